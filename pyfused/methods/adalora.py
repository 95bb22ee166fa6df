"""AdaLoRA: :class:`pyfused.nn.AdaLoraLinear` on the linear layers that are named, and a budget for all of them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..config import AdaLoraConfig
from ..nn import AdaLoraLinear, AdapterLayer
from ..nn.adalora import linear_features
from ..nn.base import is_conv1d
from ..rank_allocator import RankAllocator
from .base import FILE_PREFIX, Method, Target, check_called, named_targets, set_fan_in_fan_out

# Layers to adapt where the configuration names none, by the model_type of the model's config. From HF PEFT 0.21.2, so
# that the same configuration adapts the same layers.
_TARGETS: dict[str, list[str] | str] = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bert": ["query", "value"],
    "bloom": ["query_key_value"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gptj": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "llama4": ["q_proj", "v_proj"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "roberta": ["query", "key", "value", "dense"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
# The matrices of a layer, and the dimension that counts its ranks.
_RANK_DIMENSION = {"lora_A": 0, "lora_B": 1, "lora_E": 0}


class AdaLora(Method):
    layer_type = AdaLoraLinear
    meaning = ("lora_alpha", "init_r")

    def targets(self, model: nn.Module, config: AdaLoraConfig, loading: bool) -> list[Target]:
        patterns = config.rank_pattern if loading and config.rank_pattern else {}
        targets = []
        for name, module in named_targets(model, config, _TARGETS):
            ranks = patterns.get(f"{name}.lora_E")
            if ranks is not None and len(ranks) != config.init_r:
                raise ValueError(
                    f"rank_pattern: {name}.lora_E must have init_r = {config.init_r} entries, got {len(ranks)}"
                )
            options = {
                "init_r": config.init_r,
                "lora_alpha": config.lora_alpha,
                "lora_dropout": config.lora_dropout,
                "init_lora_weights": bool(config.init_lora_weights),
                "ranks": ranks,
            }
            targets.append(Target(name, module, options))
        for target in targets:
            check_called(model, target)
            _check_layer(target)
        set_fan_in_fan_out(config, targets)
        if not config.inference_mode and config.task_type is None and config.orth_reg_weight:
            warnings.warn(
                "orth_reg_weight: HF PEFT adds the orthogonal regularisation to the loss only where task_type is set, "
                "and so does pyfused; set task_type, or orth_reg_weight to 0",
                stacklevel=5,
            )
        return targets

    def layer_class(self, module: nn.Module) -> type[AdapterLayer]:
        return AdaLoraLinear

    def shapes(self, target: Target) -> dict[str, torch.Size]:
        options = target.options
        r = options["init_r"] if options["ranks"] is None else sum(options["ranks"])
        inputs, outputs = linear_features(target.base)
        return {
            "lora_A": torch.Size((r, inputs)),
            "lora_B": torch.Size((outputs, r)),
            "lora_E": torch.Size((r, 1)),
        }

    def check_beside(self, config: AdaLoraConfig, others: Collection[AdaLoraConfig]) -> None:
        if not config.inference_mode and any(not other.inference_mode for other in others):
            raise ValueError(
                "AdaLoRA supports only 1 trainable adapter in a model: set inference_mode to True in the "
                "configurations of all others"
            )

    def rank_allocator(
        self, config: AdaLoraConfig, adapter_name: str, layers: Mapping[str, AdapterLayer]
    ) -> RankAllocator | None:
        return None if config.inference_mode else RankAllocator(layers, config, adapter_name)

    def to_file(
        self, config: AdaLoraConfig, layers: Mapping[str, AdapterLayer], adapter_name: str, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Without the ranks that the pattern prunes."""
        tensors = dict(tensors)
        for name, ranks, left in _patterns(config, layers, adapter_name):
            kept = torch.tensor([kept for kept, there in zip(left, ranks, strict=True) if there], dtype=torch.bool)
            for matrix, dim in _RANK_DIMENSION.items():
                key = f"{FILE_PREFIX}{name}.{matrix}"
                if key in tensors and not kept.all():
                    tensor = tensors[key]
                    tensors[key] = tensor.index_select(dim, kept.nonzero().view(-1).to(tensor.device))
        return tensors

    def from_file(
        self, config: AdaLoraConfig, layers: Mapping[str, AdapterLayer], adapter_name: str, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The file's ranks go to where they were in the training, and E of all others becomes 0."""
        tensors = dict(tensors)
        for name, ranks, left in _patterns(config, layers, adapter_name):
            if any(kept and not there for kept, there in zip(left, ranks, strict=True)):
                continue  # the file has ranks that were removed here, which its shapes show
            places = [kept for kept, there in zip(left, ranks, strict=True) if there]
            places = torch.tensor(places, dtype=torch.bool).nonzero().view(-1)
            for matrix, dim in _RANK_DIMENSION.items():
                saved, here = tensors.get(f"{FILE_PREFIX}{name}.{matrix}"), getattr(layers[name], matrix)[adapter_name]
                # What has other shapes is an error, in terms of the file.
                if saved is None or saved.dim() != 2 or saved.shape[dim] != len(places):
                    continue
                if saved.shape[1 - dim] != here.shape[1 - dim]:
                    continue
                whole = here.detach().to(saved.device, saved.dtype, copy=True)
                if matrix == "lora_E":
                    whole.zero_()
                tensors[f"{FILE_PREFIX}{name}.{matrix}"] = whole.index_copy_(dim, places.to(saved.device), saved)
        return tensors

    def loaded(
        self, config: AdaLoraConfig, saved: AdaLoraConfig, layers: Mapping[str, AdapterLayer], adapter_name: str
    ) -> None:
        config.rank_pattern = saved.rank_pattern
        for layer in layers.values():
            if isinstance(layer, AdaLoraLinear):
                layer.prune(adapter_name, None)


def _patterns(
    config: AdaLoraConfig, layers: Mapping[str, AdapterLayer], adapter_name: str
) -> Iterator[tuple[str, list[bool], list[bool]]]:
    """Layers that the pattern names: which of the first ``init_r`` ranks are there, and which the pattern leaves."""
    for name, left in (config.rank_pattern or {}).items():
        layer = layers.get(name.removesuffix(".lora_E"))
        if isinstance(layer, AdaLoraLinear) and layer.has_adapter(adapter_name):
            ranks = layer.ranks[adapter_name]
            if len(ranks) == len(left):
                yield name.removesuffix(".lora_E"), ranks, left


def _check_layer(target: Target) -> None:
    name, module = target.name, target.base
    if isinstance(module, nn.Conv2d):
        raise NotImplementedError(f"Target module {name!r}: AdaLoRA on Conv2d is not built yet")
    if not (isinstance(module, nn.Linear) or is_conv1d(module)):
        kind = type(module).__name__
        raise ValueError(f"Target module {name!r} is not supported: it must be an nn.Linear or Conv1D, got {kind}")
