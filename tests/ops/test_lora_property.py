"""Random calls: any mix of shapes, dtypes, layouts and options against the reference, by the error rule."""

from __future__ import annotations

import torch
from helpers import CUDA_KERNELS, DTYPE_PAIRS, assert_matches_reference, delta_op, make_case
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyfused.ops import lora_linear

SIZES = st.one_of(st.integers(1, 20), st.integers(1, 300))
LEADS = st.one_of(
    SIZES.map(lambda m: (m,)),
    st.lists(st.integers(1, 6), min_size=0, max_size=3).map(tuple),
    st.just((0,)),
)


@st.composite
def relaid(draw, tensor: Tensor) -> Tensor:
    """The same numbers with dimensions in another order in memory, gaps between them and an offset before them."""
    order = draw(st.permutations(range(tensor.dim())))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in order]
    spare = [draw(st.sampled_from([0, 0, 1, 5])) for _ in order]
    sizes = [tensor.shape[i] * step + extra for i, step, extra in zip(order, steps, spare, strict=True)]
    storage = tensor.new_full(sizes, 1e4)
    inner = storage[tuple(slice(extra, None, step) for step, extra in zip(steps, spare, strict=True))]
    back = [order.index(i) for i in range(tensor.dim())]
    return inner.permute(back).copy_(tensor)


@st.composite
def cases(draw):
    case = make_case(
        draw(LEADS),
        draw(SIZES),
        draw(SIZES),
        draw(st.one_of(st.integers(1, 9), st.integers(1, 70))),
        *draw(st.sampled_from(DTYPE_PAIRS)),
        bias=draw(st.booleans()),
        vector=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.05, 0.5, 0.9])),
        seed=draw(st.integers(0, 2**31)),
    )
    views = {}
    for name in ("x", "weight", "a", "b", "grad_y", "bias", "scale"):
        value = getattr(case, name)
        if isinstance(value, Tensor) and draw(st.booleans()):
            views[name] = draw(relaid(value))
    return case.replace(**views)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    op=st.sampled_from([lora_linear, delta_op]),
    case=cases(),
    needs=st.sets(st.sampled_from(["x", "bias", "a", "b", "scale"])),
)
def test_any_call_matches_the_reference(op, case, needs):
    assert_matches_reference(op, case, sorted(needs))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_any_layout_gives_the_bits_of_the_contiguous_one(case):
    """Layout changes where numbers are read, not the order they are summed in: the kernels give the same bits."""
    ops, vector = torch.ops.pyfused, case.scale if isinstance(case.scale, Tensor) else None

    def outputs(case):
        rest = (vector, 0.5, case.dropout_p, case.seed)
        out, s = ops._lora_delta_forward(case.grad_y, case.x, case.a, case.b, *rest)
        return out, s, *ops._lora_backward(case.grad_y, case.x, None, case.a, case.b, s, *rest, 31)

    plain = case.replace(**{name: getattr(case, name).contiguous() for name in ("x", "a", "b", "grad_y")})
    *got, got_bias = outputs(case)
    *expected, expected_bias = outputs(plain)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    if CUDA_KERNELS:  # torch's sum, whose order follows the layout
        torch.testing.assert_close(got_bias, expected_bias)
    else:
        assert torch.equal(got_bias, expected_bias)
