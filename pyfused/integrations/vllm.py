"""pyfused's kernels in vLLM: a Punica wrapper over :func:`multi_lora_stacked_`, and the plug-in that names it.

Where pyfused is installed beside vLLM, the entry point ``vllm.general_plugins`` calls :func:`register` in each of
vLLM's processes. ``PYFUSED_VLLM=0`` or ``VLLM_PLUGINS`` leaves it out. Importing this file imports vLLM.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from .. import _library
from ..ops.multi_lora_stacked import multi_lora_stacked_


def register() -> None:
    """Let vLLM compute LoRA with :class:`PunicaWrapper` on CPUs, and with ``PYFUSED_VLLM=1`` on NVIDIA's GPUs, too.

    On CPUs models with LoRA are then compiled like others, unless ``--enforce-eager`` says otherwise. Nothing changes
    on a device for which pyfused has no kernels.
    """
    from vllm.platforms import current_platform

    wanted = os.environ.get("PYFUSED_VLLM", "1" if current_platform.is_cpu() else "0")
    if wanted == "0" or not _library.has_kernel(current_platform.device_type):
        return
    platform = type(current_platform)
    name = f"{PunicaWrapper.__module__}.{PunicaWrapper.__qualname__}"
    platform.get_punica_wrapper = classmethod(lambda cls: name)
    if current_platform.is_cpu():
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
        if lora is not None and vllm_config.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker":
            vllm_config.parallel_config.worker_cls = f"{__package__}.vllm_worker.Worker"

    platform.check_and_update_config = classmethod(check_and_update_config)


class PunicaWrapper(PunicaWrapperBase):
    """vLLM's interface to LoRA kernels: ``y`` is changed in place, and rows of the base model are not touched.

    ``lora_a_stacked`` has a tensor ``[slots, 1, max_rank, in]`` for each slice of the output and ``lora_b_stacked`` one
    ``[slots, 1, slice, max_rank]``; the slot of each token is what ``update_metadata`` was told, -1 for the base model.
    Nothing here waits for a GPU, and what runs in a model that is compiled is one op without a result.
    """

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device)
        for slots in (self._token_lora_indices, self._sampler_indices):
            slots.fill_(-1)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Take the adapters of the tokens and prompts of a step."""
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.is_prefill = mapping.is_prefill
        # Rows beyond the batch, which fill it up, belong to the base model.
        self._token_lora_indices[self.indices_len[0] :] = -1
        self._sampler_indices[self.indices_len[1] :] = -1

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
        """Without ``a`` or ``b`` the identity is in its place."""
        a = a or [torch.eye(one.shape[-1], dtype=one.dtype, device=one.device) for one in b]
        b = b or [torch.eye(one.shape[-2], dtype=one.dtype, device=one.device) for one in a]
        y, x, wide = _rows(y), _rows(x), torch.promote_types(x.dtype, y.dtype)
        if y.dtype == wide:
            multi_lora_stacked_(y, x.to(wide), a, b, scale, slots)
            return
        # Adding -0.0 changes no bit of a row without an adapter.
        out = torch.full_like(y, -0.0, dtype=wide)
        multi_lora_stacked_(out, x.to(wide), a, b, scale, slots)
        y += out


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.view(-1, tensor.shape[-1])
