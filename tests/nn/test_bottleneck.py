"""nn.Bottleneck: its parameters, initial values, options and what happens where its layers have to be called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyfused.nn import Bottleneck


def plain(module: Bottleneck, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The module's formula in plain PyTorch, in eval mode."""
    z = module.adapter_down(x)
    y = F.relu(z) @ module.adapter_up.weight.t() + module.adapter_up.bias
    y = y * module.scaling
    if module.gate is not None:
        y = y * torch.sigmoid(module.gate(x)).mean(dim=1, keepdim=True)
    if module.adapter_residual_before_ln and residual is not None:
        y = y + residual
    if module.adapter_norm_after is not None:
        y = module.adapter_norm_after(y)
    return y if module.adapter_residual_before_ln or residual is None else y + residual


@pytest.mark.parametrize("residual", ["x", "other", None])
@pytest.mark.parametrize("residual_first", [False, True], ids=["residual-last", "residual-first"])
@pytest.mark.parametrize("gating", [False, True], ids=["", "gate"])
@pytest.mark.parametrize("ln_after", [False, True], ids=["", "ln-after"])
@pytest.mark.parametrize("ln_before", [False, True], ids=["", "ln-before"])
@pytest.mark.parametrize("scaling", [2.0, "learned", "channel"])
def test_options(scaling, ln_before, ln_after, gating, residual_first, residual):
    torch.manual_seed(0)
    module = Bottleneck(
        24,
        6,
        scaling=scaling,
        ln_before=ln_before,
        ln_after=ln_after,
        use_gating=gating,
        adapter_residual_before_ln=residual_first,
    )
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 7, 24, requires_grad=True)
    r = {"x": x, "other": torch.randn(3, 7, 24), None: None}[residual]
    got, expected = module(x, r), plain(module, x, r)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *module.parameters()]
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), leaves, allow_unused=True),
        torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True),
        strict=True,
    ):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_state_dict():
    names = set(Bottleneck(24, 6, scaling="channel", ln_before=True, ln_after=True, use_gating=True).state_dict())
    assert names == {
        *(f"adapter_down.{index}.{name}" for index in (0, 1) for name in ("weight", "bias")),
        *(f"{module}.{name}" for module in ("adapter_up", "adapter_norm_after", "gate") for name in ("weight", "bias")),
        "scaling",
    }
    assert set(Bottleneck(24, 6).state_dict()) == {
        f"{module}.{name}" for module in ("adapter_down.0", "adapter_up") for name in ("weight", "bias")
    }


def test_initial_values():
    torch.manual_seed(0)
    bert, mam, houlsby = (Bottleneck(768, 64, init_weights=name) for name in ("bert", "mam_adapter", "houlsby"))
    for module in (bert, mam, houlsby):
        assert not module.adapter_down[0].bias.any() and not module.adapter_up.bias.any()
    assert abs(bert.adapter_down[0].weight.std() - 0.02) < 1e-3 and abs(bert.adapter_up.weight.std() - 0.02) < 1e-3
    assert not mam.adapter_up.weight.any()
    assert mam.adapter_down[0].weight.abs().max() <= 768**-0.5
    x = torch.randn(5, 768)
    assert torch.equal(mam(x, x), x)
    assert houlsby.adapter_up.weight.abs().max() <= 0.02 and abs(houlsby.adapter_up.weight.std() - 0.0088) < 3e-4


@pytest.mark.parametrize("how", ["hook", "subclass"])
def test_layers_that_have_to_be_called(how):
    """A hook on a layer, or a layer of another class, runs; the result stays."""
    torch.manual_seed(0)
    module = Bottleneck(24, 6, "gelu", scaling=1.5)
    x = torch.randn(4, 24)
    expected = module(x, x)
    calls = []

    class Mine(nn.Linear):
        def forward(self, z):
            calls.append(1)
            return super().forward(z)

    if how == "hook":
        module.adapter_up.register_forward_hook(lambda *_: calls.append(1))
    else:
        module.adapter_up.__class__ = Mine
    torch.testing.assert_close(module(x, x), expected)
    assert calls == [1]


def test_dropout_only_in_training():
    module = Bottleneck(24, 6, dropout=0.5)
    nn.init.ones_(module.adapter_up.bias)
    x = torch.randn(40, 24)
    module.eval()
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first) and not torch.equal(first, second)
    assert 0.4 < (first == 0).float().mean() < 0.6


def test_fp32_adapter_on_16_bit_activations():
    module = Bottleneck(24, 6, ln_before=True, ln_after=True)
    x = torch.randn(40, 24).bfloat16()
    y = module(x, x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), plain(module, x.float(), x.float()), rtol=2e-2, atol=2e-2)


def test_copies_and_compiles():
    module = copy.deepcopy(Bottleneck(24, 6, scaling="learned"))
    x = torch.randn(20, 24, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, x), module(x, x))
    assert "scaling=learned [1]" in repr(module)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be at least 1, got 0"),
        ({"bottleneck_size": 2.5}, TypeError, "bottleneck_size must be an integer, got 2.5"),
        ({"activation": "softmax"}, ValueError, "activation must be one of"),
        ({"scaling": "often"}, ValueError, "scaling must be a number, 'learned' or 'channel', got 'often'"),
        ({"scaling": None}, TypeError, "scaling must be a number"),
        ({"scaling": float("inf")}, ValueError, "scaling must be finite"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number"),
        ({"init_weights": "zeros"}, ValueError, "init_weights must be one of bert, mam_adapter, houlsby, got 'zeros'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Bottleneck(**({"hidden_size": 24, "bottleneck_size": 6} | arguments))
