"""``ia3_linear`` and ``ia3_scale`` against plain PyTorch in fp64, by the error rule; their gradients; any layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPE_PAIRS, OWN_NARROW_PRODUCTS, readable_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ia3_cases import NEEDS, SIDES, assert_matches_reference, assert_scale_matches, evaluate, make_case
from torch import Tensor

from pyfused.ops import ia3_linear, ia3_scale
from pyfused.reference import ia3 as reference

# Rows, N, K: single elements, odd sizes, several tasks and column blocks, and few outputs for many rows, where the
# input side folds the vector into the weight.
SHAPES = [(1, 1, 1), (3, 129, 1), (130, 3, 1134), (129, 1134, 7), (517, 65, 600), (4, 700, 520), (300, 20, 33)]
EMPTY = [(0, 4, 5), (3, 0, 5), (3, 4, 0)]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_matches_the_reference(dtypes, shape, side):
    case = make_case(*shape, *dtypes, side=side, bias=shape[1] % 2 == 1)
    got = assert_matches_reference(ia3_linear, case)
    assert got["y"].is_contiguous() and got["y"].dtype == dtypes[0]
    assert got["grad_scale"].dtype == dtypes[1]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("needs", [(), ("x",), ("scale",), ("weight",), ("bias", "scale"), NEEDS], ids=str)
def test_any_gradients(needs, side):
    for dtypes in DTYPE_PAIRS:
        assert_matches_reference(ia3_linear, make_case((2, 35), 40, 33, *dtypes, side=side), needs)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", EMPTY, ids=readable_id)
def test_empty(shape, side):
    case = make_case(*shape, side=side)
    got, expected = evaluate(ia3_linear, case), evaluate(reference.ia3_linear, case)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=readable_id)
def test_output_side_has_eager_bits(dtype):
    """16-bit results are HF PEFT's to the bit, the base rounded, its multiple rounded, where the products are."""
    if OWN_NARROW_PRODUCTS and dtype != torch.float32:
        pytest.skip("the products are ours")
    case = make_case(70, 50, 40, dtype, torch.float32)
    got = evaluate(ia3_linear, case)
    y = F.linear(case.x, case.weight, case.bias)
    if dtype != torch.float32:
        assert torch.equal(got["y"], (y * case.scale).to(dtype))
    grad = torch.mm((case.grad_y * case.scale).to(dtype), case.weight)
    assert torch.equal(got["grad_x"], grad)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(side, bias):
    case = make_case((2, 3), 5, 4, torch.float64, side=side, bias=bias)
    tensors = [case.x, case.weight, case.bias, case.scale]
    tensors = [tensor if tensor is None else tensor.clone().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *args: ia3_linear(*args, side), tensors)
    frozen = [tensors[0], case.weight, case.bias, tensors[3]]
    assert torch.autograd.gradcheck(lambda *args: ia3_linear(*args, side), frozen)


@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4), 1), ((3, 5), -1), ((2, 3, 2, 2), -3), ((4,), 0), ((3, 2), 0)])
def test_gradcheck_scale(shape, dim):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(shape[dim], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, scale: ia3_scale(x, scale, dim), (x, scale))


@pytest.mark.parametrize("side", SIDES)
def test_graph_kept_and_x_used_twice(side):
    case = make_case((3, 4), 6, 5, side=side)

    def grads(op):
        x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()
        y = op(x, case.weight, case.bias, scale, side) + x.sum() + op(x, case.weight, None, scale, side)
        first = torch.autograd.grad(y, (x, scale), case.grad_y, retain_graph=True)
        return (*first, *torch.autograd.grad(y, (x, scale), case.grad_y))

    for got, expected in zip(grads(ia3_linear), grads(reference.ia3_linear), strict=True):
        torch.testing.assert_close(got, expected)


def test_the_vector_may_be_expanded():
    case = make_case(5, 6, 7)
    one = torch.tensor(0.5, requires_grad=True)
    ia3_linear(case.x, case.weight, case.bias, one.expand(6)).sum().backward()
    torch.testing.assert_close(one.grad, F.linear(case.x, case.weight, case.bias).sum())


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 7, 5, 9), 1), ((2, 70, 33), 1), ((65, 130), -1), ((5, 4), 0), ((2, 3, 4, 2, 3), -4), ((6,), 0)],
)
def test_scale_along_any_dimension(dtypes, shape, dim):
    x, grad = torch.randn(shape, dtype=dtypes[0]), torch.randn(shape, dtype=dtypes[0])
    scale = torch.randn(shape[dim], dtype=dtypes[1])
    scale[:1] = 0.0
    assert_scale_matches(x, scale, dim, grad)


def test_scale_keeps_channels_last():
    x = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last)
    y = ia3_scale(x, torch.randn(6), 1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_scale_matches(x, torch.randn(6), 1, torch.randn(2, 6, 5, 4))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=readable_id)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_scale_of_nothing(shape, dim):
    x, scale = torch.randn(shape, requires_grad=True), torch.randn(shape[dim], requires_grad=True)
    y = ia3_scale(x, scale, dim)
    grads = torch.autograd.grad(y, (x, scale), torch.ones(shape))
    assert y.shape == x.shape and grads[0].shape == x.shape
    assert torch.equal(grads[1], torch.zeros(shape[dim]))


SIZES = st.one_of(st.integers(1, 20), st.integers(1, 300))


@st.composite
def relaid(draw, tensor: Tensor) -> Tensor:
    """The same numbers with dimensions in another order in memory, and gaps before and between them."""
    order = draw(st.permutations(range(tensor.dim())))
    steps = [draw(st.sampled_from([1, 1, 2])) for _ in order]
    storage = tensor.new_full([tensor.shape[i] * step for i, step in zip(order, steps, strict=True)], 1e4)
    inner = storage[tuple(slice(draw(st.integers(0, step - 1)), None, step) for step in steps)]
    return inner.permute([order.index(i) for i in range(tensor.dim())]).copy_(tensor)


@st.composite
def cases(draw):
    case = make_case(
        draw(st.one_of(SIZES.map(lambda m: (m,)), st.lists(st.integers(0, 5), max_size=3).map(tuple))),
        draw(SIZES),
        draw(SIZES),
        *draw(st.sampled_from(DTYPE_PAIRS)),
        side=draw(st.sampled_from(SIDES)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )
    names = [name for name in ("x", "weight", "bias", "scale", "grad_y") if getattr(case, name) is not None]
    return case.replace(**{name: draw(relaid(getattr(case, name))) for name in names if draw(st.booleans())})


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(), needs=st.sets(st.sampled_from(NEEDS)))
def test_any_call_matches_the_reference(case, needs):
    assert_matches_reference(ia3_linear, case, sorted(needs))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data(), dtypes=st.sampled_from(DTYPE_PAIRS), shape=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_any_scale_matches_the_reference(data, dtypes, shape):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    x, grad = torch.randn(shape, dtype=dtypes[0]), torch.randn(shape, dtype=dtypes[0])
    assert_scale_matches(data.draw(relaid(x)), torch.randn(shape[dim], dtype=dtypes[1]), dim, data.draw(relaid(grad)))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_part_of_a_weight(rows, side):
    """As a module has it whose projections lie in one parameter."""
    case = make_case((rows,), 6, 7, side=side)
    whole = torch.full((11, 12), 1e4)
    whole[4:10, 3:10] = case.weight
    assert_matches_reference(ia3_linear, case.replace(weight=whole[4:10, 3:10]))


def test_stride_zero_gradient():
    case = make_case((4, 3), 6, 7)
    expanded = case.replace(grad_y=torch.ones(()).expand(4, 3, 6), x=case.x[:, :1].expand(4, 3, 7))
    assert_matches_reference(ia3_linear, expanded)
    assert_matches_reference(ia3_linear, expanded.replace(side="input", scale=torch.randn(7)))
