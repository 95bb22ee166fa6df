"""Adapters made beside a model from their files, so that putting one in is no more than entries in dictionaries.

What is found out by walking over the model (which layers, which shapes) is the same for all adapters of one
configuration, and is kept.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import WEIGHTS_NAME, Expected, expected_of_plan
from .config import CONFIG_NAME, PeftConfig
from .file_keys import PROMPT
from .host_cache import AdapterFiles, Signature
from .inject import Plan
from .methods import FILE_PREFIX, PromptLearningMethod, Target
from .methods.prompts_by_row import check_prompt_by_row
from .nn.base import adapter_device, frozen_copy
from .nn.lora_init import changes_base
from .tuner import AdapterModel

# Fields of a configuration that say nothing about what is put where.
_NO_MATTER = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision")
_KEPT_RECIPES = 256


@dataclass(frozen=True)
class DetachedAdapter:
    """An adapter with its weights, in no model yet.

    Attributes:
        config: its configuration.
        parts: for each layer by its name what :meth:`pyfused.nn.AdapterLayer.detached_adapter` made.
        modules: copies of wrapped modules by the wrapper's name.
        encoder: of its virtual tokens; None where it has none.
        size: bytes of its tensors.
        signature: of the files that it was read from.
    """

    config: PeftConfig
    parts: dict[str, dict[str, Any]]
    modules: dict[str, nn.Module]
    encoder: nn.Module | None
    size: int
    signature: Signature | None


@dataclass(frozen=True)
class _Recipe:
    plan: Plan
    expected: Expected


class Detacher:
    """Makes :class:`DetachedAdapter` for one model, in any thread.

    Args:
        tuner: the model's adapters.
        lock: held while the model is walked over or its layers are replaced.
        autocast_adapter_dtype: see :func:`pyfused.get_peft_model`.
    """

    def __init__(self, tuner: AdapterModel, lock: threading.RLock, autocast_adapter_dtype: bool) -> None:
        self._tuner = tuner
        self._lock = lock
        self._autocast = autocast_adapter_dtype
        self._recipes: OrderedDict[str, _Recipe] = OrderedDict()

    @property
    def gpu(self) -> torch.device | None:
        """The GPU that the model is on, or begins on; None where it is on none."""
        first = next(self._tuner.model.parameters(), None)
        return first.device if first is not None and first.is_cuda else None

    def make(self, folder: Path, files: AdapterFiles) -> DetachedAdapter:
        """The adapter of a folder's files.

        Layers that no adapter was on before are wrapped; they go on giving what they gave.

        Raises:
            TypeError, ValueError, NotImplementedError: the files do not fit the model, or hold what adapters cannot
                have side by side. The model is unchanged.
        """
        file = folder / WEIGHTS_NAME
        with self._lock, _told(folder / CONFIG_NAME):
            recipe = self._recipe(folder.name, files.config)
        recipe.expected.check(files.tensors, str(file), all_needed=True)
        self._check_base(recipe, files.tensors, file)
        with _told(folder / CONFIG_NAME):
            with self._lock:
                self._wrap(recipe)
            tensors = files.on(self.gpu)
            parts = {target.name: self._part(recipe, target, tensors) for target in recipe.plan.targets}
            encoder = self._encoder(recipe, tensors)
        modules = {name: self._module(name, tensors) for name in recipe.plan.modules_to_save}
        own_config = copy.copy(recipe.plan.config)
        own_config.base_model_name_or_path = files.config.base_model_name_or_path
        own = _tensors(parts, modules, encoder)
        for device in {tensor.device for tensor in own if tensor.is_cuda}:
            # Copies within a GPU may be under way still, and a request may be on another stream.
            torch.cuda.current_stream(device).synchronize()
        size = sum(tensor.nbytes for tensor in own)
        return DetachedAdapter(own_config, parts, modules, encoder, size, files.signature)

    def _recipe(self, name: str, config: PeftConfig) -> _Recipe:
        fields = {name: value for name, value in config.to_dict().items() if name not in _NO_MATTER}
        key = repr({name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()})
        recipe = self._recipes.get(key)
        if recipe is None:
            plan = self._tuner.plan(config, _unused_name(self._tuner), loading=True)
            _check_side_by_side(name, plan)
            recipe = self._recipes[key] = _Recipe(plan, expected_of_plan(self._tuner.model, plan))
            if len(self._recipes) > _KEPT_RECIPES:
                self._recipes.popitem(last=False)
        self._recipes.move_to_end(key)
        return recipe

    def _check_base(self, recipe: _Recipe, tensors: dict[str, Tensor], file: Path) -> None:
        """Adapters on embeddings are saved with the embedding's own weight, which all adapters share."""
        expected = recipe.expected
        for key in set(tensors) - set(expected.adapter) - set(expected.modules):
            own = expected.base.get(key)
            if own is None or not torch.equal(own, tensors[key].to(own.device, own.dtype)):
                raise ValueError(f"{file}: {key} is not the base model's, which all adapters of a pool share")

    def _wrap(self, recipe: _Recipe) -> None:
        plan, tuner = recipe.plan, self._tuner
        if all(tuner.layers.get(target.name, plan.method.layer_type) is not None for target in plan.targets) and all(
            name in tuner.wrappers for name in plan.modules_to_save
        ):
            return
        name = _unused_name(tuner)
        tuner.inject(tuner.plan(plan.config, name, loading=True), name)
        tuner.delete_adapter(name)

    def _part(self, recipe: _Recipe, target: Target, tensors: dict[str, Tensor]) -> dict[str, Any]:
        method = recipe.plan.method
        own = {key: tensors[f"{FILE_PREFIX}{target.name}.{key}"] for key in method.shapes(target)}
        layer = self._tuner.layers.get(target.name, method.layer_type)
        return layer.detached_adapter(own, autocast_adapter_dtype=self._autocast, **target.options)

    def _encoder(self, recipe: _Recipe, tensors: dict[str, Tensor]) -> nn.Module | None:
        method, config, model = recipe.plan.method, recipe.plan.config, self._tuner.model
        if not isinstance(method, PromptLearningMethod):
            return None
        with torch.device("meta"):  # where nothing is drawn
            encoder = method.new_encoder(model, config, loading=True)
        dtype = encoder.embedding.weight.dtype
        encoder.embedding.weight = frozen_copy(tensors[PROMPT], adapter_device(model), dtype)
        return encoder

    @torch.no_grad()
    def _module(self, name: str, tensors: dict[str, Tensor]) -> nn.Module:
        module = copy.deepcopy(self._tuner.wrappers[name].original_module)
        for key, tensor in module.state_dict().items():
            tensor.copy_(tensors[f"{FILE_PREFIX}{name}.{key}"])
        return module


@contextmanager
def _told(file: Path) -> Iterator[None]:
    """Errors in here name the file."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        raise type(error)(f"{file}: {error}") from error


def _check_side_by_side(name: str, plan: Plan) -> None:
    """Refuse what changes the base model for all, or acts on all samples alike."""
    if plan.config.bias != "none":
        raise NotImplementedError(f"bias={plan.config.bias!r}: the biases of the base model are shared by all adapters")
    init = getattr(plan.config, "init_lora_weights", True)
    if changes_base(init):
        raise NotImplementedError(f"init_lora_weights={init!r}: it took a part of the base weight, which others share")
    if plan.config.is_prompt_learning:
        check_prompt_by_row(name, plan.config)
    for target in plan.targets:
        kind = plan.method.layer_class(target.base)
        if not kind.follows_rows or ".experts." in f".{target.name}.":
            raise NotImplementedError(f"{target.name}: AdapterPool is not built for {kind.__name__} there")


def _tensors(
    parts: dict[str, dict[str, Any]], modules: dict[str, nn.Module], encoder: nn.Module | None
) -> list[Tensor]:
    owners = [part for layer in parts.values() for part in layer.values()]
    tensors = [owner for owner in owners if isinstance(owner, Tensor)]
    tensors += [tensor for owner in owners if isinstance(owner, nn.Module) for tensor in owner.parameters()]
    tensors += [tensor for module in modules.values() for tensor in module.state_dict().values()]
    tensors += [] if encoder is None else list(encoder.parameters())
    return tensors


def _unused_name(tuner: AdapterModel) -> str:
    name = "_pool"
    while name in tuner.peft_config:
        name += "_"
    return name
