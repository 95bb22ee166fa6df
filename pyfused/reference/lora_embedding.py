"""LoRA on an embedding in plain PyTorch (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models")."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_embedding(
    y: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    embed_scale: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """See :func:`pyfused.ops.lora_embedding`: the dense product of A and B, and its rows by the tokens' numbers."""
    dtype = torch.promote_types(y.dtype, b.dtype)
    if padding_idx is not None:
        trained = torch.arange(a.shape[1], device=a.device) != padding_idx
        a = torch.where(trained, a, a.detach())
    table = a.t().to(dtype) if embed_scale is None else a.t().to(dtype) * embed_scale.to(dtype)
    product = scale * (table @ b.t().to(dtype))
    return (y.to(dtype) + product[ids.long()]).to(y.dtype)
