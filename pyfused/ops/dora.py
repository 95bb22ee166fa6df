"""DoRA's norm in its factored form, in plain PyTorch: no dense product of the adapter, whatever the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import without_autocast

# Elements of a weight that are held in fp32 at a time.
_CHUNK = 1 << 20


@torch.no_grad()
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, squares: Tensor | None = None) -> Tensor:
    r"""Norms of the rows of an adapted weight: :math:`||W + s B A||` ``[N]``.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5, by
    :math:`||W||^2 + 2 s (W A^T \odot B) 1 + s^2 (B (A A^T) \odot B) 1`, whose largest intermediate is ``[N, R]``. For
    fp16 and bf16 weights, parts of the weight are held in fp32 as well.

    Args:
        weight: ``[N, K]``, any floating dtype and strides.
        a: ``[R, K]``.
        b: ``[N, R]``.
        scale: a float, or a tensor with one element.
        squares: ``row_squares(weight)``, where it is known.

    Returns:
        fp32 (fp64 for an fp64 weight), under autocast as well, without a gradient. A norm of 0 is given as 1: the row
        is 0 whatever it is multiplied by.
    """
    dtype = _accumulator(weight)
    a, b = a.to(dtype), b.to(dtype)
    squares = row_squares(weight) if squares is None else squares
    with without_autocast(weight):
        product = torch.cat([part.to(dtype) @ a.t() for part in _parts(weight)])
        square = squares + ((2.0 * scale * product + scale * scale * (b @ (a @ a.t()))) * b).sum(1)
    norm = square.clamp_min(0.0).sqrt()
    return norm.masked_fill(norm == 0.0, 1.0)


@torch.no_grad()
def row_squares(weight: Tensor) -> Tensor:
    """:math:`||W||^2` of each row ``[N]``, in fp32 (fp64 for fp64)."""
    dtype = _accumulator(weight)
    return torch.cat([part.to(dtype).square().sum(1) for part in _parts(weight)])


def _accumulator(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.detach().split(max(1, _CHUNK // max(1, weight.shape[1])))
