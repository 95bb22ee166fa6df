"""One adapter for each sample of a batch, ``adapter_names=``: what the layers of a model are told for one call.

A call of the model puts :class:`RowAdapters` into a context variable, so calls in several threads do not see each
other's; the layers look for it once a model was called that way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from .. import ops
from ..ops.common import autocasts, current_stream
from .base import has_only_forward, is_plain_linear, plain_weights
from .shared_input import MISSES, SharedInput

BASE = "__base__"

_current: ContextVar[RowAdapters | None] = ContextVar("pyfused_adapters_by_row", default=None)


class Layer(Protocol):
    """What :meth:`RowAdapters.add` needs of a layer."""

    base_layer: nn.Module
    training: bool

    def has_adapter(self, adapter_name: str) -> bool: ...

    def table_entry(self, adapter_name: str) -> ops.LoraAdapter | None:
        """The adapter for ``ops.multi_lora``; None where that would not give its result."""

    def add_adapters(self, y: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """The base layer's y with these adapters, for rows that all have them."""


class LinearLayer(Layer, Protocol):
    """What :meth:`RowAdapters.linear` needs of a layer."""

    _disabled: bool
    _shared_input: SharedInput | None


class RowAdapters:
    """The adapters of the samples of one call.

    Args:
        names: an adapter or ``"__base__"`` for each sample.
        layers: the model's layers that are to follow.
        copies: how often generation repeats each sample (beams, returned sequences).

    Attributes:
        adapters: their names.
        alone: the one adapter of all samples; None where they have several.
        layers: ids.
    """

    def __init__(self, names: Sequence[str], layers: Sequence[nn.Module], copies: int = 1) -> None:
        self.names = list(names)
        self.copies = copies
        self.adapters = sorted(set(names) - {BASE})
        self.alone = self.adapters[0] if len(self.adapters) == 1 and BASE not in self.names else None
        self.layers = frozenset(map(id, layers))
        self._index: dict[tuple[int, torch.device], Tensor] = {}
        self._groups: dict[tuple[int, torch.device], dict[str, Tensor]] = {}
        self._plans: dict[int, _Plan] = {}
        self._together: dict[int, _Together] = {}
        self._ahead: dict[int, _Ahead] = {}

    def index(self, x: Tensor) -> Tensor:
        """int64 ``[samples]`` on x's device: places in :attr:`adapters`, -1 for the base."""
        count, samples = x.shape[0] if x.dim() else 0, len(self.names)
        if count not in (samples, samples * self.copies):
            raise ValueError(f"adapter_names must have one name for each of the {count} samples, got {samples}")
        key = (count, x.device)
        if key not in self._index:
            numbers = {name: number for number, name in enumerate(self.adapters)}
            places = [numbers.get(name, -1) for name in self.names]
            # Generation repeats each sample, its copies beside each other.
            self._index[key] = torch.tensor(places, device=x.device).repeat_interleave(count // max(samples, 1))
        return self._index[key]

    def names_of(self, x: Tensor) -> list[str]:
        """The name of each of x's samples."""
        self.index(x)  # checks their number
        times = x.shape[0] // max(len(self.names), 1)
        return [name for name in self.names for _ in range(times)]

    def groups(self, x: Tensor) -> dict[str, Tensor]:
        """For each name in the batch, "__base__" first, which samples have it: int64 on x's device."""
        key = (x.shape[0] if x.dim() else 0, x.device)
        if key not in self._groups:
            rows: dict[str, list[int]] = {name: [] for name in (BASE, *self.adapters)}
            for row, name in enumerate(self.names_of(x)):
                rows[name].append(row)
            self._groups[key] = {name: torch.tensor(own, device=x.device) for name, own in rows.items() if own}
        return self._groups[key]

    def replace(self, layer: Layer, y: Tensor, part: Callable[[str, Tensor | slice], Tensor]) -> Tensor:
        """The base layer's y ``[samples, ...]`` with ``part(name, chosen)`` in the samples of each of its adapters."""
        groups = {name: chosen for name, chosen in self.groups(y).items() if name != BASE and layer.has_adapter(name)}
        if len(groups) == 1 and len(y) == len(next(iter(groups.values()))):
            return part(next(iter(groups)), slice(None))
        parts = [(chosen, part(name, chosen)) for name, chosen in groups.items()]
        if parts:
            y = y.clone()
        for chosen, values in parts:
            y.index_copy_(0, chosen, values)
        return y

    def linear(self, layer: LinearLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer, a linear one, gives for x ``[samples, ..., K]``, with the adapter of each sample.

        In inference, layers that read the same x (see shared_input.py) compute together: the first that is called
        computes the results of all by one op, the others take theirs when they are called with that x. Layers with
        hooks are not among them, so that between their calls runs the model's own code alone, which changes no
        parameter. Where gradients are recorded each computes alone: one op would round x's gradient once for all.
        """
        if not (args or kwargs or layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling()):
            y = self._infer(layer, x)
            if y is not None:
                return y
        y = layer._modules["base_layer"](x, *args, **kwargs)
        return y if layer._disabled else self.add(layer, y, x)

    def _infer(self, layer: LinearLayer, x: Tensor) -> Tensor | None:
        """:meth:`linear` in inference; None where that is more than a product and a table."""
        if layer._disabled:
            return None
        key = id(layer)
        ahead = self._ahead.pop(key, None)
        if ahead is not None:
            if ahead.x is x and ahead.version == x._version and ahead.stream == current_stream(x) and not autocasts(x):
                ahead.misses.pop(key, None)
                return ahead.y
            self._miss(key, ahead)
        together = self._together.get(key)
        if together is None:
            together = self._together[key] = self._find_together(layer)
        if not together.layers:
            return None
        if len(together.layers) == 1 or type(x) is not Tensor or x.is_inference() or autocasts(x):
            return ops.multi_lora_(_product(layer, x), x, together.tables[0], self.index(x))
        for other in together.layers[1:]:
            left = self._ahead.pop(id(other), None)
            if left is not None:
                self._miss(id(other), left)
        try:
            ys = [_product(one, x) for one in together.layers]
            ops.multi_lora_(ys, x, together.tables, self.index(x))
        except (RuntimeError, TypeError, ValueError):
            # Another layer's parameters may be unusable until it is called, and its errors are its own.
            self._together[key] = _Together(together.layers[:1], together.tables[:1], {})
            return self._infer(layer, x)
        version, stream = x._version, current_stream(x)
        for other, y in zip(together.layers[1:], ys[1:], strict=True):
            self._ahead[id(other)] = _Ahead(x, version, stream, y, together.misses)
        return ys[0]

    def _find_together(self, layer: LinearLayer) -> _Together:
        """The layer and those whose results its call is to compute; no layer where its own is more than a product and
        a table.
        """

        def fits(one: LinearLayer) -> bool:
            plan = self._plan(one)
            return plan.table is not None and not plan.others and is_plain_linear(one._modules["base_layer"])

        layers, group, misses = [layer] if fits(layer) else [], layer._shared_input, {}
        if layers and group is not None and has_only_forward(layer):
            others, misses = group.others(layer), group.misses(layer)
            others = [other for other in others if id(other) in self.layers and has_only_forward(other)]
            layers += filter(fits, others)
        return _Together(layers, [self._plan(one).table for one in layers], misses)

    def _miss(self, key: int, ahead: _Ahead) -> None:
        ahead.misses[key] = ahead.misses.get(key, 0) + 1
        if ahead.misses[key] >= MISSES:
            self._together.clear()

    def close(self) -> None:
        """The call of the model has ended: nobody will take what was computed ahead."""
        while self._ahead:
            self._miss(*self._ahead.popitem())

    def _plan(self, layer: Layer) -> _Plan:
        if torch.is_grad_enabled():  # it may hold what was computed from parameters, for the graph of this one run
            return _Plan.of(layer, self.adapters)
        plan = self._plans.get(id(layer))
        if plan is None:
            plan = self._plans[id(layer)] = _Plan.of(layer, self.adapters)
        return plan

    def add(self, layer: Layer, y: Tensor, x: Tensor) -> Tensor:
        """The base layer's y ``[samples, ...]`` with the adapter of each sample; y itself is lost."""
        index, plan = self.index(x), self._plan(layer)
        if x.dtype != y.dtype:  # autocast, or a quantised layer
            x = x.to(y.dtype)
        if plan.table is not None:
            y = add_table(layer, y, x, plan.table, index)
        for name in plan.others:
            chosen = self.groups(x)[name]
            y = y.index_copy(0, chosen, layer.add_adapters(y[chosen], x[chosen], (name,)))
        return y


class _Together(NamedTuple):
    """Linear layers whose results the call of the first computes."""

    layers: list[LinearLayer]
    tables: list[ops.LoraTable]
    misses: dict[int, int]  # the first's, see SharedInput.misses


class _Ahead(NamedTuple):
    """A layer's result that the call of another has computed from x."""

    x: Tensor
    version: int
    stream: int | None
    y: Tensor
    misses: dict[int, int]


def _product(layer: LinearLayer, x: Tensor) -> Tensor:
    """What calling a plain base layer comes to."""
    parameters = layer._modules["base_layer"]._parameters
    return ops.frozen_linear(x, parameters["weight"], parameters["bias"])


def add_table(layer: nn.Module, y: Tensor, x: Tensor, table: ops.LoraTable, index: Tensor) -> Tensor:
    """The base layer's y with a table's adapters; y itself is lost where nobody else can have it."""
    if torch.is_grad_enabled() or layer.training or plain_weights(layer._modules["base_layer"]) is None:
        return ops.multi_lora(y, x, table, index, training=layer.training)
    return ops.multi_lora_(y, x, table, index)  # nobody else has the result of a plain linear layer


class _Plan(NamedTuple):
    """How a layer applies the adapters of a call: those in a table together, others one by one."""

    table: ops.LoraTable | None
    others: list[str]

    @classmethod
    def of(cls, layer: Layer, adapters: list[str]) -> _Plan:
        entries = [layer.table_entry(name) if layer.has_adapter(name) else None for name in adapters]
        others = [
            name for name, entry in zip(adapters, entries, strict=True) if entry is None and layer.has_adapter(name)
        ]
        return cls(None if all(entry is None for entry in entries) else table_of(layer, entries), others)


def table_of(layer: nn.Module, entries: list[ops.LoraAdapter | None]) -> ops.LoraTable:
    """A table of these; the layer's last one where it is the same."""
    table = _tables.get(layer)
    if table is None or not _same(table, entries):
        table = _tables[layer] = ops.LoraTable(entries)
    return table


# The last table of each layer: making one takes longer than to see that it still holds.
_tables: WeakKeyDictionary[nn.Module, ops.LoraTable] = WeakKeyDictionary()


def forget_adapter(layer: nn.Module, adapter_name: str) -> None:
    """Before an adapter is removed: its memory is not to stay in the layer's last table."""
    table = _tables.get(layer)
    entry = None if table is None else layer.table_entry(adapter_name)
    if entry is not None and any(other is not None and other.a is entry.a for other in table.adapters):
        _tables.pop(layer, None)


def _same(table: ops.LoraTable, entries: list[ops.LoraAdapter | None]) -> bool:
    if len(table) != len(entries) or not table.is_current():
        return False
    for old, new in zip(table.adapters, entries, strict=True):
        if (old is None) != (new is None):
            return False
        if old is not None and not (old.a is new.a and old.b is new.b and old[2:] == new[2:]):
            return False
    return True


def rows_for(layer: nn.Module) -> RowAdapters | None:
    """What the call in progress says about the layer; None where it says nothing."""
    rows = _current.get()
    return rows if rows is not None and id(layer) in rows.layers else None


@contextmanager
def adapters_by_row(names: Sequence[str], layers: Sequence[nn.Module], copies: int = 1) -> Iterator[None]:
    """In this context, ``layers`` give each sample its adapter."""
    for layer in layers:
        layer._looks_for_rows = True
    if torch.is_grad_enabled():  # a process that only serves leaves torch as it is
        _let_checkpoints_follow()
    rows = RowAdapters(names, layers, copies)
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)
        rows.close()


@torch.compiler.disable  # Dynamo would go through it in every graph
@functools.cache
def _let_checkpoints_follow() -> None:
    """From now on, what a checkpoint computes again in the backward has the adapters that its forward had.

    By then the call is over and the thread may be one of autograd's. torch has no hook for what is to be there again
    (``context_fn`` is an argument of each checkpoint, and of one kind alone), so we are where each kind is given the
    function that it will run: a checkpoint with ``use_reentrant`` when it runs it first, one without when it is made.
    """
    reentrant, frame = checkpoint.CheckpointFunction, checkpoint._CheckpointFrame
    reentrant.forward = staticmethod(_following(reentrant.forward))
    frame.__init__ = _following(frame.__init__)


def _following(keep: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(keep)
    def keep_with_rows(self: Any, run: Callable[..., Any], *args: Any) -> Any:
        return keep(self, functools.partial(_run_with, _current.get(), run), *args)

    return keep_with_rows


def _run_with(rows: RowAdapters | None, run: Callable[..., Any], *args: Any) -> Any:
    token = _current.set(rows)
    try:
        return run(*args)
    finally:
        _current.reset(token)
