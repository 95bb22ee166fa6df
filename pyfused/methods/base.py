"""What a method has to say, and what several of them say alike."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..config import PeftConfig
from ..nn import AdapterLayer, ModulesToSaveWrapper
from ..nn.adapter import layers_around
from ..nn.base import is_conv1d
from ..targets import (
    base_of,
    base_submodule,
    describe_candidates,
    is_excluded,
    is_target,
    matches_names,
    model_config_value,
    own_modules,
    resolve_target_modules,
)

# Mamba's kernels read the weight of these layers and never call them.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_MODULES = ("out_proj", "conv1d")


# What the names of tensors in an adapter's file begin with, before the name of the layer.
FILE_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Target:
    """A module to adapt.

    Attributes:
        name: its (first) name in the model.
        module: what is there now, the bare module or the outermost :class:`AdapterLayer` around it.
        options: the method's arguments for the layer's constructor and ``add_adapter``.
    """

    name: str
    module: nn.Module
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> nn.Module:
        """The module without adapters."""
        return base_of(self.module)

    def layer(self, kind: type[AdapterLayer]) -> AdapterLayer | None:
        """The layer of one method around the module; None where there is none."""
        return next((layer for layer in layers_around(self.module) if isinstance(layer, kind)), None)


class Method(ABC):
    """One PEFT method. It has no state; what differs between two calls is in their configurations."""

    # Fields of the configuration that say what the weights in a file are worth, and do not show in their shapes.
    meaning: ClassVar[tuple[str, ...]] = ()
    # What all of its layers are, and no other method's.
    layer_type: ClassVar[type[AdapterLayer]]

    @abstractmethod
    def targets(self, model: nn.Module, config: PeftConfig, loading: bool) -> list[Target]:
        """The modules to adapt, in the order of ``named_modules``; at least one, or an error.

        Changes nothing but ``config``, where it fills in what depends on the model.

        Args:
            loading: all weights will come from a file, so it does not matter how they are initialised.

        Raises:
            ValueError, NotImplementedError: what does not fit the model, or is not built.
        """

    @abstractmethod
    def layer_class(self, module: nn.Module) -> type[AdapterLayer]:
        """What to put around a bare module; it is called with it, ``adapter_name`` and the target's options."""

    @abstractmethod
    def shapes(self, target: Target) -> dict[str, torch.Size]:
        """Shapes of the tensors of a new adapter by their names in its file, :meth:`AdapterLayer.adapter_keys`."""

    # For methods whose adapters are not alone, change while they are trained, or are not saved as they are -----------

    def check_beside(self, config: PeftConfig, others: Collection[PeftConfig]) -> None:
        """ValueError where an adapter cannot join those of ``others``, which are of the same method."""
        return None

    def rank_allocator(self, config: PeftConfig, adapter_name: str, layers: Mapping[str, AdapterLayer]) -> Any:
        """What distributes the ranks of the adapter while it is trained, :class:`pyfused.rank_allocator.RankAllocator`;
        None.
        """
        return None

    def to_file(
        self, config: PeftConfig, layers: Mapping[str, AdapterLayer], adapter_name: str, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """An adapter's tensors as they go into its file, by the names that they have there."""
        return tensors

    def from_file(
        self, config: PeftConfig, layers: Mapping[str, AdapterLayer], adapter_name: str, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """A file's tensors as they go into an adapter that is there, by the same names.

        Args:
            config: the file's.
        """
        return tensors

    def loaded(
        self, config: PeftConfig, saved: PeftConfig, layers: Mapping[str, AdapterLayer], adapter_name: str
    ) -> None:
        """Weights that belong to the configuration ``saved`` were loaded into the adapter, whose own is ``config``."""
        return None


def named_targets(
    model: nn.Module, config: PeftConfig, defaults: Mapping[str, list[str] | str], condense: bool = True
) -> list[tuple[str, nn.Module]]:
    """The modules that ``target_modules`` names and nothing excludes; ``config.target_modules`` is resolved.

    Args:
        defaults: ``target_modules`` by the model_type of the model's config, where the configuration names none.
        condense: see :func:`resolve_target_modules`.

    Raises:
        ValueError: there are none.
    """
    asked_for = config.target_modules
    config.target_modules = resolve_target_modules(model, config, defaults, condense)
    found, excluded = [], []
    for name, module in own_modules(model):
        if is_target(config, config.target_modules, name):
            (excluded if is_excluded(config, name) else found).append((name, module))
    if not found:
        raise ValueError(_nothing_matched(model, config, asked_for, [name for name, _ in excluded]))
    exclude = config.exclude_modules
    if exclude and not any(matches_names(exclude, name) for name, _ in own_modules(model)):
        warnings.warn(f"exclude_modules={exclude} excluded nothing", stacklevel=7)
    return found


def set_fan_in_fan_out(config: PeftConfig, targets: list[Target]) -> None:
    """It says nothing that the layers do not say; what is written to the file is right for HF PEFT."""
    linear = [target.base for target in targets if isinstance(target.base, nn.Linear) or is_conv1d(target.base)]
    needed = {is_conv1d(module) for module in linear}
    if needed and config.fan_in_fan_out not in needed:
        layers = "Conv1D" if True in needed else "nn.Linear"
        warnings.warn(
            f"fan_in_fan_out is {config.fan_in_fan_out} but the layers to adapt are {layers}: it is set to "
            f"{not config.fan_in_fan_out}",
            stacklevel=6,
        )
        config.fan_in_fan_out = not config.fan_in_fan_out


def _nothing_matched(model: nn.Module, config: PeftConfig, asked_for: Any, excluded: list[str]) -> str:
    shown = sorted(asked_for) if isinstance(asked_for, set) else asked_for
    message = f"Target modules {shown} not found in the base model"
    if excluded:
        message = (
            f"All modules that target_modules ({shown}) names were excluded by exclude_modules or modules_to_save: "
            f"{', '.join(excluded[:5])}{' and more' if len(excluded) > 5 else ''}"
        )
    for name in ("layers_to_transform", "layers_pattern"):
        if getattr(config, name, None) is not None:
            message += f", with {name} = {getattr(config, name)}"
    return f"{message}. {describe_candidates(model)}"


def check_called(model: nn.Module, target: Target) -> None:
    """An error where ``model`` never calls the module, or calls something else that adapts it."""
    name, module = target.name, target.base
    if type(module).__module__.startswith("peft."):
        raise ValueError(f"Target module {name!r} was wrapped by HF PEFT; pyfused.fuse speeds such a model up as it is")
    if isinstance(module, ModulesToSaveWrapper):
        raise ValueError(f"Target module {name!r} is a modules_to_save module of another adapter")
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise NotImplementedError(
            f"Target module {name!r}: nn.MultiheadAttention reads the weight of its out_proj and never calls it, so an "
            "adapter there would do nothing; leave it out (exclude_modules)"
        )
    parent, _, last = name.rpartition(".")
    encoder_layer = isinstance(base_submodule(model, parent), nn.TransformerEncoderLayer)
    if encoder_layer and torch.backends.mha.get_fastpath_enabled():
        raise ValueError(
            f"Target module {name!r}: in evaluation, nn.TransformerEncoderLayer reads the weights of its layers and "
            "never calls them, so an adapter there would do nothing; call "
            "torch.backends.mha.set_fastpath_enabled(False) first"
        )
    model_type = model_config_value(model, "model_type")
    if last in _MAMBA_MODULES and model_type in _MAMBA_TYPES:
        raise ValueError(
            f"Target module {name!r}: models of type {model_type!r} read the weight of {last} and never call it, so an "
            "adapter there would do nothing; leave it out (exclude_modules)"
        )
