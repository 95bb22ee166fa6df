"""Dropout's mask as a forward leaves it for the backward, a bit an element, in place of the seed."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPE_PAIRS, cpu_kernels_only, leaves_mask, make_case, readable_id

from pyfused import _library
from pyfused.ops import Projection, lora_linear, lora_linear_shared
from pyfused.reference.dropout import keep_mask

RAW = torch.ops.pyfused
P = 0.3

# Loops for a few rows, in vectors and in tiles, one and several ranges of rows, columns in many blocks of the mask.
SHAPES = [(3, 40, 5, 2), (37, 50, 129, 4), (70, 64, 96, 8), (515, 96, 300, 8), (130, 64, 1134, 70)]

pytestmark = cpu_kernels_only


def words(keep: torch.Tensor) -> torch.Tensor:
    """[M, K] bool -> int32 [M, 4 ceil(K / 128)]."""
    bits = torch.nn.functional.pad(keep.long(), (0, -keep.shape[1] % 128)).reshape(keep.shape[0], -1, 32)
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def bits(mask: torch.Tensor, columns: int) -> torch.Tensor:
    return ((mask[..., None].long() >> torch.arange(32)) & 1).bool().flatten(1)[:, :columns]


def is_kept(case) -> bool:
    return leaves_mask(case.x.dtype, case.x.shape[0], case.b.shape[0], *case.a.shape[::-1])


@pytest.mark.parametrize("with_weight", [True, False], ids=["linear", "delta"])
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_backward_takes_the_mask_for_the_seed(dtypes, shape, with_weight):
    case = make_case(*shape, *dtypes, vector=True, dropout_p=P)
    rest = (case.a, case.b, case.scale, 1.5, P)
    _, s = RAW._lora_linear_forward(case.x, case.weight, case.bias, *rest, case.seed)
    mask = words(keep_mask(case.seed, *case.x.shape, P))
    weight = case.weight if with_weight else None
    for needs in (31, 1, 2):
        want, got = (
            RAW._lora_backward(case.grad_y, case.x, weight, case.a, case.b, s, *rest[2:], seed, needs)
            for seed in (case.seed, mask)
        )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_forward_leaves_the_mask_it_makes(dtypes, shape):
    case = make_case(*shape, *dtypes, dropout_p=P)
    arguments = (case.x, case.weight, case.bias, case.a, case.b, None, 1.5, P, case.seed)
    y, s, mask = RAW._lora_linear_forward_with_mask(*arguments)
    for got, want in zip((y, s), RAW._lora_linear_forward(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    columns = case.x.shape[1]
    if not is_kept(case):
        assert mask.numel() == 0
    else:
        assert mask.dtype == torch.int32 and mask.shape == (shape[0], (columns + 127) // 128 * 4)
        assert torch.equal(bits(mask, columns), keep_mask(case.seed, *case.x.shape, P))
    assert RAW._lora_linear_forward_with_mask(*arguments[:-2], 0.0, None)[2].numel() == 0


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=readable_id)
def test_the_layer_keeps_it(dtypes, monkeypatch):
    """In C++ and in Python the same gradients, twice over; in place of the seed the mask is saved."""
    case = make_case(515, 96, 300, 8, *dtypes, dropout_p=P)
    leaves = [tensor.requires_grad_() for tensor in (case.x, case.a, case.b)]
    results = []
    for _ in range(2):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, to=saved: to.append(tensor) or tensor, lambda t: t
        ):
            y = lora_linear(case.x, case.weight, case.bias, case.a, case.b, 1.5, **case.options)
        for _ in range(2):
            results.append(torch.autograd.grad(y, leaves, case.grad_y, retain_graph=True))
        native = _library.autograd is not None
        masks = [tensor for tensor in saved if tensor.dtype == torch.int32]
        assert len(masks) == (native and is_kept(case))
        assert sum(tensor.dtype == torch.int64 for tensor in saved) == 1 - len(masks)
        monkeypatch.setattr(_library, "autograd", None)
    for grads in results[1:]:
        for got, want in zip(grads, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@cpu_kernels_only
def test_nothing_is_kept_in_bf16_for_b_alone():
    case = make_case(515, 96, 300, 8, torch.bfloat16, dropout_p=P)
    case.b.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(case.x, case.weight, case.bias, case.a, case.b, 1.5, **case.options)
        lora_linear_shared(case.x, [Projection(case.weight, case.bias, case.a, case.b, 1.5, P, True, case.seed)])
    assert saved and all(tensor.dtype != torch.int32 for tensor in saved)


def shared(case):
    """Arguments of three projections of one x: with dropout, without, and without an adapter."""
    weights, biases, (a, b) = [case.weight] * 3, [case.bias, None, case.bias], ((t, t, None) for t in (case.a, case.b))
    return case.x, weights, biases, list(a), list(b), [None] * 3, [1.5] * 3, [P, 0.0, 0.0], [case.seed, None, None]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2], ids=readable_id)
def test_projections_of_one_x_leave_theirs(dtypes):
    case = make_case(130, 96, 300, 8, *dtypes, dropout_p=P)
    x, weights, biases, a, b, *rest, seeds = shared(case)
    y, s, masks = RAW._lora_linear_shared_forward_with_masks(x, weights, biases, a, b, *rest, seeds)
    for got, want in zip((y, s), RAW._lora_linear_shared_forward(x, weights, biases, a, b, *rest, seeds), strict=True):
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert [mask.numel() > 0 for mask in masks] == [is_kept(case), False, False]
    if is_kept(case):
        assert torch.equal(bits(masks[0], 300), keep_mask(case.seed, *x.shape, P))
    mask = words(keep_mask(case.seed, *x.shape, P))
    results = [
        RAW._lora_linear_shared_backward([case.grad_y] * 3, x, weights, a, b, s, *rest, each, [15, 15, 1])
        for each in (seeds, [mask, None, None])
    ]
    for got, want in zip(*([grad_x, *grads] for grad_x, grads in results), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.library.opcheck(RAW._lora_linear_shared_forward_with_masks.default, shared(case))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=readable_id)
def test_the_layers_of_one_x_keep_theirs(dtypes, monkeypatch):
    case = make_case(130, 96, 300, 8, *dtypes, dropout_p=P)
    projection = Projection(case.weight, case.bias, case.a, case.b, 1.5, P, True, case.seed)
    leaves = [tensor.requires_grad_() for tensor in (case.x, case.a, case.b)]
    results = []
    for _ in range(2):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t) or t, lambda t: t):
            ys = lora_linear_shared(case.x, [projection, projection._replace(dropout_p=0.0, seed=None)])
        results.append(torch.autograd.grad(ys, leaves, [case.grad_y] * 2))
        masks = [tensor for tensor in saved if tensor.dtype == torch.int32]
        assert len(masks) == (_library.autograd is not None and is_kept(case))
        monkeypatch.setattr(_library, "autograd", None)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.0, P])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_opcheck(dtype, p):
    case = make_case(70, 64, 96, 8, dtype, dropout_p=P)
    seed = case.seed if p > 0.0 else None
    arguments = (case.x, case.weight, case.bias, case.a, case.b, None, 1.5, p, seed)
    torch.library.opcheck(RAW._lora_linear_forward_with_mask.default, arguments)


def test_a_mask_that_does_not_fit_is_an_error():
    case = make_case(37, 50, 129, 4, torch.float32, dropout_p=P)
    rest = (case.a, case.b, None, 1.5, P)
    _, s = RAW._lora_linear_forward(case.x, case.weight, case.bias, *rest, case.seed)
    mask = words(keep_mask(case.seed, *case.x.shape, P))

    def backward(seed):
        return RAW._lora_backward(case.grad_y, case.x, case.weight, case.a, case.b, s, *rest[2:], seed, 31)

    backward(mask)
    for wrong in (mask[1:], mask[:, 1:], mask[0], mask.new_zeros(1)):
        with pytest.raises(RuntimeError, match=r"lora_backward: seed must have shape \[37, 8\]"):
            backward(wrong)
    with pytest.raises(RuntimeError, match="seed must be contiguous where it is a mask"):
        backward(mask.t().contiguous().t())
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor with one element"):
        backward(mask.to(torch.int16))
    for forward in (RAW._lora_linear_forward, RAW._lora_linear_forward_with_mask):
        with pytest.raises(RuntimeError, match="lora_linear: seed must be an int64 tensor with one element"):
            forward(case.x, case.weight, case.bias, *rest, mask)
    index = torch.zeros(37, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="multi_lora: seed must be an int64 tensor with one element"):
        RAW._multi_lora_forward([case.grad_y], case.x, [case.a], [case.b], [1.5], [P], [mask], index, None)
    with pytest.raises(TypeError, match="seed must be an int64 tensor"):
        lora_linear(case.x, case.weight, case.bias, case.a, case.b, 1.5, P, True, mask)
