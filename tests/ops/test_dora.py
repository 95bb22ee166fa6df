"""``ops.dora_norm`` against its reference, and what it holds in memory on the way."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, readable_id
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyfused.ops import dora, dora_norm, row_squares
from pyfused.reference.dora import dora_norm as reference


def make(n=7, k=11, r=3, dtype=torch.float64, adapter=None) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    adapter = dtype if adapter is None else adapter
    sizes = ((n, k, dtype), (r, k, adapter), (n, r, adapter))
    return tuple(torch.randn(*size, generator=generator, dtype=torch.float64).to(kind) for *size, kind in sizes)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize(("n", "k", "r"), [(7, 11, 3), (1, 1, 1), (129, 1134, 6), (0, 5, 2), (3, 129, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=readable_id)
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32 adapter", "same"])
def test_values(n, k, r, dtype, adapter):
    weight, a, b = make(n, k, r, dtype, adapter)
    got = dora_norm(weight, a, b, 0.7)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got, reference(weight, a, b, 0.7), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(dora_norm(weight, a, b, 0.7, row_squares(weight)), got, rtol=0, atol=0)


def test_a_scale_in_a_tensor_and_no_gradient():
    weight, a, b = (tensor.requires_grad_() for tensor in make())
    got = dora_norm(weight, a, b, torch.tensor([0.7], dtype=torch.float64))
    assert not got.requires_grad
    torch.testing.assert_close(got, reference(weight, a, b, 0.7))


def test_layouts_and_autocast():
    weight, a, b = make(dtype=torch.float32)
    expected = dora_norm(weight, a, b, 0.7)
    strided = [tensor.t().contiguous().t() for tensor in (weight, a, b)]
    torch.testing.assert_close(dora_norm(*strided, 0.7), expected)
    repeated = weight[:1].expand(7, -1)
    torch.testing.assert_close(dora_norm(repeated, a, b, 0.7), dora_norm(repeated.contiguous(), a, b, 0.7))


def test_rows_of_zeros_have_norm_one():
    weight, a, b = make()
    weight[2], b[2] = 0.0, 0.0
    norm = dora_norm(weight, a, b, 0.7)
    assert norm[2] == 1.0
    torch.testing.assert_close(norm, reference(weight, a, b, 0.7))


def test_a_row_that_the_adapter_takes_away():
    """Its square is rounded to a number below 0; the norm is no NaN."""
    weight, a, b = make(dtype=torch.float32)
    with torch.no_grad():
        weight.copy_(-0.7 * b @ a)
    norm = dora_norm(weight, a, b, 0.7)
    assert torch.isfinite(norm).all() and (norm > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_no_tensor_of_the_weights_size(dtype, monkeypatch):
    monkeypatch.setattr(dora, "_CHUNK", 64)
    weight, a, b = make(96, 32, 3, dtype)
    with Largest() as largest:
        dora_norm(weight, a, b, 0.7)
    assert 0 < largest.elements <= max(96 * 3, 3 * 32) < weight.numel()


def test_compiles_in_one_graph():
    weight, a, b = make(dtype=torch.float32)
    compiled = torch.compile(dora_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, a, b, 0.7), dora_norm(weight, a, b, 0.7))
