"""pyfused's kernels in vLLM: a Punica wrapper over :func:`pyfused.ops.multi_lora_`, and the plug-in that names it.

Where pyfused is installed beside vLLM, the entry point ``vllm.general_plugins`` calls :func:`register` in each of
vLLM's processes. ``PYFUSED_VLLM=0`` or ``VLLM_PLUGINS`` leaves it out. Importing this file imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from ..ops import LoraTable, multi_lora_


def register() -> None:
    """Let vLLM compute LoRA with :class:`PunicaWrapper` where it runs on a CPU; on other devices nothing changes."""
    if os.environ.get("PYFUSED_VLLM") == "0":
        return
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        name = f"{PunicaWrapper.__module__}.{PunicaWrapper.__qualname__}"
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: name)


class PunicaWrapper(PunicaWrapperBase):
    """vLLM's interface to LoRA kernels: ``y`` is changed in place, and rows of the base model are not touched.

    ``lora_a_stacked`` has a tensor ``[slots, 1, max_rank, in]`` for each slice of the output and ``lora_b_stacked`` one
    ``[slots, 1, slice, max_rank]``; the slot of each token is what ``update_metadata`` was told, -1 for the base model.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._tables: dict[tuple[int, int, float], LoraTable] = {}
        self._base_only = False

    def update_metadata(self, mapping: Any, *args: Any, **kwargs: Any) -> None:
        """Take the adapters of the tokens and prompts of a step."""
        super().update_metadata(mapping, *args, **kwargs)
        self._base_only = not any(mapping.index_mapping) and not any(mapping.prompt_mapping)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        """``y[:, slice] += scale * x A^T B^T`` for each slice, in one pass over x."""
        if not self._base_only:
            y, x = _rows(y), _rows(x)
            _add(
                y.split(list(output_slices), dim=1) if len(output_slices) > 1 else [y],
                x,
                [self._table(a, b, scale) for a, b in zip(lora_a_stacked, lora_b_stacked, strict=True)],
                _fitted(self.token_lora_indices, x.shape[0]),
            )

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """``y += scale * x A^T B^T``, a row for each prompt that is sampled from."""
        if not self._base_only:
            y, x = _rows(y)[:, : lora_b_stacked.shape[-2]], _rows(x)  # y may be padded to a round vocabulary
            slots = _fitted(self.sampler_indices, x.shape[0])
            _add([y], x, [self._table(lora_a_stacked, lora_b_stacked, scale)], slots)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """``y[i] += scale * x A^T``; called by itself in fully sharded layers only."""
        x = _rows(x)
        for one, a in zip(y, lora_a_stacked, strict=True):
            one = _rows(one)
            for slot, rows in _groups(_fitted(self.token_lora_indices, x.shape[0])):
                one[rows] += (x[rows].to(one.dtype) @ _matrix(a, slot).to(one.dtype).t()) * scale

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y[:, slice] += x[i] B^T``; without ``add_inputs`` it is an assignment."""
        y, offset = _rows(y), offset_start
        for one, b, size in zip(x, lora_b_stacked, output_slices, strict=True):
            _expand(y[:, offset : offset + size], _rows(one), b, self.token_lora_indices, add_inputs)
            offset += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """``y += x B^T``, x the rows of A that were looked up."""
        if not self._base_only:
            _expand(_rows(y), _rows(x), lora_b_stacked, self.token_lora_indices, add_inputs)

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> None:
        """``y = x W^T + bias`` with the adapter's own classification head, for prompts whose adapter has one."""
        for slot, rows in _groups(_fitted(self.sampler_indices, x.shape[0])):
            if module_enabled[slot]:
                weight = _matrix(weight_stacked, slot)
                y[rows] = (x[rows].to(weight.dtype) @ weight.t() + bias_stacked[slot].view(-1)).to(y.dtype)

    def _table(self, a: Tensor, b: Tensor, scale: float) -> LoraTable:
        # The engine's stacks live as long as it does, and adapters are loaded into them in place.
        key = (a.data_ptr(), b.data_ptr(), scale)
        table = self._tables.get(key)
        if table is None:
            slots = range(a.shape[0])
            table = LoraTable([(_matrix(a, slot), _matrix(b, slot), float(scale)) for slot in slots])
            self._tables[key] = table
        return table


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


def _matrix(stacked: Tensor, slot: int) -> Tensor:
    """A slot's matrix of ``[slots, 1, rows, columns]`` or ``[slots, rows, columns]``."""
    return stacked[slot].view(stacked.shape[-2:])


def _fitted(slots: Tensor, rows: int) -> Tensor:
    """One entry for each row: rows beyond the batch, which fill it up, belong to the base model."""
    if slots.shape[0] >= rows:
        return slots[:rows]
    return torch.nn.functional.pad(slots, (0, rows - slots.shape[0]), value=-1)


def _groups(slots: Tensor) -> Iterator[tuple[int, Tensor]]:
    for slot in slots.unique().tolist():
        if slot >= 0:
            yield slot, (slots == slot).nonzero().view(-1)


def _add(ys: list[Tensor] | tuple[Tensor, ...], x: Tensor, tables: list[LoraTable], slots: Tensor) -> None:
    if all(y.dtype == x.dtype for y in ys):
        multi_lora_(ys, x, tables, slots)
        return
    for y, table in zip(ys, tables, strict=True):  # logits may be wider than the hidden states
        delta = torch.zeros_like(y, dtype=x.dtype)
        multi_lora_(delta, x, table, slots)
        y += delta


def _expand(y: Tensor, x: Tensor, stacked: Tensor, slots: Tensor, add_inputs: bool) -> None:
    for slot, rows in _groups(_fitted(slots, x.shape[0])):
        weight = _matrix(stacked, slot)
        delta = (x[rows].float() @ weight.float().t()).to(y.dtype)
        y[rows] = y[rows] + delta if add_inputs else delta
