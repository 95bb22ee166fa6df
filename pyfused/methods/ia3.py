"""IA3: :class:`pyfused.nn.IA3Linear` on linear layers, :class:`pyfused.nn.IA3Layer` on Conv1D and convolutions."""

from __future__ import annotations

import re

import torch
from torch import nn

from ..config import IA3Config
from ..nn import AdapterLayer, IA3Layer, IA3Linear
from ..nn.base import is_conv1d
from ..nn.ia3 import vector_shape
from ..targets import model_config_value
from .base import Method, Target, check_called, named_targets, set_fan_in_fan_out

# Layers to adapt, and those of them whose input is scaled, where the configuration does not say, by the model_type of
# the model's config. From HF PEFT 0.21.2, so that the same configuration adapts the same layers.
_TARGETS: dict[str, list[str] | str] = {
    "bart": ["q_proj", "v_proj", "fc2"],
    "bert": ["key", "value", "output.dense"],
    "bloom": ["query_key_value", "mlp.dense_4h_to_h"],
    "deberta": ["in_proj", "output.dense"],
    "deberta-v2": ["key_proj", "value_proj", "output.dense"],
    "falcon": ["query_key_value", "dense_4h_to_h"],
    "gemma": ["q_proj", "v_proj", "down_proj"],
    "gemma2": ["q_proj", "v_proj", "down_proj"],
    "gemma3_text": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_bigcode": ["c_attn", "mlp.c_proj"],
    "gpt_neo": ["q_proj", "v_proj", "c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "gptj": ["q_proj", "v_proj", "fc_out"],
    "llama": ["k_proj", "v_proj", "down_proj"],
    "llama4": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["k_proj", "v_proj", "down_proj"],
    "mixtral": ["k_proj", "v_proj", "w2"],
    "mt5": ["k", "v", "wi_1"],
    "opt": ["q_proj", "k_proj", "fc2"],
    "phi": ["q_proj", "v_proj", "fc2"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "RefinedWeb": ["query_key_value", "dense_4h_to_h"],
    "RefinedWebModel": ["query_key_value", "dense_4h_to_h"],
    "roberta": ["key", "value", "output.dense"],
    "t5": ["k", "v", "wo"],
}
_FEEDFORWARD: dict[str, list[str]] = {
    "bart": ["fc2"],
    "bert": ["output.dense"],
    "bloom": ["mlp.dense_4h_to_h"],
    "deberta": ["output.dense"],
    "deberta-v2": ["output.dense"],
    "falcon": ["dense_4h_to_h"],
    "gemma": ["down_proj"],
    "gemma2": ["down_proj"],
    "gemma3_text": ["down_proj"],
    "gpt2": ["mlp.c_proj"],
    "gpt_bigcode": ["mlp.c_proj"],
    "gpt_neo": ["c_proj"],
    "gpt_neox": ["dense_4h_to_h"],
    "gptj": ["fc_out"],
    "llama": ["down_proj"],
    "llama4": ["down_proj"],
    "mistral": ["down_proj"],
    "mixtral": ["w2"],
    "mt5": [],
    "opt": ["fc2"],
    "phi": ["fc2"],
    "qwen2": ["down_proj"],
    "qwen3": ["down_proj"],
    "RefinedWeb": ["dense_4h_to_h"],
    "RefinedWebModel": ["dense_4h_to_h"],
    "roberta": ["output.dense"],
    "t5": ["wo"],
}


class IA3(Method):
    layer_type = IA3Layer

    def targets(self, model: nn.Module, config: IA3Config, loading: bool) -> list[Target]:
        found = named_targets(model, config, _TARGETS, condense=False)
        if config.feedforward_modules is None:
            model_type = model_config_value(model, "model_type")
            if model_type not in _FEEDFORWARD:
                raise ValueError(
                    f"Please specify feedforward_modules, [] for none: there is no default for model type "
                    f"{model_type!r}"
                )
            config.feedforward_modules = set(_FEEDFORWARD[model_type])
        targets = []
        for name, module in found:
            options = {
                "is_feedforward": _is_feedforward(config, name),
                "init_ia3_weights": config.init_ia3_weights,
            }
            targets.append(Target(name, module, options))
        for target in targets:
            check_called(model, target)
            _check_layer(target)
        set_fan_in_fan_out(config, targets)
        return targets

    def layer_class(self, module: nn.Module) -> type[AdapterLayer]:
        return IA3Linear if isinstance(module, nn.Linear) else IA3Layer

    def shapes(self, target: Target) -> dict[str, torch.Size]:
        return {"ia3_l": torch.Size(vector_shape(target.base, target.options["is_feedforward"]))}


def _is_feedforward(config: IA3Config, name: str) -> bool:
    """HF PEFT's rule: names match the end of a layer's name, and not only after a dot."""
    modules = config.feedforward_modules
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return name.endswith(tuple(modules))


def _check_layer(target: Target) -> None:
    name, module = target.name, target.base
    if not (isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)) or is_conv1d(module)):
        kind = type(module).__name__
        raise ValueError(
            f"Target module {name!r} is not supported: it must be an nn.Linear, Conv1D, Conv2d or Conv3d, got {kind}"
        )
    wanted = target.options["is_feedforward"]
    layer = target.layer(IA3Layer)
    if layer is not None and layer.is_feedforward is not wanted:
        there = "in" if layer.is_feedforward else "not in"
        raise ValueError(
            f"feedforward_modules: {name!r} is {there} those of the adapters that it has, and has to be so here"
        )
