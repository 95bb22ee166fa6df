"""Adapters as serving engines keep them, stacked by slot: :func:`multi_lora_stacked_`.

One op without a result and without a line of Python in it, so that a compiled model calls it at no more than its own
cost: what Python a compiled graph of a large model calls may cost a system call for each frame, as CPython takes memory
for the frames of deep calls in chunks and returns a chunk when the call that needed it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (it loads the raw op)

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
