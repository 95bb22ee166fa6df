"""What prompt and prefix tuning share: they leave a model's layers alone and change what goes into it."""

from __future__ import annotations

import functools
import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PromptLearningConfig, TaskType
from ..nn import AdapterLayer
from ..targets import model_config_value
from .base import Method, Target

Inputs = dict[str, Any]

# Heads that see one text: HF PEFT takes no token types for them.
_WITHOUT_TOKEN_TYPES = (TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM, TaskType.FEATURE_EXTRACTION)


class PromptLearningMethod(Method):
    """A method whose adapter is an encoder of virtual tokens next to the model, and acts on the model's arguments."""

    def targets(self, model: nn.Module, config: PromptLearningConfig, loading: bool) -> list[Target]:
        """None; the sizes that the configuration leaves open are filled in."""
        if config.task_type is None:
            known = ", ".join(task.value for task in TaskType)
            raise ValueError(f"task_type: {config.peft_type.value} must be told what the model is for: one of {known}")
        fill_in_sizes(model, config)
        self.check(model, config, loading)
        return []

    def layer_class(self, module: nn.Module) -> type[AdapterLayer]:
        """Never asked for: there are no targets."""
        raise NotImplementedError

    def shapes(self, target: Target) -> dict[str, torch.Size]:
        """Never asked for: there are no targets."""
        raise NotImplementedError

    # For subclasses to define -----------------------------------------------------------------------------------------

    def check(self, model: nn.Module, config: PromptLearningConfig, loading: bool) -> None:
        """Raise ValueError where the model or the configuration, whose sizes are filled in, will not do."""

    @abstractmethod
    def new_encoder(self, model: nn.Module, config: PromptLearningConfig, loading: bool) -> nn.Module:
        """The module with a new adapter's parameters; :meth:`prompt` of it is what a file holds."""

    @abstractmethod
    def file_shape(self, config: PromptLearningConfig) -> torch.Size:
        """Shape of the one tensor in a file, ``prompt_embeddings``."""

    @abstractmethod
    def forward_inputs(
        self, model: nn.Module, config: PromptLearningConfig, encoder: nn.Module, inputs: Inputs
    ) -> Inputs:
        """The arguments of ``model.forward`` with the virtual tokens in them; ``inputs`` are the caller's, by name."""

    @abstractmethod
    def first_step(
        self, model: nn.Module, config: PromptLearningConfig, encoder: nn.Module, input_ids: Tensor, inputs: Inputs
    ) -> None:
        """Put the virtual tokens into the arguments of ``prepare_inputs_for_generation`` of the first step."""

    # Calling ----------------------------------------------------------------------------------------------------------

    def generate(
        self, model: nn.Module, config: PromptLearningConfig, encoder: nn.Module, args: tuple, kwargs: Inputs
    ) -> Any:
        """``model.generate`` with the virtual tokens; the ids that it returns do not count them."""
        original = model.prepare_inputs_for_generation
        own = vars(model).get("prepare_inputs_for_generation")

        @functools.wraps(original)  # generate asks for its signature
        def prepare(input_ids: Tensor, **inputs: Any) -> Inputs:
            return self.step_inputs(model, config, encoder, original, input_ids, **inputs)

        model.prepare_inputs_for_generation = prepare
        try:
            return model.generate(*args, **kwargs)
        finally:
            del model.prepare_inputs_for_generation
            if own is not None:
                model.prepare_inputs_for_generation = own

    def step_inputs(
        self,
        model: nn.Module,
        config: PromptLearningConfig,
        encoder: nn.Module,
        prepare: Callable[..., Inputs],
        input_ids: Tensor,
        **kwargs: Any,
    ) -> Inputs:
        """``prepare_inputs_for_generation`` of one step: ``prepare`` is the model's own, and sees a text that is n
        tokens longer than what ``generate`` knows of.
        """
        n, side = config.num_virtual_tokens, "decoder_" if is_encoder_decoder(model) else ""
        extend(kwargs, f"{side}attention_mask", n, 1)
        positions = kwargs.get(f"{side}position_ids")
        if positions is not None:
            leading = torch.arange(n, device=positions.device).expand(*positions.shape[:-1], n)
            kwargs[f"{side}position_ids"] = torch.cat((leading, positions + n), dim=-1)
        name = cache_name(prepare, kwargs)
        if kwargs.get("use_cache") is False:  # some models hand the prefix's cache back, grown by the text
            kwargs.pop(name, None)
        if not continues(kwargs, name):
            self.first_step(model, config, encoder, input_ids, kwargs)
        else:
            count_text_alone(kwargs, n)
        return prepare(input_ids, **kwargs)


def by_name(model: nn.Module, args: tuple, kwargs: Inputs) -> Inputs:
    """Arguments of a call of ``model`` by their names."""
    return dict(inspect.signature(model.forward).bind_partial(*args).arguments) | kwargs if args else dict(kwargs)


def drop(inputs: Inputs, name: str) -> None:
    """Leave an argument out, with a warning."""
    if inputs.get(name) is not None:
        warnings.warn(f"{name} is not supported by prompt or prefix tuning of this task, and ignored", stacklevel=6)
    inputs.pop(name, None)


def drop_token_types(config: PromptLearningConfig, inputs: Inputs) -> None:
    if config.task_type in _WITHOUT_TOKEN_TYPES:
        drop(inputs, "token_type_ids")


def extend(inputs: Inputs, name: str, n: int, value: int) -> None:
    """Put n entries of ``value`` in front of each row of an argument, if it is there: [B, L] becomes [B, n + L]."""
    tensor = inputs.get(name)
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        got = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"{type(tensor).__name__}"
        raise ValueError(f"{name} must be a tensor [batch, length], got {got}")
    inputs[name] = torch.cat((tensor.new_full((tensor.shape[0], n), value), tensor), dim=1)


def cache_name(function: Callable, given: Iterable[str] = ()) -> str | None:
    """What ``function`` calls its cache of keys and values: transformers renamed it; None where it has none.

    Args:
        given: names of the arguments of a call, which may be all that tells.
    """
    names = (*inspect.signature(function).parameters, *given)
    return next((name for name in ("cache", "past_key_values") if name in names), None)


def continues(inputs: Inputs, name: str | None) -> bool:
    """Whether the call goes on from a cache that holds something, and so the virtual tokens as well."""
    cache = inputs.get(name) if name else None
    if cache is None:
        return False
    try:
        return cache.get_seq_length() > 0
    except ValueError:  # it counts no tokens where no layer has attention, as in Mamba
        return cache.has_previous_state()


def count_text_alone(inputs: Inputs, n: int) -> None:
    """In a first step that goes on from a filled cache, ``generate`` takes all that the cache holds for the text."""
    if inputs.get("is_first_iteration") and inputs.get("next_sequence_length") is not None:
        inputs["next_sequence_length"] += n


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(model_config_value(model, "is_encoder_decoder"))


def batch_size(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> int:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids and inputs_embeds: exactly one of them must be given")
    return (inputs_embeds if input_ids is None else input_ids).shape[0]


def text_config(model: nn.Module) -> Any:
    """The model's configuration, of a vision-language model that of its text part."""
    return model_config_value(model, "text_config") or getattr(model, "config", None)


def config_value(config: Any, *names: str) -> Any:
    """The first of these values that a configuration has, an object or a dict; None where it has none."""
    for name in names:
        value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
        if value is not None:
            return value
    return None


def fill_in_sizes(model: nn.Module, config: PromptLearningConfig) -> None:
    """Read what ``config`` leaves open from the model's configuration."""
    source = text_config(model)
    names = {
        "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
        "token_dim": ("hidden_size", "n_embd", "d_model"),
        "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
    }
    for size, candidates in names.items():
        if getattr(config, size) is None:
            value = config_value(source, *candidates)
            if value is None:
                raise ValueError(f"Please specify {size}: the model's configuration has none of {candidates}")
            setattr(config, size, value)
    if config.num_transformer_submodules is None:
        config.num_transformer_submodules = 2 if config.task_type is TaskType.SEQ_2_SEQ_LM else 1
    elif config.num_transformer_submodules == 2 and config.task_type is not TaskType.SEQ_2_SEQ_LM:
        raise ValueError(
            f"num_transformer_submodules must be 1 for task_type={config.task_type.value}, got "
            f"{config.num_transformer_submodules}"
        )


def with_room(cache: Any, n: int, model: nn.Module) -> Any:
    """A cache that takes n more tokens than ``cache``, which is empty: itself where it grows."""
    from transformers import StaticCache

    if not isinstance(cache, StaticCache):
        return cache
    return StaticCache(config=text_config(model), max_cache_len=cache.get_max_length() + n)
