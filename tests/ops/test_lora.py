"""lora_linear and lora_delta against the reference: results and gradients, dtypes, odd sizes, any gradients asked."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPE_PAIRS, assert_matches_reference, delta_op, evaluate, make_case, readable_id

from pyfused.ops import lora_delta, lora_linear

OPS = [pytest.param(lora_linear, id="linear"), pytest.param(delta_op, id="delta")]
FROZEN_BASE = ("x", "bias", "a", "b", "scale")

# (M, N, K, R): ones, odd numbers, a few beyond every block size, real layers, ranks around every vector width.
SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (1, 129, 3, 3),
    (129, 3, 129, 5),
    (3, 129, 1134, 6),
    (129, 1134, 129, 7),
    (517, 129, 257, 8),
    (64, 96, 384, 12),
    (33, 768, 768, 16),
    (17, 65, 130, 24),
    (40, 100, 96, 33),
    (33, 70, 200, 64),
    (9, 150, 140, 130),
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids="p={}".format)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_linear_matches_reference(shape, dtypes, dropout_p):
    m, n, k, r = shape
    case = make_case(m, n, k, r, *dtypes, vector=r % 2 == 0, bias=m % 2 == 1, dropout_p=dropout_p)
    assert_matches_reference(lora_linear, case, FROZEN_BASE)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES[1::3], ids=readable_id)
def test_delta_matches_reference(shape, dtypes):
    m, n, k, r = shape
    case = make_case(m, n, k, r, *dtypes, vector=r % 2 == 1, dropout_p=0.25)
    assert_matches_reference(delta_op, case, ("x", "weight", "bias", "a", "b", "scale"))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 128, 256])
@pytest.mark.parametrize("dtypes", [DTYPE_PAIRS[1], DTYPE_PAIRS[2], DTYPE_PAIRS[4]], ids=readable_id)
def test_ranks(rank, dtypes):
    assert_matches_reference(lora_linear, make_case(21, 37, 67, rank, *dtypes, dropout_p=0.3), FROZEN_BASE)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[1:5], ids=readable_id)
def test_rows(rows, dtypes):
    assert_matches_reference(lora_linear, make_case(rows, 40, 136, 8, *dtypes, dropout_p=0.1), FROZEN_BASE)


@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 256, 300])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:5], ids=readable_id)
def test_columns(columns, dtypes):
    """K and N on both sides of the vector widths and of the 128 columns of a dropout block."""
    assert_matches_reference(lora_linear, make_case(5, columns + 1, columns, 4, *dtypes, dropout_p=0.5), FROZEN_BASE)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 1, 3), (0, 4), (2, 0, 3)], ids=str)
def test_leading_dimensions(op, lead):
    case = make_case(lead, 5, 9, 3, vector=True, dropout_p=0.4)
    assert_matches_reference(op, case)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("n, k", [(0, 9), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_empty_features(op, n, k, dtype):
    """Like nn.Linear: no input features give the bias, no output features give an empty result."""
    got = assert_matches_reference(op, make_case(4, n, k, 3, dtype, dropout_p=0.4), FROZEN_BASE)
    assert got["y"].shape == (4, n)


@pytest.mark.parametrize(
    "a_dtype, b_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=readable_id
)
def test_adapter_halves_in_different_dtypes(a_dtype, b_dtype):
    case = make_case(33, 40, 50, 8, torch.bfloat16, vector=True, dropout_p=0.1)
    case = case.replace(a=case.a.to(a_dtype), b=case.b.to(b_dtype), scale=case.scale.float())
    got = assert_matches_reference(lora_linear, case, FROZEN_BASE)
    assert (got["grad_a"].dtype, got["grad_b"].dtype, got["grad_scale"].dtype) == (a_dtype, b_dtype, torch.float32)


@pytest.mark.parametrize("vector", [False, True], ids=["float", "vector"])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op, vector):
    """Numerical derivatives of the fp64 kernel itself, dropout on."""
    case = make_case((2, 3), 5, 4, 3, torch.float64, vector=vector, dropout_p=0.4)
    names = [name for name in FROZEN_BASE if isinstance(getattr(case, name), torch.Tensor)]
    fixed = {"weight": case.weight, "scale": case.scale}

    def function(*leaves):
        return op(**(fixed | dict(zip(names, leaves, strict=True))), **case.options)

    leaves = [getattr(case, name).requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, leaves)


def test_gradcheck_noncontiguous():
    case = make_case(6, 5, 8, 3, torch.float64, dropout_p=0.4)
    x = torch.randn(8, 6, dtype=torch.float64).t().requires_grad_()
    a = torch.randn(8, 3, dtype=torch.float64).t().requires_grad_()
    b = torch.randn(3, 5, dtype=torch.float64).t().requires_grad_()
    weight = torch.randn(8, 5, dtype=torch.float64).t()

    def function(x, a, b):
        return lora_linear(x, weight, None, a, b, -0.7, **case.options).t()

    assert torch.autograd.gradcheck(function, [x, a, b])


SUBSETS = [subset for count in range(6) for subset in itertools.combinations(FROZEN_BASE, count)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("needs", SUBSETS, ids=lambda names: "-".join(names) or "none")
def test_only_gradients_asked_for(op, needs):
    case = make_case(7, 6, 10, 3, vector=True, dropout_p=0.3)
    everything = evaluate(op, case, FROZEN_BASE)
    got = evaluate(op, case, needs)
    assert set(got) == {"y"} | {f"grad_{name}" for name in needs}
    for name, value in got.items():
        assert torch.equal(value, everything[name]), name


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:5], ids=readable_id)
def test_trained_weight(dtypes):
    """A weight that is trained too gets its gradient, and the others stay right."""
    assert_matches_reference(lora_linear, make_case((2, 9), 12, 20, 4, *dtypes, dropout_p=0.2))


def test_frozen_weight_gets_no_gradient():
    case = make_case(7, 6, 10, 3)
    weight, bias = (
        torch.nn.Parameter(case.weight, requires_grad=False),
        torch.nn.Parameter(case.bias, requires_grad=False),
    )
    a = case.a.requires_grad_()
    lora_linear(case.x, weight, bias, a, case.b, 1.0).sum().backward()
    assert weight.grad is None and bias.grad is None and a.grad is not None


def test_inputs_are_not_changed():
    case = make_case(7, 6, 10, 3, vector=True, dropout_p=0.3)
    before = case.to(torch.float32)
    before = before.replace(
        **{name: getattr(case, name).clone() for name in ("x", "weight", "bias", "a", "b", "scale", "grad_y")}
    )
    y = torch.randn(7, 6)
    y_before = y.clone()
    lora_delta(y, case.x, case.a, case.b, case.scale, **case.options)
    evaluate(lora_linear, case)
    assert torch.equal(y, y_before)
    for name in ("x", "weight", "bias", "a", "b", "scale", "grad_y", "seed"):
        assert torch.equal(getattr(case, name), getattr(before, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_zero_b_is_the_base_layer(dtype, monkeypatch):
    """A fresh adapter (b = 0) must leave the base layer's result as it is, to the last bit."""
    # On CUDA: where the base product comes first, since a GEMM that adds to its result may be another kernel.
    monkeypatch.setenv("PYFUSED_LORA_UPDATE", "after")
    case = make_case(19, 30, 40, 8, dtype, dropout_p=0.1)
    got = lora_linear(case.x, case.weight, case.bias, case.a, torch.zeros_like(case.b), 2.0, **case.options)
    assert torch.equal(got, torch.nn.functional.linear(case.x, case.weight, case.bias))
