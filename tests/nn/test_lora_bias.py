"""A bias on lora_B: fused with the base's, on top of a base that has to be called, merged, refused."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from lora_layers import NOT_PLAIN, make
from lora_layers import expected as without_bias
from torch import nn

from pyfused.nn import LoraLinear


def expected(layer: LoraLinear, x: torch.Tensor, *names: str) -> torch.Tensor:
    return without_bias(layer, x, *names) + sum(
        layer.scaling[name] * layer.lora_B[name].bias.double() for name in names if layer.lora_B[name].bias is not None
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_forward_is_fused(calls, dtype, bias):
    layer = make(base=nn.Linear(24, 20, bias=bias, dtype=dtype), lora_bias=True)
    x = torch.randn(2, 5, 24, dtype=dtype)
    y, exact = layer(x), expected(layer, x, "default")
    assert calls == ["lora_linear"] and y.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("kind", [None, "subclass", "forward_hook"])
def test_gradients(kind):
    layer = make(base=NOT_PLAIN[kind]() if kind else None, lora_bias=True).double()
    x = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    assert len(leaves) == 4
    got = torch.autograd.grad(layer(x).square().sum(), leaves)
    exact = torch.autograd.grad(expected(layer, x, "default").square().sum(), leaves)
    for grad, value in zip(got, exact, strict=True):
        torch.testing.assert_close(grad, value)


def test_several_adapters_and_merging():
    layer, x = make(lora_bias=True), torch.randn(4, 24)
    layer.add_adapter("plain", r=2, init_lora_weights=False)
    layer.add_adapter("other", r=3, init_lora_weights=False, lora_bias=True)
    before = [layer.weight.clone(), layer.bias.clone()]
    for names in (["plain"], ["plain", "default"], ["default", "other"]):
        layer.set_adapter(names)
        y = layer(x)
        torch.testing.assert_close(y.double(), expected(layer, x, *names), rtol=1e-5, atol=1e-5)
        for safe_merge in (False, True):
            layer.merge(safe_merge=safe_merge)
            torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-5)
            layer.unmerge()
            torch.testing.assert_close([layer.weight, layer.bias], before)
    layer.delete_adapter("default")
    layer.delete_adapter("other")
    assert layer._merged_names == ("weight",)


def test_a_base_without_bias_cannot_be_merged():
    layer = make(base=nn.Linear(24, 20, bias=False), lora_bias=True)
    layer.add_adapter("plain", r=2, init_lora_weights=False)
    weight = layer.weight.clone()
    for safe_merge in (False, True):
        with pytest.raises(RuntimeError, match="impossible to merge adapter 'default', which has lora_bias=True"):
            layer.merge(safe_merge=safe_merge)
    assert torch.equal(layer.weight, weight) and not layer.merged
    layer.merge(adapter_names=["plain"])
    assert layer.merged_adapters == ["plain"]


def test_initial_bias():
    assert not make(lora_bias=True, init_lora_weights=True).lora_B["default"].bias.any()
    assert make(lora_bias=True).lora_B["default"].bias.any()


def test_autocast_and_compile():
    layer, x = make(lora_bias=True), torch.randn(4, 24)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
