"""Putting an adapter into a model: :func:`plan` checks everything and changes nothing, :func:`apply` carries it out."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .config import LoraConfig, PeftConfig
from .nn import LoraLinear, ModulesToSaveWrapper
from .nn.arguments import check_adapter_name, check_init
from .targets import (
    TASK_HEADS,
    describe_candidates,
    is_conv1d,
    is_excluded,
    is_target,
    matches_names,
    model_config_value,
    own_modules,
    pattern_key,
    resolve_target_modules,
)

# Modules that LoRA can adapt in HF PEFT.
_NOT_BUILT = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
# Mamba's kernels read the weight of these layers and never call them.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_MAMBA_MODULES = ("out_proj", "conv1d")


@dataclass(frozen=True)
class Target:
    """A layer to adapt: its (first) name in the model, the module that is there now, and its rank and alpha."""

    name: str
    module: nn.Module
    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Plan:
    """What :func:`apply` will do.

    Attributes:
        config: a copy of the configuration with everything filled in that depends on the model.
        targets: layers to adapt, in the order of ``named_modules``.
        modules_to_save: name and module, or the wrapper that is there already, of each module to train in full.
    """

    config: LoraConfig
    targets: list[Target]
    modules_to_save: dict[str, nn.Module]


def plan(
    model: nn.Module, config: PeftConfig, adapter_name: str, others: Collection[LoraConfig] = (), loading: bool = False
) -> Plan:
    """Decide what an adapter changes in ``model``, without changing it or ``config``.

    Args:
        model: the base model, bare or with adapters of pyfused in it.
        config: of the new adapter.
        adapter_name: of the new adapter.
        others: configurations of the adapters that are there.
        loading: all weights will come from a file.

    Raises:
        TypeError, ValueError, NotImplementedError: whatever is wrong with the arguments or does not fit the model.
    """
    check_adapter_name(adapter_name)
    if not isinstance(config, LoraConfig):
        kind = type(config)
        raise TypeError(f"config must be a pyfused.LoraConfig, got {kind.__module__}.{kind.__qualname__}")
    config = copy.deepcopy(config)
    config.__post_init__()  # fields may have been set since it was made
    if not loading:
        check_init(config.init_lora_weights)
    if config.bias != "none" and any(other.bias != "none" for other in others):
        raise ValueError("bias: only one adapter of a model can train biases; set bias to 'none' for all others")
    _add_task_heads(config)
    asked_for = config.target_modules
    config.target_modules = resolve_target_modules(model, config)
    modules_to_save = _modules_to_save(model, config)
    targets = _targets(model, config, asked_for)
    _warn_if_tied(model, [*(target.name for target in targets), *modules_to_save])
    _warn_if_shared(model, targets)
    for target in targets:
        _check_layer(model, target)
        for name in modules_to_save:
            if target.name == name or target.name.startswith(f"{name}."):
                raise ValueError(f"modules_to_save: {name!r} holds {target.name!r}, which target_modules names as well")
    if config.fan_in_fan_out:
        warnings.warn("fan_in_fan_out is True but the layers to adapt are nn.Linear: it is set to False", stacklevel=4)
        config.fan_in_fan_out = False
    return Plan(config, targets, modules_to_save)


def _add_task_heads(config: LoraConfig) -> None:
    heads = TASK_HEADS.get(config.task_type, ())
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def _targets(model: nn.Module, config: LoraConfig, asked_for: Any) -> list[Target]:
    targets, excluded = [], []
    for name, module in own_modules(model):
        if not is_target(config, config.target_modules, name):
            continue
        if is_excluded(config, name):
            excluded.append(name)
        else:
            r = config.rank_pattern.get(pattern_key(config.rank_pattern, name), config.r)
            alpha = config.alpha_pattern.get(pattern_key(config.alpha_pattern, name), config.lora_alpha)
            targets.append(Target(name, module, r, alpha))
    if not targets:
        raise ValueError(_nothing_matched(model, config, asked_for, excluded))
    exclude = config.exclude_modules
    if exclude and not any(matches_names(exclude, name) for name, _ in own_modules(model)):
        warnings.warn(f"exclude_modules={exclude} excluded nothing", stacklevel=5)
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        unused = sorted(key for key in patterns if not any(pattern_key({key: 0}, target.name) for target in targets))
        if unused:
            warnings.warn(
                f"{field}: keys that match no adapted layer were ignored: {unused}", RuntimeWarning, stacklevel=5
            )
    return targets


def _nothing_matched(model: nn.Module, config: LoraConfig, asked_for: Any, excluded: list[str]) -> str:
    shown = sorted(asked_for) if isinstance(asked_for, set) else asked_for
    message = f"Target modules {shown} not found in the base model"
    if excluded:
        message = (
            f"All modules that target_modules ({shown}) names were excluded by exclude_modules or modules_to_save: "
            f"{', '.join(excluded[:5])}{' and more' if len(excluded) > 5 else ''}"
        )
    for field in ("layers_to_transform", "layers_pattern"):
        if getattr(config, field) is not None:
            message += f", with {field} = {getattr(config, field)}"
    return f"{message}. {describe_candidates(model)}"


def _check_layer(model: nn.Module, target: Target) -> None:
    name, module = target.name, target.module
    kind = type(module).__name__
    if type(module).__module__.startswith("peft."):
        raise ValueError(f"Target module {name!r} was wrapped by HF PEFT; pyfused.fuse speeds such a model up as it is")
    if isinstance(module, ModulesToSaveWrapper):
        raise ValueError(f"Target module {name!r} is a modules_to_save module of another adapter")
    if isinstance(module, _NOT_BUILT) or is_conv1d(module):
        raise NotImplementedError(f"Target module {name!r}: LoRA on {kind} is not built yet, only on nn.Linear")
    if not isinstance(module, (nn.Linear, LoraLinear)):
        raise ValueError(f"Target module {name!r} is not supported: it must be an nn.Linear, got {kind}")
    linear = module.base_layer if isinstance(module, LoraLinear) else module
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        raise NotImplementedError(
            f"Target module {name!r}: nn.MultiheadAttention reads the weight of its out_proj and never calls it, so an "
            "adapter there would do nothing; leave it out (exclude_modules)"
        )
    parent, _, last = name.rpartition(".")
    encoder_layer = isinstance(model.get_submodule(parent), nn.TransformerEncoderLayer)
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


def _modules_to_save(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Modules whose names end in one of ``modules_to_save`` (no dot needed); those inside of another come with it."""
    if not config.modules_to_save:
        return {}
    found: dict[str, nn.Module] = {}
    matched = set()
    for name, module in own_modules(model):
        ends = [item for item in config.modules_to_save if name.endswith(item)]
        matched.update(ends)
        if not ends or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if isinstance(module, _CONTAINERS):
            raise TypeError(f"modules_to_save: {name!r} is a {type(module).__name__}, which has no forward to train")
        if isinstance(module, LoraLinear):
            raise ValueError(f"modules_to_save: {name!r} is adapted by LoRA already")
        found[name] = module
    unmatched = set(config.modules_to_save) - matched - set(TASK_HEADS.get(config.task_type, ()))
    if unmatched:
        warnings.warn(f"modules_to_save: no module of the model is called {', '.join(sorted(unmatched))}", stacklevel=5)
    return found


def parameter_uses(model: nn.Module) -> Counter[int]:
    """In how many modules each parameter is, by its ``id``."""
    return Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())


def _warn_if_tied(model: nn.Module, names: list[str]) -> None:
    uses = parameter_uses(model)
    modules = dict(model.named_modules())
    tied = [name for name in names if any(uses[id(parameter)] > 1 for parameter in modules[name].parameters())]
    if tied:
        warnings.warn(
            f"The weights of {', '.join(tied)} are tied to those of another module, which this adapter does not "
            "change: merging the adapter, or training a copy of the module, unties them",
            stacklevel=5,
        )


def _warn_if_shared(model: nn.Module, targets: list[Target]) -> None:
    modules = {target.module for target in targets if isinstance(target.module, nn.Linear)}
    uses = Counter(child for parent in model.modules() for child in parent._modules.values() if child in modules)
    names = model.named_modules(remove_duplicate=False)
    shared = [name for name, module in names if module in modules and uses[module] > 1]
    if shared:
        warnings.warn(
            f"{', '.join(shared)}: one layer in several places, and its adapter acts in all of them (HF PEFT's acts in "
            "the first only)",
            stacklevel=5,
        )


def apply(
    model: nn.Module,
    plan: Plan,
    adapter_name: str,
    active_adapters: Sequence[str],
    autocast_adapter_dtype: bool = True,
) -> None:
    """Carry a plan out.

    In a model without adapters, everything but the new adapter (and what ``bias`` names) is frozen; in one with
    adapters, nothing that was there changes. An active adapter is trainable unless ``config.inference_mode``.

    Args:
        active_adapters: names of the active adapters, the new one among them where it is to be active.
        autocast_adapter_dtype: see :class:`pyfused.nn.LoraLinear`.
    """
    config = plan.config
    first = not any(isinstance(module, LoraLinear) for module in model.modules())
    trainable = [] if first else [parameter for parameter in model.parameters() if parameter.requires_grad]
    if first:
        model.requires_grad_(False)
    replaced: dict[nn.Module, nn.Module] = {}
    for target in plan.targets:
        options = {
            "r": target.r,
            "lora_alpha": target.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "init_lora_weights": False if config.weights_must_be_loaded else config.init_lora_weights,
            "autocast_adapter_dtype": autocast_adapter_dtype,
        }
        if isinstance(target.module, LoraLinear):
            target.module.add_adapter(adapter_name, **options)
        else:
            layer = replaced[target.module] = LoraLinear(target.module, adapter_name=adapter_name, **options)
            layer.set_adapter(active_adapters, config.inference_mode)
    active = adapter_name in active_adapters
    if active:
        _thaw_biases(model, plan, config.bias)
    for module in plan.modules_to_save.values():
        wrapper = module
        if not isinstance(module, ModulesToSaveWrapper):
            wrapper = replaced[module] = ModulesToSaveWrapper(module)
        wrapper.add_adapter(adapter_name)
        if active:
            wrapper.set_adapter(adapter_name, config.inference_mode)
    replace_modules(model, replaced)
    for parameter in trainable:
        parameter.requires_grad = True


def _thaw_biases(model: nn.Module, plan: Plan, bias: str) -> None:
    if bias == "all":
        for name, parameter in model.named_parameters():
            if name == "bias" or name.endswith(".bias"):
                parameter.requires_grad = True
    elif bias == "lora_only":
        for target in plan.targets:
            if target.module.bias is not None:
                target.module.bias.requires_grad = True


def replace_modules(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Put other modules into the places of some, wherever they are used: a layer that two blocks share stays shared."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
