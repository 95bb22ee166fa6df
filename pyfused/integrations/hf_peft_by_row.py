"""``adapter_names=`` of HF PEFT's LoRA layers: one op for all adapters of a batch in place of a loop over them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from torch import Tensor, nn

from .. import ops
from ..nn.by_row import BASE, add_table, table_of
from .hf_peft_adapters import adapter_obstacle, fits, is_plain


class FusedByRow:
    """For a linear layer of HF PEFT's: its forward where a call has an adapter for each sample.

    PEFT's own runs where an adapter is more than A and B.
    """

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        used = tuple(sorted({name for name in adapter_names if name != BASE and name in self.lora_A}))
        entries = self._table_entries(used, x)
        if entries is None:
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        # What is left are arguments of variants, of which there is none here, and those of the base layer.
        kwargs = {key: value for key, value in kwargs.items() if key not in VARIANT_KWARG_KEYS}
        y = self.base_layer(x, *args, **kwargs)
        if not entries:
            return y
        x, table, index = x.to(y.dtype), table_of(self, entries), _index(tuple(adapter_names), used, x.device)
        return add_table(self, y, x, table, index)

    def _table_entries(self, names: tuple[str, ...], x: Tensor) -> list[ops.LoraAdapter] | None:
        if not is_plain(x, self.in_features):
            return None
        entries = []
        for name in names:
            if adapter_obstacle(self, name) is not None or isinstance(self.scaling[name], Tensor):
                return None
            a, b = self.lora_A[name].weight, self.lora_B[name].weight
            if not (fits(a, x) and fits(b, x) and a.stride(-1) == 1 and b.stride(-1) == 1):
                return None
            dropout = self.lora_dropout[name]
            if type(dropout) is nn.Dropout and dropout.training is not self.training:
                return None
            entries.append(ops.LoraAdapter(a, b, self.scaling[name], getattr(dropout, "p", 0.0)))
        return entries


@functools.lru_cache(maxsize=4)
def _index(adapter_names: tuple[str, ...], used: tuple[str, ...], device: torch.device) -> Tensor:
    """int64 ``[samples]``: places in ``used``; -1 for the base and for adapters that the layer has not."""
    with torch.inference_mode(False):  # it may be used where gradients are recorded next
        return torch.tensor([used.index(name) if name in used else -1 for name in adapter_names], device=device)
