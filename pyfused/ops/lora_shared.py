"""LoRA on several projections of one input, as query, key and value are: :func:`lora_linear_shared`.

The raw ops are those of ``csrc/cpu/lora_shared.cpp`` and ``csrc/cuda/lora_shared.cpp``. Without them, and wherever
:func:`lora_linear` has a path of its own (torch.compile, forward-mode differentiation, trained weights, other devices),
the projections are computed one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from .common import (
    CALL_ERRORS,
    FLOAT_DTYPES,
    active_dropout,
    allows_tf32,
    autocast,
    autocasts,
    check_one_device,
    draw_seed,
    has_native,
    refuse_double_backward,
    takes_native_autograd,
)
from .lora import (
    _NEED_A,
    _NEED_B,
    _NEED_BIAS,
    _NEED_SCALE,
    _NEED_X,
    _check_linear,
    _fake_mask,
    _fake_s,
    lora_linear,
)

_OP = "lora_linear_shared"
_raw_forward = torch.ops.pyfused._lora_linear_shared_forward.default
_raw_backward = torch.ops.pyfused._lora_linear_shared_backward.default


class Projection(NamedTuple):
    """What :func:`lora_linear` takes besides x, in its order; without ``a`` and ``b`` it is ``F.linear``."""

    weight: Tensor  # [N, K]
    bias: Tensor | None = None  # [N]
    a: Tensor | None = None  # [R, K]
    b: Tensor | None = None  # [N, R]
    scale: float | Tensor = 1.0
    dropout_p: float = 0.0
    training: bool = False
    seed: Tensor | None = None


def lora_linear_shared(x: Tensor, projections: Sequence[Projection | tuple]) -> tuple[Tensor, ...]:
    r"""Linear layers with LoRA adapters that read the same x: ``lora_linear(x, *p)`` for each of ``projections``.

    One pass over x computes what all adapters need of it, one node of autograd carries all gradients, and there is one
    gradient of x: :math:`dX = \sum_i dY_i W_i + \sum_i mask_i \odot (ds_i A_i)`, to which each product adds in place.

    Results and the gradients of the adapters and biases have the bits of the separate calls (given the same seeds).
    x's gradient has the same terms in another order: the base products last to first, which is autograd's order, after
    or before the adapters' shares. In 16 bits it is rounded after each of these (on a GPU the shares of three are one),
    at most as often as by the separate calls.

    Args:
        x: input ``[..., K]``.
        projections: for each layer the arguments of :func:`lora_linear` that follow x: a :class:`Projection` or a plain
            tuple. Widths N, ranks, adapter dtypes, scales and dropout may differ; ``a`` and ``b`` None: no adapter.
            Where ``seed`` is None, each projection draws its own, in their order, so masks are independent.

    Returns:
        ``[..., N]`` in x's dtype for each projection.

    Autocast and TF32 as in :func:`lora_linear`; x is cast once. Under ``torch.compile``, on devices without kernels,
    where a weight requires a gradient, and in forward-mode differentiation the projections are computed separately.

    Raises:
        TypeError, ValueError: as :func:`lora_linear`, with the place of the projection; or there is no projection.
    """
    projections = [_projection(i, entry) for i, entry in enumerate(_checked(projections))]
    if torch.compiler.is_compiling() or not isinstance(x, Tensor) or not has_native(x, on_cuda=True):
        return _separately(x, projections)
    if autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = autocast(x, dtype)
        projections = [p._replace(weight=autocast(p.weight, dtype), bias=autocast(p.bias, dtype)) for p in projections]
    try:
        return _shared(x, projections)
    except CALL_ERRORS:
        for i, projection in enumerate(projections):
            _explain(i, x, projection)
        raise


def _checked(projections) -> Sequence:
    if isinstance(projections, Tensor) or not isinstance(projections, Sequence):
        raise TypeError(f"{_OP}: projections must be a sequence of tuples, got {type(projections).__name__}")
    if not projections:
        raise ValueError(f"{_OP}: projections must have at least one entry, got none")
    return projections


def _projection(index: int, entry) -> Projection:
    if type(entry) is Projection:
        return entry
    if not isinstance(entry, tuple) or not 1 <= len(entry) <= len(Projection._fields):
        got = f"{len(entry)} entries" if isinstance(entry, tuple) else type(entry).__name__
        raise TypeError(f"{_OP}: projections[{index}] must be a tuple of lora_linear's arguments after x, got {got}")
    return Projection(*entry)


def _shared(x: Tensor, projections: list[Projection]) -> tuple[Tensor, ...]:
    grad = torch.is_grad_enabled()
    if grad and any(projection.weight.requires_grad for projection in projections):
        return _separately(x, projections)
    tensors, factors, ps = [], [], []
    for projection in projections:
        weight, bias, a, b, scale, dropout_p, training, seed = projection
        p = 0.0
        if a is not None:
            p = active_dropout(_OP, dropout_p, training)
            if seed is None and p > 0.0:
                seed = draw_seed(x)
        vector, factor = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
        if a is None:
            vector, factor, seed = None, 1.0, None
        tensors += (weight, bias, a, b, vector, seed)
        factors.append(factor)
        ps.append(p)
    # torch resolves an argument that is a negative view, but no entry of a list with None among its entries
    tensors = [tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor for tensor in tensors]
    weights, biases, a, b, vectors, seeds = _columns(tensors)
    if takes_native_autograd(x, *tensors):
        tf32 = _allow_tf32(x, a, b)
        return tuple(_library.autograd.lora_linear_shared(x, weights, biases, a, b, vectors, factors, ps, seeds, tf32))
    trained = (x, *biases, *a, *b, *vectors)
    if grad and any(tensor is not None and tensor.requires_grad for tensor in trained):
        return _LoraLinearShared.apply(x, factors, ps, *tensors)
    return tuple(_raw_forward(x, weights, biases, a, b, vectors, factors, ps, seeds, _allow_tf32(x, a, b))[0])


def _separately(x: Tensor, projections: list[Projection]) -> tuple[Tensor, ...]:
    results = []
    for index, projection in enumerate(projections):
        if projection.a is None and projection.b is None:
            _explain(index, x, projection)
            results.append(F.linear(x, projection.weight, projection.bias))
            continue
        try:
            results.append(lora_linear(x, *projection))
        except (TypeError, ValueError):
            _explain(index, x, projection)
            raise
    return tuple(results)


def _allow_tf32(x: Tensor, a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> bool:
    """As each projection's own call has it: those without fp32 products do not look at it."""
    return x.is_cuda and any(allows_tf32(x, down, up) for down, up in zip(a, b, strict=True) if down is not None)


# Tensors of one projection in the flat list of an autograd.Function's arguments.
_FIELDS = 6


def _columns(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], ...]:
    return tuple(list(tensors[field::_FIELDS]) for field in range(_FIELDS))


class _LoraLinearShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factors, ps, *tensors):
        weights, biases, a, b, vectors, seeds = _columns(tensors)
        y, s = _raw_forward(x, weights, biases, a, b, vectors, factors, ps, seeds, _allow_tf32(x, a, b))
        needs = ctx.needs_input_grad
        need_x, ctx.needs = needs[0], []
        kept_s = []
        for i in range(len(factors)):
            _, need_bias, need_a, need_b, need_vector, _ = needs[3 + i * _FIELDS : 3 + (i + 1) * _FIELDS]
            ctx.needs.append(
                _NEED_X * need_x
                | _NEED_A * need_a
                | _NEED_B * need_b
                | _NEED_SCALE * need_vector
                | _NEED_BIAS * need_bias
            )
            kept_s.append(s[i] if need_b or need_vector else None)
        need_any_a = any(bits & _NEED_A for bits in ctx.needs)
        ctx.save_for_backward(
            x if need_any_a else None,
            *(weights if need_x else [None] * len(weights)),
            *a,
            *b,
            *kept_s,
            *vectors,
            *seeds,
        )
        ctx.set_materialize_grads(False)
        ctx.factors, ctx.ps = factors, ps
        return tuple(y)

    @staticmethod
    def backward(ctx, *grad_y):
        refuse_double_backward(_OP, "pyfused.reference.lora.lora_linear")
        x, *saved = ctx.saved_tensors
        count = len(grad_y)
        # A result that nothing was computed from has no gradient and no share.
        used = [i for i in range(count) if grad_y[i] is not None]
        grads: list[Tensor | None] = [None] * (3 + count * _FIELDS)
        if not used:
            return tuple(grads)
        weights, a, b, s, vectors, seeds = ([saved[field * count + i] for i in used] for field in range(6))
        needs, factors, ps = ([values[i] for i in used] for values in (ctx.needs, ctx.factors, ctx.ps))
        dys = [grad_y[i] for i in used]
        tf32 = _allow_tf32(dys[0], a, b)
        grad_x, found = _raw_backward(dys, x, weights, a, b, s, vectors, factors, ps, seeds, needs, tf32)
        grads[0] = grad_x if needs[0] & _NEED_X else None
        for place, i in enumerate(used):
            grad_a, grad_b, grad_vector, grad_bias = found[4 * place : 4 * place + 4]
            bits, at = needs[place], 3 + i * _FIELDS
            grads[at + 1] = grad_bias if bits & _NEED_BIAS else None
            grads[at + 2] = grad_a if bits & _NEED_A else None
            grads[at + 3] = grad_b if bits & _NEED_B else None
            grads[at + 4] = grad_vector if bits & _NEED_SCALE else None
        return tuple(grads)


@torch.library.register_fake("pyfused::_lora_linear_shared_forward")
def _(x, weights, biases, a, b, vectors, factors, ps, seeds, allow_tf32=False):
    return _fake_forward(x, weights, biases, a, b, vectors, seeds)


@torch.library.register_fake("pyfused::_lora_linear_shared_forward_with_masks")
def _(x, weights, biases, a, b, vectors, factors, ps, seeds):
    none = x.new_empty((0, 0), dtype=torch.int32)
    masks = [none if a[i] is None else _fake_mask(x, weights[i], a[i], ps[i]) for i in range(len(a))]
    return *_fake_forward(x, weights, biases, a, b, vectors, seeds), masks


def _fake_forward(x, weights, biases, a, b, vectors, seeds):
    y, s = [], []
    for i, weight in enumerate(weights):
        others = {"bias": biases[i], "a": a[i], "b": b[i], "scale_vector": vectors[i], "seed": seeds[i]}
        check_one_device(x, weight=weight, **others)
        y.append(x.new_empty((*x.shape[:-1], weight.shape[0])))
        s.append(x.new_empty((0,)) if a[i] is None else _fake_s(x, a[i]))
    return y, s


@torch.library.register_fake("pyfused::_lora_linear_shared_backward")
def _(grad_y, x, weights, a, b, s, vectors, factors, ps, seeds, needs, allow_tf32=False):
    grads = []
    first, need_x = grad_y[0], any(bits & _NEED_X for bits in needs)
    check_one_device(first, x=x)
    for i, dy in enumerate(grad_y):
        others = {"weight": weights[i], "a": a[i], "b": b[i], "s": s[i], "scale_vector": vectors[i], "seed": seeds[i]}
        check_one_device(first, grad_y=dy, **others)

        def grad(like, need, i=i, dy=dy):
            if like is None or a[i] is None:
                return dy.new_empty((0,))
            return like.new_empty(like.shape if needs[i] & need else (0,))

        grads += [grad(a[i], _NEED_A), grad(b[i], _NEED_B), grad(vectors[i], _NEED_SCALE)]
        grads.append(dy.new_empty(dy.shape[-1:] if needs[i] & _NEED_BIAS else (0,)))
    grad_x = first.new_empty((*first.shape[:-1], weights[0].shape[1]) if need_x else (0,))
    return grad_x, grads


def _explain(index: int, x, projection: Projection) -> None:
    """The public error of a bad argument, which names the projection; nothing where all is well."""
    try:
        if projection.a is None and projection.b is None:
            _check_base(x, projection)
        else:
            weight, bias, a, b, scale, dropout_p, _, seed = projection
            _check_linear(x, weight, bias, a, b, scale, dropout_p, seed)
    except (TypeError, ValueError) as clear:
        message = str(clear).removeprefix("lora_linear: ")
        raise type(clear)(f"{_OP}: projections[{index}]: {message}") from None


def _check_base(x, projection: Projection) -> None:
    for name, tensor in (("x", x), ("weight", projection.weight), ("bias", projection.bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise TypeError(f"{name} must be on x's device {x.device}, got {tensor.device}")
    if x.dim() == 0:
        raise ValueError("x must have shape [..., K], got a scalar")
    weight, bias = projection.weight, projection.bias
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"weight must have shape [N, {x.shape[-1]}] (x is {list(x.shape)}), got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
