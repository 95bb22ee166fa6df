"""Any strides: every argument and the incoming gradient as transposed, sliced, strided and expanded views."""

from __future__ import annotations

import pytest
import torch
from helpers import TENSORS, assert_matches_reference, delta_op, evaluate, make_case, readable_id
from torch import Tensor

from pyfused.ops import lora_delta, lora_linear

# Fills what lies between the elements of a view. Large, so that using it shows; finite, because the vendor's 16-bit
# GEMM multiplies an element past an odd row's end by zero. pyfused's own kernels are tested with NaN, at the end.
GAP = 1e4
FROZEN_BASE = ("x", "bias", "a", "b", "scale")
OPS = [pytest.param(lora_linear, id="linear"), pytest.param(delta_op, id="delta")]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def transposed(tensor: Tensor) -> Tensor:
    """Last two dimensions laid out the other way round."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def first_dimension_inside(tensor: Tensor) -> Tensor:
    """As a sequence-first model hands over a batch-first view."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def row_slice(tensor: Tensor) -> Tensor:
    """Left columns of a wider matrix, at an odd offset: rows are apart, and not aligned."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), GAP)
    wide[..., 3:-2] = tensor
    return wide[..., 3:-2]


def every_second_row(tensor: Tensor) -> Tensor:
    tall = tensor.new_full((*tensor.shape[:-2], 2 * tensor.shape[-2], tensor.shape[-1]), GAP)
    tall[..., ::2, :] = tensor
    return tall[..., ::2, :]


def every_second_element(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), GAP)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def offset(tensor: Tensor) -> Tensor:
    """Contiguous, at an address that no vector load is aligned to."""
    return torch.cat([tensor.new_full((1,), GAP), tensor.flatten()])[1:].view(tensor.shape)


MATRIX_LAYOUTS = [transposed, row_slice, every_second_row, every_second_element, offset]
LAYOUTS = [*MATRIX_LAYOUTS, first_dimension_inside]


def named(layout) -> str:
    return layout.__name__


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("op", OPS)
def test_x(op, dtypes, layout):
    case = make_case((3, 11), 20, 37, 5, *dtypes, dropout_p=0.2)
    changed = case.replace(x=layout(case.x))
    assert (torch.equal(changed.x, case.x) and changed.x.stride() != case.x.stride()) or layout is offset
    assert_matches_reference(op, changed, FROZEN_BASE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=named)
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("op", OPS)
def test_incoming_gradient(op, dtypes, layout):
    case = make_case((3, 11), 20, 37, 5, *dtypes, dropout_p=0.2)
    assert_matches_reference(op, case.replace(grad_y=layout(case.grad_y)), FROZEN_BASE)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS, ids=named)
@pytest.mark.parametrize("name", ["weight", "a", "b"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_parameters(dtypes, name, layout):
    case = make_case(14, 20, 37, 5, *dtypes, vector=True, dropout_p=0.2)
    assert_matches_reference(lora_linear, case.replace(**{name: layout(getattr(case, name))}), FROZEN_BASE)


@pytest.mark.parametrize("name", ["bias", "scale"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_vectors(dtypes, name):
    case = make_case(14, 20, 37, 5, *dtypes, vector=True, dropout_p=0.2)
    strided = getattr(case, name).repeat_interleave(3)[::3]
    assert_matches_reference(lora_linear, case.replace(**{name: strided}), FROZEN_BASE)


@pytest.mark.parametrize("layout", MATRIX_LAYOUTS, ids=named)
def test_base_output(layout):
    """lora_delta's y: any strides, the result is a new tensor and y is as it was."""
    case = make_case(14, 20, 37, 5)
    y = layout(torch.randn(14, 20))
    before = y.clone()
    got = lora_delta(y, case.x, case.a, case.b, 1.5)
    assert torch.equal(y, before)
    torch.testing.assert_close(got, before + 1.5 * case.x @ case.a.t() @ case.b.t())


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("shape", [(1, 37), (11, 1), (1, 1)], ids=readable_id)
def test_expanded(dtypes, shape):
    """Stride 0: x expanded along rows, columns or both, and the gradient of a sum."""
    case = make_case(11, 20, 37, 5, *dtypes, dropout_p=0.2)
    x = torch.randn(shape).to(dtypes[0]).expand(11, 37)
    grad_y = torch.ones((), dtype=dtypes[0]).expand(11, 20)
    assert_matches_reference(lora_linear, case.replace(x=x, grad_y=grad_y), FROZEN_BASE)
    assert_matches_reference(delta_op, case.replace(x=x, grad_y=grad_y), FROZEN_BASE)


def test_gradient_of_sum():
    """``y.sum().backward()`` hands over a gradient with strides 0 (and 1 element of memory)."""
    case = make_case(11, 20, 37, 5, torch.float64, vector=True, dropout_p=0.2)
    leaves = [getattr(case, name).requires_grad_() for name in FROZEN_BASE]
    lora_linear(*(getattr(case, name) for name in TENSORS), **case.options).sum().backward()
    expected = evaluate(lora_linear, case.replace(grad_y=torch.ones(11, 20, dtype=torch.float64)), FROZEN_BASE)
    for name, leaf in zip(FROZEN_BASE, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[f"grad_{name}"])


def test_overlapping_windows():
    """Rows that share memory, as ``unfold`` makes them."""
    signal = torch.randn(50)
    case = make_case(14, 20, 37, 5, dropout_p=0.2).replace(x=signal.unfold(0, 37, 1))
    assert case.x.shape == (14, 37) and case.x.stride() == (1, 1)
    assert_matches_reference(lora_linear, case, ("a", "b", "bias"))


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_the_mask_is_by_position_not_by_layout(dtypes):
    """Strides do not move the dropout mask: the same numbers in another layout give the same result."""
    case = make_case((3, 11), 20, 37, 5, *dtypes, dropout_p=0.5)
    case = case.replace(weight=torch.zeros_like(case.weight))  # the vendor's GEMM may round another layout differently
    expected = evaluate(delta_op, case)
    for layout in LAYOUTS:
        got = evaluate(delta_op, case.replace(x=layout(case.x)))
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, msg=f"{layout.__name__}: {name}")


def test_views_with_a_pending_negation():
    """A part of a conjugated complex tensor is a real view whose sign torch has not written yet."""
    case = make_case(14, 20, 37, 5, dropout_p=0.2)
    expected = evaluate(lora_linear, case)
    lazy = {}
    for name in ("x", "weight", "a", "b", "grad_y"):
        value = getattr(case, name)
        lazy[name] = torch.complex(value, -value).conj().imag
        assert lazy[name].is_neg() and torch.equal(lazy[name], value)
    for name, value in evaluate(lora_linear, case.replace(**lazy)).items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("columns", [1, 3, 31, 37, 64, 131])
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_memory_between_rows_is_not_read(dtypes, columns):
    """NaN next to every argument's elements reaches no result."""
    case = make_case(11, columns, columns, 5, *dtypes, vector=True, dropout_p=0.2)
    y = case.grad_y.flip(0)

    def surround(tensor: Tensor) -> Tensor:
        padded = tensor.new_full([size + 6 for size in tensor.shape], float("nan"))
        inner = padded[tuple(slice(3, -3) for _ in tensor.shape)]
        return inner.copy_(tensor)

    def compute(case, y):
        leaves = [getattr(case, name).detach().requires_grad_() for name in ("x", "a", "b", "scale")]
        out = lora_delta(y, *leaves, **case.options)
        return out, *torch.autograd.grad(out, leaves, case.grad_y)

    expected = compute(case, y)
    changes = {name: surround(getattr(case, name)) for name in ("x", "a", "b", "scale", "grad_y")}
    for got, value in zip(compute(case.replace(**changes), surround(y)), expected, strict=True):
        torch.testing.assert_close(got, value)
