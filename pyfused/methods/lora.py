"""LoRA: the classes of :mod:`pyfused.nn` for linear layers, GPT-2's Conv1D and embeddings."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..config import LoraConfig
from ..nn import AdapterLayer, LoraConv, LoraConv1D, LoraEmbedding, LoraLinear
from ..nn.arguments import check_init
from ..nn.base import is_conv1d, is_offloaded
from ..nn.dora import check_dora_base
from ..nn.lora_conv import CONVOLUTIONS, check_conv
from ..nn.lora_init import changes_base, check_init_fits
from ..nn.lora_layer import LoraLayer
from ..targets import leave_out_experts, pattern_key
from .base import Method, Target, check_called, named_targets, set_fan_in_fan_out

# Layers to adapt where the configuration names none, by the model_type of the model's config. From HF PEFT 0.21.2, so
# that the same configuration adapts the same layers.
_TARGETS: dict[str, list[str] | str] = {
    "bart": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "blip-2": ["q", "v", "q_proj", "v_proj"],
    "bloom": ["query_key_value"],
    "btlm": ["c_proj", "c_attn"],
    "chatglm": ["query_key_value"],
    "codegen": ["qkv_proj"],
    "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"],
    "electra": ["query", "value"],
    "falcon": ["query_key_value"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gemma3_text": ["q_proj", "v_proj"],
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "gpt2": ["c_attn"],
    "gpt_bigcode": ["c_attn"],
    "gpt_neo": ["q_proj", "v_proj"],
    "gpt_neox": ["query_key_value"],
    "gptj": ["q_proj", "v_proj"],
    "layoutlm": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "llama4": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "mpt": ["Wqkv"],
    "mt5": ["q", "v"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "opt": ["q_proj", "v_proj"],
    "phi": ["q_proj", "v_proj", "fc1", "fc2"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "RefinedWeb": ["query_key_value"],
    "RefinedWebModel": ["query_key_value"],
    "roberta": ["query", "value"],
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"],
    "stablelm": ["q_proj", "v_proj"],
    "t5": ["q", "v"],
    "xlm-roberta": ["query", "value"],
}


class Lora(Method):
    layer_type = LoraLayer
    meaning = ("lora_alpha", "use_rslora", "alpha_pattern")

    def targets(self, model: nn.Module, config: LoraConfig, loading: bool) -> list[Target]:
        if not loading:
            check_init(config.init_lora_weights)
        targets = []
        for name, module in named_targets(model, config, _TARGETS):
            options = {
                "r": config.rank_pattern.get(pattern_key(config.rank_pattern, name), config.r),
                "lora_alpha": config.alpha_pattern.get(pattern_key(config.alpha_pattern, name), config.lora_alpha),
                "lora_dropout": config.lora_dropout,
                "use_rslora": config.use_rslora,
                "use_dora": config.use_dora,
                "lora_bias": config.lora_bias,
                "init_lora_weights": False if config.weights_must_be_loaded else config.init_lora_weights,
            }
            targets.append(Target(name, module, options))
        _warn_of_unused_patterns(config, targets)
        leave_out_experts(model, config, [target.name for target in targets])
        for target in targets:
            check_called(model, target)
            _check_layer(target)
        if config.lora_bias:
            _warn_of_missing_biases(targets)
        set_fan_in_fan_out(config, targets)
        return targets

    def layer_class(self, module: nn.Module) -> type[AdapterLayer]:
        if isinstance(module, nn.Embedding):
            return LoraEmbedding
        if isinstance(module, CONVOLUTIONS):
            return LoraConv
        return LoraConv1D if is_conv1d(module) else LoraLinear

    def shapes(self, target: Target) -> dict[str, torch.Size]:
        options = {name: target.options[name] for name in ("r", "use_dora", "lora_bias")}
        shapes = self.layer_class(target.base).adapter_shapes(target.base, **options)
        return {name: torch.Size(shape) for name, shape in shapes.items()}


def _warn_of_unused_patterns(config: LoraConfig, targets: list[Target]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field)
        unused = sorted(key for key in patterns if not any(pattern_key({key: 0}, target.name) for target in targets))
        if unused:
            warnings.warn(
                f"{field}: keys that match no adapted layer were ignored: {unused}", RuntimeWarning, stacklevel=6
            )


def _warn_of_missing_biases(targets: list[Target]) -> None:
    bare = [target.name for target in targets if target.base.bias is None]
    if bare:
        warnings.warn(
            f"lora_bias=True, and these layers have no bias of their own, so the adapter cannot be merged into them: "
            f"{', '.join(bare[:5])}{' and more' if len(bare) > 5 else ''}",
            stacklevel=6,
        )


def _check_layer(target: Target) -> None:
    name, module = target.name, target.base
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        raise NotImplementedError(f"Target module {name!r}: LoRA on nn.MultiheadAttention is not built")
    is_matrix = isinstance(module, nn.Linear) or is_conv1d(module)
    if not (is_matrix or isinstance(module, (nn.Embedding, *CONVOLUTIONS))):
        raise ValueError(
            f"Target module {name!r} is not supported: it must be an nn.Linear, Conv1D, nn.Embedding or a convolution, "
            f"got {kind}"
        )
    options = target.options
    if is_offloaded(module) and changes_base(options["init_lora_weights"]):
        raise NotImplementedError(
            f"init_lora_weights: {options['init_lora_weights']!r} is not built for offloaded weights: it would change "
            f"those of {name!r}, which come anew for each call"
        )
    if is_matrix:
        check_init_fits(options["init_lora_weights"], options["r"], module.weight)
    if isinstance(module, CONVOLUTIONS):
        check_conv(module, options["r"], options["use_dora"], options["init_lora_weights"], name)
    if options["lora_bias"] and isinstance(module, nn.Embedding):
        raise ValueError(f"lora_bias: {name!r} is an nn.Embedding, which can have none; leave it out of target_modules")
    if options["use_dora"]:
        check_dora_base(module, name)
