"""LoRA on a linear layer in plain PyTorch (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models")."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop


def lora_delta(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``y + (scale * drop(x) a^T) b^T``, accumulated in fp32 (fp64 for fp64) and rounded once to ``y``'s dtype."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_acc = x.to(acc)
    if training and dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed: the reference needs an int64 tensor with one element when dropout is on, got None")
        x_acc = drop(x_acc, dropout_p, seed)
    s = F.linear(x_acc, a.to(acc))
    s = s * (scale.to(acc) if isinstance(scale, Tensor) else scale)
    return (y.to(acc) + F.linear(s, b.to(acc))).to(y.dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``x weight^T + bias + (scale * drop(x) a^T) b^T``; the base product is rounded to ``x``'s dtype first."""
    return lora_delta(F.linear(x, weight, bias), x, a, b, scale, dropout_p, training, seed)
