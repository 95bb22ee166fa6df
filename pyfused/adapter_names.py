"""``adapter_names=``: what a model checks and sets up for a call with one adapter for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .config import PromptTuningConfig
from .methods.prompts_by_row import PromptsByRow, check_prompt_by_row
from .nn.by_row import BASE, adapters_by_row, rows_for

if TYPE_CHECKING:
    from .tuner import AdapterModel


@contextmanager
def use_adapters(tuner: AdapterModel, adapter_names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """In this context each sample has its adapter, see :meth:`pyfused.tuner.AdapterModel.adapters_by_row`."""
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names must be a list of names, got {type(adapter_names).__name__}")
    names = list(adapter_names)
    unknown = sorted({name for name in names if name != BASE and name not in tuner.peft_config}, key=str)
    if unknown:
        raise ValueError(f"adapter_names: no adapters {unknown}, there are {sorted(tuner.peft_config)} and {BASE!r}")
    _check(tuner, set(names) - {BASE})
    followers = [*tuner.layers, *tuner.wrappers.values(), tuner.prompt_encoder]
    with adapters_by_row(names, followers, copies):
        yield


def is_by_row(tuner: AdapterModel) -> bool:
    """Whether the call in progress gives each sample its adapter."""
    encoders = tuner.prompt_encoder
    return encoders._looks_for_rows and rows_for(encoders) is not None


def prompts_of_call(tuner: AdapterModel) -> PromptsByRow | None:
    """The virtual tokens of the samples of the call in progress; None where none has any."""
    encoders = tuner.prompt_encoder
    rows = rows_for(encoders) if encoders._looks_for_rows else None
    if rows is None or encoders.disable_adapters:
        return None
    prompts = PromptsByRow(tuner.model, encoders, tuner.peft_config, rows)
    return prompts if prompts else None


def _check(tuner: AdapterModel, names: set[str]) -> None:
    for name in sorted(names):
        if name in tuner.prompt_encoder:
            check_prompt_by_row(name, tuner.peft_config[name])
    gated = sorted(name for name in names if getattr(tuner.peft_config[name], "use_gating", False))
    prompts = sorted(name for name in names if isinstance(tuner.peft_config[name], PromptTuningConfig))
    if gated and prompts:
        raise NotImplementedError(
            f"adapter_names: the gates of {gated} average over all places of a text (use_gating), and the prompts of "
            f"{prompts} give every sample of the batch more places; call the model for each of the two kinds"
        )
    for path, layer in tuner.layers.named():
        if layer.merged_adapters:
            raise ValueError(f"adapter_names: {layer.merged_adapters} are merged, call unmerge_adapter first")
        if not layer.follows_rows:
            # even for samples without it: the layer would apply its active adapter to them
            raise NotImplementedError(f"adapter_names: not built for {type(layer).__name__} ({path})")
        if ".experts." in f".{path}." and any(layer.has_adapter(name) for name in names):
            raise NotImplementedError(f"adapter_names: {path} sees rows that a router chose, of no known sample")
    if not (tuner.training and torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in tuner.model.modules()):
        raise NotImplementedError(
            "adapter_names: gradient checkpointing computes layers again in the backward, when the names are gone"
        )
