"""Modules that are trained and saved as a whole next to an adapter, such as a classification head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import put_entry, remove_entry
from .arguments import check_adapter_name
from .by_row import RowAdapters, rows_for


class ModulesToSaveWrapper(nn.Module):
    """A frozen module and a trainable copy of it for each adapter that asked for one.

    The copy of the active adapter is called; the original where that adapter has none or adapters are switched off.
    Attributes that the wrapper has not are those of the module that would be called. State dict:
    ``original_module.*`` and ``modules_to_save.<name>.*``, as HF PEFT has it.

    Args:
        module: the module to wrap; frozen by this call.
    """

    containers = ("modules_to_save",)

    # Set where a model was called with one adapter for each sample, see by_row.py.
    _looks_for_rows = False

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self._active_adapter: str | None = None
        self._disabled = False
        module.requires_grad_(False)

    def add_adapter(self, adapter_name: str) -> None:
        """A copy of the original module for ``adapter_name``, frozen until :meth:`set_adapter`."""
        self.attach(adapter_name, copy.deepcopy(self.original_module))

    def attach(self, adapter_name: str, module: nn.Module) -> None:
        """Take in a copy of the original module that was made beside the wrapper; it is frozen."""
        check_adapter_name(adapter_name)
        put_entry(self.modules_to_save, adapter_name, module.requires_grad_(False).train(self.training))

    @property
    def active_adapter(self) -> str | None:
        return self._active_adapter

    def set_adapter(self, adapter_name: str | None, inference_mode: bool = False) -> None:
        """Call the copy of ``adapter_name`` from now on, and train it unless ``inference_mode``; None: the original."""
        self._active_adapter = adapter_name if adapter_name in self.modules_to_save else None
        for name, module in self.modules_to_save.items():
            self._set_requires_grad(module, name == self._active_adapter and not inference_mode)

    def set_requires_grad(self, adapter_names: list[str], requires_grad: bool) -> None:
        for name in adapter_names:
            if name in self.modules_to_save:
                self._set_requires_grad(self.modules_to_save[name], requires_grad)

    @staticmethod
    def _set_requires_grad(module: nn.Module, requires_grad: bool) -> None:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad = requires_grad

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name in self.modules_to_save:
            remove_entry(self.modules_to_save, adapter_name)
        if self._active_adapter == adapter_name:
            self._active_adapter = None

    def enable_adapters(self, enabled: bool) -> None:
        self._disabled = not enabled

    def active_module(self) -> nn.Module:
        """The module that is called while adapters are on."""
        modules = self.__dict__["_modules"]
        name = self.__dict__.get("_active_adapter")
        return modules["original_module"] if name is None else modules["modules_to_save"][name]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._looks_for_rows and not self._disabled:
            rows = rows_for(self)
            if rows is not None:
                return self._forward_by_row(rows, *args, **kwargs)
        return (self.original_module if self._disabled else self.active_module())(*args, **kwargs)

    def _forward_by_row(self, rows: RowAdapters, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = []
        for name, chosen in rows.groups(x).items():
            module = self.modules_to_save[name] if name in self.modules_to_save else self.original_module
            parts.append((chosen, module(x[chosen], *args, **kwargs)))
        order = torch.cat([chosen for chosen, _ in parts])
        return torch.cat([part for _, part in parts])[order.argsort()]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", ()):  # while it is being made or unpickled
                raise
            disabled = self.__dict__.get("_disabled", False)
            return getattr(self.__dict__["_modules"]["original_module"] if disabled else self.active_module(), name)
