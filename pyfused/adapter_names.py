"""``adapter_names=``: what a model checks and sets up for a call with one adapter for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .config import PromptTuningConfig
from .methods.prompts_by_row import PromptsByRow, check_prompt_by_row
from .nn.by_row import BASE, adapters_by_row, rows_for

if TYPE_CHECKING:
    from .tuner import AdapterModel


@contextmanager
def use_adapters(tuner: AdapterModel, adapter_names: Sequence[str], copies: int = 1) -> Iterator[None]:
    """In this context each sample has its adapter, see :meth:`pyfused.tuner.AdapterModel.adapters_by_row`."""
    names = _as_list(adapter_names)
    unknown = sorted({name for name in names if name != BASE and name not in tuner.peft_config}, key=str)
    if unknown:
        raise ValueError(f"adapter_names: no adapters {unknown}, there are {sorted(tuner.peft_config)} and {BASE!r}")
    _check(tuner, set(names) - {BASE})
    followers = [*tuner.layers, *tuner.wrappers.values(), tuner.prompt_encoder]
    with adapters_by_row(names, followers, copies):
        yield


def copies_in_generate(
    model: nn.Module,
    adapter_names: Sequence[str],
    inputs: Any = None,
    generation_config: Any = None,
    *_: Any,
    **kwargs: Any,
) -> int:
    """How often ``generate``, with these arguments, repeats each sample, for its beams or the sequences it returns.

    Raises:
        TypeError, ValueError: ``adapter_names`` is no list with a name for each sample as it is given. Layers could not
            tell names of samples from names of beams: they see the copies alone.
    """
    count, samples = len(_as_list(adapter_names)), _samples(model, inputs, **kwargs)
    if samples not in (None, count):
        raise ValueError(f"adapter_names must have one name for each of the {samples} samples, got {count}")
    configs = (generation_config, getattr(model, "generation_config", None))

    def asked(name: str) -> int:
        return next(filter(None, (kwargs.get(name), *(getattr(config, name, None) for config in configs))), 1)

    return max(asked("num_beams"), asked("num_return_sequences"))


def _samples(
    model: nn.Module,
    inputs: Any = None,
    input_ids: Any = None,
    inputs_embeds: Any = None,
    encoder_outputs: Any = None,
    **others: Any,
) -> int | None:
    """How many samples ``generate`` is given; None where it is given something else than tensors."""
    main = others.get(getattr(model, "main_input_name", ""))
    encoded = None if encoder_outputs is None else encoder_outputs[0]
    given = [each for each in (inputs, input_ids, inputs_embeds, main, encoded, *others.values()) if each is not None]
    found = next((len(each) for each in given if isinstance(each, Tensor) and each.dim() > 0), None)
    return 1 if found is None and inputs is None else found  # without any, transformers begins one text


def _as_list(adapter_names: Sequence[str]) -> list[str]:
    if isinstance(adapter_names, str) or not isinstance(adapter_names, Sequence):
        raise TypeError(f"adapter_names must be a list of names, got {type(adapter_names).__name__}")
    return list(adapter_names)


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
