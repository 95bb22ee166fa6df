"""Conversions in the kernels, bit by bit: every 16-bit number read and written, fp32 sums rounded to nearest even."""

from __future__ import annotations

import pytest
import torch
from helpers import CUDA_KERNELS, DEVICE, EMULATED, readable_id
from torch import Tensor

from pyfused.ops import lora_delta

HALVES = [torch.bfloat16, torch.float16]


def every_number(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns of a 16-bit dtype as a [256, 256] matrix: subnormals, infinities and NaNs too."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(256, 256)


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """fp32 numbers on and next to the middle between two numbers of ``dtype``, beyond its range, and random ones."""
    numbers = every_number(dtype).float().flatten()
    numbers = numbers[numbers.isfinite()].sort().values.unique()
    middles = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,), generator=torch.Generator(DEVICE).manual_seed(0))
    random = bits.to(torch.int32).view(torch.float32)
    largest = torch.tensor(torch.finfo(torch.float32).max)
    beyond = torch.tensor([float("inf"), float("nan"), largest, torch.finfo(dtype).max * 1.001])
    infinity = torch.tensor(float("inf"))
    next_to = [torch.nextafter(middles, infinity), torch.nextafter(middles, -infinity)]
    if CUDA_KERNELS:
        # Their fp32 products are of three TF32 products, with 22 of the 24 bits (docs/numerics.md).
        next_to = [middles * (1 + 2.0**-19), middles * (1 - 2.0**-19)]
        random = (random.view(torch.int32) & ~0xF).view(torch.float32)
    values = torch.cat([numbers, middles, *next_to, random, beyond])
    # Of fp32's subnormals no more than a rounded zero is asked, because the bf16 instructions take them for zero; where
    # numbers are cut in two, neither part may be subnormal.
    smallest = torch.finfo(torch.float32).tiny * (2**12 if CUDA_KERNELS else 1)
    values[(values.abs() < smallest) & (values != 0)] = 0.0
    values = torch.cat([values, -values])
    return values[::16] if EMULATED else values


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def outer(left: Tensor, right: Tensor) -> Tensor:
    """[M] x [N] by the op alone: x = left as a column, a = 1, b = right as a column, on top of y = 0."""
    y = torch.zeros(left.shape[0], right.shape[0], dtype=left.dtype)
    return lora_delta(y, left[:, None], torch.ones(1, 1, dtype=right.dtype), right[:, None], 1.0)


@pytest.mark.parametrize("dtype", HALVES, ids=readable_id)
def test_reads_every_number(dtype):
    """From x, from y and from the adapter, in fp32 out of a 16-bit tensor there is no rounding at all."""
    numbers = every_number(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    as_x = torch.ops.pyfused._lora_delta_forward(
        one.expand(65536, 1), numbers.view(-1, 1), one, one, None, 1.0, 0.0, None
    )
    assert_same(as_x[1], numbers.float().view(-1, 1))
    as_b = outer(torch.ones(1), numbers.flatten())
    assert_same(as_b, numbers.float().view(1, -1))
    x, a = torch.zeros(256, 3, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    if dtype == torch.bfloat16:
        # Written back; the processor's bf16 conversion takes subnormals, which bf16 shares with fp32, for zero.
        numbers = torch.where(numbers.abs() < torch.finfo(dtype).tiny, 0.0, numbers)
    assert_same(lora_delta(numbers, x, a, torch.ones(256, 2, dtype=dtype), 1.0), numbers)


@pytest.mark.parametrize("dtype", HALVES, ids=readable_id)
def test_rounds_results_to_nearest_even(dtype):
    values = hard_to_round(dtype)
    one = torch.ones(1, dtype=dtype)
    assert_same(outer(one, values), values.to(dtype).unsqueeze(0))


@pytest.mark.parametrize("dtype", HALVES, ids=readable_id)
def test_rounds_gradients_to_nearest_even(dtype):
    """grad_a and grad_b of 16-bit adapters from fp32 sums, grad_x of a 16-bit x."""
    values = hard_to_round(dtype)
    count = values.shape[0]
    one = torch.ones(1, 1)
    half = torch.ones(1, 1, dtype=dtype)

    b = torch.ones(count, 1, dtype=dtype, requires_grad=True)
    y = lora_delta(torch.zeros(1, count), one, one, b, 1.0)
    (grad_b,) = torch.autograd.grad(y, b, values[None])
    assert_same(grad_b, values.to(dtype)[:, None])

    a = torch.ones(1, count, dtype=dtype, requires_grad=True)
    y = lora_delta(torch.zeros(1, 1), values[None], a, one, 1.0)
    (grad_a,) = torch.autograd.grad(y, a, torch.ones_like(y))
    assert_same(grad_a, values.to(dtype)[None])

    x = torch.ones(1, count, dtype=dtype, requires_grad=True)
    y = lora_delta(torch.zeros(1, 1, dtype=dtype), x, values[None], one, 1.0)
    (grad_x,) = torch.autograd.grad(y, x, half)
    assert_same(grad_x, values.to(dtype)[None])


@pytest.mark.parametrize("dtype", HALVES, ids=readable_id)
def test_sums_in_fp32(dtype):
    """2048 ones and then some: a sum in 16 bit would stand still at 256 (bf16) or 2048 (fp16)."""
    size = 5000
    ones = torch.ones(size, size // 100, dtype=dtype)
    x = torch.ones(1, size, dtype=dtype)
    s = torch.ops.pyfused._lora_delta_forward(
        torch.zeros(1, 1, dtype=dtype), x, ones.t().contiguous(), torch.zeros(1, 50, dtype=dtype), None, 1.0, 0.0, None
    )[1]
    assert torch.all(s == size)
    column = torch.ones(size, 1, dtype=dtype)
    grads = torch.ops.pyfused._lora_backward(
        column, column, None, column[:1], column[:1], torch.ones(size, 1), None, 1.0, 0.0, None, 31
    )
    for grad in (grads[1], grads[2], grads[4]):
        assert_same(grad.flatten(), torch.tensor([size]).to(dtype))
