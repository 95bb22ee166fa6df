"""Merging adapters into the base weights of a model: all is checked before anything changes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .inject import parameter_uses
from .nn import AdapterLayer
from .targets import model_config_value

if TYPE_CHECKING:
    from .tuner import AdapterModel


def check_and_merge(tuner: AdapterModel, names: Sequence[str], safe_merge: bool) -> None:
    """See :meth:`pyfused.tuner.AdapterModel.merge_adapter`, which has looked at the names."""
    changed = {name for adapter in names for name in tuner.layers.of(adapter)}
    # Around one module, the outer layers' adapters act on what the inner ones give.
    chains = {name: tuner.layers.around(name)[::-1] for name in tuner.layers.names if name in changed}
    for name, chain in chains.items():
        _check_order(name, chain, names)
        tensors: dict[str, Tensor] = {}
        for layer in chain:
            own = [adapter for adapter in names if layer.has_adapter(adapter)]
            if safe_merge and own:
                new = [adapter for adapter in own if adapter not in layer.merged_adapters]
                tensors = layer.checked_merge(new, tensors)
            elif own:
                layer.check_mergeable("merge", own)
    merging = {name: [layer for layer in chain if any(map(layer.has_adapter, names))] for name, chain in chains.items()}
    uses = parameter_uses(tuner.model)
    tied = [
        name
        for name, layers in merging.items()
        if any(uses[id(tensor)] > 1 for layer in layers for tensor in layer.check_mergeable("merge").values())
    ]
    if tied:
        warnings.warn(
            f"The weights of {', '.join(tied)} are tied to those of another module: the merged layers have weights "
            "of their own, so that the other module stays as it is",
            stacklevel=4,
        )
    for name, layers in merging.items():
        for layer in layers:
            if name in tied:
                layer.own_weight()
            layer.merge(adapter_names=names)


def tell_untied(model: nn.Module, untied: Sequence[str]) -> None:
    """Layers at these paths of the base model have weights of their own now: its config is to say so."""
    if untied and model_config_value(model, "tie_word_embeddings"):
        model.config.tie_word_embeddings = False
        warnings.warn(
            f"{', '.join(untied)} no longer shares its weight: tie_word_embeddings is set to False in model.config",
            stacklevel=3,
        )


def _check_order(name: str, chain: Sequence[AdapterLayer], adapter_names: Sequence[str]) -> None:
    """ValueError where one of these would be merged before something that acts inside of it, or after what is outside.

    Args:
        chain: the layers around one module, the innermost first.
    """
    for place, layer in enumerate(chain):
        own = [adapter for adapter in adapter_names if layer.has_adapter(adapter)]
        new = [adapter for adapter in own if adapter not in layer.merged_adapters]
        if not new:
            continue
        inside = {adapter for other in chain[:place] for adapter in other._in_forward} - set(adapter_names)
        if inside:
            raise ValueError(
                f"adapter_names: {new[0]!r} acts on what {min(inside)!r} gives at {name}; merge that one as well, or "
                "make it inactive"
            )
        outside = [adapter for other in chain[place + 1 :] for adapter in other.merged_adapters]
        if outside:
            raise ValueError(
                f"adapter_names: {outside[0]!r}, which acts on what {new[0]!r} gives at {name}, is merged already; "
                "unmerge it first, then merge both"
            )
