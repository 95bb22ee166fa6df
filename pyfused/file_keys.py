"""Names of tensors: in an adapter's file, and in a model that has that adapter and perhaps others in it.

A file knows of one adapter: a layer that it adapts has its weight at ``<layer>.base_layer``, all others theirs where
the base model has them. In the model, a layer of each method may be around a module, and around a block as well.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .methods import FILE_PREFIX
from .nn import AdapterLayer
from .targets import base_modules, base_state_dict

if TYPE_CHECKING:
    from .tuner import AdapterModel

# The tensor of an adapter of virtual tokens, and what such adapters have in the place of FILE_PREFIX: HF PEFT keeps the
# model one level higher there.
PROMPT = "prompt_embeddings"
_PROMPT_PREFIX = "base_model."


def in_file(key: str, config: Any) -> str:
    return _PROMPT_PREFIX + key.removeprefix(FILE_PREFIX) if config.is_prompt_learning else key


def in_model(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The tensors of a file with the model's prefix in their keys."""
    if not config.is_prompt_learning:
        return tensors
    return {
        FILE_PREFIX + key.removeprefix(_PROMPT_PREFIX) if key.startswith(_PROMPT_PREFIX) else key: tensor
        for key, tensor in tensors.items()
    }


def without_copies(tensors: dict[str, Tensor], modules_to_save: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file without what it has of modules_to_save a second time, under the name that the adapter had.

    HF PEFT writes the biases of such a module's parts so where ``bias`` is "all".
    """
    copies = {f"{FILE_PREFIX}{name}.modules_to_save.": f"{FILE_PREFIX}{name}." for name in modules_to_save}

    def is_copy(key: str) -> bool:
        owner = next((copy for copy in copies if key.startswith(copy)), None)
        return owner is not None and copies[owner] + key.removeprefix(owner).partition(".")[2] in tensors

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key)}


def base_tensors(model: nn.Module, layers: Collection[str]) -> dict[str, tuple[str, Tensor]]:
    """The base model's tensors with their keys in it, by those in the file of an adapter that is on these layers.

    By those in the model, too, where other adapters may be on other layers: HF PEFT writes them.
    """
    found = {key: (key, tensor) for key, tensor in base_state_dict(model).items() if isinstance(tensor, Tensor)}
    paths = _layer_paths(model)
    named = {_file_key(_plain_key(key, paths) or key, layers): value for key, value in found.items()}
    return {f"{FILE_PREFIX}{key}": value for key, value in (found | named).items()}


def base_keys(tuner: AdapterModel, keys: Iterable[str], layers: Collection[str]) -> dict[str, str]:
    """Of some keys of the PeftModel's state dict those of the base model's tensors: in the file -> in the model."""
    paths, found = _layer_paths(tuner.model), {}
    for key in keys:
        plain = _plain_key(key.removeprefix(FILE_PREFIX), paths)
        if plain is not None:
            found[f"{FILE_PREFIX}{_file_key(plain, layers)}"] = key
    return found


def _layer_paths(model: nn.Module) -> set[str]:
    modules = base_modules(model, remove_duplicate=False)
    return {path for path, module in modules if isinstance(module, AdapterLayer)}


def _plain_key(key: str, paths: Collection[str]) -> str | None:
    """A key of a model with adapters as it is without them; None for a tensor of an adapter.

    Args:
        paths: of the layers with adapters in the model.
    """
    kept, path = [], ""
    for part in key.split("."):
        if path not in paths:
            kept.append(part)
        elif part != "base_layer":
            return None
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def _file_key(key: str, layers: Collection[str]) -> str:
    """The key that a tensor of the base model has in the file of an adapter that is on these layers."""
    kept, path = [], ""
    for part in key.split("."):
        kept.append(part)
        path = f"{path}.{part}" if path else part
        if path in layers:
            kept.append("base_layer")
    return ".".join(kept)


def biases(tuner: AdapterModel, state_dict: dict[str, Tensor], adapter_name: str) -> dict[str, str]:
    """All biases but those of other adapters: in the file -> in the model."""
    copies = tuple(f"{FILE_PREFIX}{name}.modules_to_save." for name in tuner.wrappers)
    own = tuple(f"{copy}{adapter_name}." for copy in copies)
    found = [key for key in state_dict if key.startswith(FILE_PREFIX) and key.endswith(".bias")]
    found = [key for key in found if not key.startswith(copies) or key.startswith(own)]
    keys = base_keys(tuner, found, tuner.layers.of(adapter_name))
    return {_without_adapter(name, adapter_name): key for name, key in keys.items()}


def _without_adapter(key: str, adapter_name: str) -> str:
    """HF PEFT's rule: the adapter's name goes where it is the last part but one."""
    owner, _, parameter = key.rpartition(".")
    return f"{owner.removesuffix(f'.{adapter_name}')}.{parameter}"
