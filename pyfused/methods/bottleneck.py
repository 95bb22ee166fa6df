"""Bottleneck adapters: where they sit in a model, AdapterHub's places by architecture or modules by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import BottleneckConfig
from ..nn import AdapterLayer, BottleneckLayer, BottleneckOutput
from ..targets import base_of, model_config_value, own_modules
from .base import Method, Target, check_called, named_targets


@dataclass(frozen=True)
class Place:
    """Where a block of a model has its adapters. Names are those behind the block's name.

    Attributes:
        block: a regular expression for a block's name.
        modules: the modules that give h, of the attention and of the feed-forward part.
        norms: the norms before the two, whose input is the residual stream; None where h's module gets it as its second
            input and has the norm in it.
        hub: AdapterHub's names for the two places.

    A name's "LAST" is the number of the block's last sub-layer.
    """

    block: str
    modules: tuple[str, str]
    norms: tuple[str, str] | None
    hub: tuple[str, str]


_HUB = ("attention_adapters", "output_adapters")
_BERT = Place(r"encoder\.layer\.\d+", ("attention.output", "output"), None, ("attention.output", "output"))
_GPT2 = Place(r"h\.\d+", ("attn.resid_dropout", "mlp.dropout"), ("ln_1", "ln_2"), _HUB)
_LLAMA = Place(r"layers\.\d+", ("self_attn.o_proj", "mlp"), ("input_layernorm", "post_attention_layernorm"), _HUB)
_T5 = Place(
    r"block\.\d+",
    ("layer.0.dropout", "layer.LAST.dropout"),
    ("layer.0.layer_norm", "layer.LAST.layer_norm"),
    ("layer.0", "layer.LAST"),
)
PLACES: dict[str, Place] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "camembert"), _BERT),
    "gpt2": _GPT2,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("t5", "mt5"), _T5),
}


@dataclass(frozen=True)
class Site:
    """One place in a model: the names of h's module and its norm, AdapterHub's name, and the layer's number."""

    name: str
    norm: str | None
    hub: str
    layer: int
    is_attention: bool


def sites(model: nn.Module) -> list[Site]:
    """All places of a model for adapters, in AdapterHub's order of layers.

    Raises:
        ValueError: the architecture has none that are known.
    """
    model_type = model_config_value(model, "model_type")
    place = PLACES.get(model_type)
    if place is None:
        raise ValueError(
            f"There are no places for bottleneck adapters known in models of type {model_type!r}; name modules in "
            f"target_modules. Known types: {', '.join(PLACES)}"
        )
    names = dict.fromkeys(name for name, _ in own_modules(model))
    blocks = [name for name in names if re.fullmatch(rf"(.*\.)?{place.block}", name)]
    found = []
    for layer, block in enumerate(blocks):
        last = sum(f"{block}.layer.{index}" in names for index in range(3)) - 1

        def full(name: str, block: str = block, last: int = last) -> str:
            return f"{block}.{name.replace('LAST', str(last))}"

        for index, module in enumerate(place.modules):
            if full(module) in names:
                norm = full(place.norms[index]) if place.norms else None
                found.append(Site(full(module), norm, full(place.hub[index]), layer, index == 0))
    return found


class BottleneckMethod(Method):
    layer_type = BottleneckLayer
    meaning = (
        *("non_linearity", "original_ln_before", "original_ln_after", "is_parallel", "residual_before_ln"),
        *("adapter_residual_before_ln", "ln_before", "ln_after", "use_gating", "scaling"),
    )

    def targets(self, model: nn.Module, config: BottleneckConfig, loading: bool) -> list[Target]:
        if config.target_modules is not None:
            return _named(model, config)
        modules = dict(own_modules(model))
        hidden_size = model_config_value(model, "hidden_size")
        targets = []
        for site in sites(model):
            if (
                not (config.mh_adapter if site.is_attention else config.output_adapter)
                or site.layer in config.leave_out
            ):
                continue
            if site.norm is not None and config.residual_before_ln == "post_add" and not config.is_parallel:
                raise ValueError("residual_before_ln='post_add' needs a post-norm model, such as BERT")
            options = _options(config, hidden_size, site.layer)
            if site.norm is not None:
                options["stream"] = options["like"] = modules[site.norm]
            targets.append(Target(site.name, modules[site.name], options))
        if not targets:
            raise ValueError(f"leave_out={config.leave_out} leaves no place for an adapter in the model")
        for target in targets:
            check_called(model, target)
        return targets

    def layer_class(self, module: nn.Module) -> type[AdapterLayer]:
        return BottleneckOutput if _is_output(module) else BottleneckLayer

    def shapes(self, target: Target) -> dict[str, torch.Size]:
        options = target.options
        d, h = options["hidden_size"], options["bottleneck_size"]
        down = f"bottleneck.adapter_down.{int(options['ln_before'])}"
        sizes = {f"{down}.weight": (h, d), f"{down}.bias": (h,)}
        sizes |= {"bottleneck.adapter_up.weight": (d, h), "bottleneck.adapter_up.bias": (d,)}
        if options["ln_before"]:
            sizes |= {f"bottleneck.adapter_down.0.{name}": (d,) for name in ("weight", "bias")}
        if options["ln_after"]:
            sizes |= {f"bottleneck.adapter_norm_after.{name}": (d,) for name in ("weight", "bias")}
        if options["use_gating"]:
            sizes |= {"bottleneck.gate.weight": (1, d), "bottleneck.gate.bias": (1,)}
        if isinstance(options["scaling"], str):
            sizes["bottleneck.scaling"] = (1 if options["scaling"] == "learned" else d,)
        return {name: torch.Size(size) for name, size in sizes.items()}


def _is_output(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("dense", "dropout", "LayerNorm"))


def _options(config: BottleneckConfig, hidden_size: int, layer: int | None) -> dict[str, Any]:
    names = (
        *("scaling", "dropout", "ln_before", "ln_after", "use_gating", "init_weights"),
        *("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln"),
    )
    return {
        "hidden_size": hidden_size,
        "bottleneck_size": config.bottleneck_size(hidden_size, layer),
        "activation": config.non_linearity,
        # AdapterHub's parallel adapter adds h behind its norm in any case
        "adapter_residual_before_ln": config.adapter_residual_before_ln and not config.is_parallel,
        **{name: getattr(config, name) for name in names},
    }


def _named(model: nn.Module, config: BottleneckConfig) -> list[Target]:
    targets = []
    for name, module in named_targets(model, config, {}):
        base = base_of(module)
        width = getattr(base, "out_features", None) or getattr(base, "nf", None)
        width = width or model_config_value(model, "hidden_size")
        if not isinstance(width, int):
            raise ValueError(f"Target module {name!r}: a {type(base).__name__} does not tell the width of its output")
        inputs = getattr(base, "in_features", width)
        if config.is_parallel and inputs != width:
            raise ValueError(
                f"Target module {name!r}: a parallel adapter goes from its input to its output, and it has {width} "
                f"outputs and {inputs} inputs"
            )
        match = re.search(r"\.(\d+)\.", name)
        options = _options(config, width, int(match[1]) if match else None)
        options |= {"original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}
        if next(base.parameters(), None) is None:
            options["like"] = model
        target = Target(name, module, options)
        check_called(model, target)
        targets.append(target)
    return targets
