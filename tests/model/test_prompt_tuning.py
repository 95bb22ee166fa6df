"""Prompt tuning in transformers' models: the meaning of HF PEFT, and what HF PEFT gets wrong put right."""

from __future__ import annotations

import json
from collections.abc import Callable

import peft
import pytest
import torch
from prompt_cases import TASKS, N, equal_models, gradients, heads, inputs_of, loss_of
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import pyfused
from pyfused import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model


def prompted(library, base: nn.Module, task: str, **options) -> nn.Module:
    torch.manual_seed(3)
    return library.get_peft_model(base, library.PromptTuningConfig(task_type=task, num_virtual_tokens=N, **options))


@pytest.fixture
def pair(build_task) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """The same model twice: wrapped by HF PEFT, and by pyfused."""
    return lambda name, **options: tuple(
        prompted(library, build_task(name), TASKS[name], **options) for library in (peft, pyfused)
    )


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


# Initialisation and configuration -------------------------------------------------------------------------------------


@pytest.fixture
def tokenizer_folder(tmp_path) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[UNK]", "is", "it", "good", "or", "bad"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"prompt_tuning_init": "SAMPLE_VOCAB"}], ids=["random", "sampled"])
def test_random_starts_are_those_of_hf_peft(pair, name, options):
    theirs, ours = (model.prompt_encoder["default"].embedding.weight for model in pair(name, **options))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("text", ["it is good", "is it good or bad or good"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_start_from_a_text(build_task, tokenizer_folder, text, dtype):
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": tokenizer_folder,
        "num_virtual_tokens": 5,
        "task_type": "CAUSAL_LM",
    }
    base = build_task("llama").to(dtype)
    theirs = peft.get_peft_model(build_task("llama").to(dtype), peft.PromptTuningConfig(**options))
    options["tokenizer_kwargs"] = {"trust_remote_code": True}
    ours = get_peft_model(base, PromptTuningConfig(**options))
    got = ours.prompt_encoder["default"].embedding.weight
    assert torch.equal(got, theirs.prompt_encoder["default"].embedding.weight)
    assert torch.equal(got[0], base.get_input_embeddings().weight[2 if text.startswith("it") else 1].float())


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, TypeError, "num_virtual_tokens must be an integer, got None"),
        ({"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens must be at least 1, got 0"),
        ({"num_virtual_tokens": True}, TypeError, "num_virtual_tokens must be an integer, got True"),
        ({"num_virtual_tokens": 2, "token_dim": -1}, ValueError, "token_dim must be at least 1"),
        ({"num_virtual_tokens": 2, "num_transformer_submodules": 3}, ValueError, "must be 1 or 2, got 3"),
        ({"num_virtual_tokens": 2, "prompt_tuning_init": "ZERO"}, ValueError, "prompt_tuning_init must be one of TEXT"),
        ({"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}, ValueError, "tokenizer_name_or_path must be given"),
        (
            {"num_virtual_tokens": 2, "prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "there"},
            ValueError,
            "prompt_tuning_init_text must be given",
        ),
        ({"num_virtual_tokens": 2, "tokenizer_kwargs": {"a": 1}}, ValueError, "tokenizer_kwargs are for"),
        ({"num_virtual_tokens": 2, "modules_to_save": "lm_head"}, TypeError, "modules_to_save must be a list"),
        ({"num_virtual_tokens": 2, "peft_type": "LORA"}, ValueError, "peft_type must be 'PROMPT_TUNING'"),
    ],
)
def test_configurations_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        PromptTuningConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"task_type": None}, "task_type: PROMPT_TUNING must be told what the model is for"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules must be 1 for task_type=CAUSAL_LM, got 2"),
        (
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "a",
                "tokenizer_name_or_path": "/nowhere/at/all",
            },
            "tokenizer_name_or_path: no tokenizer at '/nowhere/at/all'",
        ),
    ],
)
def test_refused_adapters_change_nothing(build_task, unchanged, options, message):
    base = build_task("llama")
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2} | options
    with unchanged(base), pytest.raises(ValueError, match=message):
        get_peft_model(base, PromptTuningConfig(**options))
    with unchanged(base), pytest.raises(ValueError, match=r"model has no get_input_embeddings\(\)|Please specify"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


# Files ----------------------------------------------------------------------------------------------------------------


def config_in(folder) -> dict:
    values = json.loads((folder / "adapter_config.json").read_text())
    return {key: set(value) if isinstance(value, list) else value for key, value in values.items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert_cls", "bert_tokens", "bert_qa", "bert"])
def test_files_both_ways(pair, build_task, tmp_path, name):
    theirs, ours = pair(name)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    expected, got = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], expected[key]) for key in got)
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")

    inputs = inputs_of(name, labels=False)
    with torch.no_grad():
        logits = theirs.eval()(**inputs)[0]
        loaded = PeftModel.from_pretrained(build_task(name), tmp_path / "theirs")
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        assert torch.equal(loaded(**inputs)[0], logits)
        back = peft.PeftModel.from_pretrained(build_task(name), str(tmp_path / "ours"))
        assert torch.equal(back(**inputs)[0], logits)


def test_training_goes_on_from_a_file(pair, build_task, tmp_path):
    _, ours = pair("llama")
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build_task("llama"), tmp_path, is_trainable=True)
    loaded(**inputs_of("llama")).loss.backward()
    assert gradients(loaded)


def test_a_model_on_the_meta_device_cannot_be_loaded_into(pair, build_task, tmp_path):
    _, ours = pair("llama")
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="the model is on the meta device"):
        PeftModel.from_pretrained(build_task("llama").to("meta"), tmp_path)


def test_files_that_do_not_fit(pair, build_task, tmp_path, unchanged):
    from safetensors.torch import save_file

    _, ours = pair("llama")
    ours.save_pretrained(tmp_path)
    base = build_task("llama")
    for tensors, message in (
        ({"prompt_embeddings": torch.zeros(4, 32)}, r"prompt_embeddings must have shape \[3, 32\]"),
        ({}, "adapter keys are missing: prompt_embeddings"),
        ({"prompt_embeddings": torch.zeros(3, 32), "base_model.x": torch.zeros(1)}, "no place for"),
    ):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with unchanged(base), pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path)


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
