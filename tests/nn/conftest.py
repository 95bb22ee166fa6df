"""Fixtures of the modules' tests."""

from __future__ import annotations

import pytest
import torch
from lora_layers import make

from pyfused import ops
from pyfused.nn import LoraLinear, lora


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that modules call, in order."""
    names: list[str] = []

    class Recording:
        def __getattr__(self, name: str):
            names.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(lora, "ops", Recording())
    return names


@pytest.fixture
def group_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the groups of layers that are computed at once, in order."""
    sizes: list[int] = []
    original = ops.lora_linear_shared

    def spy(x, projections):
        sizes.append(len(projections))
        return original(x, projections)

    monkeypatch.setattr(ops, "lora_linear_shared", spy)
    return sizes


@pytest.fixture
def two() -> LoraLinear:
    layer = make()
    layer.add_adapter("second", r=3, lora_alpha=7, init_lora_weights=False)
    return layer
