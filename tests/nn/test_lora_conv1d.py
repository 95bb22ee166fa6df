"""LoRA around transformers' Conv1D: against the linear layer of the transposed weight."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import DEVICE
from lora_layers import make
from torch import nn

from pyfused.nn import LoraConv1D, LoraLinear

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def pair(dtype: torch.dtype = torch.float32, **options) -> tuple[LoraConv1D, LoraLinear]:
    """Two layers with the same numbers: a Conv1D, and an nn.Linear whose weight is the transposed one."""
    linear = make(dtype, **options)
    conv = Conv1D(20, 24).to(dtype)
    conv.weight.data, conv.bias.data = linear.weight.detach().T.contiguous(), linear.bias.detach().clone()
    layer = LoraConv1D(conv, r=6, lora_alpha=13, **options)
    layer.load_state_dict({name: value for name, value in linear.state_dict().items() if "lora" in name}, strict=False)
    return layer, linear


def results(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(1)
    y = layer(x)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


@pytest.mark.parametrize("rows", [(), (1,), (0,), (2, 5)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_same_as_the_transposed_linear(dtype, p, rows):
    layer, linear = pair(dtype, lora_dropout=p)
    x = torch.randn(*rows, 24, dtype=dtype)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 8 * torch.finfo(dtype).eps)
    for got, expected in zip(results(layer, x), results(linear, x), strict=True):
        assert got.dtype == expected.dtype
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * largest)


def test_state_dict_and_flags():
    layer, _ = pair()
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "base_layer.weight": (24, 20),
        "base_layer.bias": (20,),
        "lora_A.default.weight": (6, 24),
        "lora_B.default.weight": (20, 6),
    }
    assert (layer.in_features, layer.out_features) == (24, 20)
    assert not layer.weight.requires_grad


def test_the_weight_is_read_where_it_is(monkeypatch):
    """No copy of the weight: the op gets a view of it."""
    from pyfused import ops

    layer, _ = pair()
    seen, op = [], ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda x, weight, *args: seen.append(weight) or op(x, weight, *args))
    layer(torch.randn(3, 24))
    assert seen[0].data_ptr() == layer.weight.data_ptr() and seen[0].shape == (20, 24)


def test_a_base_with_hooks_is_called():
    layer, linear = pair()
    called = []
    layer.base_layer.register_forward_hook(lambda *args: called.append(1))
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-5, atol=1e-5)
    assert called == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging(dtype):
    layer, linear = pair(dtype)
    before = layer.weight.clone()
    for one in (layer, linear):
        one.merge()
    assert torch.equal(layer.weight.T, linear.weight) and layer.weight.is_contiguous()
    for one in (layer, linear):
        one.unmerge()
    assert torch.equal(layer.weight.T, linear.weight)
    torch.testing.assert_close(layer.weight, before, rtol=2e-2, atol=2e-2)


def test_a_trained_weight_gets_its_gradient():
    layer, linear = pair(torch.float64)
    for one in (layer, linear):
        one.weight.requires_grad_()
    x = torch.randn(3, 24, dtype=torch.float64)
    got, expected = results(layer, x), results(linear, x)
    torch.testing.assert_close(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2].T)


def test_compile_copy_and_autocast():
    layer, _ = pair()
    x = torch.randn(5, 24)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


def test_other_layers_are_refused():
    with pytest.raises(TypeError, match="LoraConv1D: linear must be transformers' Conv1D, got Linear"):
        LoraConv1D(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"LoraLinear: linear must be an nn\.Linear, got Conv1D"):
        LoraLinear(Conv1D(3, 3))
