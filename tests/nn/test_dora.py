"""DoRA: the factored norm, what is remembered of it, the layer against the dense formula, merging."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_layers import NOT_PLAIN, make
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyfused import ops
from pyfused.nn import LoraLinear, dora

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def factor(layer: LoraLinear, name: str = "default") -> torch.Tensor:
    a, b = layer.matrices(name)
    adapted = layer.weight.double() + layer.scaling[name] * (b.double() @ a.double())
    return layer.lora_magnitude_vector[name].weight / adapted.norm(dim=1).detach()


def expected(layer: LoraLinear, x: torch.Tensor, name: str = "default") -> torch.Tensor:
    """The formula on dense weights, in fp64."""
    a, b = layer.matrices(name)
    adapted = layer.weight.double() + layer.scaling[name] * (b.double() @ a.double())
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x.double(), factor(layer, name).double()[:, None] * adapted, bias)


def changed(layer: LoraLinear) -> LoraLinear:
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.3)
        layer.lora_B["default"].weight.mul_(0.7)
    return layer


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    r=st.integers(1, 9),
    scale=st.floats(-4.0, 4.0),
    dtype=st.sampled_from([FP32, BF16, FP16, FP64]),
    transposed=st.booleans(),
    seed=st.integers(0, 100),
)
def test_factored_norm(n, k, r, scale, dtype, transposed, seed):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = torch.randn(*((k, n) if transposed else (n, k)), generator=generator).to(dtype)
    weight = weight.t() if transposed else weight
    a, b = torch.randn(r, k, generator=generator).to(dtype), torch.randn(n, r, generator=generator).to(dtype)
    exact = (weight.double() + scale * (b.double() @ a.double())).norm(dim=1)
    norm = ops.dora_norm(weight, a, b, scale)
    assert norm.dtype == (FP64 if dtype == FP64 else FP32)
    room = (1e-12 if dtype == FP64 else 1e-4) * (
        weight.double().norm(dim=1) + abs(scale) * (b.double() @ a.double()).norm(dim=1)
    )
    assert ((norm.double() - exact).abs() <= room + 1e-12).all()
    torch.testing.assert_close(norm, ops.dora_norm(weight, a, b, scale, ops.row_squares(weight)))


def test_parts_of_a_large_weight(monkeypatch):
    from pyfused.ops import dora as op

    weight, a, b = torch.randn(33, 40), torch.randn(4, 40), torch.randn(33, 4)
    whole = ops.dora_norm(weight, a, b, 0.5)
    monkeypatch.setattr(op, "_CHUNK", 100)
    torch.testing.assert_close(ops.dora_norm(weight, a, b, 0.5), whole)


def test_a_row_of_zeros_is_no_nan():
    linear = nn.Linear(6, 5)
    linear.weight.data[2] = 0.0
    layer = LoraLinear(linear, r=2, use_dora=True)
    y = layer(torch.randn(3, 6))
    y.sum().backward()
    assert y.isfinite().all() and layer.lora_magnitude_vector["default"].weight.grad.isfinite().all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16, FP64], ids=str)
def test_forward(dtype, bias):
    layer = changed(make(base=nn.Linear(24, 20, bias=bias, dtype=dtype), use_dora=True))
    x = torch.randn(2, 5, 24, dtype=dtype)
    y, exact = layer(x), expected(layer, x)
    assert y.dtype == dtype
    tolerance = {FP64: 1e-12, FP32: 1e-5}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gradients(train):
    layer = changed(make(FP64, use_dora=True)).train(train)
    x = torch.randn(3, 24, dtype=FP64, requires_grad=True)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    assert len(leaves) == 4 and layer.weight.grad is None
    got = torch.autograd.grad(layer(x).square().sum(), leaves)
    for grad, exact in zip(got, torch.autograd.grad(expected(layer, x).square().sum(), leaves), strict=True):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("position", ["first", "second"])
@pytest.mark.parametrize("dropout", ["plain", "hooked"])
def test_dropout_is_on_the_whole_product(position, dropout):
    """HF PEFT's formula: base(x) + (g - 1) drop(x) W^T + g s drop(x) A^T B^T."""
    layer = changed(make(FP64, use_dora=True, lora_dropout=0.4)).train()
    x = torch.randn(50, 24, dtype=FP64)
    if position == "second":
        layer.base_layer.register_forward_hook(lambda *args: None)  # it has to be called
    if dropout == "hooked":
        layer.lora_dropout["default"].register_forward_hook(lambda *args: None)  # so does this
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = ops.dropout(x, 0.4) if dropout == "plain" else F.dropout(x, 0.4)
    g, (a, b) = factor(layer), layer.matrices("default")
    delta = layer.scaling["default"] * F.linear(F.linear(dropped, a), b)
    exact = layer.base_layer(x) + (g - 1) * F.linear(dropped, layer.weight) + g * delta
    torch.testing.assert_close(y, exact)
    torch.testing.assert_close(layer.eval()(x), expected(layer, x))


@pytest.mark.parametrize("kind", ["forward_hook", "own_forward"])
def test_a_base_that_has_to_be_called(kind):
    layer = changed(make(base=NOT_PLAIN[kind](), use_dora=True))
    x = torch.randn(4, 24)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["parametrized", "weight_subclass"])
def test_a_weight_that_has_no_norm_here(kind):
    base = NOT_PLAIN[kind]()
    with pytest.raises(NotImplementedError, match="use_dora: the base weight must be a plain"):
        LoraLinear(base, use_dora=True)


def test_an_adapter_whose_modules_have_to_be_called():
    layer, x = changed(make(use_dora=True)), torch.randn(4, 24)
    y, called = layer(x), []
    layer.lora_A["default"].register_forward_hook(lambda *args: called.append(1))
    torch.testing.assert_close(layer(x), y)
    assert called


# What is remembered ---------------------------------------------------------------------------------------------------


@pytest.fixture
def norms(monkeypatch) -> list[str]:
    """The names of the norms and squares that are computed."""
    names: list[str] = []

    class Recording:
        def __getattr__(self, name: str):
            if name in ("dora_norm", "row_squares"):
                names.append(name)
            return getattr(ops, name)

    monkeypatch.setattr(dora, "ops", Recording())
    return names


CHANGES = {
    "a": lambda layer: layer.lora_A["default"].weight.mul_(2),
    "b": lambda layer: layer.lora_B["default"].weight.add_(1),
    "weight": lambda layer: layer.weight.mul_(2),
    "another weight": lambda layer: setattr(layer.base_layer, "weight", nn.Parameter(layer.weight * 2)),
    "data": lambda layer: setattr(layer.weight, "data", layer.weight.data * 2),
    "scaling": lambda layer: layer.scaling.update(default=3.0),
    "state dict": lambda layer: layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}),
    "merge": lambda layer: (layer.merge(), layer.unmerge()),
    "behind the back, then eval": lambda layer: (layer.weight.data.mul_(2), layer.eval()),
    "dtype and back": lambda layer: (layer.double(), layer.weight.data.mul_(2), layer.float()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_never_stale(change, train):
    layer, x = make(use_dora=True).train(train), torch.randn(4, 24)
    for _ in range(2):
        layer(x)
    with torch.no_grad():
        change(layer)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_a_scaling_that_is_a_tensor(train):
    """As prepare_model_for_compiled_hotswap makes it; its value changes in place."""
    layer, x = make(use_dora=True).train(train), torch.randn(4, 24)
    layer.scaling["default"] = torch.tensor(2.0)
    for value in (0.5, 3.0):
        layer.scaling["default"].fill_(value)
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)
    layer.merge()
    layer.unmerge()
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_an_optimizers_step_is_seen():
    layer, x = make(use_dora=True).train(), torch.randn(4, 24)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        y = layer(x)
        torch.testing.assert_close(y.double(), expected(layer, x), rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        y.sum().backward()
        optimizer.step()


@pytest.mark.parametrize("how", ["called", "replaced"])
def test_new_factors_where_the_old_ones_were_in_memory(how):
    layer, x = make(use_dora=True).eval().requires_grad_(False), torch.randn(4, 24)
    b = layer.lora_B["default"]
    if how == "called":  # its factors are made anew for each call
        b.register_forward_hook(lambda *_: None)
    for _ in range(5):
        if how == "called":
            b.weight.mul_(1.1)
        else:
            values = (b.weight * 1.1).tolist()
            b.weight = None
            b.weight = nn.Parameter(torch.tensor(values), requires_grad=False)
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_computed_once_in_evaluation(norms):
    layer, x = make(use_dora=True).eval(), torch.randn(4, 24)
    for _ in range(3):
        layer(x)
    assert norms == ["dora_norm"]
    layer.train()
    norms.clear()
    for _ in range(3):
        layer(x)
    assert norms == ["row_squares"] + ["dora_norm"] * 3


def test_copies_and_pickles():
    layer, x = changed(make(use_dora=True)).eval(), torch.randn(4, 24)
    y = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(x), y)
        with torch.no_grad():
            other.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(other(x).double(), expected(other, x), rtol=1e-5, atol=1e-5)
    assert "_known" not in layer.state_dict()


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_gradients_after_inference_mode(train, norms):
    layer, x = make(use_dora=True).train(train), torch.randn(4, 24)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    norms.clear()
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert norms == (["dora_norm"] * 2 if train else [])
    assert layer.lora_magnitude_vector["default"].weight.grad is not None


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_autocast_does_not_round_the_norm(train):
    layer, x = changed(make(use_dora=True)).train(train), torch.randn(4, 24)
    exact = layer.dora_factor("default")
    layer.train(train)
    with torch.autocast("cpu", BF16):
        layer(x)
        assert torch.equal(layer.dora_factor("default"), exact)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


def test_traced():
    layer, x = make(use_dora=True).eval(), torch.randn(4, 24)
    with torch.no_grad():
        layer(x)
        traced = torch.jit.trace(layer, x)  # compares the graphs of two calls
        layer.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(traced(x), layer(x))


def test_inference_mode():
    with torch.inference_mode():
        layer, x = make(use_dora=True).eval(), torch.randn(4, 24)
        layer(x)
        layer.lora_B["default"].weight.mul_(2)
        torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


# Adapters and merging -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_merging_two_of_which_one_is_dora(dtype):
    layer = changed(make(dtype, use_dora=True)).eval()
    layer.add_adapter("plain", r=3, lora_alpha=7, init_lora_weights=False)
    x, before = torch.randn(4, 24, dtype=dtype), layer.weight.detach().clone()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.05, "atol": 0.05}
    for names in (["default", "plain"], ["plain", "default"]):
        layer.set_adapter(names)
        y = layer(x)
        layer.merge()
        torch.testing.assert_close(layer(x), y, **tolerance)
        layer.unmerge()
        torch.testing.assert_close(layer.weight, before, **tolerance)
        layer.merge(adapter_names=names[:1])
        with pytest.warns(UserWarning, match="additionally merging"):
            layer.merge(adapter_names=names[1:], safe_merge=True)  # one after the other: the same
        torch.testing.assert_close(layer(x), y, **tolerance)
        layer.unmerge()


def test_state_dict():
    layer = make(use_dora=True)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "base_layer.weight": (20, 24),
        "base_layer.bias": (20,),
        "lora_A.default.weight": (6, 24),
        "lora_B.default.weight": (20, 6),
        "lora_magnitude_vector.default.weight": (20,),
    }
    assert list(layer.adapter_tensors("default")) == ["lora_A.weight", "lora_B.weight", "lora_magnitude_vector"]
    layer.delete_adapter("default")
    assert list(layer.state_dict()) == ["base_layer.weight", "base_layer.bias"]


def test_starts_as_the_base():
    layer = LoraLinear(nn.Linear(24, 20), r=4, use_dora=True)
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_compile_without_graph_breaks(p, train):
    layer, x = make(use_dora=True, lora_dropout=p).train(train), torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        torch.manual_seed(1)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_compile_with_gradient_checkpointing_and_unknown_sizes(p):
    torch.compiler.reset()
    layers, x = nn.ModuleList(make(use_dora=True, lora_dropout=p) for _ in range(2)).train(), torch.randn(5, 24)

    def both(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(layers[0], x, use_reentrant=False) + checkpoint(layers[1], x, use_reentrant=False)

    results = []
    for call in (both, torch.compile(both, dynamic=True, backend="aot_eager")):
        torch.manual_seed(1)
        y = call(x)
        trained = [parameter for parameter in layers.parameters() if parameter.requires_grad]
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)


def test_autocast():
    layer, x = changed(make(use_dora=True)), torch.randn(5, 24)
    exact = expected(layer, x)
    for base_is_called in (False, True):
        if base_is_called:
            layer.base_layer.register_forward_hook(lambda *args: None)
        for p in (0.0, 0.3):
            layer.lora_dropout["default"].p = p
            with torch.autocast(DEVICE.type, BF16):
                y = layer(x)
            assert y.dtype == BF16
            if p == 0.0:
                torch.testing.assert_close(y.double(), exact, rtol=0.03, atol=0.03 * exact.abs().max().item())
