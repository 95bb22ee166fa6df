"""LoRA around transformers' ``Conv1D``, GPT-2's linear layer: its weight is ``[in_features, out_features]``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import is_conv1d, is_plain_conv1d
from .lora import LoraLinear
from .shared_input import Arguments


class LoraConv1D(LoraLinear):
    """:class:`LoraLinear` around a ``Conv1D``: the op reads a transposed view of the weight, nothing is copied.

    Args, adapters and state dict are those of :class:`LoraLinear`; ``base_layer.weight`` is
    ``[in_features, out_features]``.
    """

    output_dim = 1

    @classmethod
    def features(cls, linear: nn.Module) -> tuple[int, int]:
        if not is_conv1d(linear):
            raise TypeError(f"{cls.__name__}: linear must be transformers' Conv1D, got {type(linear).__name__}")
        return tuple(linear.weight.shape)

    def _first_arguments(self, x: Tensor, base: nn.Module, name: str) -> Arguments | None:
        if name in self._forms or not is_plain_conv1d(base):
            return None
        weight = base._parameters["weight"]
        # Where the layer would refuse x's dtype, it is called and says so itself.
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        adapter = self._arguments(name)
        return None if adapter is None else (weight.t(), base._parameters["bias"], *adapter)
