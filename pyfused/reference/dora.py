"""DoRA's norm in plain PyTorch (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5)."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """See :func:`pyfused.ops.dora_norm`: of the adapted weight, which is computed here; a norm of 0 is given as 1."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(weight.to(dtype) + scale * (b.to(dtype) @ a.to(dtype)), dim=1)
    return norm.masked_fill(norm == 0.0, 1.0)
