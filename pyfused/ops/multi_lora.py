"""Many LoRA adapters in one batch, each row with its own or none: :func:`multi_lora` and :func:`multi_lora_`.

The raw ops are those of ``csrc/cpu/multi_lora.cpp`` and ``csrc/cuda/multi_lora.cpp``. In place, a table's addresses are
handed over as one tensor; where there are gradients, its matrices are.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import _library
from ..reference import multi_lora as _reference
from .common import (
    CALL_ERRORS,
    autocast,
    autocasts,
    check_floating,
    check_one_device,
    check_seed,
    draw_seed,
    explain,
    has_native,
    refuse_double_backward,
    takes_native_autograd,
    without_autocast,
)
from .lora import _NEED_A, _NEED_B, _NEED_X
from .lora_table import LoraTable

# kDecodeRows in csrc/cpu/lora.h.
LORA_DECODE_ROWS = 16

_raw_in_place = torch.ops.pyfused._multi_lora_.default
_raw_forward = torch.ops.pyfused._multi_lora_forward.default
_raw_backward = torch.ops.pyfused._multi_lora_backward.default


def multi_lora(
    y: Tensor | Sequence[Tensor],
    x: Tensor,
    table: LoraTable | Sequence[LoraTable],
    index: Tensor,
    segments: Tensor | None = None,
    training: bool = False,
    seeds: Sequence[Tensor | None] | Sequence[Sequence[Tensor | None] | None] | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""Each row's LoRA adapter added to the output of a base layer: :math:`y_m + s_i (drop_i(x_m) A_i^T) B_i^T`.

    :math:`i` is row m's entry of ``index``; Hu et al. 2021, eq. 3, and Chen et al. 2023, "Punica: Multi-Tenant LoRA
    Serving", for the mixture. A row's result has the same bits whatever else is in the batch; a row without an adapter
    has y's. Differentiable in y, x and the table's matrices; an adapter without a row gets a gradient of zeros.

    Args:
        y: output of the base layer ``[..., N]``, x's dtype; or several, of layers that share x.
        x: their input ``[..., K]``, fp32, bf16, fp16 or fp64, any strides.
        table: adapters for y; where y is a sequence, a table of the same length for each.
        index: int32 or int64 on x's device, places in the table, -1 for none. Its shape is that of the first of x's
            leading dimensions, one or more: ``[batch]`` for x ``[batch, sequence, K]`` has an entry for each sequence.
        segments: int32 or int64 ``[S + 1]``, ascending from 0 to the number of rows (all leading dimensions
            flattened): ``index`` is ``[S]`` then, and its entries are for the rows in between.
        training: the adapters' dropout is applied only where True.
        seeds: int64 tensors with one element, one for each adapter (for each table a sequence of them where y is one).
            A mask is a pure function of the seed, the row's place among the rows of its adapter, and the column: that
            of the adapter alone. None: drawn from the generator of x's device.

    Returns:
        New tensors of y's shapes and dtype, accumulated in fp32 (fp64 for fp64) and rounded once.

    Under autocast x is cast to y's dtype.

    Raises:
        TypeError, ValueError: an argument has a shape, dtype or device that does not fit, or ``index`` goes beyond the
            table. On a GPU, where the numbers in ``index`` and ``segments`` are not waited for, these are a device-side
            assertion instead, as in torch's own indexing.
    """
    ys, tables, x = _lists(y, x, table)
    arguments = ("multi_lora", ys, x, tables, index, segments, [seeds] if isinstance(y, Tensor) else seeds)
    try:
        out = _multi_lora(*arguments[1:], training)
    except CALL_ERRORS:
        explain(_check, *arguments)
        raise
    return out[0] if isinstance(y, Tensor) else out


def multi_lora_(
    y: Tensor | Sequence[Tensor],
    x: Tensor,
    table: LoraTable | Sequence[LoraTable],
    index: Tensor,
    segments: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`multi_lora` in place, for inference: y is changed, no gradient is recorded, no dropout applied.

    Rows without an adapter are neither read nor written. y must not overlap x, nor one y another.

    Returns:
        y.

    Raises:
        TypeError, ValueError: as :func:`multi_lora`.
        RuntimeError: a gradient would be recorded: y, x or an adapter requires one, and grad mode is on.
    """
    ys, tables, x = _lists(y, x, table)
    try:
        _multi_lora_in_place(ys, x, tables, index, segments)
    except CALL_ERRORS:
        explain(_check, "multi_lora_", ys, x, tables, index, segments, None)
        raise
    return y if isinstance(y, Tensor) else tuple(ys)


def sums_as_lora_linear(x: Tensor) -> bool:
    """Whether :func:`pyfused.ops.lora_linear` and :func:`multi_lora` with one adapter sum in the same order for x: on a
    CPU up to :data:`LORA_DECODE_ROWS` rows; a GPU's kernels for one adapter cut their sums by the batch.
    """
    return x.dim() > 0 and not x.is_cuda and x.numel() <= LORA_DECODE_ROWS * x.shape[-1]


def _lists(y, x, table) -> tuple[list[Tensor], list[LoraTable], Tensor]:
    ys, tables = ([y], [table]) if isinstance(y, Tensor) else (list(y), list(table))
    if isinstance(x, Tensor) and ys and isinstance(ys[0], Tensor) and x.dtype != ys[0].dtype and autocasts(x):
        x = autocast(x, ys[0].dtype) if ys[0].is_floating_point() else x
    return ys, tables, x


def _multi_lora_in_place(ys, x, tables, index, segments) -> None:
    if torch.is_grad_enabled() and _needs_grad(ys, x, tables):
        raise RuntimeError("multi_lora_: y, x or an adapter requires a gradient; multi_lora is differentiable")
    native = has_native(x, on_cuda=True)
    if native and takes_native_autograd(x, index, *ys):
        return _library.autograd.multi_lora_(ys, x, [table.descriptor_for(x) for table in tables], index, segments)
    if not native or segments is None or torch.compiler.is_compiling():
        _check_shapes("multi_lora_", ys, x, tables, index, segments)
    if native:
        _raw_in_place(ys, x, [table.descriptor_for(x) for table in tables], index, segments)
        # A saved y that has changed is to be an error in a backward; the raw op does not say that it wrote.
        if not torch.compiler.is_compiling() and not ys[0].is_inference():
            torch.autograd.graph.increment_version(ys)
        return
    _check("multi_lora_", ys, x, tables, index, segments, None)
    with torch.no_grad(), without_autocast(x):
        for one, table in zip(ys, tables, strict=True):
            one.copy_(_reference.multi_lora(one, x, table.adapters, index, segments))


def _multi_lora(ys, x, tables, index, segments, seeds, training) -> tuple[Tensor, ...]:
    native = has_native(x, on_cuda=True)
    if not native or seeds is not None or segments is None or torch.compiler.is_compiling():
        _check_shapes("multi_lora", ys, x, tables, index, segments)
    drops = [[p if training else 0.0 for p in _dropout_ps(table)] for table in tables]
    seeds = [_seeds(x, own, given) for own, given in zip(drops, seeds or [None] * len(ys), strict=True)]
    if not native:
        _check("multi_lora", ys, x, tables, index, segments, seeds)
        with without_autocast(x):
            return tuple(
                _reference.multi_lora(y, x, table.adapters, index, segments, training, own)
                for y, table, own in zip(ys, tables, seeds, strict=True)
            )
    if not any(p > 0.0 for own in drops for p in own) and not (torch.is_grad_enabled() and _needs_grad(ys, x, tables)):
        out = [y.clone(memory_format=torch.contiguous_format) for y in ys]
        _raw_in_place(out, x, [table.descriptor_for(x) for table in tables], index, segments)
        return tuple(out)
    entries = [entry for table in tables for entry in table.adapters]
    scales = [1.0 if entry is None else float(entry.scale) for entry in entries]
    ps = [p for own in drops for p in own]
    a = [None if entry is None else entry.a for entry in entries]
    b = [None if entry is None else entry.b for entry in entries]
    ys = [y.view_as(y) if y is x else y for y in ys]  # torch.compile takes no tensor twice
    flat_seeds = [seed for own in seeds for seed in own]
    return _MultiLora.apply(x, index, segments, scales, ps, len(ys), *ys, *a, *b, *flat_seeds)


def _needs_grad(ys, x, tables) -> bool:
    return (
        x.requires_grad
        or any(y.requires_grad for y in ys)
        or any(
            entry is not None and (entry.a.requires_grad or entry.b.requires_grad)
            for table in tables
            for entry in table.adapters
        )
    )


def _dropout_ps(table: LoraTable) -> list[float]:
    return [0.0 if entry is None else float(entry.dropout_p) for entry in table.adapters]


def _seeds(x: Tensor, ps: list[float], given: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    """A seed for each adapter that drops anything."""
    given = [None] * len(ps) if given is None else given
    return [(draw_seed(x) if seed is None else seed) if p > 0.0 else None for p, seed in zip(ps, given, strict=True)]


class _MultiLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, segments, scales, ps, count, *tensors):
        y, a, b, seeds = _parts(tensors, count, len(scales))
        out, s = _raw_forward(y, x, a, b, scales, ps, seeds, index, segments)
        needs = ctx.needs_input_grad
        ctx.need_y, need_a, need_b, _ = _parts(needs[6:], count, len(scales))
        ctx.needs = [
            _NEED_X * needs[0] | _NEED_A * of_a | _NEED_B * of_b for of_a, of_b in zip(need_a, need_b, strict=True)
        ]
        ctx.save_for_backward(x, index, segments, s, *a, *b, *seeds)
        ctx.scales, ctx.ps = scales, ps
        return tuple(out)

    @staticmethod
    def backward(ctx, *grad_y):
        refuse_double_backward("multi_lora", "pyfused.reference.multi_lora.multi_lora")
        x, index, segments, s, *matrices = ctx.saved_tensors
        _, a, b, seeds = _parts(matrices, 0, len(ctx.scales))
        grads: list[Tensor | None] = [None] * (6 + len(grad_y) + 3 * len(a))
        for slot, (grad, need) in enumerate(zip(grad_y, ctx.need_y, strict=True)):
            grads[6 + slot] = grad if need else None
        if any(ctx.needs):
            grad_x, found = _raw_backward(
                list(grad_y), x, a, b, ctx.scales, ctx.ps, seeds, index, segments, s, ctx.needs
            )
            grads[0] = grad_x if ctx.needs[0] & _NEED_X else None
            for place, bits in enumerate(ctx.needs):
                at = 6 + len(grad_y) + place
                grads[at] = found[2 * place] if bits & _NEED_A else None
                grads[at + len(a)] = found[2 * place + 1] if bits & _NEED_B else None
        return tuple(grads)


def _parts(flat: Sequence, count: int, adapters: int) -> tuple[list, ...]:
    """``count`` entries for y, then ``adapters`` each for a, b and seeds."""
    ends = (0, count, count + adapters, count + 2 * adapters, count + 3 * adapters)
    return tuple(list(flat[begin:end]) for begin, end in pairwise(ends))


@torch.library.register_fake("pyfused::_multi_lora_")
def _(y, x, tables, index, segments):
    check_one_device(x, index=index, segments=segments)


@torch.library.register_fake("pyfused::_multi_lora_forward")
def _(y, x, a, b, scales, ps, seeds, index, segments):
    check_one_device(x, index=index, segments=segments)
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    rank = max([0, *(matrix.shape[0] for matrix in a if matrix is not None)])
    return [one.new_empty(one.shape) for one in y], x.new_empty((len(y), rows, rank), dtype=acc)


@torch.library.register_fake("pyfused::_multi_lora_backward")
def _(grad_y, x, a, b, scales, ps, seeds, index, segments, s, needs):
    check_one_device(x, index=index, segments=segments, s=s)
    grads = []
    for place, bits in enumerate(needs):
        for matrix, need in ((a[place], _NEED_A), (b[place], _NEED_B)):
            given = matrix is not None and bits & need
            grads.append(matrix.new_empty(matrix.shape) if given else x.new_empty((0,)))
    return x.new_empty(x.shape if any(bits & _NEED_X for bits in needs) else (0,)), grads


# ---- errors ----------------------------------------------------------------------------------------------------------


def _check_shapes(op: str, ys, x, tables, index, segments) -> None:
    """What native code cannot know: which of x's dimensions an index of this length is for."""
    for name, tensor in (("x", x), ("index", index)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have shape [..., K], got a scalar")
    lead = tuple(x.shape[:-1])
    if segments is None:
        if tuple(index.shape) != lead[: max(index.dim(), 1)] or (index.dim() == 0 and lead):
            raise ValueError(
                f"{op}: index must have the shape of x's first dimensions, {list(lead[:1])} to {list(lead)}, got "
                f"{list(index.shape)}"
            )
    elif index.dim() != 1 or segments.dim() != 1 or segments.shape[0] != index.shape[0] + 1:
        raise ValueError(
            f"{op}: segments must have one entry more than index, which has shape [S], got {list(segments.shape)} for "
            f"{list(index.shape)}"
        )


def _check(op: str, ys, x, tables, index, segments, seeds) -> None:
    if not ys or len(ys) != len(tables):
        raise ValueError(f"{op}: table must be a sequence as long as y, got {len(tables)} for {len(ys)}")
    for table in tables:
        if not isinstance(table, LoraTable):
            raise TypeError(f"{op}: table must be a pyfused.ops.LoraTable, got {type(table).__name__}")
        if len(table) != len(tables[0]):
            raise ValueError(f"{op}: table must have the same adapters for each y, got {[len(t) for t in tables]}")
    _check_shapes(op, ys, x, tables, index, segments)
    check_floating(op, x, x=x)
    for y, table in zip(ys, tables, strict=True):
        if not isinstance(y, Tensor):
            raise TypeError(f"{op}: y must be a tensor, got {type(y).__name__}")
        if y.dtype != x.dtype or y.device != x.device:
            raise TypeError(f"{op}: y must have x's dtype and device, {x.dtype} on {x.device}, got {y.dtype}")
        if y.dim() != x.dim() or y.shape[:-1] != x.shape[:-1]:
            raise ValueError(f"{op}: y must have shape {[*x.shape[:-1], 'N']}, got {list(y.shape)}")
        if table.device is None:
            continue
        if table.device != x.device:
            raise TypeError(f"{op}: table must be on x's device {x.device}, got {table.device}")
        if (table.in_features, table.out_features) != (x.shape[-1], y.shape[-1]):
            raise ValueError(
                f"{op}: table must have adapters [R, {x.shape[-1]}] and [{y.shape[-1]}, R] (x is {list(x.shape)}, y is "
                f"{list(y.shape)}), got [R, {table.in_features}] and [{table.out_features}, R]"
            )
        matrices = [matrix for entry in table.adapters if entry is not None for matrix in entry[:2]]
        if x.dtype != torch.float64 and any(matrix.dtype == torch.float64 for matrix in matrices):
            raise TypeError(f"{op}: table can have float64 adapters only with a float64 x, got x of {x.dtype}")
    for name, tensor in (("index", index), ("segments", segments)):
        if tensor is None:
            continue
        if tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: {name} must be int32 or int64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise TypeError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")
    if x.is_meta:
        return
    if index.numel() and not (index.min() >= -1 and index.max() < len(tables[0])):
        raise ValueError(
            f"{op}: index must be from -1 to {len(tables[0]) - 1}, the table's last adapter, got "
            f"{int(index.min())} to {int(index.max())}"
        )
    rows = x.shape[:-1].numel()
    if segments is not None and not (segments[0] == 0 and segments[-1] == rows and (segments.diff() >= 0).all()):
        raise ValueError(f"{op}: segments must ascend from 0 to the number of rows, {rows}, got {segments.tolist()}")
    for own in seeds or ():
        if own is not None and len(own) != len(tables[0]):
            raise ValueError(f"{op}: seeds must have one entry for each of {len(tables[0])} adapters, got {len(own)}")
        for seed in own or ():
            check_seed(op, x, seed)
