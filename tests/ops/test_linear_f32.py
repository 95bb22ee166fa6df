"""fp32 base products by loops of our own (many rows, from AVX2 on), with IA3's vector or LoRA's update in them."""

from __future__ import annotations

import helpers
import ia3_cases
import pytest
import torch
from helpers import cpu_kernels_only, readable_id
from ia3_cases import SIDES
from product_cases import (
    LAYOUTS,
    assert_a_row_that_is_not_finite_stays_alone,
    assert_bits_depend_on_no_other_gradient,
    assert_bits_depend_on_no_thread_count,
    assert_projections_are_separate_ones,
    every_second,
    spread,
)

from pyfused import _library
from pyfused.ops import ia3_linear, lora_linear

pytestmark = cpu_kernels_only

# Rows, N, K: whole tiles; sizes that no tile, vector or block of k divides; several blocks; the fewest that are ours;
# more than dl takes from the sums.
SHAPES = [
    (560, 128, 96),
    (513, 129, 65),
    (527, 64, 1134),
    (641, 1134, 129),
    (512, 97, 2051),
    (128, 64, 64),
    (8193, 65, 66),
]
VECTOR_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def ia3_case(shape, side, dtype=torch.float32):
    return ia3_cases.make_case(*shape, torch.float32, dtype, side=side, bias=shape[1] % 2 == 0)


def lora_case(shape, r=5, dtype=torch.float32, **options):
    return helpers.make_case(*shape, r, torch.float32, dtype, bias=shape[1] % 2 == 0, **options)


def all_ops(shape, dropout_p=0.2):
    """(evaluate, op, case): IA3 on either side, LoRA."""
    for side in SIDES:
        yield ia3_cases.evaluate, ia3_linear, ia3_case(shape, side)
    yield helpers.evaluate, lora_linear, lora_case(shape, vector=True, dropout_p=dropout_p)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", VECTOR_DTYPES, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_ia3_matches_the_reference(shape, dtype, side):
    case = ia3_case(shape, side, dtype)
    for needs in (("x", "scale"), ("x",), ("scale",), ()):
        ia3_cases.assert_matches_reference(ia3_linear, case, needs)


@pytest.mark.parametrize("r", [1, 8, 33])
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_lora_matches_the_reference(shape, r):
    dtype = VECTOR_DTYPES[r % 3]
    helpers.assert_matches_reference(lora_linear, lora_case(shape, r, dtype, vector=r == 8, dropout_p=0.1 * (r % 2)))


def test_layouts():
    """What is read where it lies gives what its contiguous copy gives, by whichever product."""
    for evaluate, op, case in all_ops((530, 130, 70)):
        expected = evaluate(op, case)
        for layout in LAYOUTS:
            got = evaluate(op, case.replace(x=layout(case.x), weight=layout(case.weight), grad_y=layout(case.grad_y)))
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")
        moved = case.replace(weight=spread(case.weight), bias=case.bias.repeat(2)[130:])
        assert torch.equal(evaluate(op, moved)["y"], expected["y"])
        apart = case.replace(x=case.x.view(2, 265, 70), grad_y=case.grad_y.view(2, 265, 130))
        assert torch.equal(evaluate(op, apart)["y"].view(530, 130), expected["y"])
        strided = case.replace(bias=every_second(case.bias))
        torch.testing.assert_close(evaluate(op, strided)["y"], expected["y"])


@pytest.mark.skipif(
    not _library._C.cpu_capability().startswith(("AVX", "AMX")), reason="the vendor's sums may depend on the rows"
)
def test_bits_depend_on_no_other_row():
    rows = slice(37, 37 + 517)
    for evaluate, op, case in all_ops((700, 131, 1500), dropout_p=0.0):
        whole = evaluate(op, case, ("x",))
        some = evaluate(op, case.replace(x=case.x[rows], grad_y=case.grad_y[rows]), ("x",))
        assert torch.equal(some["y"], whole["y"][rows])
        if op is ia3_linear:
            assert torch.equal(some["grad_x"], whole["grad_x"][rows])


@pytest.mark.skipif(
    not _library._C.cpu_capability().startswith(("AVX", "AMX")), reason="the vendor's sums may depend on threads"
)
def test_bits_depend_on_no_number_of_threads(threads):
    for shape in [(600, 130, 300), (530, 1100, 800)]:
        for evaluate, op, case in all_ops(shape):
            assert_bits_depend_on_no_thread_count(threads, (2, 3, 7, 16), evaluate, op, case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(513, 129, 65), (530, 1100, 800), (512, 1537, 64)], ids=readable_id)
def test_bits_depend_on_no_other_gradient(shape, dropout_p):
    assert_bits_depend_on_no_other_gradient(lora_case(shape, vector=True, dropout_p=dropout_p))


@pytest.mark.parametrize(
    "widths", [[(130, 8)], [(130, 8), (64, 16), (257, 3)], [(130, 8), (64, None)], [(130, 8), (1537, 4)]], ids=str
)
def test_projections_of_one_input(widths):
    """dX of one, and of several: in products of ours; where one has no adapter, or too many columns, the vendor's."""
    assert_projections_are_separate_ones(widths, 530, torch.float32)


def test_a_row_that_is_not_finite_stays_alone():
    for evaluate, op, case in all_ops((530, 77, 67)):
        assert_a_row_that_is_not_finite_stays_alone(evaluate, op, case, 100)
