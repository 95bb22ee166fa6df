"""Which bases and adapters the module computes in one op, and which it calls."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import cpu_only, native_autograd
from lora_layers import NOT_PLAIN, Widening, assert_near, expected, make
from torch import Tensor, nn

from pyfused import _library
from pyfused.nn import LoraLinear, lora


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_other_bases_are_called(calls, kind):
    layer = make(base=NOT_PLAIN[kind]()).eval()
    x = torch.randn(3, 24)
    y = layer(x)
    assert calls == ["lora_delta"]
    base = layer.base_layer(x)
    assert_near(y.as_subclass(Tensor), (base + expected(layer, x, "default") - expected(layer, x)).as_subclass(Tensor))


def test_a_hook_set_later_is_seen(calls):
    layer, x, seen = make(), torch.randn(3, 24), []
    first = layer(x)
    handle = layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    torch.testing.assert_close(layer(x), first)
    handle.remove()
    layer(x)
    assert calls == ["lora_linear", "lora_delta", "lora_linear"] and len(seen) == 1


def hook_on(part: str, register: str):
    def change(layer: LoraLinear, seen: list) -> None:
        getattr(getattr(layer, part)["default"], register)(lambda *args: seen.append(part))

    return change


def wrap_lora_a(layer: LoraLinear, seen: list) -> None:
    layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"])
    seen.append("replaced")


CHANGED_ADAPTERS = {
    "hook_on_a": hook_on("lora_A", "register_forward_hook"),
    "pre_hook_on_b": hook_on("lora_B", "register_forward_pre_hook"),
    "backward_hook_on_a": hook_on("lora_A", "register_full_backward_hook"),
    "hook_on_dropout": hook_on("lora_dropout", "register_forward_hook"),
    "replaced_a": wrap_lora_a,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CHANGED_ADAPTERS)
def test_adapters_with_hooks_are_called(calls, kind, dtype):
    layer, x, seen = make(base=nn.Linear(24, 20).to(dtype)), torch.randn(3, 24, dtype=dtype), []
    y = layer(x)
    assert calls == ["lora_linear"]
    CHANGED_ADAPTERS[kind](layer, seen)
    again = layer(x)
    assert calls == ["lora_linear"] and again.dtype == dtype
    torch.testing.assert_close(again, y)
    again.sum().backward()
    assert len(seen) == 1


def test_the_second_adapter_may_have_hooks(two, calls):
    layer, x = two, torch.randn(3, 24)
    layer.set_adapter(["default", "second"])
    first = layer(x)
    layer.lora_B["second"].register_forward_hook(lambda module, inputs, output: 2 * output)
    layer.set_adapter("second")
    delta = layer(x) - layer.base_layer(x)
    layer.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), first + delta / 2)


@cpu_only
def test_offloaded_bases():
    accelerate = pytest.importorskip("accelerate")
    layer, x = make(), torch.randn(3, 24)
    base = accelerate.cpu_offload(nn.Sequential(copy.deepcopy(layer.base_layer)), execution_device="cpu")
    assert base[0].weight.is_meta
    offloaded = LoraLinear(base[0], r=5, lora_alpha=13)
    assert not offloaded.lora_A["default"].weight.is_meta
    torch.testing.assert_close(offloaded(x), layer.base_layer(x))


def test_a_base_with_another_output_dtype(calls):
    layer, x = make(base=Widening(24, 20)), torch.randn(3, 24, dtype=torch.bfloat16)
    y = layer(x)
    assert calls == ["lora_delta"] and y.dtype == torch.float32
    assert_near(y, expected(layer, x, "default"))


def asked_in_cpp(layer: LoraLinear, x: Tensor):
    parts = (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"], layer.lora_dropout["default"])
    return _library.autograd.lora_arguments(x, *parts, layer.scaling["default"])


@native_autograd
@pytest.mark.parametrize("bias", [True, False])
def test_cpp_finds_what_python_finds(monkeypatch, bias):
    layer, x = make(base=nn.Linear(24, 20, bias=bias), lora_dropout=0.25), torch.randn(3, 24)
    found = asked_in_cpp(layer, x)
    monkeypatch.setattr(lora, "lora_arguments", lambda *_: None)
    expected = layer.fused_arguments(x)
    assert len(found) == len(expected) and all(one is other for one, other in zip(found, expected, strict=True))
    assert asked_in_cpp(layer.eval(), x)[-1] is False


@native_autograd
def test_cpp_leaves_the_rest_to_python():
    x = torch.randn(3, 24)
    layers = {kind: make(base=build()) for kind, build in NOT_PLAIN.items()}
    for kind, change in CHANGED_ADAPTERS.items():
        layers[kind] = make()
        change(layers[kind], [])
    layers["scale"] = make()
    layers["scale"].scaling["default"] = torch.tensor(2.0)
    assert [kind for kind, layer in layers.items() if asked_in_cpp(layer, x) is not None] == []
    assert asked_in_cpp(make(), x.bfloat16()) is None
    assert asked_in_cpp(make(), None) is None


def test_layers_that_stand_in_for_torchs_are_called(monkeypatch):
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    monkeypatch.setattr(nn, "Linear", Doubling)
    layer, x = LoraLinear(nn.Linear(8, 6), r=2), torch.randn(3, 8)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
