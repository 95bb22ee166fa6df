"""Prompt tuning: how a prompt starts, its configuration, its files."""

from __future__ import annotations

import functools
from collections.abc import Callable

import peft
import pytest
import torch
from prompt_cases import TASKS, config_in, gradients, inputs_of, prompted_pair
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from pyfused import PeftModel, PromptTuningConfig, get_peft_model


@pytest.fixture
def pair(build_task) -> Callable[..., tuple[nn.Module, nn.Module]]:
    return functools.partial(prompted_pair, build_task)


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
@pytest.mark.parametrize("name", ["llama", "t5", "bert_cls"])
def test_start_from_a_text(build_task, tokenizer_folder, text, dtype, name):
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": tokenizer_folder,
        "num_virtual_tokens": 5,
        "task_type": TASKS[name],
    }
    base = build_task(name).to(dtype)
    theirs = peft.get_peft_model(build_task(name).to(dtype), peft.PromptTuningConfig(**options))
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
        ({"token_dim": 30}, "token_dim must be the width of the model's input embeddings, 32, got 30"),
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
