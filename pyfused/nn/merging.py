"""Layers whose adapters can be merged into the base layer's weights."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .adapter import AdapterLayer


class MergeableLayer(AdapterLayer):
    """An :class:`AdapterLayer` whose adapters are a change of the base layer's weight, and of its bias perhaps.

    A subclass says what merging changes (``_merged_names``), and how (``_merge_into``, ``_take_out``).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self._remerge: list[str] = []
        self._shared: dict[str, nn.Parameter] = {}

    # For subclasses to define -----------------------------------------------------------------------------------------

    _merged_names: tuple[str, ...] = ("weight",)

    def _prepare_merge(self, adapter_names: list[str]) -> None:
        """Called before any of these adapters is merged; others may be."""

    def _merge_into(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        """Change the base layer's tensors, by name, in place."""
        raise NotImplementedError

    def _take_out(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        """Undo :meth:`_merge_into`."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------------

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on or off. Merged ones are taken out of the weight while they are off."""
        if enabled == (not self._disabled):
            return
        if not enabled and self.merged:
            names = list(self.merged_adapters)
            self.unmerge()
            self._remerge = names
        super().enable_adapters(enabled)
        if enabled and self._remerge:
            names, self._remerge = self._remerge, []
            self.merge(adapter_names=names)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Put adapters into the base weights, rounded once per adapter; the layer then costs what the base costs.

        Args:
            safe_merge: compute the new weights next to the old ones, and keep the old ones where the new have an
                infinity or a NaN.
            adapter_names: None for the active adapters.

        Raises:
            TypeError: ``adapter_names`` is a string.
            ValueError: the result is not finite (``safe_merge``), or adapters are switched off; the layer is unchanged.
            NotImplementedError: a base weight is no plain floating-point tensor.
            RuntimeError: an adapter has a bias and the base layer has none.
        """
        names = self._names_to_merge(adapter_names)
        if not names:
            return
        parameters = self.check_mergeable("merge", names)
        if safe_merge:
            for key, merged in self.checked_merge(names).items():
                parameters[key].data = merged
        else:
            self._prepare_merge(names)
            tensors = {key: parameter.data for key, parameter in parameters.items()}
            for name in names:
                self._merge_into(tensors, name)
        self.merged_adapters.extend(names)
        self._update_forward()

    @torch.no_grad()
    def checked_merge(
        self, adapter_names: Sequence[str], merged: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The base layer's tensors as :meth:`merge` leaves them; ValueError where they are not finite.

        Args:
            merged: as layers inside of this one have left them; changed in place.
        """
        names = [name for name in adapter_names if self.has_adapter(name)]
        parameters = self.check_mergeable("merge", names)
        merged = {key: parameter.clone() for key, parameter in parameters.items()} | dict(merged or {})
        self._prepare_merge(names)
        for name in names:
            self._merge_into(merged, name)
            if not all(torch.isfinite(tensor).all() for tensor in merged.values()):
                raise ValueError(f"NaNs detected in the merged weights: adapter {name!r} is not finite")
        return merged

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo :meth:`merge`, last merged first. Exact but for the rounding of the base weights."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        tensors = {key: parameter.data for key, parameter in self.check_mergeable("unmerge").items()}
        while self.merged_adapters:
            self._take_out(tensors, self.merged_adapters.pop())
        for key, parameter in self._shared.items():
            setattr(self.get_base_layer(), key, parameter)
        self._shared = {}
        self._update_forward()

    def own_weight(self) -> None:
        """Give the base layer copies of what merging changes until it is unmerged: it is tied to another layer."""
        if not self._shared:
            self._shared = self.check_mergeable("merge")
            for key, parameter in self._shared.items():
                setattr(self.get_base_layer(), key, nn.Parameter(parameter.detach().clone(), requires_grad=False))

    @property
    def is_untied(self) -> bool:
        return bool(self._shared)

    def _names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names or None, got the string {adapter_names!r}")
        names = self._active_adapters if adapter_names is None else adapter_names
        names = [name for name in dict.fromkeys(names) if self.has_adapter(name)]
        if not self.merged_adapters:
            return names
        names = [name for name in names if name not in self.merged_adapters]
        if names:
            warnings.warn(
                f"Already following adapters were merged {','.join(self.merged_adapters)}. You are now additionally "
                f"merging {','.join(names)}.",
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        return names

    def check_mergeable(self, action: str, adapter_names: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        """The base layer's parameters that merging changes.

        Args:
            action: for messages.
            adapter_names: what is to be merged.

        Raises:
            ValueError: adapters are switched off.
            NotImplementedError: one of the parameters is no plain floating-point tensor, or its values are elsewhere.
        """
        if self._disabled:
            raise ValueError(f"{action}: adapters are disabled, enable them first")
        base = self.get_base_layer()
        parameters = {key: getattr(base, key) for key in self._merged_names}
        for key, parameter in parameters.items():
            kind = type(parameter)
            if kind is not nn.Parameter or parameter.layout is not torch.strided or not parameter.is_floating_point():
                raise NotImplementedError(
                    f"{action}: the base {key} must be a plain floating-point tensor, got {kind.__name__} of "
                    f"{parameter.dtype} in {type(base).__name__}; merging into quantised or sharded weights "
                    "is not built"
                )
            if parameter.is_meta:
                raise NotImplementedError(
                    f"{action}: the base {key} has no values, it is on the meta device; where accelerate has offloaded "
                    "the model, load it without to merge"
                )
        return parameters

    # What the models read from a linear layer -------------------------------------------------------------------------

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: T5 and others look at its dtype."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> Tensor | None:
        return self.get_base_layer().bias
