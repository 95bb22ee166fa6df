"""``IA3Linear`` and ``IA3Layer`` as modules: which op runs, bases that have to be called, several adapters, copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from lora_layers import NOT_PLAIN, Widening
from torch import Tensor, nn

from pyfused import ops
from pyfused.nn import IA3Layer, IA3Linear, ia3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    class Recording:
        def __getattr__(self, name: str):
            names.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(ia3, "ops", Recording())
    return names


def make(base: nn.Module | None = None, is_feedforward: bool = False, **options) -> IA3Layer:
    base = nn.Linear(24, 20) if base is None else base
    kind = IA3Linear if isinstance(base, nn.Linear) else IA3Layer
    return kind(base, is_feedforward, **({"init_ia3_weights": False} | options))


def expected(layer: IA3Layer, x: Tensor, *names: str) -> Tensor:
    """The formula in fp64, on a linear base."""
    scale = torch.ones((), dtype=torch.float64)
    for name in names:
        scale = scale * layer.ia3_l[name].double().flatten()
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    if layer.is_feedforward:
        return F.linear(x.double() * scale, weight, bias)
    return F.linear(x.double(), weight, bias) * scale


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
class TestLinear:
    def test_formula_and_trainable_parameters(self, calls, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward), torch.randn(2, 5, 24)
        y = layer(x)
        torch.testing.assert_close(y.double(), expected(layer, x, "default"), rtol=1e-5, atol=1e-6)
        y.sum().backward()
        assert [name for name, parameter in layer.named_parameters() if parameter.grad is not None] == ["ia3_l.default"]
        assert calls == ["ia3_layer"]
        assert layer.ia3_l["default"].shape == ((1, 24) if is_feedforward else (20, 1))

    def test_ones_change_nothing(self, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward, init_ia3_weights=True), torch.randn(5, 24)
        torch.testing.assert_close(layer(x), layer.base_layer(x))

    @pytest.mark.parametrize("base", NOT_PLAIN)
    def test_bases_that_have_to_be_called(self, calls, base, is_feedforward):
        layer, x = make(NOT_PLAIN[base](), is_feedforward), torch.randn(5, 24)
        torch.testing.assert_close(layer(x).double(), expected(layer, x, "default"), rtol=1e-5, atol=1e-6)
        assert calls == ["ia3_scale"]

    def test_a_base_that_widens(self, is_feedforward):
        layer = make(Widening(24, 20), is_feedforward)
        x = torch.randn(5, 24, dtype=torch.bfloat16)
        assert layer(x).dtype == torch.float32
        torch.testing.assert_close(layer(x).double(), expected(layer, x, "default"), rtol=2e-2, atol=2e-2)

    def test_several_adapters(self, calls, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward), torch.randn(5, 24)
        layer.add_adapter("second", init_ia3_weights=False)
        assert layer.adapter_names == ["default", "second"]
        assert not layer.ia3_l["second"].requires_grad
        layer.set_adapter(["second", "default"])
        torch.testing.assert_close(layer(x).double(), expected(layer, x, "default", "second"), rtol=1e-5, atol=1e-5)
        layer(x).sum().backward()
        assert all(vector.grad is not None for vector in layer.ia3_l.values())
        layer.enable_adapters(False)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.enable_adapters(True)
        layer.delete_adapter("second")
        torch.testing.assert_close(layer(x).double(), expected(layer, x, "default"), rtol=1e-5, atol=1e-6)
        assert calls == ["ia3_layer"] * 3

    def test_merging(self, calls, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward), torch.randn(5, 24)
        layer.add_adapter("second", init_ia3_weights=False)
        before, bias = layer.weight.clone(), layer.bias.clone()
        layer.merge(adapter_names=["default", "second"])
        y = layer(x)
        assert calls == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.unmerge()
        torch.testing.assert_close(y.double(), expected(layer, x, "default", "second"), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.weight, before, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer.bias, bias, rtol=1e-6, atol=0)

    def test_merging_what_is_not_finite(self, is_feedforward):
        layer = make(is_feedforward=is_feedforward)
        with torch.no_grad():
            layer.ia3_l["default"].view(-1)[3] = float("inf")
        before = layer.weight.clone()
        with pytest.raises(ValueError, match="NaNs detected in the merged weights: adapter 'default' is not finite"):
            layer.merge(safe_merge=True)
        assert torch.equal(layer.weight, before) and not layer.merged

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
    def test_dtypes(self, dtype, autocast_adapter_dtype, is_feedforward):
        base = nn.Linear(24, 20).to(dtype)
        layer = make(base, is_feedforward, autocast_adapter_dtype=autocast_adapter_dtype)
        vector = layer.ia3_l["default"]
        assert vector.dtype == (torch.float32 if autocast_adapter_dtype else dtype)
        assert torch.equal(vector.to(dtype).to(vector.dtype), vector), "initial values are rounded to the base's dtype"
        assert layer(torch.randn(5, 24, dtype=dtype)).dtype == dtype
        with pytest.raises(RuntimeError, match="dtype"):
            layer(torch.randn(5, 24))

    def test_autocast(self, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward), torch.randn(5, 24)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), expected(layer, x, "default"), rtol=3e-2, atol=3e-2)

    def test_copies_and_pickles(self, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward), torch.randn(5, 24)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert torch.equal(other(x), layer(x))

    def test_compiles(self, is_feedforward):
        layer, x = make(is_feedforward=is_feedforward), torch.randn(5, 24)
        layer.add_adapter("second", init_ia3_weights=False)
        layer.set_adapter(["default", "second"])
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        compiled(x).sum().backward()


@pytest.mark.parametrize("is_feedforward", [False, True], ids=["output", "input"])
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
@pytest.mark.parametrize(
    ("base", "shape"),
    [(lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 6)), (lambda: nn.Conv3d(4, 6, 2), (4, 3, 4, 5))],
    ids=["conv2d", "conv3d"],
)
def test_convolutions(base, shape, batched, is_feedforward):
    layer = make(base(), is_feedforward)
    x = torch.randn(2, *shape) if batched else torch.randn(shape)
    vector = layer.ia3_l["default"] if batched else layer.ia3_l["default"][0]
    plain = layer.base_layer(x * vector) if is_feedforward else layer.base_layer(x) * vector
    torch.testing.assert_close(layer(x), plain)
    layer.merge()
    torch.testing.assert_close(layer(x), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda: IA3Linear(nn.Conv2d(1, 1, 1)), TypeError, "linear must be an nn.Linear, got Conv2d"),
        (
            lambda: IA3Layer(nn.Embedding(3, 4)),
            TypeError,
            "Conv1D, Conv2d or Conv3d, got Embedding",
        ),
        (lambda: make(init_ia3_weights="ones"), TypeError, "init_ia3_weights must be True or False, got 'ones'"),
        (lambda: make(adapter_name="a.b"), ValueError, "adapter_name must not .* hold a dot"),
        (lambda: make(adapter_name="setdefault"), ValueError, "nn.ParameterDict uses, got 'setdefault'"),
        (lambda: make().add_adapter("default"), ValueError, "already has an adapter 'default'"),
        (lambda: make().add_adapter("b", is_feedforward=True), ValueError, "is_feedforward must be False"),
    ],
)
def test_errors(function, error, message):
    with pytest.raises(error, match=message):
        function()
