"""What state the adapters of a model are in: ``get_layer_status`` and ``get_model_status``, as HF PEFT has them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from .nn import AdapterLayer, ModulesToSaveWrapper

Irregular = Literal["irregular"]
_T = TypeVar("_T", bound=Hashable)


@dataclass
class TunerLayerStatus:
    """One adapted layer, or one wrapped module of ``modules_to_save``.

    Attributes:
        name: in the model that was asked about.
        module_type: name of its class.
        enabled: its adapters are switched on.
        active_adapters, merged_adapters: their names.
        requires_grad: of each adapter; "irregular" where its parameters differ.
        available_adapters: names of those it has, sorted.
        devices: types of the devices that each adapter is on.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


@dataclass
class TunerModelStatus:
    """A whole model. "irregular" is what differs from layer to layer; the model may then not do what one expects.

    Attributes:
        base_model_type: name of the base model's class.
        adapter_model_type: name of the class of what ``base_model`` is.
        peft_types: method of each adapter.
        trainable_params, total_params: numbers of parameters.
        num_adapter_layers: how many layers have adapters.
        enabled, active_adapters, merged_adapters, requires_grad, available_adapters, devices: as of a layer.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each layer with adapters.

    Args:
        model: a :class:`pyfused.PeftModel`, or any module that has pyfused's layers in it.

    Raises:
        ValueError: it has none.
    """
    inner = getattr(model, "base_model", model) if hasattr(model, "peft_config") else model
    found = [
        _layer_status(name, module)
        for name, module in inner.named_modules()
        if isinstance(module, (AdapterLayer, ModulesToSaveWrapper))
    ]
    if not found:
        raise ValueError("model has no layers with adapters of pyfused")
    return found


def _layer_status(name: str, module: AdapterLayer | ModulesToSaveWrapper) -> TunerLayerStatus:
    parameters: dict[str, list[nn.Parameter]] = {}
    for container in module.containers:
        for adapter, entry in getattr(module, container).items():
            tensors = entry.parameters() if isinstance(entry, nn.Module) else (entry,)
            parameters.setdefault(adapter, []).extend(tensors)
    adapted = isinstance(module, AdapterLayer)
    return TunerLayerStatus(
        name=name,
        module_type=type(module).__name__,
        enabled=not module._disabled,
        active_adapters=module.active_adapters if adapted else [module.active_adapter] if module.active_adapter else [],
        merged_adapters=list(module.merged_adapters) if adapted else [],
        requires_grad={key: _common(tensor.requires_grad for tensor in found) for key, found in parameters.items()},
        available_adapters=sorted(parameters),
        devices={key: sorted({tensor.device.type for tensor in found}) for key, found in parameters.items()},
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters of a model; arguments and errors as :func:`get_layer_status`."""
    layers = get_layer_status(model)
    available = sorted({name for layer in layers for name in layer.available_adapters})
    # A module of modules_to_save belongs to some of the adapters, and is never merged.
    adapted = [layer for layer in layers if layer.module_type != ModulesToSaveWrapper.__name__]
    merged = {name for layer in adapted for name in layer.merged_adapters}
    half_merged = any((set(layer.available_adapters) - set(layer.merged_adapters)) & merged for layer in adapted)
    parameters = list(model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    configs: dict[str, Any] = getattr(model, "peft_config", {})
    if hasattr(model, "get_nb_trainable_parameters"):
        trainable, total = model.get_nb_trainable_parameters()
    active = _common(tuple(layer.active_adapters) for layer in adapted)
    return TunerModelStatus(
        base_model_type=type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__,
        adapter_model_type=type(model.base_model).__name__ if configs else "None",
        peft_types={name: config.peft_type.value for name, config in configs.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=active if active == "irregular" else list(active),
        merged_adapters="irregular" if half_merged else sorted(merged),
        requires_grad={
            name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in available
        },
    )


def _common(values: Iterable[_T]) -> _T | Irregular:
    """The value that all are, or "irregular"."""
    different = set(values)
    return different.pop() if len(different) == 1 else "irregular"
