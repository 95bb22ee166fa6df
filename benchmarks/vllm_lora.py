"""Many adapters in one batch by vLLM's Triton kernels, which descend from Punica's: a provider of bench_multi_lora.py.

The kernels are called as vLLM 0.32 has them. vLLM is imported only where this provider is asked for on a GPU. Its
matrices are padded to the batch's largest rank, as its engine pads them to ``max_lora_rank``; what the engine prepares
once a step for all layers is not timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def missing(device: torch.device) -> str | None:
    """Why the kernels cannot be called here; None where they can."""
    if device.type != "cuda":
        return "vLLM's Triton kernels need a CUDA device"
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink  # noqa: F401
    except Exception as error:  # a vllm for another torch fails in many ways
        return f"vllm's Triton kernels cannot be imported: {type(error).__name__}: {error}"
    return None


def padded(matrices: Sequence[Tensor], dim: int, rank: int) -> Tensor:
    """``[L, ...]``: matrices one after the other, with zeros up to ``rank`` in dimension ``dim``."""
    shape = list(matrices[0].shape)
    shape[dim] = rank
    out = matrices[0].new_zeros(len(matrices), *shape)
    for place, matrix in zip(out, matrices, strict=True):
        place.narrow(dim, 0, matrix.shape[dim]).copy_(matrix)
    return out


def layer(
    linear: nn.Linear, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], index: Tensor, scale: float
) -> Callable[[], Tensor]:
    """The frozen layer and its adapters by vLLM's kernels.

    Args:
        x: ``[sequences, rows, K]``.
        a, b: for each adapter ``[R, K]`` and ``[N, R]``.
        index: int64 ``[sequences]``, -1 for none.
    """
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    rank = max(matrix.shape[0] for matrix in a)
    stacked_a, stacked_b = padded(a, 0, rank), padded(b, 1, rank)
    rows = x.reshape(-1, x.shape[-1])
    of_row = index.repeat_interleave(x.shape[1]).int()
    meta = LoRAKernelMeta.make(len(a), len(rows), device=x.device)
    meta.prepare_tensors(of_row)
    # A grid for the adapters that have rows, the faster of the two that vLLM has.
    arguments = meta.meta_args(len(rows), True)
    buffer = torch.empty(1, len(rows), rank, dtype=torch.float32, device=x.device)

    def call() -> Tensor:
        y = linear(rows)
        lora_shrink(rows, [stacked_a], buffer, *arguments, scale)
        lora_expand(buffer, [stacked_b], y, *arguments, offset_start=0, add_inputs=True)
        return y.view(*x.shape[:-1], -1)

    return call
