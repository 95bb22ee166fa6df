"""AdapterHub's adapter folders: ``adapter_config.json`` and ``adapter.safetensors``, for bottleneck adapters."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .._files import replacing
from ..config import BottleneckConfig, PeftConfig
from ..methods.bottleneck import sites
from ..targets import model_config_value

if TYPE_CHECKING:
    from ..model import PeftModel

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter.safetensors"
_PICKLE_NAME = "pytorch_adapter.bin"
_PREFIX = "base_model.model."
# The version of AdapterHub's library whose format this file has.
_VERSION = "adapters.1.3.0"
# Fields that AdapterHub writes beside those of BottleneckConfig, with the values that its classes have for them.
_THEIR_FIELDS: dict[str, Any] = {
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "learn_phm": True,
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "shared_W_phm": False,
    "shared_phm_rule": True,
}
# Fields of BottleneckConfig that are not AdapterHub's.
_OUR_FIELDS = {item.name for item in dataclasses.fields(PeftConfig)} | {
    "target_modules",
    "exclude_modules",
    "modules_to_save",
}
_KEY = re.compile(r"(?P<site>.+)\.adapters\.(?P<adapter>[^.]+)\.(?P<parameter>.+)")


def read_config(folder: Path) -> BottleneckConfig:
    """The configuration of an AdapterHub folder.

    Raises:
        ValueError: no such file, a damaged one, or not one of a bottleneck adapter.
        NotImplementedError: a kind of bottleneck that is not built.
    """
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"Can't find '{CONFIG_NAME}' at '{folder}' (pyfused reads local folders only)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))["config"]
        fields = dict(values)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged, or not AdapterHub's: it must be JSON with 'config' ({error!r})") from None
    architecture = fields.pop("architecture", None)
    if architecture is not None:
        raise ValueError(f"{file}: only bottleneck adapters are read, this is {architecture!r}")
    known = {item.name for item in dataclasses.fields(BottleneckConfig)} - _OUR_FIELDS
    unknown = sorted(set(fields) - known - set(_THEIR_FIELDS))
    if unknown:
        raise ValueError(f"{file}: fields that pyfused does not know: {', '.join(unknown)}")
    try:
        return BottleneckConfig(**{name: value for name, value in fields.items() if name in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_weights(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an AdapterHub folder by the keys that they have in a pyfused file for ``model``.

    A head's prefix ("bert.") may be there or not, in the file and in the model.

    Raises:
        ValueError: no such file, a damaged one, or a place that the model does not have.
    """
    file = folder / WEIGHTS_NAME
    if not file.is_file():
        hint = ""
        if (folder / _PICKLE_NAME).is_file():
            hint = f"; {_PICKLE_NAME} is a pickle: write it anew by save_adapter(..., use_safetensors=True)"
        raise ValueError(f"Can't find '{WEIGHTS_NAME}' at '{folder}'{hint}")
    try:
        tensors = safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None
    names = {_without_prefix(model, site.hub): site.name for site in sites(model)}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        name = match and names.get(_without_prefix(model, match["site"]))
        if not name:
            raise ValueError(f"{file}: {key} is no place for an adapter in this {type(model).__name__}")
        if not match["parameter"].startswith("adapter_norm_before."):  # the same tensors as adapter_down.0
            found[f"{_PREFIX}{name}.bottleneck.{match['parameter']}"] = tensor
    return found


def write(folder: Path, model: PeftModel, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """Write an AdapterHub folder.

    Args:
        tensors: as :func:`pyfused.get_peft_model_state_dict` gives them.

    Raises:
        ValueError: the adapter is no bottleneck adapter, or on modules that AdapterHub does not adapt.
    """
    config = model.peft_config[adapter_name]
    if not isinstance(config, BottleneckConfig):
        raise ValueError(
            f"format='adapterhub' is for bottleneck adapters, {adapter_name!r} is {config.peft_type.value}"
        )
    if config.target_modules is not None or config.modules_to_save:
        raise ValueError("format='adapterhub' has no place for target_modules and modules_to_save")
    base = model.get_base_model()
    hubs = {site.name: site.hub for site in sites(base)}
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name, _, parameter = key.removeprefix(_PREFIX).partition(".bottleneck.")
        converted[f"{hubs[name]}.adapters.{adapter_name}.{parameter}"] = tensor.detach().clone().contiguous()
    theirs = {name: value for name, value in dataclasses.asdict(config).items() if name not in _OUR_FIELDS}
    document = {
        "config": _THEIR_FIELDS | theirs,
        "hidden_size": model_config_value(base, "hidden_size"),
        "model_class": type(base).__name__,
        "model_name": getattr(base, "name_or_path", "") or "",
        "model_type": model_config_value(base, "model_type"),
        "name": adapter_name,
        "version": _VERSION,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        safetensors.torch.save_file(converted, temporary)
    with replacing(folder / CONFIG_NAME) as temporary:
        temporary.write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")


def _without_prefix(model: nn.Module, name: str) -> str:
    return name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
