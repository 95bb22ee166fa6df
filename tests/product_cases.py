"""What the tests of base products by loops of our own share: layouts, and bits that depend on nothing beside them."""

from __future__ import annotations

import functools

import helpers
import torch
from projections import make_group, run, separately
from torch import Tensor

from pyfused.ops import lora_linear, lora_linear_shared
from pyfused.reference import lora as reference


def spread(tensor: Tensor) -> Tensor:
    """Every row apart from the next, and at an odd address."""
    wide = torch.full((tensor.shape[0] + 1, tensor.shape[1] + 7), torch.nan, dtype=tensor.dtype)
    wide[1:, 3:-4] = tensor
    return wide[1:, 3:-4]


def every_second(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], -1)[..., 0]


LAYOUTS = [spread, every_second, lambda tensor: tensor.t().contiguous().t(), lambda tensor: spread(tensor.t()).t()]


def assert_bits_depend_on_no_thread_count(threads, counts, evaluate, op, case) -> None:
    """``threads`` is the fixture of that name."""
    threads(1)
    expected = evaluate(op, case)
    for count in counts:
        threads(count)
        got = evaluate(op, case)
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def assert_bits_depend_on_no_other_gradient(case) -> None:
    """Of LoRA, whose scale is a vector."""
    whole = helpers.evaluate(lora_linear, case)
    for needs in (("x",), ("a",), ("b", "scale"), ("x", "b"), ("x", "a"), ("a", "scale")):
        some = helpers.evaluate(lora_linear, case, needs)
        assert all(torch.equal(value, whole[name]) for name, value in some.items())


def assert_projections_are_separate_ones(widths, rows: int, dtype: torch.dtype) -> None:
    """Projections of one input against one call each: the same bits; dX of several, a sum, by the error rule."""
    x, projections, grad_y = make_group(widths, (rows,), 129, dtype)
    got = run(lora_linear_shared, x, projections, grad_y)
    single = run(functools.partial(separately, lora_linear), x, projections, grad_y)
    for one, other in zip(got[0] + list(got[2]), single[0] + list(single[2]), strict=True):
        assert torch.equal(one, other)
    if len(widths) == 1:
        assert torch.equal(got[1], single[1])
    exact = run(functools.partial(separately, reference.lora_linear), x, projections, grad_y, torch.float64)
    eager = run(functools.partial(separately, helpers.eager_linear), x, projections, grad_y)
    helpers.assert_error_rule("grad_x", got[1], eager[1], exact[1])


def assert_a_row_that_is_not_finite_stays_alone(evaluate, op, case, row: int) -> None:
    """``row`` becomes NaN, and one number of the last row infinite."""
    last = case.x.shape[0] - 1
    expected = evaluate(op, case, ())["y"]
    x = case.x.clone()
    x[row], x[last, 3] = torch.nan, torch.inf
    got = evaluate(op, case.replace(x=x), ())["y"]
    assert got[row].isnan().all()
    others = [i for i in range(last) if i != row]
    assert torch.equal(got[others], expected[others])
