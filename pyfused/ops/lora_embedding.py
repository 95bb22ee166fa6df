"""LoRA on an embedding: the public op ``lora_embedding``.

Forward and backward are raw ops of ``_ops`` (``csrc/cpu/lora_embedding.cpp``): what a batch asks for is gathered, and
added to y in one pass. Saved for backward are the tokens and the gathered rows, M x R. Rare options of embeddings, and
devices without a kernel, are composed of torch's own functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    CALL_ERRORS,
    FLOAT_DTYPES,
    check_one_device,
    explain,
    has_native,
    on_values,
    refuse_double_backward,
    without_autocast,
)

_raw_forward = torch.ops.pyfused._lora_embedding_forward.default
_raw_backward = torch.ops.pyfused._lora_embedding_backward.default

# Which gradients a backward is asked for, as bits of the raw op's `needs` (csrc/common/needs.h has the same).
_NEED_A, _NEED_B = 2, 4


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
            gradient is always dense, and a token's share of it is added up in the order of the rows.

    Returns:
        A new tensor ``[..., D]`` in y's dtype. The sum is computed in the wider of y's and the adapter's dtypes and
        rounded once; autocast is not followed, as it is not by embeddings.

    Raises:
        TypeError: y, a or b is no floating tensor, or ids no tensor of integers.
        ValueError: shapes do not fit.
        IndexError: a token outside of [0, V).
    """
    _check(y, ids, a, b)
    if y.layout is torch.jagged:
        options = {"embed_scale": embed_scale, "padding_idx": padding_idx, "max_norm": max_norm}
        options |= {"norm_type": norm_type, "scale_grad_by_freq": scale_grad_by_freq}
        return on_values(lambda rows, tokens: lora_embedding(rows, tokens, a, b, scale, **options), y, ids)
    native = (
        max_norm is None
        and not scale_grad_by_freq
        and has_native(y)
        # Sharded parameters, or an adapter that is wider than y: the sum is in its dtype.
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and (y.dtype == torch.float64 or torch.float64 not in (a.dtype, b.dtype))
    )
    if not native:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq)
        return _composed(y, ids, a, b, scale, embed_scale, options)
    try:
        return _native(y, ids, a, b, scale, embed_scale, padding_idx)
    except CALL_ERRORS:
        explain(_check_ids, ids, a)
        raise


_PLAIN = (Tensor, torch.nn.Parameter)


def _native(y, ids, a, b, scale, embed_scale, padding_idx):
    vector = None
    if embed_scale is not None:
        # the loops widen a's columns, so this is rounded to a's dtype alone
        vector = embed_scale.to(a.dtype).reshape(1).expand(a.shape[0])
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += a.shape[1]
    ids = ids.long().contiguous()
    if torch.is_grad_enabled() and (y.requires_grad or a.requires_grad or b.requires_grad):
        return _LoraEmbedding.apply(y, ids, a, b, vector, scale, padding_idx)
    return _raw_forward(y, ids, a, b, vector, scale)[0]


class _LoraEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, ids, a, b, vector, scale, padding_idx):
        out, s = _raw_forward(y, ids, a, b, vector, scale)
        ctx.save_for_backward(ids, a, b, s if ctx.needs_input_grad[3] else None, vector)
        ctx.scale, ctx.padding_idx = scale, padding_idx
        return out

    @staticmethod
    def backward(ctx, grad_y):
        refuse_double_backward("lora_embedding", "pyfused.reference.lora_embedding.lora_embedding")
        need_y, _, need_a, need_b = ctx.needs_input_grad[:4]
        grad_a = grad_b = None
        if need_a or need_b:
            ids, a, b, s, vector = ctx.saved_tensors
            needs = _NEED_A * need_a | _NEED_B * need_b
            grad_a, grad_b = _raw_backward(grad_y, ids, a, b, s, vector, ctx.scale, ctx.padding_idx, needs)
        return (grad_y if need_y else None), None, grad_a if need_a else None, grad_b if need_b else None, *[None] * 3


@torch.library.register_fake("pyfused::_lora_embedding_forward")
def _(y, ids, a, b, vector, scale):
    check_one_device(y, ids=ids, a=a, b=b, scale_vector=vector)
    rows = ids.numel()
    return y.new_empty(y.shape), y.new_empty((rows, a.shape[0]), dtype=_accumulator(y))


@torch.library.register_fake("pyfused::_lora_embedding_backward")
def _(grad_y, ids, a, b, s, vector, scale, padding_idx, needs):
    check_one_device(grad_y, ids=ids, a=a, b=b, s=s, scale_vector=vector)
    shapes = a.shape if needs & _NEED_A else (0,), b.shape if needs & _NEED_B else (0,)
    return a.new_empty(shapes[0]), b.new_empty(shapes[1])


def _accumulator(y: Tensor) -> torch.dtype:
    return torch.float64 if y.dtype == torch.float64 else torch.float32


def _composed(y, ids, a, b, scale, embed_scale, options):
    gathered = F.embedding(ids, a.t(), *options)
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


def _check_ids(ids, a) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < a.shape[1]:
        raise IndexError(f"lora_embedding: ids must be in [0, {a.shape[1]}), got {int(ids.min())} to {int(ids.max())}")


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
