"""LoRA on a frozen linear layer: the public ops ``lora_linear`` and ``lora_delta``.

Forward and backward are raw ops (``csrc/cpu/lora.cpp``, ``csrc/cuda/lora.cpp``); this file checks arguments, applies
autocast, draws the dropout seed where C++ does not, and carries the gradient. Saved for backward, as far as a gradient
needs it: x as it came, S = drop(x) A^T, and the parameters. On a CPU with AMX a call in C++ keeps bf16's dropout mask,
too, a bit an element.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from .. import _library
from ..reference import lora as _reference
from .common import (
    CALL_ERRORS,
    FLOAT_DTYPES,
    active_dropout,
    allows_tf32,
    autocast,
    autocasts,
    check_dropout,
    check_floating,
    check_linear,
    check_one_device,
    check_seed,
    draw_seed,
    explain,
    has_native,
    is_sparse,
    on_values,
    refuse_double_backward,
    refuse_dropout,
    takes_native_autograd,
    without_autocast,
)

_raw_linear_forward = torch.ops.pyfused._lora_linear_forward.default
_raw_delta_forward = torch.ops.pyfused._lora_delta_forward.default
_raw_backward = torch.ops.pyfused._lora_backward.default

# Which gradients a backward is asked for, as bits of the raw op's `needs` (csrc/common/needs.h has the same).
_NEED_X, _NEED_A, _NEED_B, _NEED_SCALE, _NEED_BIAS = 1, 2, 4, 8, 16


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Linear layer with a LoRA adapter: :math:`y = x W^T + bias + (scale \cdot drop(x) A^T) B^T`.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3, with dropout on the adapter's input as
    HF PEFT has it.

    Args:
        x: input ``[..., K]``, fp32, bf16, fp16 or fp64, any strides.
        weight: frozen weight ``[N, K]``, x's dtype. No gradient buffer is made for it; where it does require a
            gradient, the base product runs as ``F.linear`` under autograd and only the adapter is fused.
        bias: ``[N]`` in x's dtype, or None. Gets a gradient where it requires one.
        a: down-projection ``[R, K]``, any of the dtypes (fp64 only with an fp64 x); R >= 1.
        b: up-projection ``[N, R]``, likewise; need not have a's dtype.
        scale: a float, or a float tensor ``[R]`` with one factor per rank (AdaLoRA), differentiable.
        dropout_p: probability of dropping an element of x on the adapter's path, in [0, 1), in steps of 1/65536.
        training: dropout is applied only where True.
        seed: int64 tensor with one element on x's device; the mask is a pure function of it, the row (all leading
            dimensions flattened) and the column. None: drawn from the generator of x's device.

    Returns:
        ``[..., N]`` in x's dtype. The adapter's sum is accumulated in fp32 (fp64 for fp64) and rounded once, on top of
        the base product that is rounded to x's dtype.

    Under autocast x, weight and bias are cast to the autocast dtype (fp64 is not, as for ``F.linear``); a and b are
    used as they are. On a GPU fp32 products follow ``torch.backends.cuda.matmul.fp32_precision``, the adapter's too.

    Raises:
        TypeError: an argument is no tensor or has a dtype or device that does not fit.
        ValueError: shapes do not fit, R is 0, or dropout_p is outside [0, 1).
    """
    try:
        native = _library.autograd
        if (  # what is_plain_call of common.py asks among it, without a function between: 0.4 us of a small call
            seed is None
            and type(scale) is float
            and native is not None
            and not is_compiling()
            and native.is_plain_call(x, weight, bias, a, b)
            and not weight.requires_grad
        ):
            p = active_dropout("lora_linear", dropout_p, training)
            return native.lora_linear(x, weight, bias, a, b, None, scale, p, None, False)
        if isinstance(x, Tensor) and autocasts(x):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = autocast(x, dtype), autocast(weight, dtype), autocast(bias, dtype)
        return _lora_linear(x, weight, bias, a, b, scale, dropout_p, training, seed)
    except CALL_ERRORS:
        if is_sparse(x):
            refuse_dropout("lora_linear", dropout_p, training)
            return _reference.lora_linear(x, weight, bias, a, b, scale)
        explain(_check_linear, x, weight, bias, a, b, scale, dropout_p, seed)
        raise


def lora_delta(
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    r"""A LoRA adapter added to the output of any base layer: :math:`y + (scale \cdot drop(x) A^T) B^T`.

    Args:
        y: output of the base layer ``[..., N]``, x's dtype, x's leading dimensions. It is not changed.
        x, a, b, scale, dropout_p, training, seed: as in :func:`lora_linear`.

    Returns:
        A new tensor ``[..., N]`` in y's dtype, accumulated in fp32 (fp64 for fp64) and rounded once.

    Under autocast x is cast to y's dtype.

    Raises:
        TypeError, ValueError: as :func:`lora_linear`.
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype != y.dtype and autocasts(x):
        x = autocast(x, y.dtype) if y.is_floating_point() else x
    try:
        return _lora_delta(y, x, a, b, scale, dropout_p, training, seed)
    except CALL_ERRORS:
        if is_sparse(x):
            refuse_dropout("lora_delta", dropout_p, training)
            return _reference.lora_delta(y, x, a, b, scale)
        explain(_check_delta, y, x, a, b, scale, dropout_p, seed)
        raise


def _lora_linear(x, weight, bias, a, b, scale, dropout_p, training, seed):
    native = has_native(x, on_cuda=True)
    if not native or seed is not None or is_compiling():
        _check_linear(x, weight, bias, a, b, scale, dropout_p, seed)
    p = active_dropout("lora_linear", dropout_p, training)
    if p > 0.0 and seed is None:
        seed = draw_seed(x)
    grad = torch.is_grad_enabled()
    if grad and weight.requires_grad:
        return _lora_delta(F.linear(x, weight, bias), x, a, b, scale, dropout_p, training, seed)
    vector, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    if native and takes_native_autograd(x, weight, bias, a, b, vector):
        return _library.autograd.lora_linear(x, weight, bias, a, b, vector, factor, p, seed, allows_tf32(x, a, b))
    if x.layout is torch.jagged:
        return on_values(lambda rows, _: _lora_linear(rows, weight, bias, a, b, scale, p, p > 0.0, seed), x)
    if not native:
        with without_autocast(x):
            return _reference.lora_linear(x, weight, bias, a, b, scale, p, p > 0.0, seed)
    if grad and (
        x.requires_grad
        or a.requires_grad
        or b.requires_grad
        or (bias is not None and bias.requires_grad)
        or (vector is not None and vector.requires_grad)
    ):
        return _LoraLinear.apply(x, weight, bias, a, b, vector, factor, p, seed)
    return _raw_linear_forward(x, weight, bias, a, b, vector, factor, p, seed, allows_tf32(x, a, b))[0]


def _lora_delta(y, x, a, b, scale, dropout_p, training, seed):
    native = has_native(x, on_cuda=True)
    if not native or seed is not None or is_compiling():
        _check_delta(y, x, a, b, scale, dropout_p, seed)
    p = active_dropout("lora_delta", dropout_p, training)
    if p > 0.0 and seed is None:
        seed = draw_seed(x)
    if type(x) is not Tensor and x.layout is torch.jagged:
        return on_values(lambda rows, other: _lora_delta(other, rows, a, b, scale, p, p > 0.0, seed), x, y)
    if not native:
        with without_autocast(x):
            return _reference.lora_delta(y, x, a, b, scale, p, p > 0.0, seed)
    if y is x:
        y = y.view_as(y)  # torch.compile takes no tensor twice
    vector, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    if torch.is_grad_enabled() and (
        y.requires_grad
        or x.requires_grad
        or a.requires_grad
        or b.requires_grad
        or (vector is not None and vector.requires_grad)
    ):
        return _LoraDelta.apply(y, x, a, b, vector, factor, p, seed)
    return _raw_delta_forward(y, x, a, b, vector, factor, p, seed, allows_tf32(x, a, b))[0]


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, vector, factor, p, seed):
        y, s = _raw_linear_forward(x, weight, bias, a, b, vector, factor, p, seed, allows_tf32(x, a, b))
        need_x, _, _, need_a, need_b, need_vector = ctx.needs_input_grad[:6]
        ctx.save_for_backward(
            x if need_a else None, weight if need_x else None, a, b, s if need_b or need_vector else None, vector, seed
        )
        ctx.factor, ctx.p = factor, p
        return y

    @staticmethod
    def backward(ctx, grad_y):
        refuse_double_backward("lora_linear", "pyfused.reference.lora.lora_linear")
        x, weight, a, b, s, vector, seed = ctx.saved_tensors
        need_x, _, need_bias, need_a, need_b, need_vector = ctx.needs_input_grad[:6]
        grads = _backward(
            grad_y, x, weight, a, b, s, vector, ctx.factor, ctx.p, seed, need_x, need_a, need_b, need_vector, need_bias
        )
        grad_x, grad_a, grad_b, grad_vector, grad_bias = grads
        return grad_x, None, grad_bias, grad_a, grad_b, grad_vector, None, None, None


class _LoraDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, a, b, vector, factor, p, seed):
        out, s = _raw_delta_forward(y, x, a, b, vector, factor, p, seed, allows_tf32(x, a, b))
        _, _, need_a, need_b, need_vector = ctx.needs_input_grad[:5]
        ctx.save_for_backward(x if need_a else None, a, b, s if need_b or need_vector else None, vector, seed)
        ctx.factor, ctx.p = factor, p
        return out

    @staticmethod
    def backward(ctx, grad_y):
        refuse_double_backward("lora_delta", "pyfused.reference.lora.lora_delta")
        x, a, b, s, vector, seed = ctx.saved_tensors
        need_y, need_x, need_a, need_b, need_vector = ctx.needs_input_grad[:5]
        grads = _backward(
            grad_y, x, None, a, b, s, vector, ctx.factor, ctx.p, seed, need_x, need_a, need_b, need_vector, False
        )
        grad_x, grad_a, grad_b, grad_vector, _ = grads
        return grad_y if need_y else None, grad_x, grad_a, grad_b, grad_vector, None, None, None


def _backward(
    grad_y, x, weight, a, b, s, vector, factor, p, seed, need_x, need_a, need_b, need_vector, need_bias
) -> tuple[Tensor | None, ...]:
    needs = _NEED_X * need_x | _NEED_A * need_a | _NEED_B * need_b | _NEED_SCALE * need_vector | _NEED_BIAS * need_bias
    grads = _raw_backward(grad_y, x, weight, a, b, s, vector, factor, p, seed, needs, allows_tf32(grad_y, a, b))
    # A gradient that was not asked for comes back as an empty tensor: the stable ABI has no optional returns.
    asked = (need_x, need_a, need_b, need_vector, need_bias)
    return tuple(grad if need else None for grad, need in zip(grads, asked, strict=True))


# A call with one argument on the meta device comes to a fake too, however real the others are: hence the device checks.


@torch.library.register_fake("pyfused::_lora_linear_forward")
def _(x, weight, bias, a, b, vector, factor, p, seed, allow_tf32=False):
    check_one_device(x, weight=weight, bias=bias, a=a, b=b, scale_vector=vector, seed=seed)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _fake_s(x, a)


@torch.library.register_fake("pyfused::_lora_linear_forward_with_mask")
def _(x, weight, bias, a, b, vector, factor, p, seed):
    check_one_device(x, weight=weight, bias=bias, a=a, b=b, scale_vector=vector, seed=seed)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _fake_s(x, a), _fake_mask(x, weight, a, p)


@torch.library.register_fake("pyfused::_lora_delta_forward")
def _(y, x, a, b, vector, factor, p, seed, allow_tf32=False):
    check_one_device(x, y=y, a=a, b=b, scale_vector=vector, seed=seed)
    return y.new_empty(y.shape), _fake_s(x, a)


@torch.library.register_fake("pyfused::_lora_backward")
def _(grad_y, x, weight, a, b, s, vector, factor, p, seed, needs, allow_tf32=False):
    check_one_device(grad_y, x=x, weight=weight, a=a, b=b, s=s, scale_vector=vector, seed=seed)

    def grad(like, shape, need):
        return like.new_empty(shape if needs & need else (0,))

    return (
        grad(grad_y, (*grad_y.shape[:-1], a.shape[1]), _NEED_X),
        grad(a, a.shape, _NEED_A),
        grad(b, b.shape, _NEED_B),
        grad_y.new_empty((0,)) if vector is None else grad(vector, vector.shape, _NEED_SCALE),
        grad(grad_y, grad_y.shape[-1:], _NEED_BIAS),
    )


def _fake_s(x: Tensor, a: Tensor) -> Tensor:
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty((rows, a.shape[0]), dtype=acc)


def _fake_mask(x: Tensor, weight: Tensor, a: Tensor, p: float) -> Tensor:
    rows, columns = _fake_s(x, a).shape[0], x.shape[-1]
    # as lora_kernels of csrc/cpu/kernels/lora.cpp has it
    in_tiles = x.dtype == torch.bfloat16 and rows >= 64 and min(weight.shape) >= 32 and a.shape[0] <= 64
    kept = p > 0.0 and in_tiles and _library._C.cpu_capability() == "AMX"
    return x.new_empty((rows if kept else 0, (columns + 127) // 128 * 4), dtype=torch.int32)


def _check_adapter(op: str, x, a, b, scale, dropout_p, seed) -> None:
    check_floating(op, x, x=x, a=a, b=b)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., K], got a scalar")
    if a.dim() != 2 or a.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: a must have shape [R, {x.shape[-1]}] (x is {list(x.shape)}), got {list(a.shape)}")
    rank = a.shape[0]
    if rank == 0:
        raise ValueError(f"{op}: a must have shape [R, K] with R >= 1, got {list(a.shape)}")
    if b.dim() != 2 or b.shape[1] != rank:
        raise ValueError(f"{op}: b must have shape [N, {rank}] (a is {list(a.shape)}), got {list(b.shape)}")
    if isinstance(scale, Tensor):
        if scale.dtype not in FLOAT_DTYPES or (scale.dtype == torch.float64 and x.dtype != torch.float64):
            raise TypeError(
                f"{op}: scale must be a float or a floating tensor that fits x ({x.dtype}), got {scale.dtype}"
            )
        if scale.device != x.device:
            raise TypeError(f"{op}: scale must be on x's device {x.device}, got {scale.device}")
        if tuple(scale.shape) != (rank,):
            raise ValueError(f"{op}: scale must be a float or have shape [{rank}], got {list(scale.shape)}")
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a float or a tensor [{rank}], got {type(scale).__name__}")
    check_dropout(op, dropout_p)
    check_seed(op, x, seed)


def _check_linear(x, weight, bias, a, b, scale, dropout_p, seed) -> None:
    _check_adapter("lora_linear", x, a, b, scale, dropout_p, seed)
    check_linear("lora_linear", x, weight, bias, b.shape[0])


def _check_delta(y, x, a, b, scale, dropout_p, seed) -> None:
    _check_adapter("lora_delta", x, a, b, scale, dropout_p, seed)
    if not isinstance(y, Tensor):
        raise TypeError(f"lora_delta: y must be a tensor, got {type(y).__name__}")
    if y.dtype != x.dtype:
        raise TypeError(f"lora_delta: y must have x's dtype {x.dtype}, got {y.dtype}")
    if y.device != x.device:
        raise TypeError(f"lora_delta: y must be on x's device {x.device}, got {y.device}")
    expected = (*x.shape[:-1], b.shape[0])
    if tuple(y.shape) != expected:
        raise ValueError(f"lora_delta: y must have shape {list(expected)}, got {list(y.shape)}")
