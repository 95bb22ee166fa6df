"""Many rows of bf16: sizes for which level AMX packs the frozen weight by panels (csrc/cpu/linear.cpp) and takes the
adapter's share, dropout's mask or IA3's scale into the same product. They hold on every level.
"""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import (
    EMULATED,
    TENSORS,
    assert_error_rule,
    assert_matches_reference,
    cpu_only,
    eager_linear,
    make_case,
    readable_id,
)
from ia3_cases import SIDES
from ia3_cases import assert_matches_reference as assert_ia3_matches
from ia3_cases import make_case as make_ia3_case
from projections import make_group, run, separately

from pyfused import _library
from pyfused.ops import ia3_linear, lora_linear, lora_linear_shared
from pyfused.reference import lora as reference

pytestmark = cpu_only

BF16 = torch.bfloat16
ops = torch.ops.pyfused
in_panels = pytest.mark.skipif(
    EMULATED or _library._C.cpu_capability() != "AMX", reason="the vendor's sums have an order of its own"
)
# Rows that end within a block of 32 and within a group of 64, one to seven blocks of columns, several groups of rows.
SHAPES = [
    (257, 96, 64, 8),
    (300, 32, 32, 5),
    (39, 64, 96, 7),
    (290, 1024, 96, 64),
    (519, 160, 1024, 1),
    (1020, 1024, 288, 3),
    (1500, 32, 768, 4),
    (70, 96, 1120, 2),
]


@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
@pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32, torch.float16], ids=readable_id)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_lora(shape, adapter_dtype, p):
    case = make_case(*shape, BF16, adapter_dtype, bias=shape[3] != 5, vector=shape[3] == 8, dropout_p=p)
    assert_matches_reference(lora_linear, case)


@pytest.mark.parametrize(
    "needs", [("x",), ("x", "a"), ("x", "b"), ("x", "scale"), ("a", "b"), ("bias", "x"), TENSORS], ids=str
)
def test_any_gradients(needs):
    case = make_case((3, 100), 64, 96, 8, BF16, vector=True, dropout_p=0.3)
    assert_matches_reference(lora_linear, case, [name for name in needs if name != "weight"])


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32], ids=readable_id)
def test_the_share_of_dx_is_that_of_the_delta_alone(adapter_dtype, p):
    """With a base of zeros: the same sums, the same mask, rounded once."""
    case = make_case(321, 128, 160, 12, BF16, adapter_dtype, dropout_p=p)
    _, s = ops._lora_delta_forward(case.grad_y, case.x, case.a, case.b, None, 1.5, p, case.seed if p else None)
    grads = [
        ops._lora_backward(case.grad_y, case.x, weight, case.a, case.b, s, None, 1.5, p, case.seed if p else None, 31)
        for weight in (torch.zeros_like(case.weight), None)
    ]
    for got, expected in zip(*grads, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(257, 96, 64), (300, 32, 32), (519, 160, 1024), (500, 224, 2048)], ids=readable_id)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=readable_id)
def test_ia3(shape, dtype, side):
    assert_ia3_matches(ia3_linear, make_ia3_case(*shape, BF16, dtype, side=side))


@pytest.mark.parametrize("bias", [True, False])
def test_ia3_scales_what_it_keeps(bias):
    case = make_case(333, 96, 160, 4, BF16)
    scale = torch.randn(96)
    shift = case.bias if bias else None
    y, base = ops._ia3_linear_forward(case.x, case.weight, shift, scale, False, True)
    assert torch.equal(y, (base * scale).to(BF16))
    alone, nothing = ops._ia3_linear_forward(case.x, case.weight, shift, scale, False, False)
    assert torch.equal(alone, y) and nothing.numel() == 0


def both_ways(case):
    p, seed = case.dropout_p, case.seed
    y, s = ops._lora_linear_forward(case.x, case.weight, case.bias, case.a, case.b, None, 1.5, p, seed)
    return y, *ops._lora_backward(case.grad_y, case.x, case.weight, case.a, case.b, s, None, 1.5, p, seed, 31)


def within_nan(tensor, columns):
    """The same numbers at an odd offset, with NaN around them."""
    wide = tensor.new_full((tensor.shape[0] + 1, tensor.shape[1] + columns), torch.nan)
    wide[1:, 3 : 3 + tensor.shape[1]] = tensor
    return wide[1:, 3 : 3 + tensor.shape[1]]


def test_layouts():
    case = make_case(270, 96, 128, 8, BF16, dropout_p=0.1)
    views = case.replace(**{name: within_nan(getattr(case, name), 5) for name in ("x", "weight", "a", "b", "grad_y")})
    row = case.replace(x=case.x[:1].expand(270, -1), grad_y=case.grad_y[:1].expand(270, -1))
    for strided, plain in ((views, case), (row, row.map(torch.Tensor.contiguous))):
        for got, expected in zip(both_ways(strided), both_ways(plain), strict=True):
            assert torch.equal(got, expected)


def test_non_finite_rows_stay_in_their_place():
    case = make_case(270, 64, 96, 4, BF16)
    x, grad_y = case.x.clone(), case.grad_y.clone()
    x[250], grad_y[241] = torch.nan, torch.inf
    y, grad_x, *_ = both_ways(case.replace(x=x, grad_y=grad_y))
    assert (~y.isfinite()).any(1).nonzero().tolist() == [[250]]
    assert (~grad_x.isfinite()).any(1).nonzero().tolist() == [[241]]


@in_panels
@pytest.mark.parametrize("shape", [(600, 416, 768, 8), (1000, 288, 1024, 4)], ids=readable_id)
def test_same_bits_with_any_number_of_threads(shape):
    case = make_case(*shape, BF16, dropout_p=0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = both_ways(case)
        for count in (2, 3):
            torch.set_num_threads(count)
            for got, want in zip(both_ways(case), expected, strict=True):
                assert torch.equal(got, want)
    finally:
        torch.set_num_threads(before)


@in_panels
def test_rows_do_not_depend_on_their_neighbours():
    case = make_case(700, 416, 640, 8, BF16)
    y, grad_x, *_ = both_ways(case)
    for rows in (slice(0, 300), slice(123, 400), slice(400, 700)):
        some_y, some_x, *_ = both_ways(case.replace(x=case.x[rows], grad_y=case.grad_y[rows]))
        assert torch.equal(some_y, y[rows]) and torch.equal(some_x, grad_x[rows])


def test_a_gradient_does_not_depend_on_which_others_are_asked_for():
    for rows in (48, 300):
        case = make_case(rows, 96, 1120, 8, BF16, torch.float32, dropout_p=0.3)
        _, s = ops._lora_linear_forward(case.x, case.weight, None, case.a, case.b, None, 1.5, case.dropout_p, case.seed)
        call = (case.grad_y, case.x, case.weight, case.a, case.b, s, None, 1.5, case.dropout_p, case.seed)
        everything = ops._lora_backward(*call, 1 | 2 | 4)
        for bit, got in enumerate(ops._lora_backward(*call, needs)[bit] for bit, needs in enumerate((1, 2, 4))):
            assert torch.equal(got, everything[bit]), (rows, bit)


def shared_both_ways(cases):
    x, count = cases[0].x, len(cases)
    weights, biases, a, b = ([getattr(c, name) for c in cases] for name in ("weight", "bias", "a", "b"))
    options = ([None] * count, [1.5] * count, [c.dropout_p for c in cases], [c.seed for c in cases])
    y, s = ops._lora_linear_shared_forward(x, weights, biases, a, b, *options)
    grad_x, grads = ops._lora_linear_shared_backward(
        [c.grad_y for c in cases], x, weights, a, b, s, *options, [7] * count
    )
    return y, s, grad_x, grads


@pytest.mark.parametrize("rows", [48, 300])
@pytest.mark.parametrize("widths", [(96,), (64, 96, 32), (64, 96, 48)], ids=readable_id)
def test_shared_projections_have_the_bits_of_separate_ones(widths, rows):
    cases = [make_case(rows, n, 128, 8, BF16, torch.float32, dropout_p=0.1, seed=n) for n in widths]
    x = cases[0].x
    y, s, grad_x, grads = shared_both_ways(cases)
    for i, c in enumerate(cases):
        single_y, single_s = ops._lora_linear_forward(x, c.weight, c.bias, c.a, c.b, None, 1.5, 0.1, c.seed)
        single = ops._lora_backward(c.grad_y, x, c.weight, c.a, c.b, single_s, None, 1.5, 0.1, c.seed, 7)
        assert torch.equal(y[i], single_y) and torch.equal(s[i], single_s)
        assert torch.equal(grads[4 * i], single[1]) and torch.equal(grads[4 * i + 1], single[2])
        if len(cases) == 1:
            assert torch.equal(grad_x, single[0])


@pytest.mark.parametrize("rows, k", [(70, 1120), (257, 64), (300, 32), (500, 96)])
@pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32], ids=readable_id)
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_x_gradient_of_shared_projections(rows, k, adapter_dtype, p):
    """Each is added to what the ones before left: the last rows, of less than a block, once like all others."""
    x, projections, grad_y = make_group([(96, 8), (32, 64), (1024, 3)], (rows,), k, BF16, adapter_dtype, p)
    exact = run(functools.partial(separately, reference.lora_linear), x, projections, grad_y, torch.float64)
    eager = run(functools.partial(separately, eager_linear), x, projections, grad_y)
    got = run(lora_linear_shared, x, projections, grad_y)
    assert_error_rule("grad_x", got[1], eager[1], exact[1])


@in_panels
def test_x_gradient_of_shared_projections_by_threads_and_rows():
    cases = [make_case(700, n, 640, 8, BF16, seed=n, dropout_p=0.1 * i) for i, n in enumerate((416, 448, 768))]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = shared_both_ways(cases)[2]
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(shared_both_ways(cases)[2], expected)
    finally:
        torch.set_num_threads(before)
    cases = [c.replace(dropout_p=0.0) for c in cases]
    expected = shared_both_ways(cases)[2]
    for rows in (slice(0, 300), slice(123, 400), slice(400, 700)):
        some = [c.replace(x=c.x[rows], grad_y=c.grad_y[rows]) for c in cases]
        assert torch.equal(shared_both_ways(some)[2], expected[rows])
