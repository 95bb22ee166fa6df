"""Many LoRA adapters in one batch, in plain PyTorch: :func:`pyfused.reference.lora.lora_delta` on each one's rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lora import lora_delta


def rows_of_adapters(index: Tensor, segments: Tensor | None, rows: int) -> Tensor:
    """The adapter of each row, int64 ``[rows]``; ``index`` and ``segments`` as in :func:`pyfused.ops.multi_lora`."""
    flat = index.reshape(-1).long()
    if segments is not None:
        return flat.repeat_interleave(segments.long().diff(), output_size=rows)
    return flat.repeat_interleave(rows // max(flat.numel(), 1))


def multi_lora(
    y: Tensor,
    x: Tensor,
    adapters: Sequence[tuple[Tensor, Tensor, float, float] | None],
    index: Tensor,
    segments: Tensor | None = None,
    training: bool = False,
    seeds: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """``y`` with each row's adapter added; ``adapters`` are ``(a, b, scale, dropout_p)``.

    A row's number in the dropout mask is its place among the rows of its adapter.
    """
    rows = x.shape[:-1].numel()
    x_rows, out = x.reshape(rows, x.shape[-1]), y.reshape(rows, y.shape[-1])
    adapter_of_row = rows_of_adapters(index, segments, rows)
    for number, adapter in enumerate(adapters):
        chosen = (adapter_of_row == number).nonzero().squeeze(1)
        if adapter is None or chosen.numel() == 0:
            continue
        a, b, scale, dropout_p = adapter
        seed = None if seeds is None else seeds[number]
        delta = lora_delta(out[chosen], x_rows[chosen], a, b, scale, dropout_p, training, seed)
        out = torch.index_copy(out, 0, chosen, delta)
    return out.reshape(y.shape)
