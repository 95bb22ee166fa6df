"""Virtual tokens by sample: prompts and prefixes of several lengths beside LoRA in one batch, each as it is alone."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import run_in_threads
from prompt_cases import check_another_turn
from torch import Tensor, nn
from transformers import DynamicCache

import pyfused
from pyfused.methods.prompt_learning import cache_name

CONFIGS = {
    "lora": lambda: pyfused.LoraConfig(r=4, lora_alpha=13, target_modules=["q_proj", "c_attn"]),
    "prompt": lambda: pyfused.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "long prompt": lambda: pyfused.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix": lambda: pyfused.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "projected": lambda: pyfused.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8
    ),
}
NAMES = ["prompt", "prefix", "lora", "__base__", "long prompt", "projected", "prompt", "__base__"]
LENGTHS = {"prompt": 3, "long prompt": 5}


def make(build, name: str, adapters: list[str] | None = None) -> nn.Module:
    first, *others = CONFIGS if adapters is None else adapters
    torch.manual_seed(3)
    model = pyfused.get_peft_model(build(name), CONFIGS[first](), first)
    for other in others:
        model.add_adapter(other, CONFIGS[other]())
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key or "prompt_encoder" in key:
                parameter.add_(torch.randn(parameter.shape) / 5)
    return model.eval()


@pytest.fixture
def inputs(batch) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (len(NAMES), 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0  # on the left, as for generate
    return {"input_ids": ids, "attention_mask": mask}


def alone(model: nn.Module, inputs: dict, name: str, call=None) -> Tensor:
    call = call or (lambda model, inputs: model(**inputs).logits[:, -inputs["input_ids"].shape[1] :])
    if name == "__base__":
        with model.disable_adapter():
            return call(model, inputs)
    model.set_adapter(name)
    return call(model, inputs)


def assert_each_is_alone(model: nn.Module, inputs: dict, mixed: Tensor, seen: Tensor, **options) -> None:
    for name in set(NAMES):
        expected = alone(model, inputs, name, **options)
        for row, other in enumerate(NAMES):
            if other == name:
                torch.testing.assert_close(mixed[row][seen[row]], expected[row][seen[row]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_forward(build, inputs, name, masked):
    adapters = [key for key in CONFIGS if name != "gpt_neox" or key != "lora"]
    model = make(build, name, adapters)
    names = [key if key in adapters else "__base__" for key in NAMES]
    seen = inputs["attention_mask"].bool() if masked else torch.ones(len(NAMES), 7, dtype=torch.bool)
    inputs = inputs if masked else {"input_ids": inputs["input_ids"]}
    mixed = model(**inputs, adapter_names=names).logits
    assert mixed.shape[1] == 5 + 7  # the prompts' region is in the output, as it is alone
    mixed = mixed[:, -7:]
    base = alone(model, inputs, "__base__")
    for key in set(names):
        expected = alone(model, inputs, key)
        for row, other in enumerate(names):
            if other == key:
                torch.testing.assert_close(mixed[row][seen[row]], expected[row][seen[row]], rtol=1e-4, atol=1e-5)
                assert key == "__base__" or not torch.allclose(expected[row][seen[row]], base[row][seen[row]])


@torch.no_grad()
def test_embeddings_positions_and_labels(build, inputs):
    model = make(build, "llama")
    ids = inputs.pop("input_ids")
    embeds = model.get_base_model().get_input_embeddings()(ids)
    with_ids = model(input_ids=ids, **inputs, adapter_names=NAMES, labels=ids)
    assert torch.equal(model(inputs_embeds=embeds, **inputs, adapter_names=NAMES).logits, with_ids.logits)
    assert with_ids.loss.isfinite()
    positions = torch.arange(7).expand(len(NAMES), -1)
    given = model(input_ids=ids, **inputs, position_ids=positions, adapter_names=NAMES).logits
    assert torch.equal(given, with_ids.logits)
    shifted = model(input_ids=ids, **inputs, position_ids=positions + 3, adapter_names=NAMES).logits[:, -7:]
    model.set_adapter("prefix")
    expected = model(input_ids=ids, **inputs, position_ids=positions + 3).logits
    torch.testing.assert_close(shifted[1, 2:], expected[1, 2:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="exactly one of them must be given"):
        model(input_ids=ids, inputs_embeds=embeds, adapter_names=NAMES)
    with pytest.raises(ValueError, match=r"attention_mask must be a tensor \[batch, length\], got shape \[8\]"):
        model(input_ids=ids, attention_mask=torch.ones(8), adapter_names=NAMES)
    with pytest.raises(ValueError, match="one name for each of the 8 samples, got 2"):
        model(input_ids=ids, adapter_names=["prompt", "prefix"])


@pytest.mark.parametrize("masked", [True, False])
@torch.no_grad()
def test_a_cache_goes_on(build, inputs, masked):
    model = make(build, "llama")
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"] if masked else torch.ones_like(ids)
    whole = model(input_ids=ids, attention_mask=mask, adapter_names=NAMES).logits
    cache = {cache_name(model.get_base_model().forward): DynamicCache()}
    model(input_ids=ids[:, :5], attention_mask=mask[:, :5], **cache, adapter_names=NAMES)
    rest = {"attention_mask": mask} if masked else {}
    logits = model(input_ids=ids[:, 5:], **rest, **cache, adapter_names=NAMES).logits
    torch.testing.assert_close(logits, whole[:, -2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "beams", "no cache", "static cache"],
)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", ""])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_generate(build, inputs, name, padded, options):
    model = make(build, name)
    if not padded:  # transformers leaves out a mask of ones, and does not know of rows with fewer virtual tokens
        inputs = {"input_ids": inputs["input_ids"]}
    options = {"max_new_tokens": 5, "pad_token_id": 0} | options
    method = model.get_base_model().prepare_inputs_for_generation
    mixed = model.generate(**inputs, adapter_names=NAMES, **options)
    assert model.get_base_model().prepare_inputs_for_generation == method
    assert_each_is_alone(
        model,
        inputs,
        mixed,
        torch.ones_like(mixed, dtype=torch.bool),
        call=lambda model, inputs: model.generate(**inputs, **options),
    )


@pytest.mark.parametrize("names", [["prompt", "long prompt", "__base__"], ["prefix", "projected", "lora"]])
@torch.no_grad()
def test_sliding_windows(build_task, inputs, names):
    """What no adapter of a row fills is in front of what the row has, so that its window is full of the latter."""
    model = make(build_task, "mistral")
    ids, options = inputs["input_ids"][:3], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    logits = model(ids, adapter_names=names).logits[:, -7:]
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        tokens = model.generate(ids, adapter_names=names, **options, **cache)
        for row, name in enumerate(names):
            one = {"input_ids": ids[row : row + 1]}
            expected = alone(model, one, name)
            torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-5)
            assert torch.equal(tokens[row], alone(model, one, name, lambda m, x: m.generate(**x, **options))[0])


def test_prompts_between_a_prefix_and_its_window_are_refused(build_task, inputs):
    model = make(build_task, "mistral")
    with pytest.raises(NotImplementedError, match="sliding window of 6 tokens; call the model for each"):
        model(**inputs, adapter_names=NAMES)
    with pytest.raises(NotImplementedError, match="sliding window of 6 tokens"):
        model.generate(**inputs, adapter_names=NAMES, max_new_tokens=3)


def test_training_together_is_training_apart(build, inputs):
    model = make(build, "llama").double().train()
    trained = sorted(set(NAMES) - {"__base__"})
    model.set_requires_grad(trained)
    seen = inputs["attention_mask"].bool()
    logits = model(**inputs, adapter_names=NAMES).logits[:, -7:]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=logits.dtype)
    weights[~seen] = 0.0
    (logits * weights).sum().backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for name in trained:
        model.zero_grad()
        model.set_adapter(name)
        chosen = [row for row, other in enumerate(NAMES) if other == name]
        logits = model(**{key: value[chosen] for key, value in inputs.items()}).logits[:, -7:]
        (logits * weights[chosen]).sum().backward()
        apart = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert apart and all(f".{name}" in key for key in apart)
        for key, grad in apart.items():
            torch.testing.assert_close(together[key], grad, msg=key)


def test_threads_generate_with_names_of_their_own(build, inputs):
    model = make(build, "llama")
    options = {"max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    model.set_adapter("lora")
    cases = [NAMES, NAMES[::-1], ["__base__", "lora"] * 4, None]
    expected = [model.generate(**inputs, adapter_names=names, **options) for names in cases]
    wrong = []

    def call(names, result):
        for _ in range(5):
            if not torch.equal(model.generate(**inputs, adapter_names=names, **options), result):
                wrong.append(names)

    run_in_threads(call, zip(cases, expected, strict=True))
    assert not wrong


@torch.no_grad()
def test_an_active_prompt_is_not_for_all(build, inputs):
    model = make(build, "llama")
    names = ["lora", "__base__"] * 4
    expected = model(**inputs, adapter_names=names).logits
    model.set_adapter("prompt")
    assert torch.equal(model(**inputs, adapter_names=names).logits, expected)
    with model.disable_adapter():
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, model(**inputs).logits)
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs, adapter_names=NAMES).logits, model(**inputs, adapter_names=NAMES).logits)


def test_other_tasks_are_refused(build, batch):
    config = pyfused.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    model = pyfused.get_peft_model(build("bert"), config)
    with pytest.raises(NotImplementedError, match="task_type=CAUSAL_LM; 'default' is for FEATURE_EXTRACTION"):
        model(**batch("bert"), adapter_names=["default", "__base__"])


@torch.no_grad()
def test_generate_goes_on_from_a_cache_of_its_own(build, inputs):
    check_another_turn(make(build, "llama"), inputs["input_ids"], NAMES, rtol=1e-4, atol=1e-5)
