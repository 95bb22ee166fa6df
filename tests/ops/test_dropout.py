"""``ops.dropout`` against its reference, whose mask tests/reference/test_dropout.py holds to the documented one."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, cpu_kernels_only, readable_id, seed_tensor
from torch.autograd import gradcheck, gradgradcheck

from pyfused.ops import dropout, lora_linear
from pyfused.reference.dropout import dropout as reference
from pyfused.reference.dropout import keep_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3,), (2, 3, 5), (129, 1134), (40, 128), (17, 1025), (7, 2200), (70, 31), (0, 5), (4, 0), (2, 0, 3)]
P = 0.3


def seed() -> torch.Tensor:
    return seed_tensor(0x1234_5678_9ABC_DEF0)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(3)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    """To the bit, as the gradient of the same mask."""
    x = values(*shape, dtype=dtype).requires_grad_()
    got = dropout(x, P, seed=seed())
    assert got.shape == x.shape and got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, reference(x, P, seed()))
    grad_y = values(*shape, dtype=dtype).flip(0)
    (grad_x,) = torch.autograd.grad(got, x, grad_y)
    assert torch.equal(grad_x, reference(grad_y, P, seed()))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.999, 0.99999999])
def test_probabilities(p):
    x = values(300, 200).abs() + 1.0
    assert torch.equal(dropout(x, p, seed=seed()) != 0, keep_mask(seed(), 300, 200, p))
    assert torch.equal(dropout(x, p, seed=seed()), reference(x, p, seed()))


def test_nothing_to_drop():
    x = values(4, 5)
    assert dropout(x, 0.0) is x and dropout(x, P, training=False) is x


def test_the_mask_is_loras():
    x = values(9, 140, dtype=torch.float64)
    a, b, weight = values(140, 140, dtype=torch.float64), values(6, 140, dtype=torch.float64), x.new_zeros(6, 140)
    y = lora_linear(x, weight, None, a, b, 1.0, P, True, seed())
    torch.testing.assert_close(y, lora_linear(dropout(x, P, seed=seed()), weight, None, a, b, 1.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: values(6, 300)[:, ::2],
        lambda: values(300, 6).t(),
        lambda: values(5, 1, 130).expand(5, 3, 130),
        lambda: values(1, 130).expand(7, 130),
        lambda: values(8, 260)[1:6, 3:150],
        lambda: values(3, 4, 130).transpose(0, 1),
        lambda: values(6, 131).flatten()[1:781].view(6, 130),
    ],
    ids=["strided", "transposed", "expanded", "stride 0", "cut", "rows exchanged", "unaligned"],
)
def test_layouts(make):
    x = make()
    kept = x.clone()
    assert torch.equal(dropout(x, P, seed=seed()), dropout(kept.contiguous(), P, seed=seed()))
    assert torch.equal(x, kept)


def test_what_is_dropped_is_gone():
    """Also NaN and infinity, in x and in the gradient."""
    x = torch.full((9, 200), torch.inf).requires_grad_()
    y = dropout(x, P, seed=seed())
    assert torch.equal(y == 0, ~keep_mask(seed(), 9, 200, P)) and not y.isnan().any()
    y.backward(torch.full_like(y, torch.nan))
    assert torch.equal(x.grad.isnan(), keep_mask(seed(), 9, 200, P))


def test_gradients_of_both_orders():
    x = values(3, 130, dtype=torch.float64).requires_grad_()

    def call(x):
        return dropout(x, P, seed=seed())

    assert gradcheck(call, x) and gradgradcheck(call, x)
    y = (call(x) * call(x)).sum()  # x used twice
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)


def test_a_seed_is_drawn():
    x = torch.ones(50, 400)
    torch.manual_seed(5)
    first, second = dropout(x, P), dropout(x, P)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, P), first) and not torch.equal(first, second)
    assert 0.25 < (first == 0).double().mean() < 0.35


@cpu_kernels_only
def test_any_number_of_threads_gives_the_same():
    x = values(1000, 700)
    expected = dropout(x, P, seed=seed())
    before = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(dropout(x, P, seed=seed()), expected)
    finally:
        torch.set_num_threads(before)


def test_opcheck():
    x = values(3, 130).requires_grad_()
    torch.library.opcheck(torch.ops.pyfused._dropout.default, (x.detach(), P, seed()))


def test_compiles_in_one_graph():
    x = values(5, 130).requires_grad_()
    compiled = torch.compile(lambda x, seed: dropout(x, P, seed=seed) * 2, fullgraph=True, backend="aot_eager")
    y = compiled(x, seed())
    assert torch.equal(y, dropout(x, P, seed=seed()) * 2)
    y.sum().backward()
    assert torch.equal(x.grad, 2 * dropout(torch.ones_like(x), P, seed=seed()))


def test_without_gradients_and_on_meta():
    x = values(4, 130).requires_grad_()
    with torch.inference_mode():
        assert torch.equal(dropout(x, P, seed=seed()), dropout(x.detach(), P, seed=seed()))
    meta = dropout(torch.empty(4, 130, device="meta"), P)
    assert meta.shape == (4, 130) and meta.is_meta


def test_forward_mode_and_autocast():
    x = values(4, 130)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert torch.equal(dropout(x, P, seed=seed()), dropout(x.clone(), P, seed=seed()))
    _, tangent = torch.func.jvp(lambda x: dropout(x, P, seed=seed()), (x,), (torch.ones_like(x),))
    assert torch.equal(tangent, dropout(torch.ones_like(x), P, seed=seed()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((lambda x: x.int(), P), TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ((lambda x: [1.0], P), TypeError, "x must be a tensor, got list"),
        ((lambda x: x[0, 0], P), ValueError, r"x must have shape \[..., K\], got a scalar"),
        ((lambda x: x, 1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ((lambda x: x, "a"), TypeError, "dropout_p must be a float, got str"),
        ((lambda x: x, P, True, 3), TypeError, "seed must be an int64 tensor with one element or None, got int"),
        ((lambda x: x, P, True, torch.tensor([1, 2])), ValueError, r"seed must have one element, got \[2\]"),
    ],
    ids=lambda value: None,
)
def test_errors(arguments, error, message):
    make, *rest = arguments
    with pytest.raises(error, match=f"dropout: {message}"):
        dropout(make(values(2, 3)), *rest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), 1.0, seed_tensor(1)), r"p must be in \[0, 1\)"),
        ((torch.ones(2, 3), 0.5, torch.ones(1)), "seed must be an int64 tensor"),
        ((torch.ones(2, 3), 0.5, torch.ones(2, dtype=torch.int64)), "seed must be an int64 tensor with one element"),
        ((torch.tensor(1.0), 0.5, seed_tensor(1)), "x must have at least one dimension"),
        ((torch.ones(2, 3, dtype=torch.int32), 0.5, seed_tensor(1)), "x must be float32"),
    ],
    ids=lambda value: None,
)
@cpu_kernels_only
def test_the_raw_op_checks_for_itself(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyfused._dropout(*arguments)
