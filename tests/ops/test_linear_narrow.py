"""Base products in bf16 and fp16, on CPUs without AVX-512 by loops of our own, with LoRA's and IA3's work in them."""

from __future__ import annotations

import functools

import helpers
import ia3_cases
import pytest
import torch
from helpers import OWN_NARROW_PRODUCTS, cpu_kernels_only, readable_id
from ia3_cases import SIDES
from product_cases import (
    LAYOUTS,
    assert_a_row_that_is_not_finite_stays_alone,
    assert_bits_depend_on_no_other_gradient,
    assert_bits_depend_on_no_thread_count,
    assert_projections_are_separate_ones,
    every_second,
)
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from pyfused.ops import frozen_linear, ia3_linear, lora_linear

pytestmark = cpu_kernels_only

# The vendor's bits may depend on the other rows and on the number of threads.
ours = pytest.mark.skipif(not OWN_NARROW_PRODUCTS, reason="16-bit products are the vendor's")

DTYPES = [torch.bfloat16, torch.float16]
# Rows, N, K: few rows and single features; sizes that no tile, vector or block of k divides; several blocks of k, with
# more rows than sums are kept for at a time.
SHAPES = [
    (1, 40, 24),
    (3, 1, 3),
    (17, 3, 1),
    (24, 129, 65),
    (129, 130, 1134),
    (61, 1134, 129),
    (33, 64, 2051),
    (35, 2051, 70),
    (1100, 33, 800),
]


def ia3_case(shape, side, dtype, scale_dtype=None):
    return ia3_cases.make_case(*shape, dtype, scale_dtype, side=side, bias=shape[1] % 2 == 0)


def lora_case(shape, dtype, r=5, adapter_dtype=None, **options):
    return helpers.make_case(*shape, r, dtype, adapter_dtype, bias=shape[1] % 2 == 0, **options)


def all_ops(shape, dtype, dropout_p=0.2):
    """(evaluate, op, case): IA3 on either side, LoRA."""
    for side in SIDES:
        yield ia3_cases.evaluate, ia3_linear, ia3_case(shape, side, dtype)
    yield helpers.evaluate, lora_linear, lora_case(shape, dtype, vector=True, dropout_p=dropout_p)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_ia3_matches_the_reference(shape, dtype, side):
    for scale_dtype in (dtype, torch.float32):
        case = ia3_case(shape, side, dtype, scale_dtype)
        for needs in (("x", "scale"), ("x",), ("scale",), ()):
            ia3_cases.assert_matches_reference(ia3_linear, case, needs)


@pytest.mark.parametrize("r", [1, 8, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_lora_matches_the_reference(shape, dtype, r):
    case = lora_case(shape, dtype, r, torch.float32 if r == 8 else None, vector=r == 8, dropout_p=0.1 * (r % 2))
    helpers.assert_matches_reference(lora_linear, case)


@ours
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_layouts(dtype):
    """What is read where it lies gives the bits of its contiguous copy."""
    for evaluate, op, case in all_ops((67, 130, 70), dtype):
        expected = evaluate(op, case)
        for layout in LAYOUTS:
            weight = case.weight if layout is every_second else layout(case.weight)
            got = evaluate(op, case.replace(x=layout(case.x), weight=weight, grad_y=layout(case.grad_y)))
            assert all(torch.equal(got[name], value) for name, value in expected.items())
        apart = case.replace(weight=every_second(case.weight), bias=every_second(case.bias))
        for name, value in evaluate(op, apart).items():  # by the vendor's product
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(value, expected[name], rtol=0.02, atol=0.01 * largest)
        one = case.grad_y[:1, :1]
        whole, expanded = (evaluate(op, case.replace(grad_y=g)) for g in (one.repeat(67, 130), one.expand(67, 130)))
        assert all(torch.equal(expanded[name], value) for name, value in whole.items())


@ours
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_bits_depend_on_no_other_row(dtype):
    rows = slice(37, 37 + 50)
    for evaluate, op, case in all_ops((130, 131, 1500), dtype, dropout_p=0.0):
        whole = evaluate(op, case, ("x",))
        some = evaluate(op, case.replace(x=case.x[rows], grad_y=case.grad_y[rows]), ("x",))
        assert torch.equal(some["y"], whole["y"][rows])
        assert torch.equal(some["grad_x"], whole["grad_x"][rows])


@ours
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_bits_depend_on_no_number_of_threads(threads, dtype):
    for shape in [(200, 130, 300), (70, 1100, 800)]:
        for evaluate, op, case in all_ops(shape, dtype):
            assert_bits_depend_on_no_thread_count(threads, (2, 3, 7), evaluate, op, case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_bits_depend_on_no_other_gradient(dtype, dropout_p):
    for shape in [(3, 40, 70), (50, 129, 800)]:
        assert_bits_depend_on_no_other_gradient(lora_case(shape, dtype, vector=True, dropout_p=dropout_p))


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("widths", [[(130, 8)], [(130, 8), (64, 16), (257, 3)], [(130, 8), (64, None)]], ids=str)
def test_projections_of_one_input(widths, dtype):
    assert_projections_are_separate_ones(widths, 70, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_a_base_layer_alone_has_its_own_bits(dtype):
    for rows in (1, 16, 17, 32, 33, 100):
        case = lora_case((rows, 130, 96), dtype)
        assert torch.equal(frozen_linear(case.x, case.weight, case.bias), linear(case.x, case.weight, case.bias))
        raw = torch.ops.pyfused._linear(case.x, case.weight, case.bias)
        assert torch.equal(raw, linear(case.x, case.weight, case.bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_a_row_that_is_not_finite_stays_alone(dtype):
    for evaluate, op, case in all_ops((50, 77, 67), dtype):
        assert_a_row_that_is_not_finite_stays_alone(evaluate, op, case, 10)


def test_a_sum_in_parts_is_rounded_at_its_end():
    """fp16's largest number is passed in one block of k and come back from in another."""
    case = lora_case((30, 40, 1700), torch.float16)
    x, weight = torch.zeros_like(case.x), torch.ones_like(case.weight)
    x[:, :8] = 2.0**14
    x[:15, -8:] = -(2.0**14)
    y = lora_linear(x, weight, None, case.a * 0, case.b, 1.0)
    assert (y[:15] == 0).all() and y[15:].isposinf().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_checkpointing_gives_the_same_bits(dtype):
    case = lora_case((50, 130, 70), dtype, dropout_p=0.3)

    def step(call):
        torch.manual_seed(7)
        leaves = [tensor.clone().requires_grad_() for tensor in (case.x, case.a, case.b)]
        y = call(lambda x, a, b: lora_linear(x, case.weight, case.bias, a, b, 1.5, 0.3, True), *leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, case.grad_y)]

    plain = step(lambda layer, *tensors: layer(*tensors))
    again = step(functools.partial(checkpoint, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
