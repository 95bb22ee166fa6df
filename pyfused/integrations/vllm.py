"""pyfused's kernels in vLLM: a Punica wrapper over :func:`pyfused.ops.multi_lora_`, and the plug-in that names it.

Where pyfused is installed beside vLLM, the entry point ``vllm.general_plugins`` calls :func:`register` in each of
vLLM's processes. ``PYFUSED_VLLM=0`` or ``VLLM_PLUGINS`` leaves it out. Importing this file imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from .. import _library
from ..ops import LoraTable, multi_lora_


def register() -> None:
    """Let vLLM compute LoRA with :class:`PunicaWrapper` on CPUs, and with ``PYFUSED_VLLM=1`` on NVIDIA's GPUs, too.

    With ``PYFUSED_VLLM=compile`` models with LoRA are compiled on CPUs like others, unless ``--enforce-eager`` says
    otherwise. Nothing changes on a device for which pyfused has no kernels.
    """
    from vllm.platforms import current_platform

    wanted = os.environ.get("PYFUSED_VLLM", "1" if current_platform.is_cpu() else "0")
    if wanted == "0" or not _library.has_kernel(current_platform.device_type):
        return
    platform = type(current_platform)
    name = f"{PunicaWrapper.__module__}.{PunicaWrapper.__qualname__}"
    platform.get_punica_wrapper = classmethod(lambda cls: name)
    if current_platform.is_cpu() and wanted == "compile":
        _compile_with_lora(platform)


def _compile_with_lora(platform: type) -> None:
    own = platform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:
        # All that vLLM decides by it on a CPU is not to compile, as its own wrapper there branches on numbers.
        lora, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            own(vllm_config)
        finally:
            vllm_config.lora_config = lora

    platform.check_and_update_config = classmethod(check_and_update_config)


class PunicaWrapper(PunicaWrapperBase):
    """vLLM's interface to LoRA kernels: ``y`` is changed in place, and rows of the base model are not touched.

    ``lora_a_stacked`` has a tensor ``[slots, 1, max_rank, in]`` for each slice of the output and ``lora_b_stacked`` one
    ``[slots, 1, slice, max_rank]``; the slot of each token is what ``update_metadata`` was told, -1 for the base model.
    Nothing here waits for a GPU, and what runs in a model that is compiled is one op without a result.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        self._layers: dict[tuple[int, int, float], _Layer] = {}
        self._base_only = False
        for slots in (self._token_lora_indices, self._sampler_indices):
            slots.fill_(-1)
            _wrappers[slots.data_ptr()] = self

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Take the adapters of the tokens and prompts of a step."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        # Rows beyond the batch, which fill it up, belong to the base model.
        self._token_lora_indices[self.indices_len[0] :] = -1
        self._sampler_indices[self.indices_len[1] :] = -1
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
        self._add(y, x, lora_a_stacked, lora_b_stacked, scale, self._token_lora_indices)

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
        y = y[..., : lora_b_stacked.shape[-2]]  # it may be padded to a round vocabulary
        self._add(y, x, (lora_a_stacked,), (lora_b_stacked,), scale, self._sampler_indices)

    def add_shrink(
        self,
        y: tuple[Tensor, ...] | Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        scale: float,
        **kwargs: Any,
    ) -> None:
        """``y[i] += scale * x A^T``; called by itself in fully sharded layers only."""
        for one, a in zip(y, lora_a_stacked, strict=True):
            self._add(one, x, (a,), (), scale, self._token_lora_indices)

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
            self._expand(y[:, offset : offset + size], one, b, add_inputs)
            offset += size

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """``y += x B^T``, x the rows of A that were looked up."""
        self._expand(y, x, lora_b_stacked, add_inputs)

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> None:
        """``y = x W^T + bias`` with the adapter's own classification head, for prompts whose adapter has one."""
        product = y.new_zeros((x.shape[0], weight_stacked.shape[-2]), dtype=torch.float32)
        self._add(product, x, (weight_stacked,), (), 1.0, self._sampler_indices)
        y.copy_(self._select_full_linear_output(y, product, bias_stacked, module_enabled))

    def _expand(self, y: Tensor, x: Tensor, b: Tensor, add_inputs: bool) -> None:
        if not add_inputs:
            y = _rows(y)
            y.masked_fill_((self._token_lora_indices[: y.shape[0]] >= 0).unsqueeze(1), 0)
        self._add(y, x, (), (b,), 1.0, self._token_lora_indices)

    def _add(self, y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: float, slots: Tensor) -> None:
        if torch.compiler.is_compiling():
            torch.ops.pyfused.vllm_add_lora(_rows(y), _rows(x), list(a), list(b), float(scale), slots)
        else:
            self._add_now(_rows(y), _rows(x), a, b, scale, slots)

    def _add_now(
        self, y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: float, slots: Tensor
    ) -> None:
        if self._base_only:
            return
        key = (a[0].data_ptr() if a else 0, b[0].data_ptr() if b else 0, scale)
        layer = self._layers.get(key)
        if layer is None:
            layer = self._layers[key] = _Layer(a, b, scale)
        tables = layer.tables()
        if not tables:
            return
        slots, wide = slots[: x.shape[0]], torch.promote_types(x.dtype, y.dtype)
        # Adding -0.0 changes no bit of a row without an adapter.
        out = y if y.dtype == wide else torch.full_like(y, -0.0, dtype=wide)
        multi_lora_(out.split(layer.sizes, dim=1) if len(tables) > 1 else [out], x.to(wide), tables, slots)
        if out is not y:
            y += out


class _Layer:
    """The adapters of a layer by slot: a table for each slice of its output, of products without ``a`` or ``b``, too.

    The engine's stacks live as long as it does, and adapters are loaded into them in place.
    """

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], scale: float) -> None:
        ranks = [one.shape[-2] for one in a] if a else [one.shape[-1] for one in b]
        units = [torch.eye(rank, dtype=(a or b)[0].dtype, device=(a or b)[0].device) for rank in ranks]
        self._factors = list(zip(a or units, b or units, strict=True))
        self._watched = list(a or b)
        self._scale = float(scale)
        self._versions: list[int] | None = None
        self._tables: list[LoraTable] = []
        self.sizes = [of_b.shape[-2] for _, of_b in self._factors]

    def tables(self) -> list[LoraTable]:
        """None of them where no slot has an adapter for this layer."""
        # To look for zeros a GPU would have to be waited for.
        versions = [one._version for one in self._watched] if self._watched[0].is_cpu else []
        if versions != self._versions:
            self._versions = versions
            tables = [self._table(*one) for one in zip(self._watched, self._factors, strict=True)]
            self._tables = tables if any(table.device is not None for table in tables) else []
        return self._tables

    def _table(self, watched: Tensor, factors: tuple[Tensor, Tensor]) -> LoraTable:
        a, b = factors
        return LoraTable(
            [
                (_matrix(a, slot), _matrix(b, slot), self._scale) if there else None
                for slot, there in enumerate(_filled(watched))
            ]
        )


def _filled(stacked: Tensor) -> list[bool]:
    """Which slots have other numbers than the zeros of a layer that its adapter leaves out, or of an empty slot."""
    if not stacked.is_cpu:
        return [True] * stacked.shape[0]
    # The first row tells nearly always; only where it is zero are the others read.
    rows = stacked.view(stacked.shape[0], -1, stacked.shape[-1])
    return [first or bool(one.any()) for first, one in zip(rows[:, 0].any(1).tolist(), rows, strict=True)]


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])


def _matrix(stacked: Tensor, slot: int) -> Tensor:
    """A slot's matrix of ``[slots, 1, rows, columns]``; two dimensions are the same matrix for all slots."""
    return stacked[slot, 0] if stacked.dim() == 4 else stacked


# The wrapper whose slots a tensor has, by its address: a compiled model passes tensors only.
_wrappers: WeakValueDictionary[int, PunicaWrapper] = WeakValueDictionary()


def _add_lora(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scale: float, slots: Tensor) -> None:
    _wrappers[slots.data_ptr()]._add_now(y, x, a, b, scale, slots)


_LIBRARY = torch.library.Library("pyfused", "FRAGMENT")
_LIBRARY.define("vllm_add_lora(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float scale, Tensor slots) -> ()")
_LIBRARY.impl("vllm_add_lora", _add_lora, "CompositeExplicitAutograd")
torch.library.register_fake("pyfused::vllm_add_lora", lambda y, x, a, b, scale, slots: None, lib=_LIBRARY)
