"""Functional ops: one file per op, tensors in, tensors out."""

from .bottleneck import bottleneck
from .lora import lora_delta, lora_linear
from .lora_shared import Projection, lora_linear_shared

__all__ = ["Projection", "bottleneck", "lora_delta", "lora_linear", "lora_linear_shared"]
