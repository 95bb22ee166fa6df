"""A folder of adapters, and a model with a pool over it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pool_cases import CONFIGS, randomise, run, save, save_alone
from torch import Tensor

import pyfused
from pyfused import AdapterPool


@pytest.fixture
def writer(wrap):
    return wrap(pyfused, "llama", target_modules=["q_proj"])


@pytest.fixture
def folder(writer, tmp_path):
    """Eight adapters, of several ranks and layers."""
    options = [{}, {"r": 1}, {"target_modules": ["o_proj"]}, {"use_rslora": True, "r": 7}] * 2
    for place, each in enumerate(options):
        save(writer, tmp_path / "all", f"a{place}", place, **each)
    return tmp_path / "all"


@pytest.fixture
def model(wrap):
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    randomise(model, "default", 77)
    return model.eval()


@pytest.fixture
def pool(model, folder):
    with AdapterPool(model, folder, max_adapters=3) as pool:
        yield pool
    assert list(model.peft_config) == ["default"]


@pytest.fixture
def inputs(batch):
    return {key: value[:1] for key, value in batch("llama").items()}


@pytest.fixture
def by_hand(wrap, inputs):
    """The logits of an adapter that ``load_adapter`` put into a model of its own."""

    def make(folder: Path, name: str) -> Tensor:
        other = wrap(pyfused, "llama", target_modules=["q_proj"])
        other.load_adapter(folder / name, "hand")
        return run(other, inputs, ["hand"])

    return make


@pytest.fixture
def mixed(build, tmp_path) -> Path:
    """An adapter of every method, by the names of ``CONFIGS``."""
    for seed, (name, config) in enumerate(CONFIGS.items()):
        save_alone(build("llama"), config(), tmp_path / "mixed" / name, seed)
    return tmp_path / "mixed"
