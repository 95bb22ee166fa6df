"""LoRA on an embedding: the rows that a batch asks for are gathered, and multiplied once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import FLOAT_DTYPES, without_autocast


def lora_embedding(
    y: Tensor,
    ids: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float,
    *,
    embed_scale: Tensor | None = None,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    r"""A LoRA adapter added to the output of an embedding: :math:`y + scale \cdot A^T[ids] \, B^T`.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3, for a one-hot x. A's columns are
    gathered; a token that comes again adds to the gradient of its column each time.

    Args:
        y: output of the base embedding ``[..., D]``. It is not changed.
        ids: integers ``[...]`` in [0, V), y's leading dimensions.
        a: ``[R, V]``.
        b: ``[D, R]``, a's dtype.
        scale: a float.
        embed_scale: a tensor with one element that the base multiplies its rows by (Gemma 3), or None.
        padding_idx, max_norm, norm_type, scale_grad_by_freq: for the gather of A's columns, as in
            ``torch.nn.functional.embedding``; padding_idx gets no gradient, ``max_norm`` changes A in place. A's
            gradient is always dense.

    Returns:
        A new tensor ``[..., D]`` in y's dtype. The sum is computed in the wider of y's and the adapter's dtypes and
        rounded once; autocast is not followed, as it is not by embeddings.

    Raises:
        TypeError: y, a or b is no floating tensor, or ids no tensor of integers.
        ValueError: shapes do not fit.
    """
    _check(y, ids, a, b)
    gathered = F.embedding(ids, a.t(), padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if embed_scale is not None:
        gathered = gathered * embed_scale.to(gathered.dtype)
    dtype = torch.promote_types(y.dtype, b.dtype)
    with without_autocast(y):
        rows = torch.addmm(
            y.reshape(-1, y.shape[-1]).to(dtype),
            gathered.reshape(-1, a.shape[0]).to(dtype),
            b.t().to(dtype),
            alpha=scale,
        )
    return rows.view(y.shape).to(y.dtype)


def _check(y, ids, a, b) -> None:
    for name, tensor in (("y", y), ("a", a), ("b", b)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOAT_DTYPES:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"lora_embedding: {name} must be a floating tensor, got {got}")
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"lora_embedding: ids must be an int64 or int32 tensor, got {got}")
    if a.dim() != 2 or a.shape[0] == 0:
        raise ValueError(f"lora_embedding: a must have shape [R, V] with R >= 1, got {list(a.shape)}")
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"lora_embedding: b must have shape [D, {a.shape[0]}], got {list(b.shape)}")
    if tuple(y.shape) != (*ids.shape, b.shape[0]):
        expected = [*ids.shape, b.shape[0]]
        raise ValueError(
            f"lora_embedding: y must have shape {expected} (ids is {list(ids.shape)}), got {list(y.shape)}"
        )
