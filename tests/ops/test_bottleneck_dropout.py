"""Dropout inside bottleneck: the kernels' mask bit by bit against the reference's, and what NaN does."""

from __future__ import annotations

import pytest
import torch
from bottleneck_cases import evaluate, make_case
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
