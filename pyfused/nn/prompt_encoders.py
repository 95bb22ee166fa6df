"""The encoders of virtual tokens of a model's adapters, by name."""

from __future__ import annotations

from torch import nn

from .adapter import put_entry, remove_entry
from .arguments import check_adapter_name


class PromptEncoders(nn.ModuleDict):
    """Encoders by adapter name, at most one of them active: the counterpart of :class:`AdapterLayer` for adapters that
    act on what goes into a model and not in its layers.
    """

    # Set where a model was called with one adapter for each sample, see by_row.py.
    _looks_for_rows = False

    def __init__(self) -> None:
        super().__init__()
        self._active: str | None = None
        self._disabled = False

    def add_adapter(self, adapter_name: str, encoder: nn.Module) -> None:
        """Neither active nor trainable until :meth:`set_adapter`."""
        check_adapter_name(adapter_name)
        put_entry(self, adapter_name, encoder.requires_grad_(False).train(self.training))

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @property
    def active_adapter(self) -> str | None:
        """The one whose virtual tokens go into the model now; None where there is none or they are switched off."""
        return None if self._disabled else self._active

    def set_adapter(self, adapter_names: list[str], inference_mode: bool = False) -> None:
        """Make the one of these names that is here the active one, and trainable unless ``inference_mode``."""
        self._active = next((name for name in adapter_names if name in self), None)
        for name, encoder in self.items():
            encoder.requires_grad_(name == self._active and not inference_mode)

    def set_requires_grad(self, adapter_names: list[str], requires_grad: bool = True) -> None:
        for name in adapter_names:
            if name in self:
                self[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self:
            remove_entry(self, adapter_name)
        if self._active == adapter_name:
            self._active = None

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled
