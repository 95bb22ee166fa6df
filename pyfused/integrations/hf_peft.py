"""``fuse`` and ``unfuse``: a model that HF PEFT has already wrapped runs its LoRA layers on pyfused's ops."""

from __future__ import annotations

import functools
import logging
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from ..model import PeftModel
from ..nn.base import is_plain_linear, plain_weights
from ..nn.shared_input import share_inputs

TESTED_PEFT_VERSIONS = ("0.21.2",)

_logger = logging.getLogger(__name__)

# Modules of peft.tuners.lora whose layer classes keep their forward; `layer` itself is told apart by class.
_LORA_BACKENDS = {
    "aqlm": "base quantised by AQLM",
    "awq": "base quantised by AWQ",
    "eetq": "base quantised by EETQ",
    "gptq": "base quantised by GPTQ",
    "hqq": "base quantised by HQQ",
    "inc": "base quantised by Intel Neural Compressor",
    "te": "base of Transformer Engine",
    "tp_layer": "Megatron tensor-parallel layer",
}
_LORA_CLASSES = {
    "Conv1d": "LoRA on a convolution",
    "Conv2d": "LoRA on a convolution",
    "Conv3d": "LoRA on a convolution",
    "MultiheadAttention": "LoRA on nn.MultiheadAttention",
    "ParamWrapper": "LoRA on an nn.Parameter (target_parameters)",
}
_ADALORA_CLASSES = {
    "SVDConv2d": "a convolution",
    "SVDQuantLinear": "a base quantised by GPTQ",
}


@dataclass
class FuseReport:
    """What ``fuse`` did. Names are those of ``model.named_modules()``.

    Attributes:
        fused: layers that run on pyfused's ops, those fused by an earlier call included.
        notes: for some of the fused layers, what does not run in one op: a base layer that has to be called, with the
            adapter next to it, or an adapter that takes PEFT's forward while it is active.
        skipped: layers that keep PEFT's forward, with the reason.
    """

    fused: list[str] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} layers fused, {len(self.skipped)} skipped"]
        for title, entries in (("note", self.notes), ("skipped", self.skipped)):
            lines += [f"  {title}: {reason} ({_shorten(names)})" for reason, names in _by_reason(entries).items()]
        return "\n".join(lines)


def fuse(model: nn.Module) -> FuseReport:
    """Let the LoRA, AdaLoRA and IA3 layers of a model wrapped by HF PEFT run on pyfused's ops, in place.

    Parameters, state dict, module tree and names stay as they are, and so does everything that PEFT does with them:
    ``set_adapter``, several active adapters, ``disable_adapter``, merging, ``add_adapter``, ``save_pretrained``.
    A fused layer takes PEFT's own forward wherever the ops would not give its result: merged or disabled adapters,
    an active adapter that is neither LoRA nor DoRA (the other variants), hooks on the adapter's modules, ``torch.func``
    transforms. ``adapter_names=`` runs one op for all LoRA adapters of a batch on linear layers, and PEFT's loop
    elsewhere. Where the base layer is not exactly an ``nn.Linear`` with plain tensors and no hooks, it is called as it
    is and only the adapter is fused. Dropout drops other elements than PEFT's for the same seed, as many of them.

    Layers that PEFT makes afterwards, for an adapter with other target modules, are fused by another call; on layers
    that are fused already, the call changes nothing. A model pickled as a whole needs pyfused to be loaded, and an
    exported one holds pyfused's ops: call :func:`unfuse` first where that matters (``save_pretrained`` and state dicts
    do not depend on it).

    Prompt and prefix tuning have no layers to fuse: what goes into the model is made as views that the rows of a batch
    share, where PEFT copies it for each.

    Args:
        model: ``peft.PeftModel``, or any module that contains PEFT's layers (``inject_adapter_in_model``,
            ``add_adapter`` of transformers).

    Returns:
        Which layers are fused and which are not, with the reasons; also logged (``logging``, level INFO).

    Raises:
        ImportError: peft is not installed.
        TypeError: ``model`` is no module, or holds nothing of HF PEFT.
        ValueError: not one layer could be fused; the message has the reasons. The model is unchanged.
    """
    _check_module("fuse", model)
    try:
        import peft
        from peft.tuners.lora.layer import MultiheadAttention
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ImportError("fuse: model must be wrapped by HF PEFT, and peft is not installed") from error
    from .hf_peft_adalora import FusedSVDLinear
    from .hf_peft_layer import FusedLinear

    layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    if not layers:
        if isinstance(model, PeftModel):
            raise TypeError("fuse: model is a pyfused.PeftModel, which runs on pyfused's ops as it is")
        if isinstance(model, peft.PeftModel) and hasattr(model, "prompt_encoder"):
            return _fuse_prompts(model)
        if isinstance(model, peft.PeftModel):
            methods = sorted({str(config.peft_type.value) for config in model.peft_config.values()})
            raise ValueError(f"fuse: model has no layers to fuse, its PEFT method is {', '.join(methods)}")
        kind = type(model)
        raise TypeError(
            f"fuse: model must be wrapped by HF PEFT (peft.get_peft_model), got {kind.__module__}.{kind.__qualname__}, "
            "which has no layer of HF PEFT"
        )

    report = FuseReport()
    # nn.MultiheadAttention never calls its out_proj, it reads the weight.
    uncalled = tuple(f"{name}." for name, layer in layers.items() if isinstance(layer, MultiheadAttention))
    for name, layer in layers.items():
        skip = _Skip("inside nn.MultiheadAttention") if name.startswith(uncalled) else _skip_reason(layer)
        if skip is not None:
            report.skipped[name] = skip.reason
            if skip.unexpected:
                _logger.warning("fuse: %s keeps PEFT's forward: %s", name, skip.reason)
            continue
        report.fused.append(name)
        note = _note(layer)
        if note is not None:
            report.notes[name] = note
    if not report.fused:
        raise ValueError(f"fuse: model has no layer that can be fused: {report}")
    _warn_if_untested(peft.__version__)
    fused_classes = _fused_classes()
    for name in report.fused:
        layers[name].__class__ = fused_classes.get(type(layers[name]), type(layers[name]))
    share_inputs(model.modules(), (FusedLinear, FusedSVDLinear))
    _logger.info("fuse: %s", report)
    return report


def _fuse_prompts(model: nn.Module) -> FuseReport:
    from peft import __version__

    from .hf_peft_prompt import FUSED_MODELS, prompt_obstacle

    report, kind = FuseReport(), type(model)
    known = kind in FUSED_MODELS or kind in FUSED_MODELS.values()
    for name in model.prompt_encoder:
        obstacle = (
            prompt_obstacle(model, name) if known else f"model of the class {kind.__module__}.{kind.__qualname__}"
        )
        if obstacle is None:
            report.fused.append(f"prompt_encoder.{name}")
        else:
            report.skipped[f"prompt_encoder.{name}"] = obstacle
    if not report.fused:
        raise ValueError(f"fuse: model has no virtual tokens that can be fused: {report}")
    _warn_if_untested(__version__)
    model.__class__ = FUSED_MODELS.get(kind, kind)
    _logger.info("fuse: %s", report)
    return report


def unfuse(model: nn.Module) -> None:
    """Give the layers that :func:`fuse` changed their PEFT forward back; nothing of pyfused stays in the model.

    Args:
        model: as given to :func:`fuse`. A model without fused layers is left as it is.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_module("unfuse", model)
    try:
        from .hf_peft_prompt import FUSED_MODELS
    except ImportError:  # without peft there can be no fused layer
        return
    original = {fused: kind for kind, fused in (_fused_classes() | FUSED_MODELS).items()}
    for module in model.modules():
        if type(module) in original:
            module.__class__ = original[type(module)]
            for name in ("_shared_input", "_pruned"):
                vars(module).pop(name, None)


def _fused_classes() -> dict[type, type]:
    """HF PEFT's classes of layers, and what becomes of their objects."""
    from . import hf_peft_quantised  # noqa: F401  with it all files are imported that add to them
    from .hf_peft_adapters import FUSED_CLASSES

    return FUSED_CLASSES


class _Skip(NamedTuple):
    reason: str
    unexpected: bool = False


def _skip_reason(layer: nn.Module) -> _Skip | None:
    """Why ``layer`` keeps PEFT's forward; None where it can be fused."""
    from .hf_peft_layer import adapter_obstacles

    kind, fused_classes = type(layer), _fused_classes()
    if kind not in fused_classes and kind not in fused_classes.values():
        return _class_reason(kind)
    if "forward" in vars(layer):
        return _Skip("forward was replaced on the layer itself (as accelerate's hooks and X-LoRA do)", unexpected=True)
    if getattr(layer.get_base_layer(), "_hf_device_mesh", None) is not None:
        return _Skip("tensor-parallel layer")
    obstacles = adapter_obstacles(layer)
    return _Skip("; ".join(obstacles)) if obstacles and all(obstacles) else None


def _class_reason(kind: type) -> _Skip:
    parts = kind.__module__.split(".")
    if parts[:2] != ["peft", "tuners"]:
        return _Skip(f"layer of the class {kind.__module__}.{kind.__qualname__}", unexpected=True)
    if parts[2] == "ia3":
        return _Skip(f"IA3 layer of the class {kind.__name__}", unexpected=True)
    if parts[2] == "adalora":
        return _Skip(f"AdaLoRA on {_ADALORA_CLASSES.get(kind.__name__, 'a layer')} ({kind.__name__})")
    if parts[2] != "lora":
        return _Skip(f"{parts[2]} is none of LoRA, AdaLoRA and IA3")
    known = _LORA_BACKENDS.get(parts[3]) or _LORA_CLASSES.get(kind.__name__)
    if known is None:
        return _Skip(f"LoRA layer of the class {kind.__name__}", unexpected=True)
    return _Skip(f"{known} ({kind.__name__})")


def _note(layer: nn.Module) -> str | None:
    from .hf_peft_layer import Embedding, IA3Layer, adapter_obstacles

    notes = []
    is_ia3 = isinstance(layer, IA3Layer)
    called = not is_plain_linear(layer.base_layer) if is_ia3 else plain_weights(layer.base_layer) is None
    if called and not isinstance(layer, Embedding):
        kind = type(layer.base_layer).__name__
        done = "what goes in or comes out is scaled" if is_ia3 else "the adapter added"
        notes.append(f"the base layer ({kind}) is no plain nn.Linear: it is called, and {done}")
    obstacles = [obstacle for obstacle in adapter_obstacles(layer) if obstacle is not None]
    notes += [f"PEFT's forward where active: {obstacle}" for obstacle in obstacles]
    return "; ".join(notes) or None


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


@functools.cache
def _warn_if_untested(version: str) -> None:
    if version not in TESTED_PEFT_VERSIONS:
        tested = ", ".join(TESTED_PEFT_VERSIONS)
        warnings.warn(f"fuse: not tested with peft {version}; tested: {tested}", UserWarning, stacklevel=3)


def _by_reason(entries: dict[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, reason in entries.items():
        grouped.setdefault(reason, []).append(name)
    return grouped


def _shorten(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
