"""Dropout inside bottleneck: the kernels' mask bit by bit against the reference's, and what NaN does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bottleneck_cases import TENSORS, assert_matches_reference, evaluate, make_case
from helpers import readable_id, seed_tensor

from pyfused.ops import bottleneck
from pyfused.reference.dropout import keep_mask, keep_scale

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x1234_5678_9ABC_DEF0]
FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def dropped_ones(rows: int, cols: int, dtype: torch.dtype, p: float, seed: torch.Tensor) -> tuple:
    """drop(1) as the forward and as the backward computes it: the result, and grad_x with identities as weights."""
    x = torch.zeros(rows, cols, dtype=dtype, requires_grad=True)
    eye = torch.eye(cols, dtype=dtype)
    y = bottleneck(x, None, eye, None, eye, torch.ones(cols, dtype=dtype), "linear", 1.0, p, True, seed)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=readable_id)
def test_mask_is_the_reference_mask(dtype, seed):
    for rows, cols, p in ((1, 1, 0.5), (3, 131, 0.5), (67, 300, 0.1), (18, 256, 0.9), (20, 1100, 0.3)):
        keep = keep_mask(seed_tensor(seed), rows, cols, p)
        expected = (keep.double() * keep_scale(p)).to(dtype)
        for got in dropped_ones(rows, cols, dtype, p, seed_tensor(seed)):
            assert torch.equal(got != 0, keep), (rows, cols, p)
            torch.testing.assert_close(got, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_rows_are_the_flattened_leading_dimensions():
    case = make_case((2, 3, 5), 40, 4, dropout_p=0.5)
    flat = case.map(lambda tensor: tensor.reshape(30, 40) if tensor.dim() == 4 else tensor)
    for name, value in evaluate(bottleneck, case).items():
        assert torch.equal(value.flatten(), evaluate(bottleneck, flat)[name].flatten()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_a_dropped_nan_is_zero(dtype):
    """NaN in the adapter's own term and in the incoming gradient: kept it shows, dropped it is gone."""
    rows, cols, seed = 40, 70, seed_tensor(3)
    keep = keep_mask(seed, rows, cols, 0.5)
    eye = torch.eye(cols, dtype=dtype)
    x = torch.zeros(rows, cols, dtype=dtype, requires_grad=True)
    bias = torch.full((cols,), float("nan"), dtype=dtype)
    y = bottleneck(x, torch.zeros_like(x), eye, None, eye, bias, "linear", 1.0, 0.5, True, seed)
    assert torch.equal(y.isnan(), keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_what_was_dropped_is_in_no_gradient(dtype):
    """NaN in the incoming gradient, only where dropout took the adapter's term, is as good as 0 there."""
    case = make_case(300, 200, 16, dtype, residual=None, dropout_p=0.25)
    keep = keep_mask(case.options["seed"], 300, 200, 0.25).to(case.grad_y.device)
    results = []
    for hidden in (float("nan"), 0.0):
        grad_y = torch.where(keep, case.grad_y, hidden)
        results.append(evaluate(bottleneck, dataclasses.replace(case, grad_y=grad_y)))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize(
    "needs", [("w_up",), ("b_up",), ("scale",), ("x",), ("w_down", "b_up"), TENSORS], ids=readable_id
)
@pytest.mark.parametrize("sizes", [(300, 200, 16), (131, 450, 9), (100, 200, 16)], ids=readable_id)
def test_some_gradients_of_many_rows(sizes, needs):
    """Sizes from which the mask goes into copies, with a last block of columns of any width, and below."""
    assert_matches_reference(bottleneck, make_case(*sizes, scale="learned", dropout_p=0.25), needs)
