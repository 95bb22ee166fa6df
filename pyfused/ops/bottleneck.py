"""The bottleneck adapter: the public op ``bottleneck``.

Forward and backward are raw ops (``csrc/cpu/bottleneck.cpp``, ``csrc/cuda/bottleneck.cpp``); this file checks
arguments, applies autocast, draws the dropout seed where C++ does not, and carries the gradient. Saved for backward: x
as it came where w_down needs a gradient, the pre-activation ``[M, H]``, and the parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library
from ..reference import bottleneck as _reference
from .common import (
    CALL_ERRORS,
    FLOAT_DTYPES,
    active_dropout,
    allows_tf32,
    autocast,
    autocasts,
    check_dropout,
    check_one_device,
    check_seed,
    draw_seed,
    explain,
    has_native,
    is_plain_call,
    on_values,
    refuse_double_backward,
    takes_native_autograd,
    without_autocast,
)

_raw_forward = torch.ops.pyfused._bottleneck_forward.default
_raw_backward = torch.ops.pyfused._bottleneck_backward.default

# Bits of the raw backward's `needs` (csrc/common/needs.h has the same).
_NEED_X, _NEED_W_DOWN, _NEED_B_DOWN, _NEED_W_UP, _NEED_B_UP, _NEED_SCALE, _RESIDUAL_IS_X = 1, 2, 4, 8, 16, 32, 64

# As in csrc/common/activation.h.
_ACTIVATIONS = {"linear": 0, "relu": 1, "leaky_relu": 2, "tanh": 3, "silu": 4, "gelu": 5, "gelu_new": 6}


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    r"""Bottleneck adapter: :math:`y = residual + drop(scale \cdot (f(x W_{down}^T + b_{down}) W_{up}^T + b_{up}))`.

    Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", figure 2, with ``residual = x``; the parallel
    adapter of He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", table 1, with the
    output of the sub-layer as ``residual``. Scale and dropout in AdapterHub's order.

    Args:
        x: input ``[..., D]``, fp32, bf16, fp16 or fp64, any strides.
        residual: ``[..., D]`` in x's dtype, or None for 0. Where it is ``x``, its gradient joins x's in one pass.
        w_down: ``[H, D]``, any of the dtypes (fp64 only with an fp64 x); H >= 1.
        b_down: ``[H]``, likewise, or None.
        w_up: ``[D, H]``, likewise.
        b_up: ``[D]``, likewise, or None.
        activation: f, by the names of AdapterHub and transformers: "relu", "gelu" (by erf), "gelu_new" (by tanh),
            "silu" or "swish", "tanh", "leaky_relu" (slope 0.01), "linear".
        scale: a float, or a float tensor ``[]`` or ``[1]`` (learned) or ``[D]`` (one factor a channel), differentiable.
        dropout_p: probability of dropping an element of what is added to the residual, in [0, 1), in steps of 1/65536.
        training: dropout is applied only where True.
        seed: int64 tensor with one element on x's device; the mask is a pure function of it, the row (all leading
            dimensions flattened) and the column. None: drawn from the generator of x's device.

    Returns:
        ``[..., D]`` in x's dtype. Where w_down and w_up have x's dtype and scale is not wider, the products run in it
        and round to it; else they run in fp32 (fp64 for fp64) without a copy of x as a whole. Everything else is fp32,
        rounded once.

    On a GPU fp32 products follow ``torch.backends.cuda.matmul.fp32_precision``.

    Under autocast x, weights and biases are cast to the autocast dtype, as ``F.linear`` does, and the products run in
    it whatever the scale's dtype; a residual of another dtype is added as PyTorch adds it.

    Raises:
        TypeError: an argument is no tensor or has a dtype or device that does not fit.
        ValueError: shapes do not fit, H is 0, the activation is not known, or dropout_p is outside [0, 1).
    """
    if seed is None and type(scale) is float and is_plain_call(x, residual, w_down, b_down, w_up, b_up):
        try:
            number, p = _ACTIVATIONS[activation], active_dropout("bottleneck", dropout_p, training)
            same = residual is x
            return _library.autograd.bottleneck(
                x, None if same else residual, w_down, b_down, w_up, b_up, None, number, scale, p, None, same, False
            )
        except (KeyError, *CALL_ERRORS):
            pass  # another name of the activation; or the checks below say what is wrong
    if isinstance(x, Tensor) and autocasts(x):
        return _under_autocast(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed)
    return _explained(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed, True)


def _explained(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed, wide_products):
    """``wide_products``: a scale that is wider than x asks for products in its dtype."""
    try:
        down = w_down
        if wide_products and isinstance(scale, Tensor) and scale.dtype.itemsize > x.dtype.itemsize:
            # Its gradient is a sum over the second product, all M x D of it: what the first rounds would be the error.
            down = w_down.to(scale.dtype)
        return _bottleneck(x, residual, down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed)
    except CALL_ERRORS:
        explain(_check, x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, seed)
        raise


def _under_autocast(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed):
    dtype = torch.get_autocast_dtype(x.device.type)
    same = residual is x
    x = autocast(x, dtype)
    w_down, b_down, w_up, b_up = (autocast(tensor, dtype) for tensor in (w_down, b_down, w_up, b_up))
    separate = isinstance(residual, Tensor) and residual.is_floating_point() and residual.dtype != x.dtype
    if same and not separate:
        residual = x
    fused = None if separate else residual
    with without_autocast(x):
        y = _explained(x, fused, w_down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed, False)
        return residual + y if separate else y


def _bottleneck(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, training, seed):
    native = has_native(x, on_cuda=True)
    if not native or seed is not None or torch.compiler.is_compiling():
        _check(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, seed)
    p = active_dropout("bottleneck", dropout_p, training)
    if p > 0.0 and seed is None:
        seed = draw_seed(x)
    number = _ACTIVATIONS.get(activation)
    if number is None:
        number = _ACTIVATIONS[_reference.activation_name(activation)]
    vector, factor = (scale.reshape(-1), 1.0) if isinstance(scale, Tensor) else (None, scale)
    same = residual is x
    if native and takes_native_autograd(x, residual, w_down, b_down, w_up, b_up, vector):
        other, tf32 = None if same else residual, allows_tf32(x, w_down, w_up)
        return _library.autograd.bottleneck(
            x, other, w_down, b_down, w_up, b_up, vector, number, factor, p, seed, same, tf32
        )
    weights = w_down, b_down, w_up, b_up, activation, scale, p, p > 0.0, seed
    if x.layout is torch.jagged:
        return on_values(lambda rows, other: _bottleneck(rows, other, *weights), x, residual)
    if not native:
        return _reference.bottleneck(x, residual, *weights)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (residual is not None and residual.requires_grad)
        or w_down.requires_grad
        or w_up.requires_grad
        or (b_down is not None and b_down.requires_grad)
        or (b_up is not None and b_up.requires_grad)
        or (vector is not None and vector.requires_grad)
    ):
        return _Bottleneck.apply(
            x, None if same else residual, w_down, b_down, w_up, b_up, vector, number, factor, p, seed, same
        )
    if same and torch.compiler.is_compiling():
        residual = x.view_as(x)  # torch.compile takes no tensor twice
    tf32 = allows_tf32(x, w_down, w_up)
    return _raw_forward(x, residual, w_down, b_down, w_up, b_up, vector, number, factor, p, seed, tf32)[0]


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, w_down, b_down, w_up, b_up, vector, activation, factor, p, seed, residual_is_x):
        added = residual
        if residual_is_x:
            added = x.view_as(x) if torch.compiler.is_compiling() else x
        tf32 = allows_tf32(x, w_down, w_up)
        y, z = _raw_forward(x, added, w_down, b_down, w_up, b_up, vector, activation, factor, p, seed, tf32)
        need_w_down = ctx.needs_input_grad[2]
        ctx.save_for_backward(x if need_w_down else None, w_down, b_down, w_up, b_up, z, vector, seed)
        ctx.activation, ctx.factor, ctx.p, ctx.residual_is_x = activation, factor, p, residual_is_x
        return y

    @staticmethod
    def backward(ctx, grad_y):
        refuse_double_backward("bottleneck", "pyfused.reference.bottleneck.bottleneck")
        x, w_down, b_down, w_up, b_up, z, vector, seed = ctx.saved_tensors
        need_x, need_residual, *asked = ctx.needs_input_grad[:7]
        asked = (need_x, *asked)
        needs = sum(1 << bit for bit, need in enumerate(asked) if need)
        grads = (None,) * 6
        if needs:
            if need_x and ctx.residual_is_x:
                needs |= _RESIDUAL_IS_X
            tf32 = allows_tf32(grad_y, w_down, w_up)
            grads = _raw_backward(
                grad_y, x, w_down, w_up, b_down, b_up, z, vector, ctx.activation, ctx.factor, ctx.p, seed, needs, tf32
            )
        # A gradient that was not asked for comes back as an empty tensor: the stable ABI has no optional returns.
        grad_x, *others = (grad if need else None for grad, need in zip(grads, asked, strict=True))
        return grad_x, grad_y if need_residual else None, *others, None, None, None, None, None


@torch.library.register_fake("pyfused::_bottleneck_forward")
def _(x, residual, w_down, b_down, w_up, b_up, vector, activation, factor, p, seed, allow_tf32=False):
    check_one_device(
        x,
        **{"residual": residual, "w_down": w_down, "b_down": b_down, "w_up": w_up, "b_up": b_up},
        **{"scale_vector": vector, "seed": seed},
    )
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty(x.shape), x.new_empty((rows, w_down.shape[0]), dtype=_product_dtype(x, w_down, w_up))


@torch.library.register_fake("pyfused::_bottleneck_backward")
def _(grad_y, x, w_down, w_up, b_down, b_up, z, vector, activation, factor, p, seed, needs, allow_tf32=False):
    check_one_device(
        grad_y,
        **{"x": x, "w_down": w_down, "b_down": b_down, "w_up": w_up, "b_up": b_up, "z": z},
        **{"scale_vector": vector, "seed": seed},
    )

    def grad(like, need):
        if like is None:
            return grad_y.new_empty((0,))
        return like.new_empty(like.shape if needs & need else (0,))

    return (
        grad(grad_y, _NEED_X),
        grad(w_down, _NEED_W_DOWN),
        grad(b_down, _NEED_B_DOWN),
        grad(w_up, _NEED_W_UP),
        grad(b_up, _NEED_B_UP),
        grad(vector, _NEED_SCALE),
    )


def _product_dtype(x: Tensor, w_down: Tensor, w_up: Tensor) -> torch.dtype:
    if w_down.dtype == x.dtype and w_up.dtype == x.dtype:
        return x.dtype
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(x, residual, w_down, b_down, w_up, b_up, activation, scale, dropout_p, seed) -> None:
    op = "bottleneck"
    tensors = {"x": x, "residual": residual, "w_down": w_down, "b_down": b_down, "w_up": w_up, "b_up": b_up}
    for name, tensor in tensors.items():
        if tensor is None and name in ("residual", "b_down", "b_up"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise TypeError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")
        if tensor.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(f"{op}: {name} must not be float64 where x is not, got x of {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., D], got a scalar")
    if residual is not None and residual.dtype != x.dtype:
        raise TypeError(f"{op}: residual must have x's dtype {x.dtype}, got {residual.dtype}")
    width = x.shape[-1]
    if w_down.dim() != 2 or w_down.shape[0] == 0 or w_down.shape[1] != width:
        raise ValueError(
            f"{op}: w_down must have shape [H, {width}] with H >= 1 (x is {list(x.shape)}), got {list(w_down.shape)}"
        )
    size = w_down.shape[0]
    expected = {"residual": x.shape, "w_up": (width, size), "b_down": (size,), "b_up": (width,)}
    for name, shape in expected.items():
        if tensors[name] is not None and tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(tensors[name].shape)}")
    _reference.activation_name(activation)
    if isinstance(scale, Tensor):
        if scale.dtype not in FLOAT_DTYPES or (scale.dtype == torch.float64 and x.dtype != torch.float64):
            raise TypeError(
                f"{op}: scale must be a float or a floating tensor that fits x ({x.dtype}), got {scale.dtype}"
            )
        if scale.device != x.device:
            raise TypeError(f"{op}: scale must be on x's device {x.device}, got {scale.device}")
        if tuple(scale.shape) not in ((), (1,), (width,)):
            raise ValueError(f"{op}: scale must be a float or have shape [1] or [{width}], got {list(scale.shape)}")
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a float or a tensor [1] or [{width}], got {type(scale).__name__}")
    check_dropout(op, dropout_p)
    check_seed(op, x, seed)
