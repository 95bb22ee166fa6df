"""What the layers of all methods share: adapters by name, some of them active."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .arguments import check_adapter_name
from .base import has_only_forward


class AdapterLayer(nn.Module):
    """A frozen module with adapters by name; the base of the layers of every method.

    A subclass registers its containers, adds the adapter of its constructor, and computes ``forward`` from the adapters
    named in ``_in_forward``; where those are none, it calls ``base_layer``. State dict: ``base_layer.*`` and
    ``<container>.<adapter>...``.

    Args:
        base_layer: the module to adapt.
        adapter_name: of the first adapter, which is active.

    Attributes:
        base_layer: that module, or a layer of another method around it.
        containers: names of the attributes that hold one entry for each adapter, ``nn.ModuleDict`` or
            ``nn.ParameterDict``; every adapter has one in the first.
        merged_adapters: names of those that are in the base weights at the moment.
    """

    containers: ClassVar[tuple[str, ...]]
    # Where several methods adapt one module, each has a layer around it: those with smaller numbers are nearer to it,
    # whichever came first, so that adapters that act together give the same in whatever order they were loaded.
    place: ClassVar[int] = 0

    # Whether forward gives each sample its adapter where a model is called that way, see by_row.py.
    follows_rows: ClassVar[bool] = False

    # Set where a model was called with one adapter for each sample, see by_row.py.
    _looks_for_rows = False

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.merged_adapters: list[str] = []
        self._active_adapters = [adapter_name]
        self._disabled = False
        self._in_forward: tuple[str, ...] = ()

    # For subclasses to define -----------------------------------------------------------------------------------------

    def add_adapter(self, adapter_name: str, *, autocast_adapter_dtype: bool = True, **options: Any) -> None:
        """Add an adapter; neither active nor trainable until :meth:`set_adapter`. Options are the method's."""
        raise NotImplementedError

    def detached_adapter(
        self, tensors: Mapping[str, Tensor], *, autocast_adapter_dtype: bool = True, **options: Any
    ) -> dict[str, Any]:
        """An adapter beside the layer, for :meth:`attach`: what goes under its name, by the attribute it goes into.

        Nothing is drawn, and the layer is not changed.

        Args:
            tensors: all of the adapter's by their names in its file; copied.
            options: the method's, as for :meth:`add_adapter`.
        """
        raise NotImplementedError

    def adapter_keys(self, adapter_name: str) -> dict[str, str]:
        """The names of an adapter's tensors: in its file, and in the layer's state dict."""
        raise NotImplementedError

    # Adapters ---------------------------------------------------------------------------------------------------------

    def has_adapter(self, adapter_name: str) -> bool:
        return adapter_name in self._modules[self.containers[0]]

    @property
    def adapter_names(self) -> list[str]:
        """Names of the layer's adapters, in the order in which they were added."""
        return list(self._modules[self.containers[0]].keys())

    def adapter_tensors(self, adapter_name: str) -> dict[str, Tensor]:
        """An adapter's tensors by their names in its file."""
        keys = self.adapter_keys(adapter_name)
        return {name: functools.reduce(getattr, key.split("."), self) for name, key in keys.items()}

    def _check_new(self, adapter_name: str) -> None:
        check_adapter_name(adapter_name)
        if self.has_adapter(adapter_name):
            raise ValueError(f"adapter_name: this layer already has an adapter {adapter_name!r}")

    def attach(self, adapter_name: str, parts: Mapping[str, Any]) -> None:
        """Take in an adapter that :meth:`detached_adapter` made; it is neither active nor trainable."""
        self._check_new(adapter_name)
        for attribute, part in parts.items():
            if isinstance(part, nn.Module):
                part.train(self.training)
            entries = getattr(self, attribute)
            if isinstance(entries, nn.Module):
                put_entry(entries, adapter_name, part)
            else:
                entries[adapter_name] = part
        self._update_forward()

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; some may belong to other layers of the model only."""
        return list(self._active_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, in this order; names that this layer does not have are passed over.

        They become trainable, unless ``inference_mode``; all others of the layer are frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name, parameter in self._adapter_parameters():
            parameter.requires_grad = name in names and not inference_mode
        self._active_adapters = names
        self._update_forward()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Thaw or freeze adapters without making them active."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, parameter in self._adapter_parameters():
            if name in names:
                parameter.requires_grad = requires_grad

    def _adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for container in self.containers:
            for name, entry in self._modules[container].items():
                for parameter in entry.parameters() if isinstance(entry, nn.Module) else (entry,):
                    yield name, parameter

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one, the first of the others by name becomes active.

        Raises:
            ValueError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is merged into the base layer; unmerge it first")
        if self.has_adapter(adapter_name):
            self._remove(adapter_name)
        if adapter_name in self._active_adapters:
            remaining = [name for name in self._active_adapters if name != adapter_name]
            self.set_adapter(remaining or sorted(self.adapter_names)[:1])

    def _remove(self, adapter_name: str) -> None:
        for container in self.containers:
            if adapter_name in self._modules[container]:
                remove_entry(self._modules[container], adapter_name)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on or off."""
        self._disabled = not enabled
        self._update_forward()

    def _update_forward(self) -> None:
        off = self._disabled or self.merged_adapters
        self._in_forward = () if off else tuple(name for name in self._active_adapters if self.has_adapter(name))

    def release(self) -> None:
        """Undo what the layer did outside of itself; it is taken out of the model."""

    def get_base_layer(self) -> nn.Module:
        """The module that is adapted, without other methods' layers around it."""
        base = self.base_layer
        while isinstance(base, AdapterLayer):
            base = base.base_layer
        return base

    def _called_base(self) -> nn.Module:
        """What calling ``base_layer`` comes to: layers of other methods that do nothing are passed by."""
        base = self._modules["base_layer"]
        while isinstance(base, AdapterLayer) and not (base._in_forward or base._looks_for_rows):
            if not has_only_forward(base):
                break
            base = base._modules["base_layer"]
        return base

    # Merging, see MergeableLayer --------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def is_untied(self) -> bool:
        """The base layer has weights of its own in place of shared ones, as long as adapters are merged into them."""
        return False

    def check_mergeable(self, action: str, adapter_names: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        """The base layer's parameters that merging these adapters changes; an error where it cannot."""
        raise NotImplementedError(f"{action}: {type(self).__name__} is no function of its base layer's weights alone")


def layers_around(module: nn.Module) -> Iterator[AdapterLayer]:
    """The layers with adapters around a module, one for each method, the outermost first."""
    while isinstance(module, AdapterLayer):
        yield module
        module = module.base_layer


def put_entry(container: nn.Module, name: str, entry: nn.Module | nn.Parameter) -> None:
    """``container[name] = entry`` for an ``nn.ModuleDict`` or ``nn.ParameterDict`` that is walked over meanwhile.

    Its dictionaries are replaced, not changed: ``parameters()`` or ``modules()`` in another thread goes on over what
    there was.
    """
    state = container.__dict__
    kind = "_modules" if isinstance(entry, nn.Module) else "_parameters"
    if "_keys" in state:  # nn.ParameterDict
        state["_keys"] = state["_keys"] | {name: None}
    state[kind] = state[kind] | {name: entry}


def remove_entry(container: nn.Module, name: str) -> None:
    """``del container[name]`` as :func:`put_entry`."""
    state = container.__dict__
    for kind in ("_keys", "_modules", "_parameters"):
        if name in state.get(kind, ()):
            kept = state[kind].copy()
            del kept[name]
            state[kind] = kept
