"""``ops.lora_embedding`` against its reference: values, gradients of repeated tokens, dtypes, layouts, compilation."""

from __future__ import annotations

import pytest
import torch
from embedding_cases import DTYPES, make, run
from helpers import DEVICE, readable_id
from torch import Tensor

from pyfused.ops import lora_embedding
from pyfused.reference.lora_embedding import lora_embedding as reference


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerance) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 4), (129,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(("count", "dim", "rank"), [(11, 7, 3), (1, 1, 1), (129, 33, 6)], ids=str)
def test_values_and_gradients(shape, count, dim, rank):
    case = make(shape, count, dim, rank)
    assert_same(run(lora_embedding, *case), run(reference, *case))


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("adapter", [torch.float32, None], ids=["fp32 adapter", "same"])
def test_dtypes(dtype, adapter):
    case = make(dtype=dtype, adapter=adapter)
    eps = torch.finfo(dtype).eps
    room = {} if dtype.itemsize >= 4 else {"rtol": 2 * eps, "atol": 8 * eps}
    assert_same(run(lora_embedding, *case), run(reference, *case), **room)


def test_a_wide_adapter_is_rounded_once():
    y, ids, a, b = make(dtype=torch.bfloat16, adapter=torch.float32)
    exact = reference(y.double(), ids, a.double(), b.double(), 1.3)
    got = lora_embedding(y, ids, a, b, 1.3)
    assert (got.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()


def test_gradcheck():
    y, ids, a, b = (tensor.requires_grad_() if tensor.is_floating_point() else tensor for tensor in make())
    assert torch.autograd.gradcheck(lambda y, a, b: lora_embedding(y, ids, a, b, 1.3), (y, a, b))


def test_a_token_that_comes_again_adds_to_its_column_each_time():
    y, _, a, b = make((4,))
    ids = torch.tensor([2, 2, 5, 2])
    _, _, grad_a, _ = run(lora_embedding, y, ids, a, b)
    single = [run(lora_embedding, y[:1], ids[:1], a, b)[2]]
    assert grad_a[:, [0, 1, 3, 4, 6, 7, 8, 9, 10]].eq(0).all() and grad_a[:, 2].ne(0).all()
    assert single[0][:, 5].eq(0).all()
    assert_same(run(lora_embedding, y, ids, a, b), run(reference, y, ids, a, b))


def test_padding_has_no_gradient_and_rows_are_scaled():
    y, ids, a, b = make()
    options = {"padding_idx": 10, "embed_scale": torch.tensor(3.0, dtype=torch.float64)}
    got, expected = run(lora_embedding, y, ids, a, b, **options), run(reference, y, ids, a, b, **options)
    assert_same(got, expected)
    assert got[2][:, 10].eq(0).all()


def test_frequent_tokens_by_their_frequency():
    y, _, a, b = make((4,))
    ids = torch.tensor([2, 2, 5, 2])
    plain, scaled = (run(lora_embedding, y, ids, a, b, scale_grad_by_freq=each)[2] for each in (False, True))
    torch.testing.assert_close(scaled[:, 2], plain[:, 2] / 3)
    torch.testing.assert_close(scaled[:, 5], plain[:, 5])


def test_layouts():
    y, ids, a, b = make()
    expected = run(lora_embedding, y, ids, a, b)
    strided = y.mT.contiguous().mT, ids.T.contiguous().T, a.T.contiguous().T, b.T.contiguous().T
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_same(run(lora_embedding, *strided), expected)
    repeated = y[:1, :1].expand(3, 5, -1)
    assert torch.equal(lora_embedding(repeated, ids, a, b, 1.3), lora_embedding(repeated.contiguous(), ids, a, b, 1.3))
    result = lora_embedding(y, ids, a.requires_grad_(), b, 1.3)
    torch.autograd.grad(result, a, torch.ones((), dtype=y.dtype).expand(result.shape))
    assert torch.equal(lora_embedding(y, ids.int(), a, b, 1.3), result)


def test_compiles_in_one_graph():
    case = make(dtype=torch.float32)
    compiled = torch.compile(lora_embedding, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, *case), run(lora_embedding, *case))


def test_autocast_is_not_followed():
    y, ids, a, b = make(dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = lora_embedding(y, ids, a, b, 1.3)
    assert torch.equal(got, lora_embedding(y, ids, a, b, 1.3))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": torch.ones(3, 5, 7, dtype=torch.int64)}, TypeError, "y must be a floating tensor"),
        ({"ids": torch.ones(3, 5)}, TypeError, "ids must be an int64 or int32 tensor"),
        ({"a": torch.ones(0, 11)}, ValueError, r"a must have shape \[R, V\] with R >= 1"),
        ({"b": torch.ones(7, 4)}, ValueError, r"b must have shape \[D, 3\]"),
        ({"y": torch.ones(3, 5, 6)}, ValueError, r"y must have shape \[3, 5, 7\]"),
    ],
    ids=lambda value: None if not isinstance(value, str) else value.split()[0],
)
def test_errors(changes, error, message):
    arguments = dict(zip(("y", "ids", "a", "b"), make(), strict=True)) | changes
    with pytest.raises(error, match=f"lora_embedding: {message}"):
        lora_embedding(*arguments.values(), 1.3)
