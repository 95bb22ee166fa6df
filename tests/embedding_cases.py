"""Cases of ``ops.lora_embedding``: what its tests share."""

from __future__ import annotations

import torch
from helpers import DEVICE
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make(shape=(3, 5), count=11, dim=7, rank=3, dtype=torch.float64, adapter=None) -> tuple[Tensor, ...]:
    """y, ids (some of them often), a, b."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    adapter = dtype if adapter is None else adapter
    ids = torch.randint(0, count, shape, generator=generator)
    if ids.numel() > 3:
        ids.view(-1)[:3] = count - 1
    y = torch.randn(*shape, dim, generator=generator, dtype=torch.float64).to(dtype)
    a = torch.randn(rank, count, generator=generator, dtype=torch.float64).to(adapter)
    return y, ids, a, torch.randn(dim, rank, generator=generator, dtype=torch.float64).to(adapter)


def run(op, y, ids, a, b, **options) -> list[Tensor]:
    tensors = [tensor.clone().requires_grad_() for tensor in (y, a, b)]
    result = op(tensors[0], ids, *tensors[1:], 1.3, **options)
    weight = torch.randn(result.shape, generator=torch.Generator(DEVICE).manual_seed(2)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad((result * weight).sum(), tensors)]
