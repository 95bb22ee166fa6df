"""Adapters of several methods in one batch: each sample against its adapter alone, and gradients."""

from __future__ import annotations

import pytest
import torch
from helpers import run_in_threads
from torch import Tensor, nn

import pyfused


def _adalora(**options) -> pyfused.AdaLoraConfig:
    return pyfused.AdaLoraConfig(total_step=10, target_modules=["v_proj"], orth_reg_weight=0.0, **options)


def _bottleneck(**options) -> pyfused.BottleneckConfig:
    options = {"non_linearity": "relu"} | options
    return pyfused.BottleneckConfig(mh_adapter=True, output_adapter=False, reduction_factor=4, **options)


# Methods share this model, each with layers of its own.
CONFIGS = {
    "lora": lambda: pyfused.LoraConfig(r=4, lora_alpha=13, target_modules=["q_proj", "up_proj"]),
    "lora3": lambda: pyfused.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]),
    "adalora": lambda: _adalora(init_r=6, target_r=4),
    "adalora2": lambda: _adalora(init_r=2, target_r=1, inference_mode=True),
    "ia3": lambda: pyfused.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "houlsby": lambda: _bottleneck(),
    "parallel": lambda: _bottleneck(is_parallel=True, scaling=3.0, non_linearity="gelu"),
    "ia3k": lambda: pyfused.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
}
NAMES = ["ia3", "lora", "__base__", "adalora", "parallel", "ia3k", "adalora2", "lora3", "houlsby", "ia3", "parallel"]


def randomise(model: nn.Module, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for key, tensor in pyfused.get_peft_model_state_dict(model, adapter_name=name).items():
        tensor.copy_(tensor + torch.randn(tensor.shape, generator=generator) / 5)
        if "lora_E" in key:
            tensor[0] = 0.0  # a rank that was pruned


def make(build, dtype: torch.dtype = torch.float32, names: list[str] | None = None, **options) -> nn.Module:
    first, *others = CONFIGS if names is None else names
    torch.manual_seed(3)
    model = pyfused.get_peft_model(build("llama", dtype), CONFIGS[first](), first, **options)
    for name in others:
        model.add_adapter(name, CONFIGS[name](), **options)
    with torch.no_grad():
        for name in (first, *others):
            randomise(model, name)
    return model.eval()


@pytest.fixture
def inputs(batch) -> dict[str, Tensor]:
    return {key: torch.cat([value] * 6)[: len(NAMES)] for key, value in batch("llama").items()}


def alone(model: nn.Module, inputs: dict, name: str) -> Tensor:
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits
    model.set_adapter(name)
    return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@torch.no_grad()
def test_each_sample_has_its_adapter(build, inputs, dtype, autocast_adapter_dtype):
    model = make(build, dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    mixed = model(**inputs, adapter_names=NAMES).logits
    base = alone(model, inputs, "__base__")
    for name in set(NAMES):
        chosen = [row for row, other in enumerate(NAMES) if other == name]
        expected = alone(model, inputs, name)[chosen]
        if name == "__base__":
            assert torch.equal(mixed[chosen], expected)
            continue
        assert not torch.allclose(expected, base[chosen])
        room = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(mixed[chosen], expected, rtol=room, atol=room, msg=name)
        # to the bit, whatever the others have
        only = [name if other == name else "__base__" for other in NAMES]
        assert torch.equal(model(**inputs, adapter_names=only).logits[chosen], mixed[chosen])


@torch.no_grad()
def test_generate(build, inputs):
    model = make(build)
    options = {"max_new_tokens": 5, "pad_token_id": 0}
    for more in ({"do_sample": False}, {"num_beams": 3}):
        mixed = model.generate(**inputs, adapter_names=NAMES, **options, **more)
        for name in ("ia3", "adalora", "lora"):
            model.set_adapter(name)
            chosen = [row for row, other in enumerate(NAMES) if other == name]
            assert torch.equal(mixed[chosen], model.generate(**inputs, **options, **more)[chosen])


def test_training_together_is_training_apart(build, inputs):
    model = make(build, torch.float64).train()
    trained = sorted(set(NAMES) - {"__base__"})
    model.set_requires_grad(trained)
    result = model(**inputs, adapter_names=NAMES).logits
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(4), dtype=result.dtype)
    (result * weights).sum().backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    for name in trained:
        model.zero_grad()
        model.set_adapter(name)
        chosen = [row for row, other in enumerate(NAMES) if other == name]
        result = model(**{key: value[chosen] for key, value in inputs.items()}).logits
        (result * weights[chosen]).sum().backward()
        apart = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        assert apart and all(f".{name}" in key for key in apart)
        for key, grad in apart.items():
            torch.testing.assert_close(together[key], grad, msg=key)


@torch.no_grad()
def test_values_that_changed_count(build, inputs):
    """AdaLoRA's factors are kept from call to call; a changed parameter makes them anew."""
    model = make(build, names=["adalora", "adalora2", "ia3"])
    names = (["adalora", "adalora2", "ia3", "__base__"] * 3)[: len(NAMES)]
    model(**inputs, adapter_names=names)
    for key, parameter in model.named_parameters():
        if "lora_E.adalora" in key or "ia3_l" in key:
            parameter.mul_(2.0)
    mixed = model(**inputs, adapter_names=names).logits
    for row, name in enumerate(names[:3]):
        torch.testing.assert_close(mixed[row], alone(model, inputs, name)[row], rtol=1e-5, atol=1e-5)
    model.set_adapter("ia3")
    model.delete_adapter("adalora")
    with pytest.raises(ValueError, match=r"no adapters \['adalora'\]"):
        model(**inputs, adapter_names=names)
    names = ["__base__" if name == "adalora" else name for name in names]
    assert torch.equal(model(**inputs, adapter_names=names).logits[1], mixed[1])


@torch.no_grad()
def test_pruned_adalora_adapters(build, inputs):
    model = make(build, names=["adalora", "adalora2"])
    for key, parameter in model.named_parameters():
        if "lora_E.adalora2" in key:
            parameter.zero_()
    mixed = model(**inputs, adapter_names=(["adalora2", "adalora"] * 6)[: len(NAMES)]).logits
    torch.testing.assert_close(mixed[::2], alone(model, inputs, "__base__")[::2])
    torch.testing.assert_close(mixed[1::2], alone(model, inputs, "adalora")[1::2], rtol=1e-5, atol=1e-5)


BERT = {
    "post-norm": lambda: pyfused.BottleneckConfig.houlsby(reduction_factor=4),
    "before": lambda: pyfused.BottleneckConfig.pfeiffer(reduction_factor=2, original_ln_after=False),
    "bert_ia3": lambda: pyfused.IA3Config(target_modules=["key", "value"], feedforward_modules=[]),
}


@torch.no_grad()
def test_bottlenecks_with_the_norm_of_a_block(build, batch):
    torch.manual_seed(3)
    model = pyfused.get_peft_model(build("bert"), BERT["post-norm"](), "post-norm")
    for name in list(BERT)[1:]:
        model.add_adapter(name, BERT[name]())
    for name in BERT:
        randomise(model, name)
    model.eval()
    inputs = {key: torch.cat([value] * 3) for key, value in batch("bert").items()}
    names = ["before", "__base__", "post-norm", "bert_ia3", "post-norm", "before"]
    mixed = model(**inputs, adapter_names=names)[0]
    for name in set(names):
        chosen = [row for row, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                assert torch.equal(mixed[chosen], model(**inputs)[0][chosen])
            continue
        model.set_adapter(name)
        torch.testing.assert_close(mixed[chosen], model(**inputs)[0][chosen], rtol=1e-5, atol=1e-5, msg=name)


@torch.no_grad()
def test_bottlenecks_in_threads(build, inputs):
    """The residual stream that one thread's call hands to a layer is not another's."""
    model = make(build, names=["parallel", "houlsby"])
    model.set_adapter("parallel")
    calls = []
    for seed in range(4):
        ids = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(seed))
        calls.append(({"input_ids": ids}, {"adapter_names": ["parallel", "houlsby", "__base__"]} if seed % 2 else {}))
    expected = [model(**given, **options).logits for given, options in calls]
    wrong = []

    def run(place: int) -> None:
        given, options = calls[place]
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(**given, **options).logits, expected[place]):
                    wrong.append(place)

    run_in_threads(run, ((place,) for place in range(len(calls))))
    assert not wrong
