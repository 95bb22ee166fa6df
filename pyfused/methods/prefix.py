"""Prefix tuning (Li and Liang 2021) in a model, through transformers' caches of keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..config import PrefixTuningConfig
from ..nn import PrefixEncoder
from .prompt_learning import (
    Inputs,
    PromptLearningMethod,
    batch_size,
    cache_name,
    config_value,
    continues,
    drop_token_types,
    extend,
    is_encoder_decoder,
    text_config,
    with_room,
)

if TYPE_CHECKING:
    from transformers import Cache


class PrefixTuning(PromptLearningMethod):
    """The prefix is in the cache before the text comes: in that of the decoder, or of an encoder that can have one."""

    def check(self, model: nn.Module, config: PrefixTuningConfig, loading: bool) -> None:
        if cache_argument(model) is None:
            raise ValueError(
                f"Model does not support past key values which are required for prefix tuning: {type(model).__name__} "
                "takes no cache"
            )
        _refuse_checkpointing(model)
        _refuse_layers_without_keys(model)
        _fit_to_keys(model, config)
        if config.encoder_hidden_size is None:
            config.encoder_hidden_size = config.token_dim
        if config.token_dim % config.num_attention_heads:
            raise ValueError(
                f"token_dim must be a multiple of num_attention_heads = {config.num_attention_heads}, got "
                f"{config.token_dim}"
            )
        if loading and config.prefix_projection and not config.inference_mode:
            raise ValueError(
                "prefix_projection: files hold what comes out of the projection, so such a prefix cannot be trained on"
            )

    def new_encoder(self, model: nn.Module, config: PrefixTuningConfig, loading: bool) -> PrefixEncoder:
        return PrefixEncoder(
            config.num_virtual_tokens,
            config.num_layers,
            config.token_dim,
            config.num_attention_heads,
            prefix_projection=config.prefix_projection and not config.inference_mode,
            encoder_hidden_size=config.encoder_hidden_size,
            zero=config.init_weights == "zero",
        )

    def file_shape(self, config: PrefixTuningConfig) -> torch.Size:
        return torch.Size((config.num_virtual_tokens, config.num_layers * 2 * config.token_dim))

    def forward_inputs(
        self, model: nn.Module, config: PrefixTuningConfig, encoder: PrefixEncoder, inputs: Inputs
    ) -> Inputs:
        n, name = config.num_virtual_tokens, cache_argument(model)
        check_cache_is_kept(model)
        rows = batch_size(inputs.get("input_ids"), inputs.get("inputs_embeds"))
        drop_token_types(config, inputs)
        extend(inputs, "decoder_attention_mask" if is_encoder_decoder(model) else "attention_mask", n, 1)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + n
        if not continues(inputs, name):
            inputs[name] = filled_cache(inputs.get(name), model, config, encoder(model.dtype, rows))
        return inputs

    def first_step(
        self, model: nn.Module, config: PrefixTuningConfig, encoder: PrefixEncoder, input_ids: Tensor, inputs: Inputs
    ) -> None:
        embeds = None if is_encoder_decoder(model) else inputs.get("inputs_embeds")
        rows = input_ids.shape[0] if embeds is None else embeds.shape[0]
        name = cache_name(model.prepare_inputs_for_generation, inputs) or "cache"
        inputs[name] = filled_cache(inputs.get(name), model, config, encoder(model.dtype, rows))


def filled_cache(
    cache: Cache | None, model: nn.Module, config: PrefixTuningConfig, keys_values: Sequence[Tensor]
) -> Cache:
    """A cache with the prefix in it; ``cache`` itself, which is empty, where it has room.

    ``keys_values`` are those of :class:`PrefixEncoder`, and ``config`` may be HF PEFT's.

    The layers of a plain cache get the prefix as views that all rows of the batch share; the model's first update
    writes each row, together with the row's own keys, and nothing else does. Others (of a fixed size, of a sliding
    window, offloaded) are given it by their ``update``, which writes it; the window's forget what no text will see.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if is_encoder_decoder(model):
        if cache is None:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache.self_attention_cache = with_room(cache.self_attention_cache, config.num_virtual_tokens, model)
        target = cache.self_attention_cache
    else:
        cache = target = (
            DynamicCache(config=text_config(model))
            if cache is None
            else with_room(cache, config.num_virtual_tokens, model)
        )
    if target.layers and len(target.layers) > config.num_layers:
        raise ValueError(
            f"num_layers: the prefix is for {config.num_layers} layers, the model has {len(target.layers)}"
        )
    for layer in range(len(target.layers) or config.num_layers):
        # An encoder-decoder's layer reads every second pair, from the start again when they are used up. That is how HF
        # PEFT splits them, and trained prefixes depend on it.
        first = 2 * config.num_transformer_submodules * layer % len(keys_values)
        _put(target, layer, *keys_values[first : first + 2])
    return cache


def _put(cache: Cache, layer: int, key: Tensor, value: Tensor) -> None:
    from transformers.cache_utils import DynamicLayer

    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        while len(cache.layers) <= layer:
            cache.layers.append(DynamicLayer())
    if not cache.offloading and len(cache.layers) > layer and type(cache.layers[layer]) is DynamicLayer:
        state = cache.layers[layer]
        state.lazy_initialization(key, value)
        state.keys, state.values = key, value
    else:
        cache.update(key, value, layer)


def _fit_to_keys(model: nn.Module, config: PrefixTuningConfig) -> None:
    """Heads and width of the model's keys, which may be fewer and of another width than those of its queries."""
    source = text_config(model)
    if not has_layers_alike(model):
        raise NotImplementedError("prefix tuning is not built for models whose layers have keys of different shapes")
    heads, head_dim = config_value(source, "num_key_value_heads"), config_value(source, "head_dim", "d_kv")
    if heads is None and head_dim is None:
        return
    head_dim = head_dim or config.token_dim // config.num_attention_heads
    config.num_attention_heads = heads or config.num_attention_heads
    config.token_dim = head_dim * config.num_attention_heads


def has_layers_alike(model: nn.Module) -> bool:
    """Whether all layers have keys of one shape, as far as the model's configuration tells."""
    source = text_config(model)
    values = source.to_dict() if hasattr(source, "to_dict") else source
    return config_value(values, "per_layer_config", "global_head_dim") is None


def cache_argument(model: nn.Module) -> str | None:
    """What ``model.forward`` calls its cache, itself or by handing all that it does not know on to its backbone."""
    name = cache_name(model.forward)
    parameters = inspect.signature(model.forward).parameters.values()
    if name is None and any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        backbone = getattr(model, getattr(model, "base_model_prefix", ""), None)
        name = cache_name(backbone.forward) if isinstance(backbone, nn.Module) else None
    return name


def _refuse_layers_without_keys(model: nn.Module) -> None:
    from transformers import DynamicCache

    source = text_config(model)
    if is_encoder_decoder(model) or not hasattr(source, "get_text_config"):
        return
    without = [i for i, layer in enumerate(DynamicCache(config=source).layers) if not hasattr(layer, "update")]
    if without:
        raise NotImplementedError(
            f"prefix tuning is not built for layers without keys and values: layers {without} of {type(model).__name__}"
        )


def check_cache_is_kept(model: nn.Module) -> None:
    """ValueError where a call of the model would drop the cache."""
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _refuse_checkpointing(model)


def _refuse_checkpointing(model: nn.Module) -> None:
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        raise ValueError("PREFIX_TUNING does not work with gradient checkpointing, which drops the cache.")
