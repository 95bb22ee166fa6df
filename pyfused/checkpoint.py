"""Adapter files in HF PEFT's format: ``adapter_model.safetensors`` next to ``adapter_config.json``.

A key is the name in the PeftModel without the adapter's name: ``base_model.model.<layer>.lora_A.weight``. Modules of
``modules_to_save`` are saved under their own names, as if they had never been wrapped. An adapter of virtual tokens has
one tensor, ``prompt_embeddings``, and its modules are called ``base_model.<name in the model>``.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ._files import replacing
from .adapted import AdaptedLayers
from .config import PeftConfig
from .file_keys import PROMPT, base_keys, base_tensors, biases, in_file, in_model, without_copies
from .inject import Plan
from .methods import FILE_PREFIX, PromptLearningMethod, method_of
from .nn import AdapterLayer, ModulesToSaveWrapper
from .nn.base import adapter_device, own_parameters
from .targets import base_modules, model_config_value

if TYPE_CHECKING:
    from .model import PeftModel

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_FLOAT_DTYPES = (
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
# Input and output embeddings by the names that HF PEFT knows: an adapter on one is saved with the layer's own weight.
_EMBEDDING_NAMES = ("embed_tokens", "lm_head")


def get_peft_model_state_dict(
    model: PeftModel,
    state_dict: dict[str, Tensor] | None = None,
    adapter_name: str = "default",
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, as they go into its file; they are the model's own, not copies.

    Args:
        state_dict: the model's, where it had to be gathered; None: ``model.state_dict()``.
        save_embedding_layers: also save the base weights of the input and output embeddings. "auto": those that have an
            adapter on them, and both where the vocabulary has another size than in the local folder that the base model
            came from.

    Raises:
        ValueError: no such adapter.
    """
    config = _config(model, adapter_name)
    state_dict = model.state_dict() if state_dict is None else state_dict
    tuner = model.base_model
    tuner.layers = AdaptedLayers(tuner.model)  # one that was replaced by hand is in the model no more
    own_layers = tuner.layers.of(adapter_name)
    paths = {module: f"{FILE_PREFIX}{path}" for path, module in base_modules(tuner.model)}
    keys: dict[str, str] = {}  # in the file -> in the model
    tensors: dict[str, Tensor] = {}
    if config.is_prompt_learning:
        tensors[PROMPT] = _prompt(model, state_dict, adapter_name)
    for name, layer in own_layers.items():
        names = layer.adapter_keys(adapter_name)
        keys.update({f"{FILE_PREFIX}{name}.{key}": f"{paths[layer]}.{own}" for key, own in names.items()})
    if config.bias == "all":
        keys.update(biases(tuner, state_dict, adapter_name))
    elif config.bias == "lora_only":
        found = {name: f"{paths[layer.get_base_layer()]}.bias" for name, layer in own_layers.items()}
        keys.update({f"{FILE_PREFIX}{name}.base_layer.bias": key for name, key in found.items() if key in state_dict})
    for name, wrapper in tuner.wrappers.items():
        if adapter_name in wrapper.modules_to_save:
            for key in wrapper.modules_to_save[adapter_name].state_dict():
                keys[f"{FILE_PREFIX}{name}.{key}"] = f"{paths[wrapper]}.modules_to_save.{adapter_name}.{key}"
    embeddings = tuple(f"{name}." for name in _embeddings_to_save(model, config, save_embedding_layers))
    if embeddings:
        keys.update(base_keys(tuner, (key for key in state_dict if key.startswith(embeddings)), own_layers))
    lost = sorted(key for key in keys.values() if key not in state_dict)
    if lost:
        raise ValueError(f"state_dict: keys of adapter {adapter_name!r} are missing: {_listed(lost)}")
    own = {key: _brought(model, model_key, state_dict[model_key]) for key, model_key in keys.items()}
    own = method_of(config).to_file(config, own_layers, adapter_name, own)
    return tensors | {in_file(key, config): tensor for key, tensor in own.items()}


def set_peft_model_state_dict(
    model: PeftModel,
    peft_model_state_dict: dict[str, Tensor],
    adapter_name: str = "default",
    *,
    saved_config: PeftConfig | None = None,
) -> _IncompatibleKeys:
    """Copy an adapter's tensors into a model that has this adapter; each is cast to the dtype of its parameter.

    Args:
        peft_model_state_dict: as :func:`get_peft_model_state_dict` gives it, whatever the adapter was called there.
        saved_config: the configuration that was saved with the tensors; None: the adapter's own, which otherwise takes
            over what belongs to the weights (AdaLoRA's ``rank_pattern``).

    Returns:
        ``missing_keys``, the parameters of the adapter that are not in it, also told by a warning; ``unexpected_keys``,
        empty.

    Raises:
        ValueError: no such adapter or it is merged or on the meta device, a key that the model does not have, a missing
            module of ``modules_to_save``, or a tensor of another shape. The model is unchanged.
    """
    config = _config(model, adapter_name)
    tuner = model.base_model
    peft_model_state_dict = in_model(peft_model_state_dict, config)
    if any(adapter_name in layer.merged_adapters for layer in tuner.layers):
        raise ValueError(f"adapter_name: {adapter_name!r} is merged into the base weights; unmerge it first")
    shapes: dict[str, torch.Size] = {}
    own_layers = tuner.layers.of(adapter_name)
    for name, layer in own_layers.items():
        for key, tensor in layer.adapter_tensors(adapter_name).items():
            _check_device(name, tensor.device)
            shapes[f"{FILE_PREFIX}{name}.{key}"] = tensor.shape
    if config.is_prompt_learning:
        encoder = tuner.prompt_encoder[adapter_name]
        _check_loadable(encoder, adapter_name)
        shapes[PROMPT] = encoder.embedding.weight.shape
    method, saved = method_of(config), saved_config or config
    peft_model_state_dict = method.from_file(saved, own_layers, adapter_name, peft_model_state_dict)
    wrapped = {name: wrapper for name, wrapper in tuner.wrappers.items() if adapter_name in wrapper.modules_to_save}
    peft_model_state_dict = without_copies(peft_model_state_dict, wrapped)
    expected = Expected(tuner.model, shapes, wrapped, list(own_layers))
    all_needed = config.weights_must_be_loaded or config.is_prompt_learning
    missing = expected.check(peft_model_state_dict, "peft_model_state_dict", all_needed)
    _copy_into(model, peft_model_state_dict, adapter_name)
    method.loaded(config, saved, own_layers, adapter_name)
    return _IncompatibleKeys(missing, [])


def check_against_plan(model: nn.Module, plan: Plan, tensors: dict[str, Tensor], source: str) -> None:
    """See that ``tensors`` fit what ``plan`` is going to make of the base model ``model``; errors as
    :func:`set_peft_model_state_dict`.
    """
    all_needed = plan.config.weights_must_be_loaded or plan.config.is_prompt_learning
    tensors = without_copies(in_model(tensors, plan.config), plan.modules_to_save)
    expected_of_plan(model, plan).check(tensors, source, all_needed, warn=False)


def expected_of_plan(model: nn.Module, plan: Plan) -> Expected:
    """What may be in the file of an adapter that ``plan`` is going to put into the base model ``model``."""
    shapes = {}
    for target in plan.targets:
        _check_device(target.name, adapter_device(target.base))
        shapes.update({f"{FILE_PREFIX}{target.name}.{key}": shape for key, shape in plan.method.shapes(target).items()})
    if isinstance(plan.method, PromptLearningMethod):
        _check_device("the model", adapter_device(model))
        shapes[PROMPT] = plan.method.file_shape(plan.config)
    return Expected(model, shapes, plan.modules_to_save, [target.name for target in plan.targets])


class Expected:
    """What may be in an adapter's file for a base model, before or after the adapter is put into it.

    Attributes:
        adapter, modules: shapes of the adapter's tensors and of those of ``modules_to_save``, by their keys.
        base: the base model's own tensors that a file may hold besides.
    """

    def __init__(
        self, model: nn.Module, shapes: dict[str, torch.Size], modules_to_save: dict[str, nn.Module], layers: list[str]
    ) -> None:
        self.adapter = shapes
        self.floating = set(shapes)
        self.modules: dict[str, torch.Size] = {}
        self.others: dict[str, torch.Size] = {}
        for name, module in modules_to_save.items():
            original = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            for key, tensor in original.state_dict().items():
                self.modules[f"{FILE_PREFIX}{name}.{key}"] = tensor.shape
                if tensor.is_floating_point():
                    self.floating.add(f"{FILE_PREFIX}{name}.{key}")
                # HF PEFT saves the biases of the copy twice, and those of the original, where bias is "all".
                self.others[f"{FILE_PREFIX}{name}.modules_to_save.{key}"] = tensor.shape
                self.others[f"{FILE_PREFIX}{name}.original_module.{key}"] = tensor.shape
        self.base = {name: tensor for name, (_, tensor) in base_tensors(model, layers).items()}
        self.others.update({key: tensor.shape for key, tensor in self.base.items()})

    def check(self, tensors: dict[str, Tensor], source: str, all_needed: bool, warn: bool = True) -> list[str]:
        known = {**self.others, **self.adapter, **self.modules}
        unexpected = sorted(set(tensors) - set(known))
        if unexpected:
            raise ValueError(f"{source}: keys that the model has no place for: {_listed(unexpected)}")
        for key, tensor in tensors.items():
            if tensor.shape != known[key]:
                raise ValueError(f"{source}: {key} must have shape {list(known[key])}, got {list(tensor.shape)}")
            if key in self.floating and tensor.dtype not in _FLOAT_DTYPES:
                raise ValueError(f"{source}: {key} must hold floating-point numbers, got {tensor.dtype}")
        lost = sorted(set(self.modules) - set(tensors))
        if lost:
            raise ValueError(f"{source}: weights of modules_to_save are missing: {_listed(lost)}")
        missing = sorted(set(self.adapter) - set(tensors))
        if missing and all_needed:
            raise ValueError(f"{source}: adapter keys are missing: {_listed(missing)}")
        if missing and warn:
            warnings.warn(f"Found missing adapter keys while loading the checkpoint: {missing}.", stacklevel=4)
        return missing


def _check_device(name: str, device: torch.device | str | int) -> None:
    if torch.device(device).type == "meta":
        raise ValueError(f"model: {name} is on the meta device, where an adapter cannot hold weights")


def _copy_into(model: PeftModel, tensors: dict[str, Tensor], adapter_name: str) -> None:
    tuner, own = model.base_model, {}
    if adapter_name in tuner.prompt_encoder:
        own[PROMPT] = tuner.prompt_encoder[adapter_name].embedding.weight
    layers = tuner.layers.of(adapter_name)
    for name, layer in layers.items():
        parts = layer.adapter_tensors(adapter_name)
        own.update({f"{FILE_PREFIX}{name}.{key}": tensor for key, tensor in parts.items()})
    for name, wrapper in tuner.wrappers.items():
        if adapter_name in wrapper.modules_to_save:
            for key, tensor in wrapper.modules_to_save[adapter_name].state_dict().items():
                own[f"{FILE_PREFIX}{name}.{key}"] = own[f"{FILE_PREFIX}{name}.modules_to_save.{key}"] = tensor
    others = tensors.keys() - own.keys()
    if others:  # biases and embeddings of the base model
        keys = {name: key for name, (key, _) in base_tensors(tuner.model, layers).items()}
        tuner.model.load_state_dict({keys[name]: tensors[name] for name in others}, strict=False)
    with torch.no_grad():
        for key in tensors.keys() - others:
            own[key].copy_(tensors[key])


def _brought(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """``tensor``, the model's of this key; its values where accelerate has offloaded it."""
    if not tensor.is_meta:
        return tensor
    path, _, name = key.rpartition(".")
    return own_parameters(model.get_submodule(path)).get(name, tensor)


def _prompt(model: PeftModel, state_dict: dict[str, Tensor], adapter_name: str) -> Tensor:
    """Virtual tokens as the file has them, of the values in ``state_dict``."""
    encoder = model.base_model.prompt_encoder[adapter_name]
    own = f"base_model.prompt_encoder.{adapter_name}."
    lost = sorted(f"{own}{key}" for key in encoder.state_dict() if f"{own}{key}" not in state_dict)
    if lost:
        raise ValueError(f"state_dict: keys of adapter {adapter_name!r} are missing: {_listed(lost)}")
    values = {key: _brought(model, f"{own}{key}", state_dict[f"{own}{key}"]) for key in encoder.state_dict()}
    return encoder.prompt_of(values)


def _check_loadable(encoder: nn.Module, adapter_name: str) -> None:
    if getattr(encoder, "transform", None) is not None:
        raise ValueError(
            f"adapter_name: {adapter_name!r} is trained with prefix_projection, and files hold what comes out of the "
            "projection; load it under another name"
        )
    _check_device("prompt_encoder", encoder.embedding.weight.device)


def _embeddings_to_save(model: PeftModel, config: Any, save_embedding_layers: bool | str) -> list[str]:
    """Names in the PeftModel of the base layers of the input and output embeddings that go into the file."""
    base = model.get_base_model()
    targets = config.target_modules
    if isinstance(targets, str):
        names = (name for name, _ in base.named_modules() if name.rpartition(".")[2] in _EMBEDDING_NAMES)
        adapted = any(re.fullmatch(targets, name) for name in names)
    else:
        adapted = any(name in (targets or ()) for name in _EMBEDDING_NAMES)
    if save_embedding_layers == "auto":
        save_embedding_layers = adapted or _vocabulary_changed(base, config.base_model_name_or_path)
        if save_embedding_layers:
            warnings.warn(
                "Setting `save_embedding_layers` to `True` as embedding layers were adapted or resized.", stacklevel=4
            )
    if not save_embedding_layers:
        return []
    if not hasattr(base, "get_input_embeddings"):
        warnings.warn("Could not identify embedding layer(s): the model has no get_input_embeddings().", stacklevel=4)
        return []
    names = []
    for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
        if isinstance(layer, AdapterLayer):
            layer = layer.get_base_layer()
        elif adapted or isinstance(layer, ModulesToSaveWrapper):
            continue
        names += [name for name, module in model.named_modules() if module is layer][:1]
    return names


def _vocabulary_changed(base: nn.Module, folder: str | None) -> bool:
    file = Path(folder or "") / "config.json"
    size = model_config_value(base, "vocab_size")
    if not folder or not size or not file.is_file():
        return False
    return json.loads(file.read_text()).get("vocab_size", size) != size


def _config(model: PeftModel, adapter_name: str) -> Any:
    model.base_model.check_names([adapter_name])
    return model.peft_config[adapter_name]


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


def write_adapter(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``adapter_model.safetensors``; the file is complete or it is the old one."""
    seen: set[tuple] = set()
    for key, tensor in tensors.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        tensor = tensor.detach().contiguous()
        tensors[key] = tensor.clone() if place in seen else tensor
        seen.add(place)
    with replacing(folder / WEIGHTS_NAME) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})


def read_adapter(path: str | os.PathLike, mapped: bool = True) -> dict[str, Tensor]:
    """The tensors of ``adapter_model.safetensors`` in a folder, on CPU.

    Args:
        mapped: they are the file's own pages, so the file must stay as it is. False: it is read once, and may change.

    Raises:
        ValueError: no such file, or a damaged one; only a pickle (``adapter_model.bin``), which is not opened.
    """
    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        pickled = file.with_name(_PICKLE_NAME)
        if pickled.is_file():
            raise ValueError(
                f"{pickled} is a pickle, which can run any code when it is opened. Convert it where it can be trusted: "
                f"safetensors.torch.save_file(torch.load('{_PICKLE_NAME}', weights_only=True), '{WEIGHTS_NAME}')"
            )
        raise ValueError(f"Can't find '{WEIGHTS_NAME}' at '{path}' (pyfused reads local folders only)")
    try:
        return safetensors.torch.load_file(file) if mapped else safetensors.torch.load(file.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short: {error}") from None
