"""Adapters as serving engines keep them, stacked by slot: :func:`multi_lora_stacked_`.

One op without a result, and on a CPU without a line of Python in it, so that a compiled model calls it at no more than
its own cost: what Python a compiled graph of a large model calls may cost a system call for each frame, as CPython
takes memory for the frames of deep calls in chunks and returns a chunk when the call that needed it ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from .lora_table import descriptor_row
from .multi_lora import _raw_in_place

_raw = torch.ops.pyfused._multi_lora_stacked_.default


def multi_lora_stacked_(
    y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], scale: float, index: Tensor
) -> None:
    """:func:`pyfused.ops.multi_lora_` for y of one or more slices side by side, over adapters stacked by slot.

    On a CPU rows to which zeros alone would be added keep their bits, as those of an empty slot: they pay for the
    product with a. A batch without adapters costs next to nothing.

    Args:
        y: ``[rows, N]``, its first columns those of the slices.
        x: ``[rows, K]``, y's dtype.
        a, b: contiguous ``[slots, ..., R, K]`` and ``[slots, ..., N_i, R]`` for each slice, one matrix in a slot; of
            two dimensions it is the matrix of all slots. All are read when the op runs.
        scale: of all adapters.
        index: int32 or int64, a slot for each row or -1; entries beyond the rows are not read.

    Raises:
        RuntimeError: an argument does not fit the others.
    """
    _raw(y, x, list(a), list(b), float(scale), index)


@torch.library.register_fake("pyfused::_multi_lora_stacked_")
def _(y, x, a, b, scale, index):
    return None


def _on_gpu(y: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], scale: float, index: Tensor) -> None:
    # Whether a slot is empty is not asked: for that the GPU would have to be waited for.
    tables = [_table(_stack(one_a), _stack(one_b), scale) for one_a, one_b in zip(a, b, strict=True)]
    sizes = [one.shape[-2] for one in b]
    ys = y[:, : sum(sizes)].split(sizes, dim=1)
    _raw_in_place(list(ys), x, tables, index[: x.shape[0]], None)


torch.library.impl("pyfused::_multi_lora_stacked_", "CUDA", _on_gpu)


def _stack(stack: Tensor) -> tuple:
    """All that a table has of it."""
    if not stack.is_contiguous() or prod(stack.shape[1:-2]) != 1:
        raise ValueError(f"multi_lora_stacked_: a and b must be contiguous stacks, got {list(stack.shape)}")
    slots = 0 if stack.dim() == 2 else stack.shape[0]
    return stack.data_ptr(), slots, *stack.shape[-2:], stack.dtype


@lru_cache(maxsize=65536)
def _table(a: tuple, b: tuple, scale: float) -> Tensor:
    """The descriptor of a :class:`pyfused.ops.LoraTable`: it has addresses only, so it holds for whatever is there."""
    (start_a, slots_a, rank, width, dtype_a), (start_b, slots_b, columns, rank_b, dtype_b) = a, b
    slots = max(slots_a, slots_b)
    if rank != rank_b or 0 < slots_a != slots_b > 0 or slots == 0:
        raise ValueError(f"multi_lora_stacked_: a and b must have the same slots and ranks, got {a} and {b}")
    step_a = rank * width * dtype_a.itemsize if slots_a else 0
    step_b = columns * rank * dtype_b.itemsize if slots_b else 0
    sizes = (rank, width, columns, width, rank)
    rows = [
        descriptor_row(start_a + slot * step_a, start_b + slot * step_b, sizes, dtype_a, dtype_b, scale)
        for slot in range(slots)
    ]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")
