"""LoRA around an embedding: against the dense formula, every option of the embedding, merging, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from torch import nn

from pyfused import ops
from pyfused.nn import LoraEmbedding

V, D, R = 11, 20, 3


def make(dtype: torch.dtype = torch.float32, options: dict | None = None, **lora) -> LoraEmbedding:
    embedding = nn.Embedding(V, D, dtype=dtype, **(options or {}))
    return LoraEmbedding(embedding, **({"r": R, "lora_alpha": 7, "init_lora_weights": False} | lora))


def ids(*shape: int) -> torch.Tensor:
    """Some tokens come several times."""
    return torch.randint(0, 5, shape)


def exact(layer: LoraEmbedding, tokens: torch.Tensor, name: str = "default") -> torch.Tensor:
    a, b = (matrix.detach().double() for matrix in layer.matrices(name))
    return F.embedding(tokens, layer.weight.double() + layer.scaling[name] * (b @ a).T)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward(dtype, shape):
    layer, tokens = make(dtype), ids(*shape)
    y, expected = layer(tokens), exact(layer, tokens)
    assert y.dtype == dtype and y.shape == (*shape, D)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, rtol=4 * eps, atol=8 * eps)


@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_gradients_with_repeated_tokens(use_dora, integers):
    layer, tokens = make(torch.float64, use_dora=use_dora), torch.tensor([[3, 3, 1], [3, 0, 1]], dtype=integers)
    weights = torch.randn(2, 3, D, dtype=torch.float64)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad((layer(tokens) * weights).sum(), trained)
    a, b = layer.matrices("default")
    rows = F.one_hot(tokens.long(), V).double() @ (layer.weight + layer.scaling["default"] * (b @ a).T)
    if use_dora:
        rows = rows * (layer.lora_magnitude_vector["default"].weight / rows_norm(layer).detach())
    for got, expected in zip(grads, torch.autograd.grad((rows * weights).sum(), trained), strict=True):
        torch.testing.assert_close(got, expected)


def rows_norm(layer: LoraEmbedding) -> torch.Tensor:
    a, b = layer.matrices("default")
    return (layer.weight + layer.scaling["default"] * (b @ a).T).norm(dim=0)


def test_gradcheck():
    y, a, b = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, D), (R, V), (D, R)))
    tokens = ids(2, 3)
    leaves = [tensor.requires_grad_() for tensor in (y, a, b)]
    assert torch.autograd.gradcheck(lambda y, a, b: ops.lora_embedding(y, tokens, a, b, 1.7), leaves)


@pytest.mark.parametrize("options", [{"padding_idx": 3}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_options_of_the_embedding(options):
    layer, tokens = make(torch.float64, options), ids(4, 6)
    layer(tokens).sum().backward()
    a = layer.lora_embedding_A["default"]
    leaf = a.detach().T.clone().requires_grad_()
    rows = F.embedding(tokens, leaf, **options | {"sparse": False}) @ layer.lora_embedding_B["default"].detach().T
    (rows * layer.scaling["default"]).sum().backward()
    torch.testing.assert_close(a.grad, leaf.grad.T)
    if "padding_idx" in options:
        assert not a.grad[:, 3].any()


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, embed_scale) -> None:
        super().__init__(V, D)
        self.embed_scale = embed_scale

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens) * self.embed_scale


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("scale", [3.0, torch.tensor(3.0)], ids=["float", "tensor"])
def test_an_embedding_that_scales(scale, use_dora):
    layer, tokens = LoraEmbedding(Scaled(scale), r=R, init_lora_weights=False, use_dora=use_dora), ids(5)
    torch.testing.assert_close(layer(tokens).double(), 3.0 * exact(layer, tokens), rtol=1e-5, atol=1e-4)


def test_state_dict_and_flags():
    layer = make(use_dora=True)
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "base_layer.weight": (V, D),
        "lora_embedding_A.default": (R, V),
        "lora_embedding_B.default": (D, R),
        "lora_magnitude_vector.default.weight": (D,),
    }
    assert not layer.weight.requires_grad and layer.lora_embedding_A["default"].requires_grad
    assert set(layer.adapter_tensors("default")) == {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}


def test_starts_as_the_base():
    layer, tokens = make(init_lora_weights=True), ids(5)
    assert torch.equal(layer(tokens), layer.base_layer(tokens))
    assert layer.lora_embedding_B["default"].any()


def test_adapters_and_merging():
    layer, tokens = make(), ids(5)
    layer.add_adapter("second", r=2, init_lora_weights=False, use_dora=True)
    before = layer.weight.clone()
    layer.set_adapter(["default", "second"])
    y = layer(tokens)
    layer.merge()
    torch.testing.assert_close(layer(tokens), y, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before)
    torch.testing.assert_close(layer(tokens), y, rtol=1e-5, atol=1e-5)
    layer.delete_adapter("second")
    assert list(layer.r) == ["default"] and not layer.lora_magnitude_vector
    torch.testing.assert_close(copy.deepcopy(layer)(tokens), layer(tokens))
    layer.enable_adapters(False)
    assert torch.equal(layer(tokens), F.embedding(tokens, layer.weight))


def test_compile_and_autocast():
    for use_dora in (False, True):
        layer, tokens = make(use_dora=use_dora), ids(2, 3)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(tokens), layer(tokens))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            assert torch.equal(layer(tokens), layer(tokens.clone())) and layer(tokens).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LoraEmbedding(nn.Linear(3, 3)), TypeError, r"embedding must be an nn\.Embedding, got Linear"),
        (lambda: make(lora_bias=True, init_lora_weights=True), ValueError, "lora_bias: an embedding has no bias"),
        (lambda: make(r=0), ValueError, "r must be at least 1"),
        (lambda: ops.lora_embedding(y(3), ids(2), a(), b(), 1.0), ValueError, r"y must have shape \[2, 20\]"),
        (lambda: ops.lora_embedding(y(2), ids(2).float(), a(), b(), 1.0), TypeError, "ids must be an int64"),
        (lambda: ops.lora_embedding(y(2), ids(2), a()[0], b(), 1.0), ValueError, r"a must have shape \[R, V\]"),
        (lambda: ops.lora_embedding(y(2), ids(2), a(), b().T, 1.0), ValueError, r"b must have shape \[D, 3\]"),
        (lambda: ops.lora_embedding(y(2), ids(2), a().int(), b(), 1.0), TypeError, "a must be a floating tensor"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def y(rows: int) -> torch.Tensor:
    return torch.randn(rows, D)


def a() -> torch.Tensor:
    return torch.randn(R, V)


def b() -> torch.Tensor:
    return torch.randn(D, R)
