"""The wrapper around a module that is trained in full."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from pyfused.nn import ModulesToSaveWrapper


@pytest.fixture
def wrapper() -> ModulesToSaveWrapper:
    """Copies for "a" and "b" that give 1 and 2 more than the original."""
    wrapper = ModulesToSaveWrapper(nn.Linear(3, 2))
    for offset, name in enumerate("ab", 1):
        wrapper.add_adapter(name)
        wrapper.modules_to_save[name].bias.data += offset
    return wrapper


def offset(wrapper: ModulesToSaveWrapper) -> float:
    x = torch.ones(3)
    return round((wrapper(x) - wrapper.original_module(x)).mean().item(), 3)


def trainable(wrapper: ModulesToSaveWrapper) -> set[str]:
    return {name for name, parameter in wrapper.named_parameters() if parameter.requires_grad}


def test_the_active_copy_is_called_and_trained(wrapper):
    assert (offset(wrapper), trainable(wrapper)) == (0, set())
    for name, expected in (("a", 1), ("b", 2)):
        wrapper.set_adapter(name)
        assert offset(wrapper) == expected and wrapper.active_adapter == name
        assert trainable(wrapper) == {f"modules_to_save.{name}.{key}" for key in ("weight", "bias")}
        assert wrapper.weight is wrapper.modules_to_save[name].weight
    wrapper.enable_adapters(False)
    assert offset(wrapper) == 0 and wrapper.weight is wrapper.original_module.weight
    wrapper.enable_adapters(True)
    wrapper.set_adapter("b", inference_mode=True)
    assert (offset(wrapper), trainable(wrapper)) == (2, set())
    wrapper.set_requires_grad(["a", "c"], True)
    assert trainable(wrapper) == {"modules_to_save.a.weight", "modules_to_save.a.bias"}
    for name in ("c", None):
        wrapper.set_adapter(name)
        assert (offset(wrapper), trainable(wrapper)) == (0, set())


def test_deleting(wrapper):
    wrapper.set_adapter("a")
    wrapper.delete_adapter("a")
    wrapper.delete_adapter("a")
    assert offset(wrapper) == 0 and list(wrapper.modules_to_save) == ["b"]


def test_state_dict_and_copies(wrapper):
    wrapper.set_adapter("b")
    parts = ("original_module", "modules_to_save.a", "modules_to_save.b")
    assert list(wrapper.state_dict()) == [f"{part}.{key}" for part in parts for key in ("weight", "bias")]
    for other in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert offset(other) == 2 and other.in_features == 3


def test_attributes_that_are_not_there(wrapper):
    with pytest.raises(AttributeError, match="nothing"):
        wrapper.nothing  # noqa: B018
    with pytest.raises(ValueError, match=r"got 'a\.b'"):
        wrapper.add_adapter("a.b")
