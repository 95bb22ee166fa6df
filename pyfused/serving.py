"""An adapter as serving engines take it: ``export_for_serving``.

vLLM and SGLang serve LoRA on linear layers, and each reads HF PEFT's files with gaps of its own: SGLang passes over
``use_rslora`` and ``alpha_pattern`` without a word, one rank has to fit all layers, and projections that an engine
computes in one product have to come together. What is written here leaves nothing to such rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .checkpoint import write_adapter
from .config import LoraConfig
from .nn import AdaLoraLinear, AdapterLayer, LoraConv1D, LoraLinear
from .nn.base import is_conv1d
from .nn.lora_init import changes_base
from .nn.shared_input import TOGETHER
from .targets import base_of, base_submodule, own_modules

if TYPE_CHECKING:
    from .model import PeftModel


@torch.no_grad()
def export_for_serving(
    model: PeftModel, save_directory: str | os.PathLike, adapter_name: str | None = None, rank: int | None = None
) -> None:
    r"""Write a LoRA or AdaLoRA adapter so that vLLM, SGLang and HF PEFT compute the same with it.

    It is LoRA with all scalings folded into ``lora_A`` (``lora_alpha`` is then ``r``; AdaLoRA's E as well, without
    pruned ranks), all layers at one rank, the layers named by their last names, and zeros for a layer that has no
    adapter beside one that has: another layer of that last name, or its neighbour in a group that engines compute
    together (query, key and value; gate and up). The model is unchanged.

    Args:
        model: with LoRA or AdaLoRA adapters.
        save_directory: made where it does not exist; ``adapter_config.json`` and ``adapter_model.safetensors``.
        adapter_name: None for the active adapter.
        rank: of all layers, at least the adapter's largest; the rest is zero. None: the largest. Engines have a limit
            (vLLM: ``--max-lora-rank``, 16 where nothing is said).

    Raises:
        ValueError: no such adapter, several are active, a rank that is too small, or something that engines cannot
            serve: ``modules_to_save``, trained biases, layers that are not linear. Nothing is written.
        NotImplementedError: a method or a form of LoRA that is no product of two matrices (DoRA, ``lora_bias``, IA3),
            or that took a part of the base weight (PiSSA, OLoRA).
    """
    name = _checked_name(model, adapter_name)
    config = model.peft_config[name]
    adapted = model.base_model.layers.of(name)
    factors = {path: _factors(path, layer, name) for path, layer in adapted.items()}
    largest = max([1, *(a.shape[0] for a, _ in factors.values())])  # AdaLoRA may have pruned all ranks
    rank = largest if rank is None else rank
    if rank < largest:
        raise ValueError(f"rank must be at least {largest}, the largest of adapter {name!r}, got {rank}")
    tensors: dict[str, Tensor] = {}
    like = next(iter(factors.values()))[0]
    leaves = _leaves(model.get_base_model(), adapted)
    for path, inputs, outputs in _linear_layers(model.get_base_model(), leaves):
        a, b = like.new_zeros(rank, inputs), like.new_zeros(outputs, rank)
        if path in factors:
            found_a, found_b = factors[path]
            a[: found_a.shape[0]], b[:, : found_b.shape[1]] = found_a, found_b
        tensors[f"base_model.model.{path}.lora_A.weight"] = a
        tensors[f"base_model.model.{path}.lora_B.weight"] = b
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, tensors)
    LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(leaves),
        fan_in_fan_out=any(is_conv1d(layer.get_base_layer()) for layer in adapted.values()),
    ).save_pretrained(folder)


def _checked_name(model: PeftModel, adapter_name: str | None) -> str:
    if adapter_name is None:
        if len(model.active_adapters) != 1:
            raise ValueError(f"adapter_name: must be said where not exactly one is active, {model.active_adapters} are")
        adapter_name = model.active_adapters[0]
    model.base_model.check_names([adapter_name])
    config = model.peft_config[adapter_name]
    if not isinstance(config, LoraConfig):
        raise NotImplementedError(
            f"export_for_serving: engines serve LoRA alone, and adapter {adapter_name!r} is {config.peft_type.value}"
        )
    if changes_base(getattr(config, "init_lora_weights", True)):
        raise NotImplementedError(
            f"export_for_serving: adapter {adapter_name!r} has init_lora_weights={config.init_lora_weights!r}: it took "
            "a part of the base weight, which an engine's base model still has"
        )
    if config.modules_to_save:
        raise ValueError(f"export_for_serving: engines load no modules_to_save ({', '.join(config.modules_to_save)})")
    if config.bias != "none":
        raise ValueError(f"export_for_serving: engines load no biases, and bias is {config.bias!r}")
    return adapter_name


def _factors(path: str, layer: AdapterLayer, name: str) -> tuple[Tensor, Tensor]:
    """``a`` ``[r, in]`` and ``b`` ``[out, r]`` of which the layer's change of weight is the plain product."""
    if isinstance(layer, AdaLoraLinear):
        return layer.folded_factors(name)
    if not isinstance(layer, LoraLinear):
        raise ValueError(f"export_for_serving: {path} is no linear layer ({type(layer).__name__})")
    tensors = layer.adapter_tensors(name)
    more = [key for key in tensors if key not in ("lora_A.weight", "lora_B.weight")]
    if more:
        raise NotImplementedError(
            f"export_for_serving: {path} has {', '.join(more)} (DoRA or lora_bias), which is no product of two matrices"
        )
    a, b = tensors.values()
    return a * layer.scaling[name], b


def _leaves(model: nn.Module, adapted: dict[str, AdapterLayer]) -> set[str]:
    leaves = set()
    for path in adapted:
        parent, _, leaf = path.rpartition(".")
        there = base_submodule(model, parent)._modules
        group = next((names for names in TOGETHER if leaf in names), ())
        leaves.update((leaf, *(other for other in group if other in there)))
    return leaves


def _linear_layers(model: nn.Module, leaves: set[str]) -> Iterator[tuple[str, int, int]]:
    """Name, inputs and outputs of each linear layer whose last name is one of ``leaves``."""
    for path, module in own_modules(model):
        base = base_of(module)
        if path.rpartition(".")[2] in leaves and (isinstance(base, nn.Linear) or is_conv1d(base)):
            yield path, *(LoraConv1D if is_conv1d(base) else LoraLinear).features(base)
