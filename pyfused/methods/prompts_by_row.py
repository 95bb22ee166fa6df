"""Virtual tokens of several adapters in one batch: prompts and prefixes of any lengths, each sample with its own.

A decoder sees ``[prefixes | prompts | text]``. Both regions are as long as the longest adapter in the batch needs, what
a sample has lies at their right, and the attention mask leaves out the rest. Positions count what a sample sees, so its
text begins where it begins with the adapter alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import PrefixTuningConfig, PromptLearningConfig, TaskType
from ..nn import PromptEncoders
from ..nn.by_row import RowAdapters
from .prefix import cache_argument, check_cache_is_kept, filled_cache
from .prompt import word_embeddings
from .prompt_learning import (
    Inputs,
    cache_name,
    config_value,
    continues,
    count_text_alone,
    drop,
    extend,
    text_config,
    with_room,
)


class PromptsByRow:
    """The virtual tokens of one call.

    Args:
        model: the base model.
        encoders: virtual tokens by adapter name.
        configs: of these adapters.
        rows: which sample has which adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        encoders: PromptEncoders,
        configs: Mapping[str, PromptLearningConfig],
        rows: RowAdapters,
    ) -> None:
        used = [name for name in rows.adapters if name in encoders]
        self._model, self._encoders, self._rows = model, encoders, rows
        self._prefixes = {name: configs[name] for name in used if isinstance(configs[name], PrefixTuningConfig)}
        self._prompts = {name: configs[name] for name in used if name not in self._prefixes}
        self._prefix_length = max((config.num_virtual_tokens for config in self._prefixes.values()), default=0)
        self._prompt_length = max((config.num_virtual_tokens for config in self._prompts.values()), default=0)
        self._length = self._prefix_length + self._prompt_length

    def __bool__(self) -> bool:
        return bool(self._prefixes or self._prompts)

    def forward_inputs(self, inputs: Inputs) -> Inputs:
        """The arguments of ``model.forward`` with the virtual tokens in them; ``inputs`` are the caller's, by name."""
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        if (ids is None) == (embeds is None):
            raise ValueError("input_ids and inputs_embeds: exactly one of them must be given")
        if self._prefixes:
            check_cache_is_kept(self._model)
        text = ids if embeds is None else embeds
        name = cache_argument(self._model)
        goes_on = continues(inputs, name)
        before = inputs[name].get_seq_length() - self._length if goes_on else 0
        drop(inputs, "token_type_ids")
        if inputs.get("attention_mask") is None:
            inputs["attention_mask"] = text.new_ones((len(text), before + text.shape[1]), dtype=torch.int64)
        self._extend_mask(inputs)
        if "position_ids" in inspect.signature(self._model.forward).parameters:
            self._set_positions(inputs, text, before, goes_on)
        if not goes_on:
            extend(inputs, "labels", self._prompt_length, -100)
            if self._prompts:
                inputs.pop("input_ids", None)
            self._put_in(inputs, name, ids)
        return inputs

    def step_inputs(self, prepare: Callable[..., Inputs], input_ids: Tensor, **kwargs: Any) -> Inputs:
        """``prepare_inputs_for_generation`` of one step: ``prepare`` is the model's own, see
        :meth:`PromptLearningMethod.step_inputs`.
        """
        name = cache_name(prepare, kwargs) or "cache"
        if kwargs.get("use_cache") is False:
            kwargs.pop(name, None)
        goes_on = continues(kwargs, name)
        if goes_on:
            count_text_alone(kwargs, self._length)
        if kwargs.get("attention_mask") is None:  # generate leaves out one of ones
            embeds = kwargs.get("inputs_embeds") if kwargs.get("is_first_iteration") else None
            text = input_ids if embeds is None else embeds
            before = kwargs[name].get_seq_length() - self._length if goes_on else 0
            length = before + (kwargs.get("next_sequence_length") or text.shape[1])
            kwargs["attention_mask"] = input_ids.new_ones((len(text), length))
        self._extend_mask(kwargs)
        positions = kwargs.get("position_ids")
        if positions is not None:
            leading, n = self._leading_positions(positions), self._counts(positions)[:, None]
            kwargs["position_ids"] = torch.cat((leading, positions + n), dim=-1)
        if not goes_on:
            self._put_in(kwargs, name, input_ids)
            if self._prompts:
                kwargs["is_first_iteration"] = True  # embeddings are read in the first step only
                if kwargs.get("next_sequence_length") is not None:
                    kwargs["next_sequence_length"] += self._prompt_length
        return prepare(input_ids, **kwargs)

    # ------------------------------------------------------------------------------------------------------------------

    def _counts(self, like: Tensor) -> Tensor:
        """int64 ``[samples]``: how many virtual tokens each sample has."""
        sizes = {name: config.num_virtual_tokens for name, config in (self._prefixes | self._prompts).items()}
        return torch.tensor([sizes.get(name, 0) for name in self._rows.names_of(like)], device=like.device)

    def _used(self, like: Tensor, configs: Mapping[str, PromptLearningConfig], length: int) -> Tensor:
        """bool ``[samples, length]``: which places of a region a sample uses."""
        names = self._rows.names_of(like)
        sizes = [configs[name].num_virtual_tokens if name in configs else 0 for name in names]
        return torch.arange(length, 0, -1, device=like.device) <= torch.tensor(sizes, device=like.device)[:, None]

    def _extend_mask(self, inputs: Inputs) -> None:
        mask = inputs.get("attention_mask")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"attention_mask must be a tensor [batch, length], got {got}")
        regions = ((self._prefixes, self._prefix_length), (self._prompts, self._prompt_length))
        leading = [self._used(mask, configs, length).to(mask.dtype) for configs, length in regions]
        inputs["attention_mask"] = torch.cat((*leading, mask), dim=1)
        window = config_value(text_config(self._model), "sliding_window")
        if self._prefixes and self._prompts and window and window < inputs["attention_mask"].shape[1]:
            raise NotImplementedError(
                f"adapter_names: {sorted(self._prefixes)} are prefixes and {sorted(self._prompts)} prompts. Between a "
                "prefix and its text would be room for the prompts, which counts in the model's sliding window of "
                f"{window} tokens; call the model for each of the two kinds"
            )

    def _leading_positions(self, like: Tensor) -> Tensor:
        """Positions of both regions ``[samples, n]``; those of the prefixes are in the cache, and not read."""
        used = self._used(like, self._prompts, self._prompt_length)
        positions = (used.cumsum(1) - 1).clamp(min=0)
        return torch.cat((positions.new_zeros(len(positions), self._prefix_length), positions), dim=1)

    def _set_positions(self, inputs: Inputs, text: Tensor, before: int, goes_on: bool) -> None:
        """A prompt's sample counts from its first virtual token, as it does alone, whatever the caller gives."""
        positions = torch.arange(before, before + text.shape[1], device=text.device).expand(len(text), -1)
        given = inputs.get("position_ids")
        if given is not None:
            names = self._rows.names_of(text)
            own = torch.tensor([name in self._prompts for name in names], device=text.device)[:, None]
            positions = torch.where(own, positions, given)
        positions = positions + self._counts(text)[:, None]
        if not goes_on:
            leading = self._leading_positions(text)[:, self._prefix_length :]
            positions = torch.cat((leading, positions), dim=1)
        inputs["position_ids"] = positions

    def _put_in(self, inputs: Inputs, name: str | None, ids: Tensor | None) -> None:
        """Prompts into the embeddings, prefixes into the cache; ids where there are no embeddings."""
        embeds = inputs.get("inputs_embeds")
        if self._prompts:
            embeds = word_embeddings(self._model)(ids) if embeds is None else embeds
            inputs["inputs_embeds"] = torch.cat((self._prompt_rows(embeds), embeds), dim=1)
            if name is not None and inputs.get(name) is not None:
                inputs[name] = with_room(inputs[name], self._prompt_length, self._model)
        if self._prefixes:
            like = ids if embeds is None else embeds
            config = copy.copy(next(iter(self._prefixes.values())))
            config.num_virtual_tokens = self._prefix_length
            inputs[name] = filled_cache(inputs.get(name), self._model, config, self._prefix_rows(like))

    def _prompt_rows(self, embeds: Tensor) -> Tensor:
        """``[samples, n, D]`` in the dtype of the text's embeddings."""
        zeros = embeds.new_zeros(self._prompt_length, embeds.shape[-1])
        leading = {}
        for name in self._prompts:
            prompt = self._encoders[name].prompt()[: self._prompts[name].num_virtual_tokens]
            prompt = prompt.to(embeds.device, embeds.dtype)
            leading[name] = torch.cat((zeros[len(prompt) :], prompt))
        return torch.stack([leading.get(name, zeros) for name in self._rows.names_of(embeds)])

    def _prefix_rows(self, like: Tensor) -> list[Tensor]:
        """Key, value, key, value ... ``[samples, H, n, D / H]`` in the model's dtype."""
        known = {name: self._encoders[name](self._model.dtype, 1) for name in self._prefixes}
        names, first = self._rows.names_of(like), next(iter(known.values()))
        found = []
        for place, tensor in enumerate(first):
            zeros = tensor.new_zeros(tensor.shape[1], self._prefix_length, tensor.shape[3])
            padded = {
                name: torch.cat((zeros[:, tensors[place].shape[2] :], tensors[place][0]), dim=1)
                for name, tensors in known.items()
            }
            found.append(torch.stack([padded.get(name, zeros) for name in names]))
        return found


def check_prompt_by_row(name: str, config: PromptLearningConfig) -> None:
    """NotImplementedError where the virtual tokens of adapter ``name`` cannot go in front of some samples alone."""
    if config.task_type is not TaskType.CAUSAL_LM:
        raise NotImplementedError(
            f"adapter_names: virtual tokens by sample are built for task_type=CAUSAL_LM; {name!r} is for "
            f"{config.task_type.value}"
        )


_lock = threading.Lock()
_users: Counter[int] = Counter()


@contextmanager
def preparing(model: nn.Module, current: Callable[[], PromptsByRow | None]) -> Iterator[None]:
    """In this context, each step of ``model.generate`` has the virtual tokens that ``current()`` says.

    Several threads may be in it with one model: ``current`` tells each its own, or None.
    """
    with _lock:
        _users[id(model)] += 1
        if _users[id(model)] == 1:
            original = model.prepare_inputs_for_generation

            @functools.wraps(original)  # generate asks for its signature
            def prepare(input_ids: Tensor, **inputs: Any) -> Inputs:
                prompts = current()
                if prompts is None:
                    return original(input_ids, **inputs)
                return prompts.step_inputs(original, input_ids, **inputs)

            model.prepare_inputs_for_generation = prepare
    try:
        yield
    finally:
        with _lock:
            _users[id(model)] -= 1
            if _users[id(model)] == 0:
                del _users[id(model)], model.prepare_inputs_for_generation
