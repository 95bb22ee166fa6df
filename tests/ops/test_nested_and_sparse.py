"""x that has no strides: jagged tensors, as batches of sequences without padding are, and what linear layers take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nested import nested_tensor, nested_tensor_from_jagged

import pyfused
from pyfused import ops

K, N, R = 16, 12, 4
LENGTHS = (3, 5, 2)


def _offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _parameters() -> dict[str, Tensor]:
    shapes = {"a": (R, K), "b": (N, R), "vector": (R,), "up": (K, R), "l": (N,), "l_in": (K,), "table": (R, 20)}
    return {name: _random(*shape).requires_grad_() for name, shape in shapes.items()}


_WEIGHT, _BIAS, _SEED = _random(N, K), _random(N), torch.tensor([5])
_IDS = torch.arange(sum(LENGTHS)) % 7

# of x [..., K] and y [..., N]
_CALLS = {
    "lora_linear": lambda x, y, p: ops.lora_linear(x, _WEIGHT, _BIAS, p["a"], p["b"], 0.7),
    "a seed": lambda x, y, p: ops.lora_linear(x, _WEIGHT, None, p["a"], p["b"], 0.7, 0.4, True, _SEED),
    "a vector": lambda x, y, p: ops.lora_linear(x, _WEIGHT, _BIAS, p["a"], p["b"], p["vector"]),
    "lora_delta": lambda x, y, p: ops.lora_delta(y, x, p["a"], p["b"], 0.7, 0.4, True, _SEED),
    "dropout": lambda x, y, p: ops.dropout(x, 0.4, True, _SEED),
    "ia3 output": lambda x, y, p: ops.ia3_linear(x, _WEIGHT, _BIAS, p["l"], "output"),
    "ia3 input": lambda x, y, p: ops.ia3_linear(x, _WEIGHT, _BIAS, p["l_in"], "input"),
    "ia3_scale": lambda x, y, p: ops.ia3_scale(x, p["l_in"]),
    "bottleneck": lambda x, y, p: ops.bottleneck(x, x, p["a"], None, p["up"], None, "gelu", 0.7, 0.4, True, _SEED),
    "no residual": lambda x, y, p: ops.bottleneck(x, None, p["a"], None, p["up"], None),
    "a residual": lambda x, y, p: ops.bottleneck(x, x * 2, p["a"], None, p["up"], None),
}


def _results(call, x: Tensor, y: Tensor) -> list[Tensor]:
    parameters = _parameters()
    out = call(x, y, parameters)
    values = out.values() if out.is_nested else out
    used = [parameter for parameter in parameters.values() if parameter.requires_grad]
    return [values, *torch.autograd.grad(values.square().sum(), [*used, x, y], allow_unused=True)]


def _assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one.values() if one.is_nested else one, other)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", _CALLS)
def test_jagged_is_as_its_values(name, compiled):
    x, y = (_random(sum(LENGTHS), size).requires_grad_() for size in (K, N))
    jagged = [nested_tensor_from_jagged(t.detach(), _offsets(*LENGTHS)).requires_grad_() for t in (x, y)]
    jagged[1] = nested_tensor_from_jagged(y.detach(), jagged[0].offsets()).requires_grad_()
    torch.compiler.reset()
    call = torch.compile(_CALLS[name], backend="aot_eager", fullgraph=True) if compiled else _CALLS[name]
    _assert_same(_results(call, *jagged), _results(_CALLS[name], x, y))


def test_jagged_of_more_dimensions():
    """Heads before the ragged dimension, as attention has them."""
    x = nested_tensor_from_jagged(_random(sum(LENGTHS), 2, K), _offsets(*LENGTHS)).transpose(1, 2)
    p = _parameters()
    y = _CALLS["lora_linear"](x, None, p)
    assert y.shape == (*x.shape[:-1], N)
    assert torch.equal(y.transpose(1, 2).values(), _CALLS["lora_linear"](x.values().transpose(0, 1), None, p))
    assert torch.equal((x.transpose(1, 2) @ _WEIGHT.t() + y.transpose(1, 2)).offsets(), x.offsets())  # the same rows


def test_jagged_with_holes():
    x = nested_tensor_from_jagged(_random(9, K), torch.tensor([0, 3, 9]), torch.tensor([2, 4]))
    p = _parameters()
    for got, part in zip(_CALLS["lora_linear"](x, None, p).unbind(), x.unbind(), strict=True):
        torch.testing.assert_close(got, _CALLS["lora_linear"](part, None, p))


def test_jagged_tokens():
    p = _parameters()
    ids = nested_tensor_from_jagged(_IDS, _offsets(*LENGTHS))
    y = nested_tensor_from_jagged(_random(sum(LENGTHS), N), ids.offsets())
    got = ops.lora_embedding(y, ids, p["table"], p["b"], 0.7)
    expected = ops.lora_embedding(y.values(), _IDS, p["table"], p["b"], 0.7)
    assert torch.equal(got.values(), expected)
    for one, other in zip(
        *(torch.autograd.grad(t.square().sum(), [p["table"], p["b"]]) for t in (got.values(), expected)), strict=True
    ):
        assert torch.equal(one, other)


def test_other_rows():
    x, y = (
        nested_tensor_from_jagged(_random(10, size), _offsets(*lengths)) for size, lengths in ((K, (3, 7)), (N, (4, 6)))
    )
    with pytest.raises(ValueError, match="lora_delta: y must have shape"):
        ops.lora_delta(y, x, *(_parameters()[name] for name in "ab"), 0.7)


_LAYERS = {
    "lora": lambda: pyfused.nn.LoraLinear(nn.Linear(K, N), R, init_lora_weights=False),
    "lora_bias": lambda: pyfused.nn.LoraLinear(nn.Linear(K, N), R, init_lora_weights=False, lora_bias=True),
    "dora": lambda: pyfused.nn.LoraLinear(nn.Linear(K, N), R, init_lora_weights=False, use_dora=True),
    "adalora": lambda: pyfused.nn.AdaLoraLinear(nn.Linear(K, N), R, init_lora_weights=False),
    "ia3": lambda: pyfused.nn.IA3Linear(nn.Linear(K, N), init_ia3_weights=False),
}


@pytest.mark.parametrize("layout", ["jagged", "coo", "csr"])
@pytest.mark.parametrize("name", _LAYERS)
def test_layers(name, layout):
    """A linear layer takes all of these, and so did it before an adapter was put around it."""
    torch.manual_seed(0)
    layer = _LAYERS[name]()
    if name == "lora":
        layer.add_adapter("second", R, init_lora_weights=False)
        layer.set_adapter(["default", "second"])
    dense = _random(sum(LENGTHS), K) * (_random(sum(LENGTHS), K, seed=1) > 0)
    makes = {
        "jagged": lambda x: nested_tensor_from_jagged(x, _offsets(*LENGTHS)),
        "coo": Tensor.to_sparse,
        "csr": Tensor.to_sparse_csr,
    }
    grads = []
    for x in (dense, makes[layout](dense)):
        y = layer(x)
        y = y.values() if y.is_nested else y
        grads.append([y, *torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_nested_with_strides():
    x = nested_tensor([_random(n, K) for n in LENGTHS])
    layer = _LAYERS["lora"]()
    got = layer(x).unbind()
    assert all(torch.allclose(one, layer(part), atol=1e-5) for one, part in zip(got, x.unbind(), strict=True))


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_of_what_is_sparse(use_dora):
    layer = pyfused.nn.LoraLinear(nn.Linear(K, N), R, lora_dropout=0.1, use_dora=use_dora).train()
    x = _random(5, K).to_sparse()
    with pytest.raises(TypeError, match="dropout needs a strided or jagged x, got a sparse or nested one"):
        layer(x)
    torch.testing.assert_close(layer.eval()(x), F.linear(x, layer.weight, layer.bias))
