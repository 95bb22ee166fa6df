"""Prompt tuning in transformers' models: the meaning of HF PEFT, and what HF PEFT gets wrong put right."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from prompt_cases import (
    STATES,
    TASKS,
    N,
    build_case,
    check_another_turn,
    equal_models,
    gradients,
    heads,
    inputs_of,
    loss_of,
    prompted,
    prompted_pair,
)
from torch import Tensor, nn

import pyfused
from pyfused import LoraConfig, PromptTuningConfig, get_peft_model


@pytest.fixture
def pair(build_task) -> Callable[..., tuple[nn.Module, nn.Module]]:
    return functools.partial(prompted_pair, build_task)


# The same numbers as HF PEFT ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "nomask"])
def test_outputs_and_gradients(pair, name, masked):
    inputs = inputs_of(name, labels=TASKS[name] != "TOKEN_CLS")
    if not masked:
        del inputs["attention_mask"]
    theirs, ours = pair(name)
    expected, got = theirs(**inputs), ours(**inputs)
    assert set(got) == set(expected)
    for key in got:
        if isinstance(got[key], Tensor):
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0, msg=key)
    loss_of(expected).backward()
    loss_of(got).backward()
    torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert_cls"])
def test_three_steps_of_training_give_the_same_weights(pair, name):
    models = pair(name)
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            model(**inputs_of(name)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs, ours = ({key: p.detach() for key, p in heads(model).items()} for model in models)
    assert theirs
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_prompt_is_float32_next_to_any_base(build_task, dtype):
    theirs, ours = (prompted(library, build_task("llama").to(dtype), "CAUSAL_LM") for library in (peft, pyfused))
    assert ours.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    inputs = inputs_of("llama")
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_generate(pair, name, beams, use_cache):
    """HF PEFT without a cache: with transformers' cache it puts the prompt in at every step."""
    inputs = inputs_of(name, labels=False, padded=False)
    inputs.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    theirs, ours = (model.eval() for model in pair(name))
    expected = theirs.generate(**inputs, **options, use_cache=False)
    got = ours.generate(**inputs, **options, use_cache=use_cache)
    assert torch.equal(got, expected)
    assert "prepare_inputs_for_generation" not in vars(ours.get_base_model())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "nocache"])
def test_generate_gives_a_padded_row_what_it_gives_the_row_alone(build_task, name, beams, use_cache):
    ours = prompted(pyfused, build_task(name), "CAUSAL_LM").eval()
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0, "use_cache": use_cache}
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :3], ids[1, :3] = 0, 0
    together = ours.generate(input_ids=ids, attention_mask=mask, **options)
    for row, start in ((0, 0), (1, 3)):
        alone = ours.generate(input_ids=ids[row : row + 1, start:], **options)[0]
        assert torch.equal(together[row, start : start + len(alone)], alone)


@pytest.mark.parametrize("name", STATES)
def test_generate_where_layers_have_a_state(name):
    ours = prompted(pyfused, build_case(name), "CAUSAL_LM").eval()
    expected = ids = inputs_of("llama")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat((expected, ours(expected).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ours.generate(ids, max_new_tokens=5, do_sample=False), expected)


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
def test_embeddings_narrower_than_the_layers(init, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.ElectraConfig(vocab_size=64, embedding_size=12, num_labels=3, **sizes)
    base = transformers.ElectraForSequenceClassification(config).eval()
    model = prompted(pyfused, copy.deepcopy(base), "SEQ_CLS", prompt_tuning_init=init).eval()
    assert model.peft_config["default"].token_dim == 12
    model.save_pretrained(tmp_path)
    expected = model(**inputs_of("bert_cls")).logits
    for library in (peft, pyfused):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        torch.testing.assert_close(loaded(**inputs_of("bert_cls")).logits, expected)


def test_generate_in_a_static_cache(build_task):
    ours = prompted(pyfused, build_task("llama"), "CAUSAL_LM").eval()
    ids = inputs_of("llama")["input_ids"]
    expected = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    got = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(got, expected)


def test_generate_from_embeddings_and_from_a_chunked_prefill(build_task):
    ours = prompted(pyfused, build_task("llama"), "CAUSAL_LM").eval()
    ids = inputs_of("llama")["input_ids"]
    expected = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    embeds = ours.get_input_embeddings()(ids)
    got = ours.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, expected[:, ids.shape[1] :])
    got = ours.generate(input_ids=ids, max_new_tokens=6, do_sample=False, prefill_chunk_size=3)
    assert torch.equal(got, expected)


def test_generate_goes_on_from_a_cache_of_its_own(build_task):
    check_another_turn(prompted(pyfused, build_task("llama"), "CAUSAL_LM").eval(), inputs_of("llama")["input_ids"])


def test_a_step_of_ones_own_goes_on_from_the_cache(build_task):
    ours = prompted(pyfused, build_task("llama"), "CAUSAL_LM").eval()
    inputs = inputs_of("llama", labels=False, padded=False)
    ids = inputs["input_ids"]
    whole = ours(**inputs).logits
    first = ours(input_ids=ids[:, :4], use_cache=True)
    rest = ours(input_ids=ids[:, 4:], attention_mask=inputs["attention_mask"], cache=first.cache).logits
    torch.testing.assert_close(torch.cat((first.logits, rest), dim=1), whole)


# What is done to the arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tokens", "bert_tokens", "gpt2_tokens"])
def test_labels_of_tokens_are_extended(build_task, name):
    """HF PEFT leaves them as they are, and fails."""
    ours = prompted(pyfused, build_task(name), "TOKEN_CLS")
    inputs = inputs_of(name)
    output = ours(**inputs)
    labels, logits = inputs["labels"], output.logits[:, N:]
    expected = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_token_types_are_extended_by_zeros_or_dropped(pair):
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]).expand(2, -1)
    for name in ("bert_cls", "bert_tokens", "bert_qa"):
        theirs, ours = pair(name)
        inputs = inputs_of(name, labels=False)
        if name != "bert_qa":  # where HF PEFT drops them without a word
            assert torch.equal(ours(**inputs, token_type_ids=types)[0], theirs(**inputs, token_type_ids=types)[0])
        assert not torch.equal(ours(**inputs, token_type_ids=types)[0], ours(**inputs)[0])
    theirs, ours = pair("bert")
    with pytest.warns(UserWarning, match="token_type_ids is not supported"):
        got = ours(**inputs_of("bert"), token_type_ids=types)[0]
    assert torch.equal(got, theirs(**inputs_of("bert"))[0])


def test_position_ids_are_dropped_with_a_warning(pair):
    theirs, ours = pair("llama")
    inputs = inputs_of("llama")
    with pytest.warns(UserWarning, match="position_ids is not supported"):
        got = ours(**inputs, position_ids=torch.arange(7)[None])
    assert torch.equal(got.logits, theirs(**inputs).logits)


def test_positional_arguments_and_embeddings(pair):
    theirs, ours = pair("llama")
    inputs = inputs_of("llama", labels=False)
    expected = theirs(**inputs).logits
    assert torch.equal(ours(inputs["input_ids"], inputs["attention_mask"]).logits, expected)
    embeds = ours.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(ours(inputs_embeds=embeds, **inputs).logits, expected)
    with pytest.raises(ValueError, match="exactly one of them must be given"):
        ours(attention_mask=inputs["attention_mask"])
    with pytest.raises(
        ValueError, match=r"attention_mask must be a tensor \[batch, length\], got shape \[2, 1, 7, 7\]"
    ):
        ours(inputs_embeds=embeds, attention_mask=torch.ones(2, 1, 7, 7))


def test_trained_input_embeddings_are_the_ones_in_front_of_which_the_prompt_goes(build_task):
    ours = prompted(pyfused, build_task("llama"), "CAUSAL_LM", modules_to_save=["embed_tokens"])
    ours(**inputs_of("llama")).loss.backward()
    assert ours.get_input_embeddings().modules_to_save["default"].weight.grad.abs().sum() > 0


# Several adapters -----------------------------------------------------------------------------------------------------


def test_several_prompts_switched_disabled_and_deleted(pair, build_task, tmp_path):
    _, ours = pair("llama")
    inputs = inputs_of("llama")
    ours.add_adapter("longer", PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    assert ours.active_adapters == ["default"]
    first = ours(**inputs).logits
    ours.set_adapter("longer")
    assert ours(**inputs).logits.shape[1] == first.shape[1] + 2
    assert [p.requires_grad for p in ours.prompt_encoder.parameters()] == [False, True]
    ours.save_pretrained(tmp_path)
    ours.set_adapter("default")
    assert torch.equal(ours(**inputs).logits, first)
    base = build_task("llama")
    with ours.disable_adapter():
        assert torch.equal(ours(**inputs).logits, base(**inputs).logits)
        with ours.disable_adapter():
            pass
        assert torch.equal(ours(**inputs).logits, base(**inputs).logits)
        ids = inputs["input_ids"]
        assert torch.equal(ours.generate(ids, max_new_tokens=3), base.generate(ids, max_new_tokens=3))
    assert torch.equal(ours(**inputs).logits, first)
    with pytest.raises(ValueError, match=r"only one of .* can be active, each has virtual tokens"):
        ours.set_adapter(["default", "longer"])
    with pytest.warns(UserWarning, match="Setting active adapter to longer"):
        ours.delete_adapter("default")
    assert ours.active_adapters == ["longer"] and list(ours.prompt_encoder) == ["longer"]
    ours.load_adapter(tmp_path, "again")
    ours.set_adapter("again")
    assert torch.equal(ours(**inputs).logits, first)


def test_merging_is_an_attribute_error_as_in_hf_peft(pair):
    for model in pair("llama"):
        for method in ("merge_adapter", "merge_and_unload"):
            with pytest.raises(AttributeError):
                getattr(model, method)()
    base = model.unload()
    assert type(base).__name__ == "LlamaForCausalLM" and base(**inputs_of("llama")).logits.shape[1] == 7


def test_heads_of_a_task(pair):
    theirs, ours = pair("bert_cls")
    for model in (theirs, ours):
        assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.modules_to_save == {"classifier", "score"}
    ours.add_adapter("second", PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    ours.set_adapter("second")
    ours(**inputs_of("bert_cls")).loss.backward()
    copies = ours.get_base_model().classifier.modules_to_save
    assert copies["second"].weight.grad is not None and copies["default"].weight.grad is None


@pytest.mark.parametrize("first", ["prompt", "lora"])
def test_with_lora_on_the_same_model(build_task, first):
    configs = {
        "prompt": PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=N),
        "lora": LoraConfig(task_type="SEQ_CLS", target_modules=["query"], r=2, init_lora_weights=False),
    }
    second = next(name for name in configs if name != first)
    inputs = inputs_of("bert_cls")
    alone = {}
    for name, config in configs.items():
        base = build_task("bert_cls")
        torch.manual_seed(3)
        alone[name] = get_peft_model(base, config, name)
    base = build_task("bert_cls")
    torch.manual_seed(3)
    both = get_peft_model(base, configs[first], first)
    torch.manual_seed(3)
    both.add_adapter(second, configs[second])
    for name in (first, second, first):
        both.set_adapter(name)
        assert torch.equal(both(**inputs).logits, alone[name](**inputs).logits)
        expected = {key for key, p in alone[name].named_parameters() if p.requires_grad}
        assert {key for key, p in both.named_parameters() if p.requires_grad} == expected
    both.base_model.set_requires_grad(["prompt", "lora"])
    assert both.prompt_encoder["prompt"].embedding.weight.requires_grad
    with pytest.raises(ValueError, match=r"only one of .* can be active, each has its own"):
        both.set_adapter(["prompt", "lora"])


def test_adapter_names_and_virtual_tokens(build_task):
    both = prompted(pyfused, build_task("llama"), "CAUSAL_LM")
    both.add_adapter("lora", LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    ids = inputs_of("llama")["input_ids"]
    n = both.peft_config["default"].num_virtual_tokens
    for active in ("default", "lora"):
        both.set_adapter(active)
        assert both(ids, adapter_names=["default", "lora"]).logits.shape[1] == n + ids.shape[1]
        assert both(ids, adapter_names=["lora", "__base__"]).logits.shape[1] == ids.shape[1]


def test_together_with_lora_at_the_same_time(build_task):
    both = prompted(pyfused, build_task("llama"), "CAUSAL_LM")
    both.add_adapter("lora", LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    both.set_adapter(["default", "lora"])
    both(**inputs_of("llama")).loss.backward()
    assert all(p.grad is not None for p in both.parameters() if p.requires_grad)
    with pytest.raises(AttributeError, match=r"adapter 'default' \(PROMPT_TUNING\) has no base weights to go into"):
        both.merge_adapter()
    both.merge_adapter(["lora"])


# What else goes through a model ---------------------------------------------------------------------------------------


def test_copies_pickles_and_state_dict(pair, tmp_path):
    import copy
    import pickle

    _, ours = pair("llama")
    inputs = inputs_of("llama")
    expected = ours(**inputs).logits
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(**inputs).logits, expected)
    assert "base_model.prompt_encoder.default.embedding.weight" in ours.state_dict()
    equal_models(ours, copy.deepcopy(ours))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(pair, reentrant):
    _, ours = pair("llama")
    inputs = inputs_of("llama")
    ours(**inputs).loss.backward()
    expected = gradients(ours)
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ours.train()
    ours(**inputs).loss.backward()
    torch.testing.assert_close(gradients(ours), expected)


def test_compiles_in_one_graph(pair):
    _, ours = pair("llama")
    inputs = inputs_of("llama")
    expected = ours(**inputs)
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(got.loss, expected.loss)


def test_autocast(pair):
    theirs, ours = pair("llama")
    inputs = inputs_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
