"""LoRA's bf16 loops, which read x as pairs of vectors: tails of pairs, ranks that fill no block, masked elements."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE

from pyfused.reference.dropout import keep_mask

OPS = torch.ops.pyfused


def draw(rows: int, columns: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x and y ``[rows, columns]``, a ``[rank, columns]``, b ``[columns, rank]``, all bf16."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    shapes = (rows, columns), (rows, columns), (rank, columns), (columns, rank)
    return tuple(torch.randn(*shape, generator=generator).bfloat16() for shape in shapes)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 383, 385, 2049])
@pytest.mark.parametrize("rank", [1, 3, 4, 7, 8, 13, 17])
def test_sums_are_those_of_fp64(columns, rank):
    """What is summed in fp32 and not rounded to bf16, s, has fp32's accuracy; so has grad_a in fp32."""
    rows = 19
    x, y, a, b = draw(rows, columns, rank)
    a, b = a.float(), b.float()
    out, s = OPS._lora_delta_forward(y, x, a, b, None, 0.5, 0.0, None)
    expected = x.double() @ a.double().T
    torch.testing.assert_close(s.double(), expected, rtol=1e-5, atol=1e-5 * columns**0.5)
    torch.testing.assert_close(
        out.double(), y.double() + 0.5 * expected @ b.double().T, rtol=2**-8, atol=1e-4 * columns**0.5
    )
    grad_x, grad_a, grad_b, _, grad_bias = OPS._lora_backward(y, x, None, a, b, s, None, 0.5, 0.0, None, 1 | 2 | 4 | 16)
    ds = 0.5 * y.double() @ b.double()
    torch.testing.assert_close(grad_a.double(), ds.T @ x.double(), rtol=1e-5, atol=1e-4 * columns**0.5)
    torch.testing.assert_close(grad_b.double(), 0.5 * y.double().T @ expected, rtol=1e-5, atol=1e-4 * columns**0.5)
    torch.testing.assert_close(grad_x.double(), ds @ a.double(), rtol=2**-8, atol=1e-4 * columns**0.5)
    torch.testing.assert_close(grad_bias.double(), y.double().sum(0), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_a_nan_reaches_what_its_element_reaches(kept):
    """A kept NaN of x is in its row of s and its column of grad_a, a dropped one nowhere."""
    x, y, a, b = draw(40, 96, 8)
    seed = torch.tensor([3])
    row, column = (int(index) for index in (keep_mask(seed, 40, 96, 0.5) == kept).nonzero()[100])
    x[row, column] = float("nan")
    _, s = OPS._lora_delta_forward(y, x, a, b, None, 0.5, 0.5, seed)
    grad_x, grad_a, *_ = OPS._lora_backward(y, x, None, a, b, s, None, 0.5, 0.5, seed, 1 | 2 | 4)
    bad_s, bad_a = ~s.isfinite(), ~grad_a.isfinite()
    assert bad_s[row].all() == kept and bad_a[:, column].all() == kept
    bad_s[row], bad_a[:, column] = False, False
    assert not bad_s.any() and not bad_a.any() and grad_x.isfinite().all()


def test_dropped_elements_of_grad_x_are_zero():
    x, y, a, b = draw(40, 96, 8)
    seed = torch.tensor([3])
    grad_x = OPS._lora_backward(y, x, None, a, b, None, None, 0.5, 0.5, seed, 1)[0]
    assert torch.equal(grad_x == 0, ~keep_mask(seed, 40, 96, 0.5))
