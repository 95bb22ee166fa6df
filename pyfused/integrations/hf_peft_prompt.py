"""The model classes that ``fuse`` makes out of HF PEFT's for prompt and prefix tuning: what goes into the model is made
without a copy for each row. Everything else is HF PEFT's. Importing this file imports peft.
"""

from __future__ import annotations

from typing import Any

import peft
from peft.tuners import PrefixEncoder, PromptEmbedding
from peft.utils import PeftType
from peft.utils.integrations import map_cache_to_layer_device_map
from torch import Tensor, nn

from ..methods.prefix import filled_cache, has_layers_alike
from ..nn.base import has_only_forward
from ..nn.prefix import keys_and_values
from ..nn.shared_rows import share_rows

_ENCODERS = {PeftType.PROMPT_TUNING: PromptEmbedding, PeftType.PREFIX_TUNING: PrefixEncoder}


class FusedPrompts:
    """``get_prompt`` of HF PEFT's model classes: the same values, as views that the rows of a batch share.

    A prompt is written where HF PEFT puts it in front of the text, a prefix where the model puts the text's keys behind
    it. HF PEFT's own ``get_prompt`` runs for other methods, and where the encoder has hooks or is of another class.
    """

    def get_prompt(self, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if prompt_obstacle(self, self.active_adapter) is not None:
            return super().get_prompt(batch_size, *args, **kwargs)
        config, encoder, model = (
            self.active_peft_config,
            self.prompt_encoder[self.active_adapter],
            self.get_base_model(),
        )
        dtype = self.base_model_torch_dtype or encoder.embedding.weight.dtype
        if config.peft_type == PeftType.PROMPT_TUNING:
            return share_rows(encoder.embedding.weight, dtype, batch_size)
        prompt = _prefix(encoder, config.inference_mode)
        pairs = keys_and_values(prompt, config.num_layers, config.num_attention_heads, dtype, batch_size)
        cache = filled_cache(None, model, config, pairs)
        map_cache_to_layer_device_map(model, cache)
        return cache


def _prefix(encoder: PrefixEncoder, inference_mode: bool) -> Tensor:
    weight = encoder.embedding.weight
    return encoder.transform(weight) if encoder.prefix_projection and not inference_mode else weight


def prompt_obstacle(model: peft.PeftModel, adapter_name: str) -> str | None:
    """Why an adapter keeps HF PEFT's ``get_prompt``; None where it does not."""
    config, encoder = model.peft_config[adapter_name], model.prompt_encoder[adapter_name]
    if type(encoder) is not _ENCODERS.get(config.peft_type):
        return f"{config.peft_type.value} is neither prompt nor prefix tuning"
    if not all(has_only_forward(module) for module in encoder.modules()):
        return "its encoder has hooks"
    base: nn.Module = model.get_base_model()
    if config.peft_type == PeftType.PREFIX_TUNING and not has_layers_alike(base):
        return "prefix tuning of a model whose layers have keys of different shapes"
    return None


class FusedForCausalLM(FusedPrompts, peft.PeftModelForCausalLM):
    """:class:`FusedPrompts` for causal language models."""


class FusedForSeq2SeqLM(FusedPrompts, peft.PeftModelForSeq2SeqLM):
    """:class:`FusedPrompts` for encoder-decoders."""


class FusedForSequenceClassification(FusedPrompts, peft.PeftModelForSequenceClassification):
    """:class:`FusedPrompts` for classifiers."""


class FusedForTokenClassification(FusedPrompts, peft.PeftModelForTokenClassification):
    """:class:`FusedPrompts` for taggers."""


class FusedForQuestionAnswering(FusedPrompts, peft.PeftModelForQuestionAnswering):
    """:class:`FusedPrompts` for extractive question answering."""


class FusedForFeatureExtraction(FusedPrompts, peft.PeftModelForFeatureExtraction):
    """:class:`FusedPrompts` for features."""


FUSED_MODELS: dict[type, type] = {fused.__bases__[1]: fused for fused in FusedPrompts.__subclasses__()}
for _kind, _fused in FUSED_MODELS.items():
    _fused.__name__ = _kind.__name__  # as `hf_peft_adapters.stands_for`
