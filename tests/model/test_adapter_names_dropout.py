"""Training adapters of all methods in one batch, each with its own dropout: each is trained as it is apart.

A call with dropout draws its seed from torch's generator. Here a hook seeds that generator in front of each adapted
layer, so that an adapter's seed is the same in both runs: apart, what the layer draws in the batch for the adapters
before it is drawn and left.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pyfused
from pyfused.ops.common import draw_seed


def _lora(p: float, **options) -> pyfused.LoraConfig:
    return pyfused.LoraConfig(lora_dropout=p, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)


def _bottleneck(p: float, **options) -> pyfused.BottleneckConfig:
    options |= {"output_adapter": False, "reduction_factor": 4, "non_linearity": "gelu"}
    return pyfused.BottleneckConfig(dropout=p, **options)


# LoRA, AdaLoRA and bottlenecks have layers of their own: one around another would draw where that has left off.
CONFIGS = {
    "lora": _lora(0.3, r=4),
    "lora0": _lora(0.0, r=2),
    "lora5": _lora(0.5, r=3, lora_alpha=5),
    "a bias": _lora(0.2, r=2, lora_bias=True),
    "dora": _lora(0.4, r=2, use_dora=True),
    "adalora": pyfused.AdaLoraConfig(
        init_r=5,
        target_r=3,
        total_step=10,
        lora_dropout=0.25,
        target_modules=["v_proj", "gate_proj"],
        orth_reg_weight=0.0,
    ),
    "ia3": pyfused.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "houlsby": _bottleneck(0.3),
    "parallel": _bottleneck(0.1, is_parallel=True),
    "prefix": pyfused.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=6
    ),
}
WITHOUT_DROPOUT = ("lora0", "ia3", "prefix")
NAMES = ["lora5", "dora", "__base__", "lora", "parallel", "a bias", "ia3", "adalora", "lora5", "houlsby", "lora0"]
NAMES += ["lora", "prefix", "houlsby", "dora", "adalora", "__base__", "a bias", "parallel", "lora"]
STEPS = 3


@pytest.fixture
def model(build_trained) -> nn.Module:
    return build_trained(CONFIGS, torch.float64).train()


def seed_layers(model: nn.Module, step: Callable[[], int], alone: str | None = None) -> None:
    """From now on torch's generator is seeded in front of each layer: to where an adapter draws that is ``alone``."""

    def hook(path: str, before: list[str]) -> Callable[[nn.Module, tuple], None]:
        def seed(layer: nn.Module, args: tuple) -> None:
            torch.manual_seed(zlib.crc32(f"{path} {step()}".encode()))
            for _ in before:
                draw_seed(args[0])

        return seed

    for path, layer in model.base_model.layers.named():
        # In a layer adapters draw in the order of their names, those that are more than two factors after all others.
        order = sorted(filter(layer.has_adapter, set(NAMES)), key=lambda name: (name in ("a bias", "dora"), name))
        before = order[: order.index(alone)] if alone in order else []
        layer.register_forward_pre_hook(hook(path, [name for name in before if name not in WITHOUT_DROPOUT]))


def train(model: nn.Module, inputs: list[dict], weights: list[Tensor], alone: str | None, **options) -> list[Tensor]:
    """The logits of each step."""
    found: list[Tensor] = []
    seed_layers(model, lambda: len(found), alone)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for given, weight in zip(inputs, weights, strict=True):
        optimizer.zero_grad()
        logits = model(**given, **options).logits
        (logits * weight).mean().backward()
        found.append(logits.detach())
        optimizer.step()
    return found


def adapter(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {key: p.detach() for key, p in model.named_parameters() if f".{name}." in f"{key}."}


def test_training_together_is_training_apart(model):
    generator = torch.Generator().manual_seed(1)
    inputs, weights = [], []
    for _ in range(STEPS):
        mask = torch.ones(len(NAMES), 7, dtype=torch.int64)
        mask[::3, 5:] = 0
        inputs.append({"input_ids": torch.randint(1, 64, mask.shape, generator=generator), "attention_mask": mask})
        weights.append(torch.randn(*mask.shape, 64, generator=generator, dtype=torch.float64) * len(NAMES))
    together = copy.deepcopy(model)
    together.set_requires_grad(list(CONFIGS))
    logits = train(together, inputs, weights, None, adapter_names=NAMES)
    for name in CONFIGS:
        chosen = [row for row, other in enumerate(NAMES) if other == name]
        apart = copy.deepcopy(model)
        apart.set_adapter(name)
        own = [{key: value[chosen] for key, value in given.items()} for given in inputs]
        # the mean is over these alone
        ours = [weight[chosen] * len(chosen) / len(NAMES) for weight in weights]
        for step, (got, expected) in enumerate(zip(logits, train(apart, own, ours, name), strict=True)):
            torch.testing.assert_close(got[chosen], expected, msg=lambda text, s=step, n=name: f"{n}, step {s}: {text}")
        trained, before = adapter(together, name), adapter(model, name)
        assert trained.keys() == adapter(apart, name).keys() and trained
        for key, parameter in adapter(apart, name).items():
            torch.testing.assert_close(trained[key], parameter, msg=lambda text, key=key: f"{key}: {text}")
            assert "ranknum" in key or not torch.equal(parameter, before[key]), key
        with torch.no_grad():
            dropped = not torch.equal(apart(**own[0]).logits, apart.eval()(**own[0]).logits)
        assert dropped == (name not in WITHOUT_DROPOUT), name
