"""Which modules of a model a configuration names: HF PEFT's rules, on names alone."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import nn

from .config import PeftConfig, TaskType
from .nn import AdapterLayer, ModulesToSaveWrapper
from .nn.base import is_conv1d

# Heads that are new for a task and therefore trained in full.
TASK_HEADS: dict[TaskType, tuple[str, ...]] = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# Layers of an expert of Mixtral and of other mixtures, where each is one.
_EXPERT_LAYERS = ("w1", "w2", "w3", "gate_proj", "up_proj", "down_proj")
# From this many names on, a set of full names is written as the suffixes that say the same.
_CONDENSE_FROM = 20


def model_config_value(model: nn.Module, name: str) -> Any:
    """A value of ``model.config``, which may be an object, a dict, or missing."""
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def resolve_target_modules(
    model: nn.Module, config: PeftConfig, defaults: Mapping[str, list[str] | str], condense: bool = True
) -> set[str] | str:
    """``config.target_modules`` with the default of the architecture and "all-linear" written out.

    Args:
        defaults: by the model_type of the model's config.
        condense: write many full names as the suffixes that say the same.

    Raises:
        ValueError: none given and the architecture is not known, or "all-linear" finds nothing.
    """
    targets = config.target_modules
    if targets is None:
        model_type = model_config_value(model, "model_type")
        default = defaults.get(model_type)
        if default is None:
            raise ValueError(
                f"Please specify target_modules: there is no default for model type {model_type!r}. "
                f"{describe_candidates(model)}"
            )
        targets = default if isinstance(default, str) else set(default)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        targets = _all_linear(model, config.task_type)
    if condense and isinstance(targets, set) and len(targets) >= _CONDENSE_FROM:
        names = [name for name, _ in model.named_modules()]
        suffixes = tuple(f".{target}" for target in targets)
        others = [name for name in names if name not in targets and not name.endswith(suffixes)]
        condensed = _shortest_suffixes(targets, others)
        if len(condensed) < len(targets):
            targets = condensed
    return targets


def _all_linear(model: nn.Module, task_type: TaskType | None) -> set[str]:
    names = {name for name, module in own_modules(model) if is_linear(module) or is_conv1d(base_of(module))}
    _warn_of_experts("'all-linear'", [name for name, module in own_modules(model) if _is_experts(module)])
    if not any(cls.__name__ == "PreTrainedModel" for cls in type(model).__mro__):
        return names
    head = model.get_output_embeddings()
    if head is None and task_type is TaskType.SEQ_CLS:
        head = next((getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)), None)
    return names - {name for name, module in model.named_modules() if module is head}


def leave_out_experts(model: nn.Module, config: PeftConfig, found: Collection[str]) -> None:
    """A warning where ``target_modules``, which is resolved, names weights of experts by the names of the layers that
    they were in transformers before 5.0: HF PEFT's LoRA goes on to the parameters that hold them now.

    Names that match nothing else are taken out: HF PEFT would put new adapters on the experts when it loads this one.

    Args:
        found: names of the layers to adapt.
    """
    experts = [name for name, module in own_modules(model) if _is_experts(module)]
    named, targets = [], config.target_modules
    for name in experts:
        weights = [f"{name}.{weight}" for weight in _EXPERT_LAYERS]
        if any(is_target(config, targets, weight) and not is_excluded(config, weight) for weight in weights):
            named.append(name)
    _warn_of_experts(targets, named)
    if experts and isinstance(targets, set):
        layers = {target for target in targets if target.rpartition(".")[2] not in _EXPERT_LAYERS}
        config.target_modules = layers | {t for t in targets if any(matches_names({t}, name) for name in found)}


def _warn_of_experts(asked_for: set[str] | str, experts: list[str]) -> None:
    if experts:
        shown = sorted(asked_for) if isinstance(asked_for, set) else asked_for
        warnings.warn(
            f"target_modules={shown}: the weights of experts are parameters and no layers; these get no adapter: "
            f"{', '.join(experts)}",
            stacklevel=3,
        )


def _is_experts(module: nn.Module) -> bool:
    """Whether the weights of all experts of a mixture are one parameter, as transformers has them from 5.0 on."""
    stacked = any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values())
    return stacked and "experts" in type(module).__name__.lower()


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` of the base model, without the root: adapted modules in their adapters, the outermost,
    and nothing of what adapters put in.
    """
    return _walk("", model, {model}, _own_children)


def base_submodule(model: nn.Module, name: str) -> nn.Module:
    """The module that :func:`own_modules` calls ``name``; "" is the model."""
    for part in filter(None, name.split(".")):
        model = getattr(base_of(model), part)
    return model


def base_modules(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` without the adapters' own modules: wrapped modules, and what is wrapped in them."""
    yield "", model
    yield from _walk("", model, {model} if remove_duplicate else None, _base_children)


_Children = Callable[[nn.Module], Iterator[tuple[str, nn.Module]]]


def _walk(
    prefix: str, module: nn.Module, seen: set[nn.Module] | None, children: _Children
) -> Iterator[tuple[str, nn.Module]]:
    """Modules below ``module`` with their names; each once where there is a set of those ``seen``."""
    for name, child in children(module):
        if seen is not None:
            if child in seen:
                continue
            seen.add(child)
        yield f"{prefix}{name}", child
        yield from _walk(f"{prefix}{name}.", child, seen, children)


def _own_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children that a module has without adapters around it."""
    children = () if isinstance(module, ModulesToSaveWrapper) else base_of(module)._modules.items()
    return ((name, child) for name, child in children if child is not None)


def _base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module; of one that wraps, where hundreds of adapters may be, what is wrapped."""
    wrapped = isinstance(module, (AdapterLayer, ModulesToSaveWrapper))
    for name, child in module._modules.items():
        if child is not None and (not wrapped or name in ("base_layer", "original_module")):
            yield name, child


def base_state_dict(model: nn.Module) -> dict[str, Any]:
    """``model.state_dict(keep_vars=True)`` without adapters and without copies of ``modules_to_save``.

    Hooks run as they do there: they may rename what a module saves.
    """
    found: dict[str, Any] = OrderedDict()
    found._metadata = OrderedDict()
    return _save("", model, found)


def _save(prefix: str, module: nn.Module, found: dict[str, Any]) -> dict[str, Any]:
    """What ``nn.Module.state_dict`` does, for a module and what belongs to the base model in it."""
    metadata = found._metadata[prefix[:-1]] = {"version": module._version}
    for hook in module._state_dict_pre_hooks.values():
        hook(module, prefix, True)
    module._save_to_state_dict(found, prefix, True)
    for name, child in _base_children(module):
        found = _save(f"{prefix}{name}.", child, found)
    for hook in module._state_dict_hooks.values():
        result = hook(module, found, prefix, metadata)
        if result is not None and not getattr(hook, "_from_public_api", False):
            found = result
    return found


def base_of(module: nn.Module) -> nn.Module:
    """A module without the adapters around it."""
    return module.get_base_layer() if isinstance(module, AdapterLayer) else module


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without adapters and without copies of it."""
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else base_of(module)


def is_linear(module: nn.Module) -> bool:
    """An ``nn.Linear``, bare or with adapters around it."""
    return isinstance(base_of(module), nn.Linear)


def _shortest_suffixes(targets: set[str], others: list[str]) -> set[str]:
    """The fewest suffixes, shortest first, that end all of ``targets`` and none of ``others``."""

    def suffixes(name: str) -> list[str]:
        parts = name.split(".")
        return [".".join(parts[index:]) for index in reversed(range(len(parts)))]

    taken = {suffix for name in others for suffix in suffixes(name)}
    chosen: set[str] = set()
    for candidates in sorted(map(suffixes, targets)):
        name = candidates[-1]
        for suffix in candidates:
            if suffix in chosen or suffix in taken:
                continue
            if not any(name.endswith(f".{known}") for known in chosen):
                chosen.add(suffix)
                break
    return chosen or set(targets)


def matches_names(value: Collection[str] | str, name: str) -> bool:
    """A regular expression that matches all of ``name``, or a collection with ``name`` or the end of it after a dot."""
    if isinstance(value, str):
        return re.fullmatch(value, name) is not None
    return name in value or any(name.endswith(f".{item}") for item in value)


def is_excluded(config: PeftConfig, name: str) -> bool:
    """Named by ``exclude_modules``, or a module to save or part of one."""
    if config.exclude_modules and matches_names(config.exclude_modules, name):
        return True
    return any(re.match(rf"(^|.*\.){item}($|\..*)", name) for item in config.modules_to_save or ())


def is_target(config: PeftConfig, targets: set[str] | str, name: str) -> bool:
    """Named by ``targets``; for suffixes also by ``layers_to_transform``, which full names do not ask."""
    if not matches_names(targets, name):
        return False
    layers = getattr(config, "layers_to_transform", None)
    if isinstance(targets, str) or name in targets or layers is None or layers == []:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first index in the name counts: "layers.1.experts.0" is layer 1.
    regexes = [rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    match = next(filter(None, (re.match(regex, name) for regex in regexes)), None)
    if match is None:
        return False
    index = int(match["index"])
    return index == layers if isinstance(layers, int) else index in layers


def pattern_key(patterns: dict[str, Any], name: str) -> str | None:
    """The first key of ``rank_pattern`` or ``alpha_pattern`` that matches the end of ``name``."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None)


def describe_candidates(model: nn.Module) -> str:
    """A sentence with the names that could have been meant: last parts of the linear layers' names, each once."""
    linears = (name for name, module in own_modules(model) if is_linear(module))
    names = sorted({name.rpartition(".")[2] for name in linears})
    if not names:
        return "The model has no linear layers."
    listed = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return f"Names of its linear layers: {listed}."
