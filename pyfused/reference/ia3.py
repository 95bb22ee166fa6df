"""IA3 in plain PyTorch: what :mod:`pyfused.ops` computes, differentiable, on any device.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ia3_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, side: str = "output") -> Tensor:
    """See :func:`pyfused.ops.ia3_linear`."""
    if side == "input":
        return F.linear(ia3_scale(x, scale), weight, bias)
    return ia3_scale(F.linear(x, weight, bias), scale)


def ia3_scale(x: Tensor, scale: Tensor, dim: int = -1) -> Tensor:
    """See :func:`pyfused.ops.ia3_scale`. Multiplied in fp32 (fp64 for fp64), rounded once to x's dtype."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    factor = scale.to(acc).view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
    return (x.to(acc) * factor).to(x.dtype)
