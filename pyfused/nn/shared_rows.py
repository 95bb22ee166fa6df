"""One small tensor as every row of a batch, without a copy for each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def share_rows(tensor: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
    """``tensor`` [...] in ``dtype`` as [rows, ...], a view that all rows share.

    The gradient is the sum of the rows', added in the wider of the two dtypes, as if each row had a copy of its own in
    the dtype of ``tensor``.
    """
    if tensor.dtype == dtype or torch.compiler.is_compiling():
        return tensor.to(dtype).expand(rows, *tensor.shape)
    return _ShareRows.apply(tensor, dtype, rows)


class _ShareRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dtype: torch.dtype, rows: int) -> Tensor:
        ctx.dtype = tensor.dtype
        return tensor.to(dtype).expand(rows, *tensor.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return sum_rows(grad, ctx.dtype), None, None


def sum_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the rows of a gradient [rows, ...], added in the wider of its dtype and ``dtype``."""
    return grad.sum(0, dtype=torch.promote_types(dtype, grad.dtype)).to(dtype)
