"""IA3: the public ops ``ia3_linear`` and ``ia3_scale``.

Forward and backward are raw ops of ``_ops`` (``csrc/cpu/ia3.cpp``); this file checks arguments, applies autocast and
carries the gradient. Saved for backward is what is scaled, as far as the vector's gradient needs it: the base product
on the output side, x on the input side. The product before the scale is kept and never recovered by a division: an
element of the vector may be 0. It could also be had again from a third GEMM; that costs half of a forward and backward,
keeping it costs a write that the scale's pass makes anyway.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from ..reference import ia3 as _reference
from .common import (
    CALL_ERRORS,
    autocast,
    autocasts,
    check_floating,
    check_linear,
    check_one_device,
    explain,
    has_native,
    is_plain_call,
    is_sparse,
    on_values,
    refuse_double_backward,
    takes_native_autograd,
    without_autocast,
)

_raw_linear_forward = torch.ops.pyfused._ia3_linear_forward.default
_raw_linear_backward = torch.ops.pyfused._ia3_linear_backward.default
_raw_scale_forward = torch.ops.pyfused._ia3_scale_forward.default
_raw_scale_backward = torch.ops.pyfused._ia3_scale_backward.default

# Which gradients a backward is asked for, as bits of the raw ops' `needs` (csrc/common/needs.h has the same).
_NEED_X, _NEED_SCALE = 1, 2
_SIDES = ("output", "input")


def ia3_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, side: str = "output") -> Tensor:
    r"""Linear layer with an IA3 vector: :math:`y = (x W^T + bias) \odot l`, or :math:`y = (x \odot l) W^T + bias`.

    Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section
    3.3: on the output of the key and value projections, on the input of the second feed-forward layer. As in HF PEFT,
    the output side scales the bias too.

    Args:
        x: input ``[..., K]``, fp32, bf16, fp16 or fp64, any strides.
        weight: ``[N, K]``, x's dtype. Frozen; where it or the bias does require a gradient, the base product runs as
            ``F.linear`` under autograd and only the scale is fused.
        bias: ``[N]`` in x's dtype, or None.
        scale: the learned vector l, ``[N]`` where side is "output", ``[K]`` where it is "input"; any of the dtypes
            (fp64 only with an fp64 x). x is not promoted to it.
        side: "output" or "input".

    Returns:
        ``[..., N]`` in x's dtype. What is scaled is multiplied in fp32 (fp64 for fp64) and rounded once to x's dtype:
        the product, x, or the weight where that is the smaller one.

    Under autocast x, weight and bias are cast to the autocast dtype (fp64 is not, as for ``F.linear``); scale is used
    as it is.

    Raises:
        TypeError: an argument is no tensor or has a dtype or device that does not fit.
        ValueError: shapes do not fit, or another side.
    """
    try:
        if side in _SIDES and is_plain_call(x, weight, bias, scale):
            return _library.autograd.ia3_linear(x, weight, bias, scale, side == "input", False)
        if isinstance(x, Tensor) and autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = autocast(x, dtype), autocast(weight, dtype), autocast(bias, dtype)
        return _ia3_linear(x, weight, bias, scale, side)
    except CALL_ERRORS:
        if is_sparse(x) and side == "output":
            return _reference.ia3_linear(x, weight, bias, scale)
        explain(_check_linear, x, weight, bias, scale, side)
        raise


def ia3_layer(x: Tensor, weight: Tensor, bias: Tensor | None, vector: Tensor, input_side: bool) -> Tensor:
    """:func:`ia3_linear` for layers, which hold the vector as HF PEFT does, ``[N, 1]`` or ``[1, K]``: it is no view in
    Python, nor is its gradient, where C++ takes the call."""
    try:
        if is_plain_call(x, weight, bias, vector):
            return _library.autograd.ia3_linear(x, weight, bias, vector, input_side, True)
    except CALL_ERRORS:
        pass  # the public op says what is wrong
    return ia3_linear(x, weight, bias, vector.view(-1), "input" if input_side else "output")


def ia3_scale(x: Tensor, scale: Tensor, dim: int = -1) -> Tensor:
    r"""An IA3 vector on what goes into any layer or comes out of it: :math:`x \odot l` along one dimension.

    Args:
        x: any shape but a scalar, fp32, bf16, fp16 or fp64, any strides.
        scale: the learned vector l, ``[x.shape[dim]]``, any of the dtypes (fp64 only with an fp64 x).
        dim: which dimension; 1 for a convolution's channels.

    Returns:
        A new tensor of x's shape and dtype, multiplied in fp32 (fp64 for fp64) and rounded once. Contiguous, or with
        ``dim`` innermost where x has it so (``channels_last``).

    Raises:
        TypeError, ValueError: as :func:`ia3_linear`.
    """
    try:
        return _ia3_scale(x, scale, dim)
    except CALL_ERRORS:
        explain(_check_scale, x, scale, dim)
        raise


def _ia3_linear(x, weight, bias, scale, side):
    native = has_native(x, on_cuda=True)
    if not native or torch.compiler.is_compiling():
        _check_linear(x, weight, bias, scale, side)
    if side not in _SIDES:
        raise ValueError(_bad_side(side))
    input_side = side == "input"
    grad = torch.is_grad_enabled()
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        if input_side:
            return F.linear(_ia3_scale(x, scale, -1), weight, bias)
        return _ia3_scale(F.linear(x, weight, bias), scale, -1)
    if native and takes_native_autograd(x, weight, bias, scale):
        return _library.autograd.ia3_linear(x, weight, bias, scale, input_side, False)
    if x.layout is torch.jagged:
        return on_values(lambda rows, _: _ia3_linear(rows, weight, bias, scale, side), x)
    if not native:
        with without_autocast(x):
            return _reference.ia3_linear(x, weight, bias, scale, side)
    if grad and (x.requires_grad or scale.requires_grad):
        return _IA3Linear.apply(x, weight, bias, scale, input_side)
    return _raw_linear_forward(x, weight, bias, scale, input_side, False)[0]


def _ia3_scale(x, scale, dim):
    native = has_native(x, on_cuda=True)
    if not native or torch.compiler.is_compiling():
        _check_scale(x, scale, dim)
    if type(x) is not Tensor and x.layout is torch.jagged and dim in (-1, x.dim() - 1):
        return on_values(lambda rows, _: _ia3_scale(rows, scale, -1), x)
    if not native:
        return _reference.ia3_scale(x, scale, dim)
    if dim < 0:
        dim += x.dim()
    if dim != x.dim() - 1 and x.stride(dim) == 1:  # channels_last: x is rows of channels already
        return _ia3_scale(x.movedim(dim, -1), scale, -1).movedim(-1, dim)
    if takes_native_autograd(x, scale):
        return _library.autograd.ia3_scale(x, scale, dim)
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _IA3Scale.apply(x, scale, dim)
    return _raw_scale_forward(x, scale, dim)


class _IA3Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, input_side):
        need_x, need_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        y, base = _raw_linear_forward(x, weight, bias, scale, input_side, need_scale and not input_side)
        saved = (x if input_side else base) if need_scale else None
        added = bias if need_scale and not input_side else None
        ctx.save_for_backward(saved, weight if need_x or input_side else None, added, scale)
        ctx.input_side = input_side
        return y

    @staticmethod
    def backward(ctx, grad_y):
        refuse_double_backward("ia3_linear", "pyfused.reference.ia3.ia3_linear")
        need_x, need_scale = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
        saved, weight, bias, scale = ctx.saved_tensors
        needs = _NEED_X * need_x | _NEED_SCALE * need_scale
        grad_x, grad_scale = _raw_linear_backward(grad_y, saved, weight, bias, scale, ctx.input_side, needs)
        return grad_x if need_x else None, None, None, grad_scale if need_scale else None, None


class _IA3Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, dim):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, scale)
        ctx.dim = dim
        return _raw_scale_forward(x, scale, dim)

    @staticmethod
    def backward(ctx, grad_y):
        refuse_double_backward("ia3_scale", "pyfused.reference.ia3.ia3_scale")
        need_x, need_scale = ctx.needs_input_grad[:2]
        x, scale = ctx.saved_tensors
        needs = _NEED_X * need_x | _NEED_SCALE * need_scale
        grad_x, grad_scale = _raw_scale_backward(grad_y, x, scale, ctx.dim, needs)
        return grad_x if need_x else None, grad_scale if need_scale else None, None


# A gradient that was not asked for comes back as an empty tensor: the stable ABI has no optional returns. A call with
# one argument on the meta device comes to a fake too, however real the others are: hence the device checks.


@torch.library.register_fake("pyfused::_ia3_linear_forward")
def _(x, weight, bias, scale, input_side, keep_base):
    check_one_device(x, weight=weight, bias=bias, scale=scale)
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape if keep_base and not input_side else (0,))


@torch.library.register_fake("pyfused::_ia3_linear_backward")
def _(grad_y, saved, weight, bias, scale, input_side, needs):
    check_one_device(grad_y, saved=saved, weight=weight, bias=bias, scale=scale)
    shape = (*grad_y.shape[:-1], weight.shape[1]) if needs & _NEED_X else (0,)
    return grad_y.new_empty(shape), scale.new_empty(scale.shape if needs & _NEED_SCALE else (0,))


@torch.library.register_fake("pyfused::_ia3_scale_forward")
def _(x, scale, dim):
    check_one_device(x, scale=scale)
    return x.new_empty(x.shape)


@torch.library.register_fake("pyfused::_ia3_scale_backward")
def _(grad_y, x, scale, dim, needs):
    check_one_device(grad_y, x=x, scale=scale)
    shapes = grad_y.shape if needs & _NEED_X else (0,), scale.shape if needs & _NEED_SCALE else (0,)
    return grad_y.new_empty(shapes[0]), scale.new_empty(shapes[1])


def _bad_side(side) -> str:
    return f"ia3_linear: side must be 'output' or 'input', got {side!r}"


def _check_linear(x, weight, bias, scale, side) -> None:
    check_floating("ia3_linear", x, x=x, scale=scale)
    if side not in _SIDES:
        raise ValueError(_bad_side(side))
    if x.dim() == 0:
        raise ValueError("ia3_linear: x must have shape [..., K], got a scalar")
    k = x.shape[-1]
    if isinstance(weight, Tensor) and (weight.dim() != 2 or weight.shape[1] != k):
        raise ValueError(
            f"ia3_linear: weight must have shape [N, {k}] (x is {list(x.shape)}), got {list(weight.shape)}"
        )
    check_linear("ia3_linear", x, weight, bias, weight.shape[0] if isinstance(weight, Tensor) else 0)
    size = k if side == "input" else weight.shape[0]
    if tuple(scale.shape) != (size,):
        raise ValueError(f"ia3_linear: scale must have shape [{size}] on the {side} side, got {list(scale.shape)}")


def _check_scale(x, scale, dim) -> None:
    check_floating("ia3_scale", x, x=x, scale=scale)
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"ia3_scale: dim must be an integer, got {dim!r}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"ia3_scale: dim must be in [{-x.dim()}, {x.dim() - 1}] (x is {list(x.shape)}), got {dim}")
    if tuple(scale.shape) != (x.shape[dim],):
        raise ValueError(
            f"ia3_scale: scale must have shape [{x.shape[dim]}] (x is {list(x.shape)}, dim {dim}), got "
            f"{list(scale.shape)}"
        )
