"""Dropout inside the LoRA ops: the kernel's mask bit by bit against the reference's, seeds, and what NaN and Inf do."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, delta_op, evaluate, make_case, readable_id, seed_tensor
from torch import Tensor

from pyfused.ops import lora_delta, lora_linear
from pyfused.reference.dropout import keep_mask, keep_scale

SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x1234_5678_9ABC_DEF0]
FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def forward_mask(rows: int, cols: int, dtype: torch.dtype, p: float, seed: Tensor) -> Tensor:
    """``drop(ones)`` as the forward kernel sees it: with a = identity it is the raw op's s."""
    a = torch.eye(cols, dtype=dtype)
    b = torch.zeros(1, cols, dtype=dtype)
    x, y = torch.ones(rows, cols, dtype=dtype), torch.zeros(rows, 1, dtype=dtype)
    return torch.ops.pyfused._lora_delta_forward(y, x, a, b, None, 1.0, p, seed)[1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=readable_id)
def test_forward_mask_is_the_reference_mask(dtype, seed):
    for rows, cols, p in ((1, 1, 0.5), (3, 131, 0.5), (67, 300, 0.1), (5, 256, 0.9)):
        got = forward_mask(rows, cols, dtype, p, seed_tensor(seed))
        keep = keep_mask(seed_tensor(seed), rows, cols, p)
        assert torch.equal(got != 0, keep), (rows, cols, p)
        kept = torch.full_like(got, keep_scale(p))
        torch.testing.assert_close(got, torch.where(keep, kept, 0.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("p", [1e-9, 1e-4, 1 / 65536, 0.37, 0.9999, 1 - 2**-20])
def test_extreme_rates(p):
    seed = seed_tensor(3)
    got = forward_mask(400, 260, torch.float32, p, seed)
    assert torch.equal(got != 0, keep_mask(seed, 400, 260, p))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=readable_id)
def test_backward_uses_the_same_mask(dtype):
    """With identities around it, grad_x is the mask (times its factor) and so is grad_a."""
    size, p, seed = 140, 0.3, seed_tensor(77)
    eye = torch.eye(size, dtype=dtype)
    x = torch.ones(size, size, dtype=dtype, requires_grad=True)
    a = eye.clone().requires_grad_()
    y = lora_delta(torch.zeros_like(eye), x, a, eye, 1.0, p, True, seed)
    expected = (keep_mask(seed, size, size, p).double() * keep_scale(p)).to(dtype)
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    (grad_a,) = torch.autograd.grad(y, a, eye)
    # One rounding to x's dtype, in the kernel or here.
    torch.testing.assert_close(grad_x, expected, rtol=torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(grad_a, expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=readable_id)
@pytest.mark.parametrize("rank", [1, 3, 8, 16, 33])
def test_mask_of_the_low_rank_kernels(dtypes, rank):
    """Rows of a that select single columns: s shows the mask of those columns at every rank."""
    rows, cols, p, seed = 50, 400, 0.4, seed_tensor(5)
    columns = torch.randperm(cols, generator=torch.Generator(DEVICE).manual_seed(rank))[:rank]
    a = torch.nn.functional.one_hot(columns, cols).to(dtypes[1])
    x, y, b = (
        torch.ones(rows, cols).to(dtypes[0]),
        torch.zeros(rows, 1).to(dtypes[0]),
        torch.zeros(1, rank).to(dtypes[1]),
    )
    s = torch.ops.pyfused._lora_delta_forward(y, x, a, b, None, 1.0, p, seed)[1]
    assert torch.equal(s != 0, keep_mask(seed, rows, cols, p)[:, columns])


def test_rows_are_the_flattened_leading_dimensions():
    case = make_case((2, 3, 5), 6, 40, 4, dropout_p=0.5)
    flat = case.replace(x=case.x.reshape(30, 40), grad_y=case.grad_y.reshape(30, 6))
    for name, value in evaluate(lora_linear, case).items():
        assert torch.equal(value.flatten(), evaluate(lora_linear, flat)[name].flatten()), name


def test_a_part_of_the_rows_gets_the_same_mask():
    """Row i's mask depends on i alone, so the first rows of a batch come out as they do by themselves."""
    case = make_case(30, 6, 40, 4, dropout_p=0.5)
    whole = lora_linear(case.x, case.weight, None, case.a, case.b, 1.0, **case.options)
    part = lora_linear(case.x[:7], case.weight, None, case.a, case.b, 1.0, **case.options)
    torch.testing.assert_close(part, whole[:7])


def test_only_in_training_and_only_with_p():
    case = make_case(30, 6, 40, 4)
    arguments = (case.x, case.weight, case.bias, case.a, case.b, 1.5)
    expected = lora_linear(*arguments)
    assert torch.equal(lora_linear(*arguments, dropout_p=0.5, training=False, seed=case.seed), expected)
    assert torch.equal(lora_linear(*arguments, dropout_p=0.0, training=True, seed=case.seed), expected)
    assert not torch.allclose(lora_linear(*arguments, dropout_p=0.5, training=True, seed=case.seed), expected)


@pytest.mark.parametrize("op", [pytest.param(lora_linear, id="linear"), pytest.param(delta_op, id="delta")])
def test_seed_from_torchs_generator(op):
    """manual_seed reproduces a run; without it every call draws a new mask; p = 0 and eval draw nothing."""
    case = make_case(30, 6, 40, 4)

    def call(**options):
        return op(case.x, case.weight, None, case.a, case.b, 1.0, **options)

    torch.manual_seed(5)
    first, second = call(dropout_p=0.5, training=True), call(dropout_p=0.5, training=True)
    torch.manual_seed(5)
    assert torch.equal(call(dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)
    device = torch.cuda if DEVICE.type == "cuda" else torch  # whose generator the seed comes from
    state = device.get_rng_state()
    call(dropout_p=0.0, training=True)
    call(dropout_p=0.5, training=False)
    call(dropout_p=0.5, training=True, seed=seed_tensor(1))
    assert torch.equal(device.get_rng_state(), state)


def test_drawn_seed_is_kept_for_backward():
    """The op is linear in x (weight 0), so <grad_y, y> = <grad_x, x> holds only where both used one mask."""
    case = make_case(30, 6, 40, 4, torch.float64)
    x = case.x.requires_grad_()
    y = lora_linear(x, torch.zeros_like(case.weight), None, case.a, case.b, 1.0, dropout_p=0.5, training=True)
    lora_linear(x.detach(), case.weight, None, case.a, case.b, 1.0, dropout_p=0.5, training=True)  # draws another
    (grad_x,) = torch.autograd.grad(y, x, case.grad_y)
    torch.testing.assert_close((grad_x * x).sum(), (case.grad_y * y).sum())


def test_changing_the_seed_tensor_afterwards_is_an_error():
    """The seed is saved for backward as any tensor is: changed in place in between, autograd refuses."""
    case = make_case(30, 6, 40, 4, dropout_p=0.5)
    seed = case.seed.clone()
    a = case.a.requires_grad_()
    y = lora_linear(case.x, case.weight, None, a, case.b, 1.0, dropout_p=0.5, training=True, seed=seed)
    seed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_shape_of_the_seed_does_not_matter(shape):
    case = make_case(9, 6, 40, 4, dropout_p=0.5)
    expected = evaluate(lora_linear, case)
    got = evaluate(lora_linear, case.replace(seed=case.seed.reshape(shape)))
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


NON_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_non_finite_x(dtype, value):
    """A kept NaN or Inf reaches its row and its column of grad_a; a dropped one is 0 and reaches nothing."""
    case = make_case(40, 6, 70, 4, dtype, dropout_p=0.5)
    keep = keep_mask(case.seed, 40, 70, 0.5)

    def delta(x, weight, bias, a, b, scale, **options):
        return lora_delta(case.grad_y, x, a, b, scale, **options)

    for kept in (True, False):
        row, col = (int(index) for index in (keep == kept).nonzero()[100])
        x = case.x.clone()
        x[row, col] = value
        got = evaluate(delta, case.replace(x=x), ("a", "b"))
        bad_y, bad_a = ~got["y"].isfinite(), ~got["grad_a"].isfinite()
        assert bad_y[row].all() == kept and bad_y.any() == kept
        assert bad_a[:, col].all() == kept and bad_a.any() == kept
        bad_y[row], bad_a[:, col] = False, False
        assert not bad_y.any() and not bad_a.any()


@pytest.mark.parametrize("name", ["weight", "bias", "a", "b", "scale"])
@pytest.mark.parametrize("value", NON_FINITE)
def test_non_finite_parameters_reach_the_result(name, value):
    case = make_case(9, 6, 40, 4, vector=True)
    damaged = getattr(case, name).clone()
    damaged.view(-1)[-1] = value
    assert not evaluate(lora_linear, case.replace(**{name: damaged}))["y"].isfinite().all()


def test_non_finite_gradient():
    """grad_x of a dropped element is 0 even where what flows in is NaN, and NaN where it is kept."""
    case = make_case(9, 6, 40, 4, dropout_p=0.5)
    case = case.replace(grad_y=torch.full_like(case.grad_y, float("nan")))
    x = case.x.requires_grad_()
    y = lora_delta(torch.zeros(9, 6), x, case.a, case.b, 1.0, **case.options)
    (grad_x,) = torch.autograd.grad(y, x, case.grad_y)
    assert torch.equal(grad_x.isnan(), keep_mask(case.seed, 9, 40, 0.5))
    assert torch.all(grad_x[~grad_x.isnan()] == 0)
