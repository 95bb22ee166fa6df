"""Functional ops: one file per op, tensors in, tensors out."""

from .lora import lora_delta, lora_linear

__all__ = ["lora_delta", "lora_linear"]
