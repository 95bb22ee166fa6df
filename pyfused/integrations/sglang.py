"""pyfused's kernels in SGLang: a LoRA backend over :func:`pyfused.ops.multi_lora_`, and the plug-in that names it.

Where pyfused is installed beside SGLang, the entry point ``sglang.srt.plugins`` calls :func:`register`, and
``--lora-backend pyfused`` chooses the backend; ``SGLANG_PLUGINS`` may leave it out. Importing this file imports SGLang.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from sglang.srt.lora.backend.base_backend import BaseLoRABackend
from sglang.srt.lora.backend.lora_registry import register_lora_backend
from sglang.srt.lora.utils import LoRABatchInfo, generate_sequence_lengths, get_lm_head_pruned_lens
from torch import Tensor

from ..ops import LoraTable, multi_lora_

NAME = "pyfused"


def register() -> None:
    """Let SGLang know :class:`LoraBackend` by the name "pyfused", also on its command line."""
    from sglang.srt.server_args import ServerArgs

    register_lora_backend(NAME)(lambda: LoraBackend)
    for field in typing.get_type_hints(ServerArgs, include_extras=True)["lora_backend"].__metadata__:
        if getattr(field, "choices", None) and NAME not in field.choices:
            field.choices.append(NAME)


@dataclass
class _Batch(LoRABatchInfo):
    """SGLang's description of a batch, with the slot of each segment (int32, -1: no adapter)."""

    index: Tensor | None = None


class LoraBackend(BaseLoRABackend):
    """SGLang's interface to LoRA kernels, for dense models; a layer's base output is changed in place.

    Buffers are ``lora_a [slots, c * max_rank, in]`` and ``lora_b [slots, out, max_rank]``, c slices of the output that
    share the input. A slot's adapter takes the first ``c * rank`` rows of A and the first ``rank`` columns of B. Ranks
    and scalings may differ from slot to slot; where a segment's adapter has rank 0 the base output is not touched.

    Without CUDA graphs: an adapter's rank is an argument of a kernel's launch, which a graph would keep.
    """

    name = NAME

    def __init__(self, max_loras_per_batch: int, device: torch.device, **kwargs: Any) -> None:
        super().__init__(max_loras_per_batch, device)
        # Of each slot, as it was last used. A batch says them of its own slots alone, and tables serve several batches.
        self._slots: list[tuple[int, float]] = [(0, 0.0)] * max_loras_per_batch
        self._tables: dict[tuple[int, int, tuple[int, ...]], list[LoraTable]] = {}

    # A batch ----------------------------------------------------------------------------------------------------------

    def prepare_lora_batch(
        self,
        forward_batch: Any,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_decode_cuda_graph: bool = False,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Take the adapters of the next forward: the slot of each request, rank and scaling of each slot."""
        if use_decode_cuda_graph or use_prefill_cuda_graph:
            raise _no_graphs()
        lengths = generate_sequence_lengths(forward_batch, device="cpu").tolist()
        self._set_batch(lengths, weight_indices, lora_ranks, scalings)
        self.batch_info = self._add_moe_lora_info(forward_batch, self.batch_info)
        pruned = get_lm_head_pruned_lens(forward_batch)
        if pruned is not None:
            self.lm_head_batch_info = _batch(pruned, weight_indices, lora_ranks, scalings, self.device)
            passes = self._get_lm_head_pass_segments(weight_indices, pruned)
            if passes is not None:
                self.lm_head_pass_batch_infos = [
                    _batch(rows, slots, lora_ranks, scalings, self.device) for slots, rows in passes
                ]

    def prepare_lora_token_segments(
        self,
        *,
        segment_lens: list[int],
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
    ) -> None:
        """:meth:`prepare_lora_batch` for segments of rows instead of requests."""
        self._set_batch(segment_lens, weight_indices, lora_ranks, scalings)

    def _set_batch(self, lengths: list[int], slots: list[int], ranks: list[int], scalings: list[float]) -> None:
        self.reset_batch_state()
        for slot, (rank, scaling) in enumerate(zip(ranks, scalings, strict=True)):
            if rank > 0 and self._slots[slot] != (rank, float(scaling)):
                self._slots[slot] = (rank, float(scaling))
                self._tables.clear()
        self.batch_info = _batch(lengths, slots, ranks, scalings, self.device)

    def init_decode_cuda_graph_batch_info(self, max_bs_in_cuda_graph: int, num_tokens_per_req: int) -> None:
        raise _no_graphs()

    def init_prefill_cuda_graph_batch_info(self, max_num_tokens: int, max_num_requests: int | None = None) -> None:
        raise _no_graphs()

    # Layers, in one step ----------------------------------------------------------------------------------------------

    def forward_with_base(
        self,
        layer: Any,
        x: Tensor,
        base_fn: Any,
        lora_a: Tensor,
        lora_b: Tensor,
        output_offset: Tensor,
        offsets: Sequence[int],
        *,
        all_reduce: Any = None,
        kind: str = "linear",
        pruned_batch_info: LoRABatchInfo | None = None,
    ) -> Tensor:
        """``y = base(x)`` with each row's adapter; layers whose halves are reduced apart take two steps."""
        if all_reduce is not None or kind not in ("linear", "lm_head"):
            options = {"all_reduce": all_reduce, "kind": kind, "pruned_batch_info": pruned_batch_info}
            return super().forward_with_base(layer, x, base_fn, lora_a, lora_b, output_offset, offsets, **options)
        return self._add(base_fn(), x, lora_a, lora_b, offsets, pruned_batch_info)

    def run_qkv_lora(
        self,
        x: Tensor,
        qkv_lora_a: Tensor,
        qkv_lora_b: Tensor,
        output_offset: Tensor,
        output_offset_cpu: Tensor,
        max_qkv_out_dim: int | None = None,
        base_output: Tensor | None = None,
        n_slices: int = 3,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``base_output[:, slice] += scaling * x A^T B^T`` for each of n_slices slices; None: 0."""
        return self._add(base_output, x, qkv_lora_a, qkv_lora_b, output_offset_cpu.tolist())

    def run_gate_up_lora(
        self,
        x: Tensor,
        gate_up_lora_a: Tensor,
        gate_up_lora_b: Tensor,
        output_offset: Tensor | None = None,
        output_offset_cpu: Tensor | None = None,
        base_output: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """:meth:`run_qkv_lora` for two slices."""
        return self._add(base_output, x, gate_up_lora_a, gate_up_lora_b, output_offset_cpu.tolist())

    def _add(
        self,
        y: Tensor | None,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        offsets: Sequence[int],
        batch: LoRABatchInfo | None = None,
    ) -> Tensor:
        batch = self.batch_info if batch is None else batch
        y = x.new_zeros(x.shape[0], offsets[-1]) if y is None else y
        if batch.has_active_lora:
            slices = [y[:, begin:end] for begin, end in pairwise(offsets)]  # y may be padded to a round vocabulary
            multi_lora_(slices, x, self._tables_of(lora_a, lora_b, offsets), batch.index, batch.seg_indptr)
        return y

    def _tables_of(self, lora_a: Tensor, lora_b: Tensor, offsets: Sequence[int]) -> list[LoraTable]:
        """A table for each slice, of all slots that have been used; SGLang loads adapters into its buffers in place."""
        key = (lora_a.data_ptr(), lora_b.data_ptr(), tuple(offsets))
        if key not in self._tables:
            self._tables[key] = [
                LoraTable(
                    [
                        (lora_a[slot, place * rank : (place + 1) * rank], lora_b[slot, begin:end, :rank], scaling)
                        if rank
                        else None
                        for slot, (rank, scaling) in enumerate(self._slots)
                    ]
                )
                for place, (begin, end) in enumerate(pairwise(offsets))
            ]
        return self._tables[key]

    # The halves of layers that are reduced in between, and embeddings -------------------------------------------------

    def run_lora_a_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        stack_num: int = 1,
        *args: Any,
        pruned_batch_info: LoRABatchInfo | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``scaling * x A^T`` in fp32, ``[rows, c * max_rank]``; a row's slices lie side by side, then zeros."""
        s = torch.zeros(x.shape[0], weights.shape[1], dtype=torch.float32, device=x.device)
        for slot, rows in _groups(self.batch_info if pruned_batch_info is None else pruned_batch_info):
            rank, scaling = self._slots[slot]
            a = weights[slot, : stack_num * rank].float()
            s[rows, : stack_num * rank] = scaling * (x[rows].float() @ a.t())
        return s

    def run_lora_b_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        output_offset: Tensor | None = None,
        output_offset_cpu: Tensor | None = None,
        base_output: Tensor | None = None,
        *args: Any,
        pruned_batch_info: LoRABatchInfo | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``base_output[:, slice] += x[:, slice of ranks] B^T``; None: 0, in the dtype of B."""
        offsets = [0, weights.shape[1]] if output_offset_cpu is None else output_offset_cpu.tolist()
        y = weights.new_zeros(x.shape[0], offsets[-1]) if base_output is None else base_output
        for slot, rows in _groups(self.batch_info if pruned_batch_info is None else pruned_batch_info):
            rank = self._slots[slot][0]
            for place, (begin, end) in enumerate(pairwise(offsets)):
                s, b = x[rows, place * rank : (place + 1) * rank].float(), weights[slot, begin:end, :rank].float()
                y[rows, begin:end] = (y[rows, begin:end].float() + s @ b.t()).to(y.dtype)
        return y

    def run_lora_a_embedding(
        self,
        input_ids: Tensor,
        weights: Tensor,
        vocab_size: int,
        extra_embeddings: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``scaling * A[:, ids]^T`` in fp32, ``[rows, max_rank]``; weights are ``[slots, max_rank, vocab_size]``."""
        if extra_embeddings is not None:
            raise NotImplementedError("run_lora_a_embedding: embeddings of added tokens are not built")
        s = torch.zeros(input_ids.shape[0], weights.shape[1], dtype=torch.float32, device=weights.device)
        for slot, rows in _groups(self.batch_info):
            rank, scaling = self._slots[slot]
            s[rows, :rank] = scaling * weights[slot, :rank, input_ids[rows]].t().float()
        return s


def _batch(
    lengths: list[int], slots: list[int], ranks: list[int], scalings: list[float], device: torch.device
) -> _Batch:
    index = [slot if ranks[slot] > 0 else -1 for slot in slots]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return _Batch(
        use_cuda_graph=False,
        bs=len(slots),
        num_segments=len(slots),
        seg_indptr=bounds.to(device, torch.int32),
        weight_indices=torch.tensor(slots, dtype=torch.int32, device=device),
        lora_ranks=torch.tensor(ranks, dtype=torch.int32, device=device),
        scalings=torch.tensor(scalings, dtype=torch.float32, device=device),
        max_len=max(lengths, default=0),
        seg_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        expected_tokens=sum(lengths),
        has_active_lora=max(index, default=-1) >= 0,
        index=torch.tensor(index, dtype=torch.int32, device=device),
    )


def _groups(batch: LoRABatchInfo) -> Iterator[tuple[int, Tensor]]:
    """The slots that are used, and their rows."""
    slots = batch.index.repeat_interleave(batch.seg_lens)
    for slot in slots.unique().tolist():
        if slot >= 0:
            yield slot, (slots == slot).nonzero().view(-1)


def _no_graphs() -> NotImplementedError:
    return NotImplementedError(
        "pyfused's LoRA backend runs without CUDA graphs: start SGLang with --disable-cuda-graph"
    )
