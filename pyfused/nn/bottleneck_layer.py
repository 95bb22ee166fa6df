"""Bottleneck adapters by name around a module of a model."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import AdapterLayer
from .base import adapter_device, adapter_dtype, frozen_copy
from .bottleneck import Bottleneck
from .by_row import RowAdapters, rows_for


class BottleneckLayer(AdapterLayer):
    r"""A module whose output h is a sub-layer's, with bottleneck adapters A on it: ``y = residual + A(input)``.

    What input and residual are is AdapterHub's: with x the residual stream that enters the sub-layer, input is x where
    ``is_parallel``, else ``h + x`` where ``original_ln_before``, else h; the residual is h. The model then adds x to y.
    Without ``original_ln_after`` x is taken off y beforehand, in fp32 or fp64 alone, unless ``h + x`` is the residual
    (``original_ln_before`` and ``residual_before_ln=False``). State dict: ``base_layer.*``, ``bottlenecks.<name>.*``,
    see :class:`pyfused.nn.Bottleneck`.

    Args:
        base_layer: the module; frozen by the caller.
        hidden_size: width of its output.
        bottleneck_size: of this first adapter, which is active.
        stream: the module whose first input is x, called before ``base_layer``, a layer norm; None: x is the first
            input of ``base_layer`` itself, and never added to h.
        like: a module with the dtype and device that adapters follow.
        is_parallel, original_ln_before, original_ln_after, residual_before_ln: AdapterHub's, for the first adapter.
        adapter_name: name of this first adapter.
        autocast_adapter_dtype: keep adapters in float32 where the model has a 16-bit dtype.
        **options: of :class:`pyfused.nn.Bottleneck`.
    """

    containers = ("bottlenecks",)
    follows_rows = True
    place = 3

    def __init__(
        self,
        base_layer: nn.Module,
        hidden_size: int,
        bottleneck_size: int,
        *,
        stream: nn.Module | None = None,
        like: nn.Module | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.bottlenecks = nn.ModuleDict()
        self.flow: dict[str, tuple[bool, bool, bool, bool | str]] = {}
        # In tuples, so that they are not registered a second time.
        self._stream = () if stream is None else (stream,)
        self._like = () if like is None else (like,)
        self._x = _Input()
        if stream is not None:
            stream.register_forward_pre_hook(_Tap(self))
        self.add_adapter(
            adapter_name, hidden_size, bottleneck_size, autocast_adapter_dtype=autocast_adapter_dtype, **options
        )
        self.train(base_layer.training)

    def add_adapter(
        self,
        adapter_name: str,
        hidden_size: int,
        bottleneck_size: int,
        *,
        is_parallel: bool = False,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        residual_before_ln: bool | str = True,
        autocast_adapter_dtype: bool = True,
        stream: nn.Module | None = None,
        like: nn.Module | None = None,
        **options: Any,
    ) -> None:
        """Add an adapter; neither active nor trainable until :meth:`set_adapter`. Arguments as for the class."""
        self._check_new(adapter_name)
        adapter = Bottleneck(hidden_size, bottleneck_size, **options).to(*self._place(autocast_adapter_dtype))
        adapter.requires_grad_(adapter_name in self._active_adapters)
        self.bottlenecks[adapter_name] = adapter.train(self.training)
        self.flow[adapter_name] = (is_parallel, original_ln_before, original_ln_after, residual_before_ln)
        self._update_forward()

    def _place(self, autocast_adapter_dtype: bool) -> tuple[torch.device | str | int, torch.dtype]:
        """Device and dtype of an adapter."""
        like = self._like[0] if self._like else self.get_base_layer()
        weight = next(like.parameters(), None)
        dtype = weight.dtype if weight is not None and weight.is_floating_point() else torch.float32
        return adapter_device(like), adapter_dtype(dtype, autocast_adapter_dtype)

    @torch.no_grad()
    def detached_adapter(
        self,
        tensors: Mapping[str, Tensor],
        *,
        autocast_adapter_dtype: bool = True,
        hidden_size: int,
        bottleneck_size: int,
        is_parallel: bool = False,
        original_ln_before: bool = False,
        original_ln_after: bool = True,
        residual_before_ln: bool | str = True,
        stream: nn.Module | None = None,
        like: nn.Module | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        with torch.device("meta"):  # where nothing is drawn
            adapter = Bottleneck(hidden_size, bottleneck_size, **options)
        place = self._place(autocast_adapter_dtype)
        for name, _ in list(adapter.named_parameters()):
            path, _, key = name.rpartition(".")
            setattr(adapter.get_submodule(path), key, frozen_copy(tensors[f"bottleneck.{name}"], *place))
        flow = (is_parallel, original_ln_before, original_ln_after, residual_before_ln)
        return {"bottlenecks": adapter, "flow": flow}

    def _remove(self, adapter_name: str) -> None:
        super()._remove(adapter_name)
        del self.flow[adapter_name]

    def release(self) -> None:
        for module in self._stream:
            hooks = module._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Tap) and hook.layer is self]:
                del hooks[key]

    def adapter_keys(self, adapter_name: str) -> dict[str, str]:
        names = [name for name, _ in self.bottlenecks[adapter_name].named_parameters()]
        return {f"bottleneck.{name}": f"bottlenecks.{adapter_name}.{name}" for name in names}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer takes and gives."""
        h = self.base_layer(*args, **kwargs)
        x = self._x.take() if self._stream else args[0] if args else None
        rows = rows_for(self) if self._looks_for_rows else None
        names = self._in_forward if rows is None else self._names_in(rows)
        if not names:
            return h
        if not isinstance(h, Tensor):
            raise TypeError(f"a bottleneck adapter needs a module that returns a tensor, got {type(h).__name__}")
        if rows is None:
            return self._adapt(h, x, None, names)
        return rows.replace(self, h, lambda name, i: self._adapt(h[i], None if x is None else x[i], None, (name,)))

    def _names_in(self, rows: RowAdapters) -> list[str]:
        """The adapters of the batch that the layer has."""
        return [] if self._disabled else [name for name in rows.adapters if self.has_adapter(name)]

    def _adapt(self, h: Tensor, x: Tensor | None, norm: nn.Module | None, names: Sequence[str]) -> Tensor:
        """The sub-layer's output with these adapters, all of which see the same h."""
        y = h
        drops_x = bool(self._stream) and all(_drops_stream(*self.flow[name]) for name in names)
        for name in names:
            is_parallel, before, after, residual_first = self.flow[name]
            if (is_parallel or before or drops_x) and x is None:
                raise RuntimeError("bottleneck adapter: the residual stream did not come by; is a norm not called?")
            if is_parallel:
                y = self.bottlenecks[name](x, y)
                continue
            if len(names) > 1 and residual_first is not True:
                raise NotImplementedError("several active bottleneck adapters need residual_before_ln=True")
            source = summed = h + x if before else h
            if before and norm is not None:
                source = norm(summed)
            if residual_first == "post_add":
                y = summed
            elif residual_first is False and (norm is not None or after):
                y = source
            # without a norm and original_ln_after, source is h + x and x is added by the model
            y = self.bottlenecks[name](source, y)
        if not drops_x:
            return y
        if x.dtype.itemsize < 4:
            raise NotImplementedError(
                "bottleneck adapter: original_ln_after=False takes the residual stream off, since the model adds it, "
                f"and too little would be left of h in {x.dtype}"
            )
        return y - x


class BottleneckOutput(BottleneckLayer):
    """The same around the output module of a post-norm encoder such as BERT's: dense, dropout, ``LayerNorm(h + x)``.

    ``original_ln_before`` also applies that norm to ``h + x``, and without ``original_ln_after`` it is not applied
    behind the adapter. ``residual_before_ln=False`` takes the adapter's input as the residual, "post_add" ``h + x``.
    """

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """``[..., in]`` and the residual stream ``[..., D]`` -> ``[..., D]``."""
        base = self.base_layer
        rows = rows_for(self) if self._looks_for_rows else None
        names = self._in_forward if rows is None else self._names_in(rows)
        if not names:
            return base(hidden_states, input_tensor)
        h = base.dropout(base.dense(hidden_states))
        if rows is None:
            return self._output(h, input_tensor, names)
        y = base.LayerNorm(h + input_tensor)
        return rows.replace(self, y, lambda name, i: self._output(h[i], input_tensor[i], (name,)))

    def _output(self, h: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        norm = self.base_layer.LayerNorm
        y = self._adapt(h, x, norm, names)
        return y if all(not self.flow[name][2] for name in names) else norm(y + x)


def _drops_stream(is_parallel: bool, before: bool, after: bool, residual_first: bool | str) -> bool:
    """Whether a pre-norm model's sub-layer is to give y and not ``y + x``."""
    return not after and (is_parallel or not before or residual_first is not False)


class _Input(threading.local):
    """The residual stream on its way from a norm to the layer, in each thread that runs the model."""

    x: Tensor | None = None

    def take(self) -> Tensor | None:
        x, self.x = self.x, None
        return x

    def __deepcopy__(self, memo: dict) -> _Input:
        return _Input()

    def __reduce__(self) -> tuple:
        return _Input, ()


class _Tap:
    """A hook that shows a layer the input of another module."""

    def __init__(self, layer: BottleneckLayer) -> None:
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple) -> None:
        layer = self.layer
        if layer._in_forward or (layer._looks_for_rows and rows_for(layer) is not None):
            layer._x.x = args[0]
