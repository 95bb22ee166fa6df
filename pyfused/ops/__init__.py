"""Functional ops: one file per op, tensors in, tensors out."""

from . import multi_lora_stacked as _multi_lora_stacked  # noqa: F401  (its raw op's fake kernel)
from .bottleneck import bottleneck
from .dora import dora_norm, row_squares
from .dropout import dropout
from .ia3 import ia3_layer, ia3_linear, ia3_scale
from .linear import frozen_linear
from .lora import lora_delta, lora_linear
from .lora_embedding import lora_embedding
from .lora_shared import Projection, lora_linear_shared
from .lora_table import LoraAdapter, LoraTable
from .multi_lora import multi_lora, multi_lora_

__all__ = [
    "LoraAdapter",
    "LoraTable",
    "Projection",
    "bottleneck",
    "dora_norm",
    "dropout",
    "frozen_linear",
    "ia3_layer",
    "ia3_linear",
    "ia3_scale",
    "lora_delta",
    "lora_embedding",
    "lora_linear",
    "lora_linear_shared",
    "multi_lora",
    "multi_lora_",
    "row_squares",
]
