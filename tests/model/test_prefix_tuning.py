"""Prefix tuning in transformers' models: the meaning of HF PEFT, and what HF PEFT gets wrong put right."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from helpers import ROWS_CHANGE_BITS
from prompt_cases import TASKS, N, build_case, config_in, gradients, heads, inputs_of, loss_of
from safetensors.torch import load_file
from torch import Tensor, nn

import pyfused
from pyfused import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

# HF PEFT 0.21.2 looks for past_key_values in the signature of models that call it cache: it wraps those, and says at
# the first call that they support no past key values.
UNSUPPORTED = ("t5_tokens", "t5_encoder")
HEADS = [name for name, task in TASKS.items() if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")]
OTHERS = [name for name in TASKS if name not in (*HEADS, *UNSUPPORTED)]
KEYS_OF_ANOTHER_WIDTH = {
    "one key": {"num_key_value_heads": 1},
    "wide": {"head_dim": 12, "num_key_value_heads": 2},
    "as many as queries": {"num_key_value_heads": 4},
}


def prefixed(library, base: nn.Module, task: str, **options) -> nn.Module:
    torch.manual_seed(3)
    return library.get_peft_model(base, library.PrefixTuningConfig(task_type=task, num_virtual_tokens=N, **options))


@pytest.fixture
def pair(build_task) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """The same model twice: wrapped by HF PEFT, and by pyfused."""
    return lambda name, **options: tuple(
        prefixed(library, build_task(name), TASKS[name], **options) for library in (peft, pyfused)
    )


def of_peft(model: nn.Module, inputs: dict[str, Tensor]) -> object:
    """What HF PEFT means by its forward, where it looks for an argument that has another name now."""
    if "labels" in inputs or "start_positions" in inputs or "decoder_input_ids" in inputs:
        rows = inputs["input_ids"].shape[0]
        inputs = dict(inputs, cache=model.get_prompt(rows))
        name = "decoder_attention_mask" if "decoder_input_ids" in inputs else "attention_mask"
        if name in inputs:
            inputs[name] = torch.cat((torch.ones(rows, N, dtype=torch.int64), inputs[name]), dim=1)
        return model.get_base_model()(**inputs)
    return model(**inputs)


# The same numbers as HF PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "nomask"])
@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 9}], ids=["", "projection"])
@pytest.mark.parametrize("name", OTHERS)
def test_outputs_and_gradients(pair, name, options, masked):
    inputs = inputs_of(name)
    if not masked:
        del inputs["attention_mask"]
    theirs, ours = pair(name, **options)
    expected, got = theirs(**inputs), ours(**inputs)
    # HF PEFT projects the prefix once for each sample
    close = bool(options) and ROWS_CHANGE_BITS
    room = 1e-6 if close else 0.0
    for key in ("loss", "logits", "last_hidden_state", "pooler_output"):
        if isinstance(expected.get(key), Tensor):
            torch.testing.assert_close(got[key], expected[key], rtol=room, atol=room, msg=key)
    loss_of(expected).backward()
    loss_of(got).backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-5, atol=1e-7 if close else 1e-8)


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_tasks(pair, build_task, name):
    if name in UNSUPPORTED:
        with pytest.raises(ValueError, match="Model does not support past key values which are required for prefix"):
            pair(name)
        return
    inputs = inputs_of(name)
    theirs, ours = pair(name)
    with pytest.raises(ValueError, match="Model does not support past key values"):
        theirs(**inputs)
    got, expected = ours(**inputs), of_peft(theirs, inputs)
    torch.testing.assert_close(got[0], expected[0], rtol=0, atol=0)
    torch.testing.assert_close(got[1], expected[1], rtol=0, atol=0)
    got.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_three_steps_of_training_give_the_same_weights(pair, name):
    models = pair(name)
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss_of(model(**inputs_of(name))).backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs, ours = ({key: p.detach() for key, p in heads(model).items()} for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", KEYS_OF_ANOTHER_WIDTH.values(), ids=KEYS_OF_ANOTHER_WIDTH)
def test_keys_of_fewer_heads_and_another_width(options):
    theirs, ours = (prefixed(library, build_case("llama", **options), "CAUSAL_LM") for library in (peft, pyfused))
    inputs = inputs_of("llama")
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    config, other = ours.peft_config["default"], theirs.peft_config["default"]
    assert (config.token_dim, config.num_attention_heads) == (other.token_dim, other.num_attention_heads)


def test_keys_wider_than_the_model_in_t5():
    """HF PEFT takes d_model for the width of the keys, and fails."""
    ours = prefixed(pyfused, build_case("t5", d_kv=12), "SEQ_2_SEQ_LM")
    assert ours.peft_config["default"].token_dim == 4 * 12
    ours(**inputs_of("t5")).loss.backward()
    assert gradients(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_prefix_is_float32_next_to_any_base(build_task, dtype):
    theirs, ours = (prefixed(library, build_task("llama").to(dtype), "CAUSAL_LM") for library in (peft, pyfused))
    inputs = inputs_of("llama")
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    losses = [model(**inputs).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-2, atol=1e-5)


# Generating -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_generate(pair, name, beams, use_cache):
    """Against transformers going on from HF PEFT's cache: HF PEFT itself gives its prefix under a name that generate
    does not have any more.
    """
    ids = inputs_of(name)["input_ids"]
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    theirs, ours = (model.eval() for model in pair(name))
    got = ours.generate(input_ids=ids, **options, use_cache=use_cache)
    mask = {} if name in ("t5", "bart") else {"attention_mask": torch.ones(2, N + 7, dtype=torch.int64)}
    with torch.no_grad():
        prefix = theirs.get_prompt(2 * beams)
    assert torch.equal(got, theirs.get_base_model().generate(input_ids=ids, **mask, cache=prefix, **options))
    assert "prepare_inputs_for_generation" not in vars(ours.get_base_model())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate_gives_what_forward_gives(pair, name):
    _, ours = pair(name)
    ids = inputs_of(name)["input_ids"]
    expected = ids
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat((expected, ours(expected).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None), expected)


def test_generate_of_an_encoder_decoder_gives_what_forward_gives(pair):
    theirs, ours = pair("t5")
    inputs = inputs_of("t5", labels=False)
    decoded = torch.zeros(2, 1, dtype=torch.int64)
    inputs.pop("decoder_input_ids")
    with torch.no_grad():
        for _ in range(5):
            logits = theirs(**inputs, decoder_input_ids=decoded).logits
            decoded = torch.cat((decoded, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    got = ours.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(got, decoded)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_generate_with_padding(pair, name, beams, side):
    theirs, ours = (model.eval() for model in pair(name))
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    padding = slice(0, 3) if side == "left" else slice(4, 7)
    mask[1, padding], ids[1, padding] = 0, 0
    together = ours.generate(input_ids=ids, attention_mask=mask, **options)
    with torch.no_grad():
        prefix = theirs.get_prompt(2 * beams)
    extended = torch.cat((torch.ones(2, N, dtype=torch.int64), mask), dim=1)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0) + N
    positions = torch.cat((torch.arange(N).expand(2, -1), positions), dim=1)
    native = theirs.get_base_model().generate(
        input_ids=ids, attention_mask=extended, position_ids=positions, cache=prefix, **options
    )
    assert torch.equal(together, native)
    if side == "left":
        alone = ours.generate(input_ids=ids[1:, 3:], **options)[0]
        assert torch.equal(together[1, 3 : 3 + len(alone)], alone)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"num_return_sequences": 2, "num_beams": 2}],
)
def test_other_ways_to_generate(pair, options):
    _, ours = pair("llama")
    ids = inputs_of("llama")["input_ids"]
    kept = {key: value for key, value in options.items() if key in ("num_return_sequences", "num_beams")}
    expected = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=False, **kept)
    got = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **options)
    assert torch.equal(got, expected)


def test_a_static_cache_of_an_encoder_decoder(pair):
    _, ours = pair("t5")
    ids = inputs_of("t5")["input_ids"]
    expected = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    got = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(got, expected)


def test_a_step_of_ones_own_goes_on_from_the_cache(pair):
    _, ours = pair("llama")
    inputs = inputs_of("llama", labels=False, padded=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = ours(**inputs).logits
    first = ours(input_ids=ids[:, :4], use_cache=True)
    rest = ours(input_ids=ids[:, 4:], attention_mask=mask, cache=first.cache).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), dim=1), whole)


# What is done to the arguments ----------------------------------------------------------------------------------------


def test_position_ids_are_shifted(pair):
    theirs, ours = pair("llama")
    inputs = inputs_of("llama")
    positions = torch.tensor([[0, 1, 2, 3, 5, 6, 7]])
    got = ours(**inputs, position_ids=positions).logits
    assert torch.equal(got, theirs(**inputs, position_ids=positions).logits)
    assert not torch.equal(got, ours(**inputs).logits)


def test_decoder_attention_mask(pair):
    theirs, ours = pair("t5")
    inputs = inputs_of("t5") | {"decoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])}
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


def test_embeddings_and_positional_arguments(pair):
    theirs, ours = pair("llama")
    inputs = inputs_of("llama", labels=False)
    expected = theirs(**inputs).logits
    assert torch.equal(ours(inputs["input_ids"], inputs["attention_mask"]).logits, expected)
    embeds = ours.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(ours(inputs_embeds=embeds, **inputs).logits, expected)
    with pytest.raises(ValueError, match="exactly one of them must be given"):
        ours(**inputs)


# Files, adapters, configuration ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}, {"init_weights": "zero"}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert", "bert_cls"])
def test_files_both_ways(pair, build_task, tmp_path, name, options):
    theirs, ours = pair(name, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected, got = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")

    inputs = inputs_of(name, labels=False)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(build_task(name), tmp_path / "theirs")
        assert torch.equal(loaded(**inputs)[0], ours.eval()(**inputs)[0])
        back = peft.PeftModel.from_pretrained(build_task(name), str(tmp_path / "ours"))
        if name != "bert_cls":
            assert torch.equal(back(**inputs)[0], ours(**inputs)[0])


def test_what_can_be_trained_on_from_a_file(pair, build_task, tmp_path, unchanged):
    _, ours = pair("llama")
    ours.save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(build_task("llama"), tmp_path / "plain", is_trainable=True)
    loaded(**inputs_of("llama")).loss.backward()
    assert gradients(loaded)
    _, ours = pair("llama", prefix_projection=True)
    ours.save_pretrained(tmp_path / "projected")
    base = build_task("llama")
    with unchanged(base), pytest.raises(ValueError, match="prefix_projection: files hold what comes out"):
        PeftModel.from_pretrained(base, tmp_path / "projected", is_trainable=True)
    with pytest.raises(ValueError, match="'default' is trained with prefix_projection"):
        ours.load_adapter(tmp_path / "projected", "default")
    ours.load_adapter(tmp_path / "projected", "second")
    expected = ours(**inputs_of("llama")).logits
    ours.set_adapter("second")
    torch.testing.assert_close(ours(**inputs_of("llama")).logits, expected)


def test_disable_switch_and_delete(pair, build_task):
    _, ours = pair("llama")
    base, inputs = build_task("llama"), inputs_of("llama")
    first = ours(**inputs).logits
    ours.add_adapter("prompt", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    ours.add_adapter("lora", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with ours.disable_adapter():
        assert torch.equal(ours(**inputs).logits, base(**inputs).logits)
    for name, length in (("prompt", 9), ("lora", 7), ("default", 7)):
        ours.set_adapter(name)
        assert ours(**inputs).logits.shape[1] == length
    assert torch.equal(ours(**inputs).logits, first)
    with pytest.raises(AttributeError, match=r"adapter 'default' \(PREFIX_TUNING\) has no base weights"):
        ours.merge_and_unload()
    with pytest.warns(UserWarning, match="Setting active adapter to lora"):
        ours.delete_adapter("default")
    plain = ours.unload()
    assert torch.equal(plain(**inputs).logits, base(**inputs).logits)


def test_gradient_checkpointing_is_refused_before_and_after(pair, build_task, unchanged):
    base = build_task("llama")
    base.gradient_checkpointing_enable()
    with unchanged(base), pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        prefixed(pyfused, base, "CAUSAL_LM")
    _, ours = pair("llama")
    ours.gradient_checkpointing_enable()
    ours.train()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        ours(**inputs_of("llama"))
    ours.eval()(**inputs_of("llama"))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"init_weights": "ones"}, ValueError, "init_weights must be None or 'zero', got 'ones'"),
        ({"prefix_projection": 1}, TypeError, "prefix_projection must be True or False, got 1"),
        ({"encoder_hidden_size": "8"}, TypeError, "encoder_hidden_size must be an integer, got '8'"),
        ({"encoder_hidden_size": 0}, ValueError, "encoder_hidden_size must be at least 1, got 0"),
        ({"num_virtual_tokens": -1}, ValueError, "num_virtual_tokens must be at least 1, got -1"),
    ],
)
def test_configurations_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        PrefixTuningConfig(**{"num_virtual_tokens": 2} | options)


def test_heads_that_do_not_divide_the_width(unchanged):
    base = build_case("gpt2")
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, token_dim=30)
    with unchanged(base), pytest.raises(ValueError, match="token_dim must be a multiple of num_attention_heads = 4"):
        get_peft_model(base, config)


def test_layers_without_keys_are_named(unchanged):
    base = build_case("mamba2")
    with unchanged(base), pytest.raises(NotImplementedError, match=r"layers \[0, 1\] of Mamba2ForCausalLM"):
        get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


def test_autocast(pair):
    theirs, ours = pair("llama")
    inputs = inputs_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
