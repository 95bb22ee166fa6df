"""bf16 on shapes around the sizes of AMX tiles (16 rows, 32 columns, panels of 32 and 64 rows, 512 and 1024 columns).

They hold on every CPU level; level AMX computes them in tiles, from 64 rows on, fp32 numbers as sums of bf16 terms.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_matches_reference, make_case, readable_id

from pyfused.ops import lora_delta, lora_linear
from pyfused.reference.dropout import keep_mask, keep_scale

ADAPTERS = [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("adapter_dtype", ADAPTERS, ids=readable_id)
@pytest.mark.parametrize(
    "shape",
    [(64, 32, 32, 1), (79, 33, 63, 2), (97, 95, 64, 7), (65, 129, 550, 16), (129, 40, 1134, 17), (90, 1100, 96, 64)],
    ids=readable_id,
)
def test_shapes_around_tiles(shape, adapter_dtype):
    case = make_case(*shape, torch.bfloat16, adapter_dtype, vector=shape[3] % 2 == 1, dropout_p=0.2)
    assert_matches_reference(lora_linear, case)


@pytest.mark.parametrize("rank", [1, 5, 6, 8, 10, 11, 21, 22, 32, 43, 64, 65])
@pytest.mark.parametrize("adapter_dtype", ADAPTERS[:2], ids=readable_id)
def test_ranks_around_tiles(rank, adapter_dtype):
    assert_matches_reference(lora_linear, make_case(70, 48, 100, rank, torch.bfloat16, adapter_dtype, dropout_p=0.1))


def test_fp32_adapters_keep_fp32_accuracy():
    """Gradients of fp32 adapters on a bf16 base are fp32 sums of exact products: no factor is rounded to bf16."""
    case = make_case(200, 300, 400, 8, torch.bfloat16, torch.float32, dropout_p=0.1)
    s, grads = raw(case)
    exact = case.to(torch.float64)
    x = exact.x * keep_mask(case.seed, 200, 400, 0.1) * keep_scale(0.1)
    u = exact.grad_y @ exact.b * 1.5
    for got, expected in ((s, x @ exact.a.t()), (grads[1], u.t() @ x), (grads[2], 1.5 * exact.grad_y.t() @ s.double())):
        assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def raw(case):
    ops = torch.ops.pyfused
    _, s = ops._lora_delta_forward(case.grad_y, case.x, case.a, case.b, None, 1.5, case.dropout_p, case.seed)
    grads = ops._lora_backward(
        case.grad_y, case.x, None, case.a, case.b, s, None, 1.5, case.dropout_p, case.seed, 1 | 2 | 4 | 16
    )
    return s, grads


@pytest.mark.parametrize("adapter_dtype", ADAPTERS[:2], ids=readable_id)
def test_non_finite_numbers_stay_in_their_place(adapter_dtype):
    """A kept NaN of x reaches its row of y and its column of grad_a, a dropped one nothing."""
    case = make_case(72, 64, 96, 4, torch.bfloat16, adapter_dtype, dropout_p=0.5)
    keep = keep_mask(case.seed, 72, 96, 0.5)
    for kept in (True, False):
        row, col = (int(index) for index in (keep == kept).nonzero()[100])
        x = case.x.clone()
        x[row, col] = float("nan")
        s, grads = raw(case.replace(x=x))
        bad_s, bad_a = ~s.isfinite(), ~grads[1].isfinite()
        assert bad_s[row].all() == kept and bad_a[:, col].all() == kept
        bad_s[row], bad_a[:, col] = False, False
        assert not bad_s.any() and not bad_a.any() and grads[0].isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 3.39e38])
def test_large_adapters(value):
    """An infinity among fp32 adapters comes out as no finite number; one that bf16 would round to infinity stays."""
    case = make_case(72, 64, 96, 4, torch.bfloat16, torch.float32)
    a = case.a.clone()
    a[1, 3] = value
    x = torch.zeros_like(case.x)
    x[:, 3] = 0.25
    s = raw(case.replace(a=a, x=x))[0][:, 1]
    if value == 3.39e38:
        torch.testing.assert_close(s, torch.full_like(s, 0.25 * value))
    else:
        assert not s.isfinite().any()


def test_strided_rows():
    case = make_case(70, 64, 96, 8, torch.bfloat16, dropout_p=0.1)
    wide_x, wide_y = case.x.new_full((70, 131), float("nan")), case.grad_y.new_full((70, 77), float("nan"))
    wide_x[:, 1:97], wide_y[:, 3:67] = case.x, case.grad_y
    strided = case.replace(x=wide_x[:, 1:97], grad_y=wide_y[:, 3:67])
    (s, grads), (other_s, other_grads) = raw(case), raw(strided)
    for got, expected in zip((other_s, *other_grads), (s, *grads), strict=True):
        assert torch.equal(got, expected)
    y = lora_delta(strided.grad_y, strided.x, case.a, case.b, 1.5)
    assert torch.equal(y, lora_delta(case.grad_y, case.x, case.a, case.b, 1.5))
