"""What the LoRA benchmarks on CPU and GPU share: LoRA in plain PyTorch, and two rules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A rank-r update holds the product of two matrices, each rounded once, on top of a base that is of its size.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}


class EagerLora(nn.Module):
    """LoRA as one writes it in PyTorch, with HF PEFT's numerics: the adapter is computed in its own dtype."""

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter, scale: float, dropout: float) -> None:
        super().__init__()
        self.linear, self.a, self.b, self.scale = linear, a, b, scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        # Scaled where it is small, and x cast before dropout so that fp32 adapters see an unrounded x / (1 - p).
        s = F.linear(self.dropout(x.to(self.a.dtype)), self.a) * self.scale
        return y + F.linear(s, self.b).to(y.dtype)


def limit(case, mode: str) -> float:
    """The ratio to eager and to HF PEFT that pyfused may have: below 1 in training with dropout, else up to 1.02."""
    return 1.0 if case.stage == "train" and case.dropout else 1.02
