"""Another adapter's weights in the place of one that is there: nothing of the model is made anew, or compiled anew."""

from __future__ import annotations

import copy
import math
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checkpoint import check_against_plan, read_adapter
from .config import LoraConfig, PeftConfig, local_folder
from .inject import Plan
from .nn import LoraLinear
from .nn.lora_init import changes_base
from .nn.lora_layer import scaling_of

if TYPE_CHECKING:
    from .model import PeftModel

_PREFIX = "base_model.model."
_WHICH_LAYERS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@torch.no_grad()
def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str | os.PathLike,
    adapter_name: str,
    torch_device: Any = None,
    *,
    subfolder: str | None = None,
    **hf_options: Any,
) -> None:
    """Put a saved LoRA adapter's weights, scaling and configuration in the place of an adapter's, under its name.

    The tensors stay where they are, so a compiled model, an optimizer or a CUDA graph goes on with the new values;
    where scalings or ranks differ, a model that is to be compiled once needs
    :func:`prepare_model_for_compiled_hotswap`. A smaller rank leaves zeros; a layer that the new adapter does not have
    gets zeros. Ranks and layers that the old adapter has no room for are errors.

    Args:
        model: a :class:`pyfused.PeftModel`, compiled by ``torch.compile`` or not.
        model_name_or_path: local folder of the new adapter.
        adapter_name: of the adapter to replace.
        torch_device: HF PEFT's; the weights go where the old ones are.
        subfolder, **hf_options: see :meth:`pyfused.PeftModel.from_pretrained`.

    Raises:
        TypeError, ValueError, NotImplementedError: the folder is no good; it holds no plain LoRA adapter, or one that
            does not fit in, or took a part of the base weight (PiSSA, OLoRA) that the other did not take; the old
            adapter is merged. The model is unchanged.
    """
    model = getattr(model, "_orig_mod", model)
    folder = local_folder(model_name_or_path, subfolder, hf_options)
    tuner = model.base_model
    config, tensors = PeftConfig.from_pretrained(folder), read_adapter(folder)
    _check_plain_lora(str(folder), config)
    tuner.check_names([adapter_name])
    old = tuner.peft_config[adapter_name]
    _check_plain_lora(f"adapter {adapter_name!r}", old)
    if any(adapter_name in layer.merged_adapters for layer in tuner.layers):
        raise ValueError(f"adapter_name: {adapter_name!r} is merged into the base weights; unmerge it first")
    plan = tuner.plan(config, _unused_name(tuner.peft_config), loading=True)
    check_against_plan(tuner.model, plan, tensors, str(folder))
    layers = tuner.layers.of(adapter_name)
    swaps = _swaps(layers, adapter_name, plan, str(folder))
    _check_same_base(str(folder), config, old, swaps, layers, adapter_name)
    for path, layer in layers.items():
        for key, target in layer.adapter_tensors(adapter_name).items():
            values = tensors.get(f"{_PREFIX}{path}.{key}") if path in swaps else None
            target.zero_()
            if values is not None:
                target[tuple(slice(size) for size in values.shape)] = values.to(target.device, target.dtype)
        if path in swaps:
            _set_scaling(layer, adapter_name, swaps[path])
    plan.config.inference_mode = old.inference_mode
    if any(path not in swaps or swaps[path]["r"] != layer.r[adapter_name] for path, layer in layers.items()):
        _describe_zeros(plan.config, old, layers, adapter_name)
    tuner.peft_config[adapter_name] = plan.config


def prepare_model_for_compiled_hotswap(model: PeftModel, *, target_rank: int | None = None) -> None:
    """Make room for the adapters that :func:`hotswap_adapter` will bring, before the model is compiled.

    Scalings become tensors, whose values can change without compiling anew; factors get ``target_rank``, filled up with
    zeros. Optimizers made before hold the old factors.

    Args:
        model: with LoRA adapters, changed in place; files saved from it have the larger rank.
        target_rank: the largest rank of all adapters to come; None leaves ranks as they are.

    Raises:
        ValueError: the model is compiled already, has no LoRA layers, an adapter of a larger rank, or one of
            another rank that took a part of the base weight (PiSSA, OLoRA); it is unchanged.
    """
    if hasattr(model, "_orig_mod"):
        raise ValueError("prepare_model_for_compiled_hotswap: call it before torch.compile")
    layers = [layer for layer in model.base_model.layers if isinstance(layer, LoraLinear)]
    if not layers:
        raise ValueError("prepare_model_for_compiled_hotswap: model has no LoRA layers")
    largest = max(rank for layer in layers for rank in layer.r.values())
    if target_rank is not None and target_rank < largest:
        raise ValueError(f"target_rank must be at least {largest}, the largest rank in the model, got {target_rank}")
    for name, config in model.peft_config.items():
        padded = target_rank is not None and any(layer.r.get(name, target_rank) != target_rank for layer in layers)
        if padded and changes_base(getattr(config, "init_lora_weights", True)):
            raise ValueError(
                f"target_rank must be None or the rank of adapter {name!r}, got {target_rank}: it took a part of the "
                f"base weight (init_lora_weights={config.init_lora_weights!r}), and files of another rank take another"
            )
    for layer in layers:
        for name in layer.adapter_names:
            if target_rank is not None:
                layer.r[name] = target_rank
                _pad(layer.lora_A[name], 0, target_rank)
                _pad(layer.lora_B[name], 1, target_rank)
            scaling = layer.scaling[name]
            if not isinstance(scaling, Tensor):
                layer.scaling[name] = torch.tensor(float(scaling), device=layer.lora_A[name].weight.device)
    if target_rank is not None:
        for name, config in model.peft_config.items():
            if type(config) is LoraConfig:
                _keep_scalings(model, name, config, target_rank)


def _keep_scalings(model: PeftModel, name: str, config: LoraConfig, rank: int) -> None:
    """Other alphas for another rank, so that a saved adapter has the scalings that it has here."""
    layers = model.base_model.layers.of(name)
    config.r, config.rank_pattern = rank, {}
    alphas = _alphas(layers, name, config)
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


def _describe_zeros(config: LoraConfig, old: LoraConfig, layers: dict[str, Any], name: str) -> None:
    """What a smaller adapter's configuration says, for the ranks and layers that are there: those are what is saved."""
    for field in _WHICH_LAYERS:
        setattr(config, field, copy.copy(getattr(old, field)))
    config.r, config.rank_pattern = old.r, dict(old.rank_pattern)
    alphas = _alphas(layers, name, config)
    config.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


def _alphas(layers: dict[str, Any], name: str, config: LoraConfig) -> dict[str, float]:
    """The alphas with which each layer's scaling is what it is at the layer's rank; the layers get them as well."""
    for layer in layers.values():
        rank = layer.r[name]
        layer.lora_alpha[name] = round(float(layer.scaling[name]) * (math.sqrt(rank) if config.use_rslora else rank), 6)
    return {path: layer.lora_alpha[name] for path, layer in layers.items()}


def _pad(linear: nn.Linear, dim: int, size: int) -> None:
    old = linear.weight
    shape = list(old.shape)
    if shape[dim] == size:
        return
    shape[dim] = size
    new = old.new_zeros(shape)
    new[tuple(slice(length) for length in old.shape)] = old.detach()
    linear.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    linear.in_features, linear.out_features = new.shape[1], new.shape[0]


def _check_plain_lora(where: str, config: PeftConfig) -> None:
    if type(config) is not LoraConfig or config.use_dora or config.lora_bias or config.bias != "none":
        raise ValueError(
            f"hotswap_adapter: {where} must be plain LoRA (no DoRA, no trained biases), and is {config.peft_type.value}"
        )
    if config.modules_to_save:
        raise ValueError(f"hotswap_adapter: {where} has modules_to_save ({', '.join(config.modules_to_save)})")


def _unused_name(names: Any) -> str:
    name = "hotswap"
    while name in names:
        name += "_"
    return name


def _swaps(layers: dict[str, Any], adapter_name: str, plan: Plan, source: str) -> dict[str, dict[str, Any]]:
    """What the method says of each layer of the new adapter; ValueError where there is no room for it."""
    swaps = {target.name: target.options for target in plan.targets}
    more = sorted(set(swaps) - set(layers))
    if more:
        shown = ", ".join(more[:3]) + (f" and {len(more) - 3} more" if len(more) > 3 else "")
        raise ValueError(f"{source}: has layers that adapter {adapter_name!r} has not: {shown}")
    for path, options in swaps.items():
        room = layers[path].r[adapter_name]
        if options["r"] > room:
            raise ValueError(
                f"{source}: {path} has rank {options['r']}, and adapter {adapter_name!r} has room for {room}; call "
                "prepare_model_for_compiled_hotswap with a target_rank first"
            )
    return swaps


def _check_same_base(
    source: str, new: LoraConfig, old: LoraConfig, swaps: dict[str, Any], layers: dict[str, Any], name: str
) -> None:
    """Refuse adapters that took different parts of the base weights, where one of them took any (PiSSA, OLoRA)."""
    inits = new.init_lora_weights, old.init_lora_weights
    if not any(map(changes_base, inits)):
        return
    ranks = {path: options["r"] for path, options in swaps.items()}
    if inits[0] != inits[1] or ranks != {path: layer.r[name] for path, layer in layers.items()}:
        raise ValueError(
            f"{source}: init_lora_weights={inits[0]!r}, and adapter {name!r} has {inits[1]!r}: they are for different "
            "base weights unless both took the same part, of the same layers at the same ranks"
        )


def _set_scaling(layer: LoraLinear, adapter_name: str, options: dict[str, Any]) -> None:
    scaling = scaling_of(options["r"], options["lora_alpha"], options["use_rslora"])
    layer.lora_alpha[adapter_name], layer.use_rslora[adapter_name] = options["lora_alpha"], options["use_rslora"]
    if isinstance(layer.scaling[adapter_name], Tensor):
        layer.scaling[adapter_name].fill_(scaling)
    else:
        layer.scaling[adapter_name] = scaling
