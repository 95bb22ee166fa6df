"""Prompt tuning (Lester et al. 2021) in a model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptTuningConfig, PromptTuningInit, TaskType
from ..nn import PromptEmbedding
from .base import Target
from .prompt_learning import (
    Inputs,
    PromptLearningMethod,
    cache_name,
    continues,
    drop,
    drop_token_types,
    extend,
    is_encoder_decoder,
    with_room,
)


class PromptTuning(PromptLearningMethod):
    """The prompt goes in front of the text, in encoder-decoders in front of the encoder's."""

    def targets(self, model: nn.Module, config: PromptTuningConfig, loading: bool) -> list[Target]:
        width = getattr(word_embeddings(model), "embedding_dim", None)  # layers may be wider, with a projection between
        if config.token_dim is None:
            config.token_dim = width
        elif width not in (None, config.token_dim):
            raise ValueError(
                f"token_dim must be the width of the model's input embeddings, {width}, got {config.token_dim}"
            )
        return super().targets(model, config, loading)

    def new_encoder(self, model: nn.Module, config: PromptTuningConfig, loading: bool) -> PromptEmbedding:
        words = word_embeddings(model)
        encoder = PromptEmbedding(config.num_virtual_tokens, config.token_dim, config.num_transformer_submodules)
        if not loading and not config.inference_mode:
            rows = encoder.embedding.num_embeddings
            if config.prompt_tuning_init is PromptTuningInit.SAMPLE_VOCAB:
                encoder.init_from_tokens(torch.randint(0, words.num_embeddings, (rows,)), words)
            elif config.prompt_tuning_init is PromptTuningInit.TEXT:
                encoder.init_from_tokens(torch.tensor(_text_ids(config, rows)), words)
        return encoder

    def file_shape(self, config: PromptTuningConfig) -> torch.Size:
        return torch.Size((config.num_virtual_tokens * config.num_transformer_submodules, config.token_dim))

    def forward_inputs(
        self, model: nn.Module, config: PromptTuningConfig, encoder: PromptEmbedding, inputs: Inputs
    ) -> Inputs:
        n = config.num_virtual_tokens
        drop(inputs, "position_ids")
        drop_token_types(config, inputs)
        extend(inputs, "attention_mask", n, 1)
        if config.task_type is TaskType.SEQ_2_SEQ_LM and inputs.get("encoder_outputs") is not None:
            return inputs  # the prompt went into the encoder
        if config.task_type is not TaskType.SEQ_2_SEQ_LM and continues(inputs, cache_name(model.forward)):
            return inputs
        extend(inputs, "token_type_ids", n, 0)
        if config.task_type in (TaskType.CAUSAL_LM, TaskType.TOKEN_CLS):
            extend(inputs, "labels", n, -100)
        ids, embeds = inputs.pop("input_ids", None), inputs.get("inputs_embeds")
        inputs["inputs_embeds"] = encoder(ids, word_embeddings(model), embeds)
        return inputs

    def generate(
        self, model: nn.Module, config: PromptTuningConfig, encoder: PromptEmbedding, args: tuple, kwargs: Inputs
    ) -> Any:
        if not is_encoder_decoder(model):
            return super().generate(model, config, encoder, args, kwargs)
        kwargs = dict(kwargs)
        ids = kwargs.pop("input_ids", None) if not args else args[0]
        ids = kwargs.pop("inputs", None) if ids is None else ids
        drop(kwargs, "encoder_outputs")
        drop(kwargs, "token_type_ids")
        extend(kwargs, "attention_mask", config.num_virtual_tokens, 1)
        kwargs["inputs_embeds"] = encoder(ids, word_embeddings(model), kwargs.get("inputs_embeds"))
        return model.generate(*(None, *args[1:]) if args else (), **kwargs)

    def first_step(
        self,
        model: nn.Module,
        config: PromptTuningConfig,
        encoder: PromptEmbedding,
        input_ids: Tensor,
        inputs: Inputs,
    ) -> None:
        embeds = inputs.get("inputs_embeds")
        inputs["inputs_embeds"] = encoder(input_ids if embeds is None else None, word_embeddings(model), embeds)
        inputs["is_first_iteration"] = True  # embeddings are read in the first step only; without cache, each is one
        if inputs.get("next_sequence_length") is not None:
            inputs["next_sequence_length"] += config.num_virtual_tokens
        cache = inputs.get("cache")
        if cache is not None:
            inputs["cache"] = with_room(cache, config.num_virtual_tokens, model)


def word_embeddings(model: nn.Module) -> nn.Module:
    """The model's input embeddings; ValueError where it does not tell them."""
    get = getattr(model, "get_input_embeddings", None)
    words = get() if get is not None else None
    if words is None:
        raise ValueError("model has no get_input_embeddings(), which prompt tuning asks for the embeddings of the text")
    return words


def _text_ids(config: PromptTuningConfig, rows: int) -> list[int]:
    from transformers import AutoTokenizer

    options = {key: value for key, value in (config.tokenizer_kwargs or {}).items() if key != "trust_remote_code"}
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options, local_files_only=True)
    except OSError as error:
        path = config.tokenizer_name_or_path
        raise ValueError(f"tokenizer_name_or_path: no tokenizer at {path!r}, nothing is downloaded ({error})") from None
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    if not ids:
        raise ValueError(f"prompt_tuning_init_text: {config.prompt_tuning_init_text!r} has no tokens")
    return (ids * math.ceil(rows / len(ids)))[:rows]
