"""Putting an adapter into a model: :func:`plan` checks everything and changes nothing, :func:`apply` carries it out."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from .config import PeftConfig
from .methods import METHODS, Method, Target, method_of
from .nn import AdaLoraLinear, AdapterLayer, LoraLinear, ModulesToSaveWrapper
from .nn.adapter import layers_around
from .nn.arguments import check_adapter_name
from .nn.lora_init import changes_base
from .nn.shared_input import share_inputs
from .targets import TASK_HEADS, base_modules, own_modules, unwrapped

_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


@dataclass(frozen=True)
class Plan:
    """What :func:`apply` will do.

    Attributes:
        config: a copy of the configuration with everything filled in that depends on the model.
        targets: layers to adapt, in the order of ``named_modules``.
        modules_to_save: name and module, or the wrapper that is there already, of each module to train in full.
        loading: all weights will come from a file.
    """

    config: PeftConfig
    targets: list[Target]
    modules_to_save: dict[str, nn.Module]
    loading: bool = False

    @property
    def method(self) -> Method:
        return method_of(self.config)


def plan(
    model: nn.Module, config: PeftConfig, adapter_name: str, others: Collection[PeftConfig] = (), loading: bool = False
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
    method = method_of(config)
    config = copy.deepcopy(config)
    config.__post_init__()  # fields may have been set since it was made
    method.check_beside(config, [other for other in others if other.peft_type is config.peft_type])
    if config.bias != "none" and any(other.bias != "none" for other in others):
        raise ValueError("bias: only one adapter of a model can train biases; set bias to 'none' for all others")
    _add_task_heads(config)
    modules_to_save = _modules_to_save(model, config)
    targets = method.targets(model, config, loading)
    _warn_if_tied(model, [*(target.name for target in targets), *modules_to_save])
    _warn_if_shared(model, targets)
    for name, module in modules_to_save.items():
        inside = next((part for part in module.modules() if isinstance(part, AdapterLayer)), None)
        if inside is not None:
            raise ValueError(
                f"modules_to_save: {name!r} has a part that is adapted by {_methods_around(inside)} already"
            )
        for target in targets:
            if target.name == name or target.name.startswith(f"{name}."):
                raise ValueError(f"modules_to_save: {name!r} holds {target.name!r}, which target_modules names as well")
    return Plan(config, targets, modules_to_save, loading)


def warn_if_base_changed(configs: Collection[PeftConfig]) -> None:
    """HF PEFT's warning, for adapters side by side of which one took a part of the base weights."""
    inits = {getattr(config, "init_lora_weights", True) for config in configs}
    for init in sorted(filter(changes_base, inits)):
        warnings.warn(
            f"init_lora_weights={init!r} took a part of the base weights: adapters beside it that were made for whole "
            "ones compute on what is left. Such an adapter should have a model of its own",
            stacklevel=3,
        )


def _methods_around(module: AdapterLayer) -> str:
    around = list(layers_around(module))
    named = ((kind.value, getattr(method, "layer_type", None)) for kind, method in METHODS.items())
    return " and ".join(name for name, kind in named if kind and any(isinstance(layer, kind) for layer in around))


def _add_task_heads(config: PeftConfig) -> None:
    heads = TASK_HEADS.get(config.task_type, ())
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def _modules_to_save(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
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
        if isinstance(module, AdapterLayer):
            raise ValueError(f"modules_to_save: {name!r} is adapted by {_methods_around(module)} already")
        found[name] = module
    unmatched = set(config.modules_to_save) - matched - set(TASK_HEADS.get(config.task_type, ()))
    if unmatched:
        warnings.warn(f"modules_to_save: no module of the model is called {', '.join(sorted(unmatched))}", stacklevel=5)
    return found


def parameter_uses(model: nn.Module) -> Counter[int]:
    """In how many modules each parameter is, by its ``id``."""
    return Counter(id(parameter) for _, module in base_modules(model) for parameter in module._parameters.values())


def _warn_if_tied(model: nn.Module, names: list[str]) -> None:
    uses = parameter_uses(model)
    modules = {name: unwrapped(module) for name, module in own_modules(model)}
    tied = [name for name in names if any(uses[id(parameter)] > 1 for parameter in modules[name].parameters())]
    if tied:
        warnings.warn(
            f"The weights of {', '.join(tied)} are tied to those of another module, which this adapter does not "
            "change: merging the adapter, or training a copy of the module, unties them",
            stacklevel=5,
        )


def _warn_if_shared(model: nn.Module, targets: list[Target]) -> None:
    modules = {target.base for target in targets if not isinstance(target.module, AdapterLayer)}
    uses = Counter(child for _, parent in base_modules(model) for child in parent._modules.values() if child in modules)
    if uses.total() > len(uses):
        names = model.named_modules(remove_duplicate=False)
        shared = [name for name, module in names if module in modules and uses[module] > 1]
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
        autocast_adapter_dtype: see :func:`pyfused.get_peft_model`.
    """
    config = plan.config
    first = not any(isinstance(module, (AdapterLayer, ModulesToSaveWrapper)) for module in model.modules())
    # Wrapping freezes a module.
    heads = (module for module in plan.modules_to_save.values() if not isinstance(module, ModulesToSaveWrapper))
    wrapped = [target.base for target in plan.targets] + list(heads)
    trainable = [] if first else [p for module in wrapped for p in module.parameters() if p.requires_grad]
    if first:
        model.requires_grad_(False)
    replaced: dict[nn.Module, nn.Module] = {}
    for target in plan.targets:
        options = target.options | {"adapter_name": adapter_name, "autocast_adapter_dtype": autocast_adapter_dtype}
        layer = target.layer(plan.method.layer_type)
        if layer is not None:
            layer.add_adapter(**options)
        else:
            layer = plan.method.layer_class(target.base)(target.base, **options)
            # Around the layers of methods that are nearer to the module, and inside of the others.
            nearer = (other for other in layers_around(target.module) if other.place < layer.place)
            layer.base_layer = next(nearer, target.base)
            replaced[layer.base_layer] = layer
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
    if replaced:  # walks over the model, but never over adapters, of which there may be many
        replace_modules(model, replaced)
        share_inputs((module for _, module in base_modules(model)), (LoraLinear, AdaLoraLinear))
    for parameter in trainable:
        parameter.requires_grad = True


def _thaw_biases(model: nn.Module, plan: Plan, bias: str) -> None:
    if bias == "all":
        for name, parameter in model.named_parameters():
            if name == "bias" or name.endswith(".bias"):
                parameter.requires_grad = True
    elif bias == "lora_only":
        for target in plan.targets:
            if getattr(target.base, "bias", None) is not None:
                target.base.bias.requires_grad = True


def replace_modules(model: nn.Module, replaced: dict[nn.Module, nn.Module]) -> None:
    """Put other modules into the places of some, wherever they are used: a layer that two blocks share stays shared."""
    for _, parent in list(base_modules(model)):
        for name, child in parent._modules.items():
            if child in replaced:
                parent._modules[name] = replaced[child]
