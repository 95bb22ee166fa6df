"""LoRA around transformers' ``Conv1D``, GPT-2's linear layer: its weight is ``[in_features, out_features]``."""

from __future__ import annotations

from torch import nn

from .base import is_conv1d, is_plain_conv1d
from .lora import LoraLinear


class LoraConv1D(LoraLinear):
    """:class:`LoraLinear` around a ``Conv1D``: the op reads a transposed view of the weight, nothing is copied.

    Args, adapters and state dict are those of :class:`LoraLinear`; ``base_layer.weight`` is
    ``[in_features, out_features]``.
    """

    output_dim = 1
    _is_plain = staticmethod(is_plain_conv1d)

    @classmethod
    def features(cls, linear: nn.Module) -> tuple[int, int]:
        if not is_conv1d(linear):
            raise TypeError(f"{cls.__name__}: linear must be transformers' Conv1D, got {type(linear).__name__}")
        return tuple(linear.weight.shape)
