"""Functional ops: one file per op, tensors in, tensors out."""

from .bottleneck import bottleneck
from .ia3 import ia3_linear, ia3_scale
from .lora import lora_delta, lora_linear
from .lora_shared import Projection, lora_linear_shared

__all__ = ["Projection", "bottleneck", "ia3_linear", "ia3_scale", "lora_delta", "lora_linear", "lora_linear_shared"]
