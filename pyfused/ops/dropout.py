"""Dropout with LoRA's mask: for layers whose adapter is more than the ops that draw it themselves.

PyTorch draws its CPU mask in one thread, a number for each element, and keeps it for the backward; here bits are
counted from a seed in all threads (``csrc/cpu/dropout.cpp``, ``csrc/cuda/dropout.cpp``), and again in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import dropout as _reference
from .common import (
    CALL_ERRORS,
    active_dropout,
    check_dropout,
    check_floating,
    check_one_device,
    check_seed,
    draw_seed,
    explain,
    has_native,
    is_sparse,
    on_values,
    refuse_dropout,
)

_raw = torch.ops.pyfused._dropout.default


def dropout(x: Tensor, dropout_p: float, training: bool = True, seed: Tensor | None = None) -> Tensor:
    r"""x with elements set to zero with probability p, and the others multiplied by :math:`1 / (1 - p)`.

    Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"; as
    ``torch.nn.functional.dropout``, by another random generator.

    Args:
        x: ``[..., K]``, fp32, bf16, fp16 or fp64, any strides.
        dropout_p: the probability p, in [0, 1), in steps of 1/65536.
        training: False: x itself is returned.
        seed: int64 tensor with one element on x's device; the mask is the one that :func:`lora_linear` makes of it.
            None: drawn from the generator of x's device.

    Returns:
        A contiguous tensor of x's shape and dtype, multiplied in fp32 (fp64 for fp64) and rounded once; x itself where
        nothing is dropped.

    Raises:
        TypeError: an argument is no tensor or has a dtype or device that does not fit.
        ValueError: x is a scalar, the seed has several elements, or dropout_p is outside [0, 1).
    """
    try:
        return _dropout(x, dropout_p, training, seed)
    except CALL_ERRORS:
        if is_sparse(x):
            refuse_dropout("dropout", dropout_p, training)
        explain(_check, x, dropout_p, seed)
        raise


def _dropout(x, dropout_p, training, seed):
    native = has_native(x, on_cuda=True)
    if not native or torch.compiler.is_compiling():
        _check(x, dropout_p, seed)
    p = active_dropout("dropout", dropout_p, training)
    if p == 0.0:
        return x
    seed = draw_seed(x) if seed is None else seed
    if type(x) is not Tensor and x.layout is torch.jagged:
        return on_values(lambda rows, _: _dropout(rows, p, True, seed), x)
    if not native:
        return _reference.dropout(x, p, seed)
    if torch.is_grad_enabled() and x.requires_grad:
        return _Dropout.apply(x, p, seed)
    return _raw(x, p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, seed):
        ctx.save_for_backward(seed)
        ctx.p = p
        return _raw(x, p, seed)

    @staticmethod
    def backward(ctx, grad_y):
        (seed,) = ctx.saved_tensors
        return _dropout(grad_y, ctx.p, True, seed), None, None


@torch.library.register_fake("pyfused::_dropout")
def _(x, p, seed):
    check_one_device(x, seed=seed)
    return x.new_empty(x.shape)


def _check(x, dropout_p, seed) -> None:
    check_floating("dropout", x, x=x)
    if x.dim() == 0:
        raise ValueError("dropout: x must have shape [..., K], got a scalar")
    check_dropout("dropout", dropout_p)
    check_seed("dropout", x, seed)
