"""Where a model has adapters, by the names that its modules have without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from .nn import AdapterLayer, ModulesToSaveWrapper
from .nn.adapter import layers_around
from .targets import own_modules

_Layer = TypeVar("_Layer", bound=AdapterLayer)


class AdaptedLayers:
    """The layers with adapters, and the wrapped modules of ``modules_to_save``, of one model as it is now.

    A module has a layer around it for each method that adapts it, and other layers inside where it is a block, so a
    layer's path in the model with adapters is not its module's name. Names here are those of the base model, as in
    files. Walking a large model costs more than what is done at its layers, so they are kept.

    Attributes:
        wrappers: the wrapped modules by name.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = [("", model), *own_modules(model)]
        self._around = {name: found for name, module in modules if (found := tuple(layers_around(module)))}
        self.wrappers = {name: module for name, module in modules if isinstance(module, ModulesToSaveWrapper)}
        self._layers = [layer for found in self._around.values() for layer in found]

    def __iter__(self) -> Iterator[AdapterLayer]:
        """All of them, each before those that it has inside."""
        return iter(self._layers)

    def __reversed__(self) -> Iterator[AdapterLayer]:
        return reversed(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    @property
    def names(self) -> list[str]:
        return list(self._around)

    def named(self) -> Iterator[tuple[str, AdapterLayer]]:
        """Name and layer, as in :meth:`__iter__`; a name comes again for each method."""
        return ((name, layer) for name, found in self._around.items() for layer in found)

    def around(self, name: str) -> tuple[AdapterLayer, ...]:
        """The layers around one module, the outermost first."""
        return self._around.get(name, ())

    def of(self, adapter_name: str) -> dict[str, AdapterLayer]:
        """The layers that have an adapter, one for each module that it adapts."""
        return {name: layer for name, layer in self.named() if layer.has_adapter(adapter_name)}

    def get(self, name: str, kind: type[_Layer]) -> _Layer | None:
        """The layer of one method around a module; None where there is none."""
        return next((layer for layer in self.around(name) if isinstance(layer, kind)), None)
