"""``get_peft_model`` and ``PeftModel``: the interface of HF PEFT over pyfused's modules."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from . import saving
from ._model_class import class_for, made_from
from .adapter_names import copies_in_generate
from .checkpoint import (
    check_against_plan,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from .config import PeftConfig, local_folder
from .inject import Plan, plan, warn_if_base_changed
from .integrations import adapterhub
from .loading import check_format, check_same_meaning, read_saved
from .nn import AdapterLayer
from .serving import export_for_serving
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .targets import base_modules
from .tuner import AdapterModel

# Methods of HF PEFT's models that the base model may have as well, or that would not name themselves when missing.
_NOT_BUILT = {
    "push_to_hub": "upload the folder that save_pretrained writes",
}


def get_peft_model(
    model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", *, autocast_adapter_dtype: bool = True
) -> PeftModel:
    """Put an adapter into a model and freeze everything else.

    Args:
        model: any module; changed in place. Model-specific features (default targets, heads, gradient checkpointing)
            need a model that follows transformers' conventions.
        peft_config: what to put where; it is copied.
        adapter_name: name of the adapter, which is active and trainable.
        autocast_adapter_dtype: keep adapters in float32 where the layer they belong to has a 16-bit dtype.

    Returns:
        The model in a :class:`PeftModel`.

    Raises:
        TypeError, ValueError, NotImplementedError: the configuration is wrong, does not fit the model, or asks for
            something that is not built. The model is unchanged.
    """
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


class PeftModel(nn.Module):
    """A model with adapters. Attributes it does not have are those of ``base_model``, and then of the model itself.

    Parameters have HF PEFT's names: ``base_model.model.<name in the model>``. ``forward`` has the signature of the
    model's class, which is what trainers look at. Where peft is installed, ``isinstance(model, peft.PeftModel)`` holds,
    so that transformers' Trainer saves, resumes and restores adapters; without peft
    :class:`pyfused.integrations.trainer.Trainer` does.

    Args: as :func:`get_peft_model`.

    Attributes:
        base_model: the adapters, :class:`pyfused.tuner.AdapterModel`; the model itself is ``base_model.model``.
        peft_type: method of the adapters.
    """

    def __new__(cls, model: nn.Module, *args: Any, **kwargs: Any) -> PeftModel:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        return super().__new__(class_for(cls, type(model)))

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        first = _first_plan(model, peft_config, adapter_name)
        told, name = first.config.base_model_name_or_path, saving.name_or_path(model)
        if told not in (None, name):
            warnings.warn(
                f"The PEFT config's base_model_name_or_path was {told!r}, the model's is {name!r} and is what is kept",
                stacklevel=3,
            )
        first.config.base_model_name_or_path = name
        self._init_from_plan(model, first, adapter_name, autocast_adapter_dtype)

    def _init_from_plan(self, model: nn.Module, plan: Plan, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        super().__init__()
        self.peft_type = plan.config.peft_type
        self.base_model = AdapterModel(model, plan, adapter_name, autocast_adapter_dtype)
        if hasattr(getattr(model, "config", None), "pretraining_tp"):
            model.config.pretraining_tp = 1  # slicing weights to imitate tensor parallelism would pass the adapters by

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class that carries the signature is made at run time: copies and pickles make it anew.
        return _new_peft_model, (made_from(type(self)), type(self.get_base_model())), vars(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # while it is being made or unpickled
                raise
            if name in _NOT_BUILT:
                raise AttributeError(f"pyfused.PeftModel: {name} is not built; {_NOT_BUILT[name]}") from None
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The model itself, with the adapters in it."""
        return self.base_model.model

    # Calling ----------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own ``forward`` takes and gives.

        ``adapter_names``: a list with the adapter of each sample of the batch, "__base__" for none, in place of the
        active ones; see :meth:`pyfused.tuner.AdapterModel.adapters_by_row`.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            return self.base_model(*args, **kwargs)
        with self.base_model.adapters_by_row(adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's own ``generate`` takes and gives.

        ``adapter_names``: as in :meth:`forward`, one for each sample that is given, whatever ``num_beams`` and
        ``num_return_sequences`` make of it.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        model = self.get_base_model()
        if "generation_config" in vars(self):  # set on this object, since the model's own is not in its __dict__
            model.generation_config = self.generation_config
        if adapter_names is None:
            return self.base_model.generate(*args, **kwargs)
        with self.base_model.adapters_by_row(adapter_names, copies_in_generate(model, adapter_names, *args, **kwargs)):
            return self.base_model.generate(*args, **kwargs)

    # Adapters ---------------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """The configuration of each adapter."""
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """What the configurations of all adapters name as ``modules_to_save``; None where that is nothing."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, autocast_adapter_dtype: bool = True) -> None:
        """Add an adapter with new weights; neither active nor trainable until :meth:`set_adapter`.

        Raises:
            TypeError, ValueError, NotImplementedError: as :func:`get_peft_model`, or the name is taken. The model is
                unchanged.
        """
        added = self.base_model.plan(peft_config, adapter_name)
        if self.peft_config:
            warn_if_base_changed([added.config, *self.peft_config.values()])
        self.base_model.inject(added, adapter_name, autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones, see :meth:`pyfused.tuner.AdapterModel.set_adapter`."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter, see :meth:`pyfused.tuner.AdapterModel.delete_adapter`."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """In this context the model gives what the base model gives; merged adapters are taken out and put back."""
        was_disabled = self.base_model._disabled
        self.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            if not was_disabled:
                self.base_model.enable_adapter_layers()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; two to a byte are counted for bitsandbytes' 4-bit weights."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if count == 0 and hasattr(parameter, "ds_numel"):  # sharded by DeepSpeed
                count = parameter.ds_numel
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each layer with adapters, see :func:`pyfused.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of all adapters, see :func:`pyfused.get_model_status`."""
        return get_model_status(self)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of :meth:`get_nb_trainable_parameters` and their ratio in percent."""
        trainable, total = self.get_nb_trainable_parameters()
        percent = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {percent:.4f}")

    # Files ------------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        *,
        state_dict: dict[str, Any] | None = None,
        path_initial_model_for_weight_conversion: str | None = None,
    ) -> None:
        """Write adapters as HF PEFT does: ``adapter_config.json`` and ``adapter_model.safetensors``.

        vLLM loads LoRA from these files but refuses DoRA, trained biases, ``lora_bias``, ``modules_to_save`` other than
        a classifier's head, AdaLoRA, and ranks beyond its ``--max-lora-rank``; SGLang passes over ``use_rslora`` and
        the patterns. :meth:`export_for_serving` writes what both read alike.

        Args:
            save_directory: made where it does not exist. Adapters not called "default" go into sub-folders of their
                names.
            safe_serialization: must be True; pickles are not written.
            selected_adapters: None for all.
            save_embedding_layers, state_dict: see :func:`pyfused.checkpoint.get_peft_model_state_dict`.
            is_main_process: others write nothing.
            path_initial_model_for_weight_conversion: must be None: an adapter that took a part of the base weight
                (pissa, olora) is written as it is.

        Raises:
            NotImplementedError: ``path_initial_model_for_weight_conversion`` is given.
            ValueError: ``save_directory`` is a file, no such adapter, or no ``safe_serialization``, or the model
                has no adapters; nothing is written.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise NotImplementedError(
                "path_initial_model_for_weight_conversion: converting a pissa or olora adapter to a plain one is not "
                "built; saved as it is, it is loaded onto the original base model, from which the same part is taken"
            )
        folder = Path(save_directory)
        names = saving.checked_names(self, folder, safe_serialization, selected_adapters)
        for name in names:
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers)
            if is_main_process:
                saving.write(self, folder if name == "default" else folder / name, name, tensors)

    def save_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str = "default", *, format: str = "adapterhub"
    ) -> None:
        """Write one bottleneck adapter as AdapterHub does: ``adapter_config.json`` and ``adapter.safetensors``.

        AdapterHub reads it by ``load_adapter(folder, use_safetensors=True)``; :meth:`save_pretrained` writes the layout
        of all other methods.

        Args:
            save_directory: made where it does not exist.
            format: "adapterhub".

        Raises:
            ValueError: no such adapter, or one that AdapterHub has no files for; nothing is written.
        """
        check_format(format, ("adapterhub",))
        tensors = get_peft_model_state_dict(self, None, adapter_name, False)
        adapterhub.write(Path(save_directory), self, adapter_name, tensors)

    def export_for_serving(
        self, save_directory: str | os.PathLike, adapter_name: str | None = None, rank: int | None = None
    ) -> None:
        """Write a LoRA adapter for vLLM and SGLang, see :func:`pyfused.serving.export_for_serving`."""
        export_for_serving(self, save_directory, adapter_name, rank)

    def _trains(self) -> bool:
        """Whether a module is in training mode; those of adapters are in their layers', and are not asked."""
        own = (self, self.base_model, self.base_model.prompt_encoder)
        return any(module.training for module in own) or any(
            module.training for _, module in base_modules(self.get_base_model())
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        *,
        subfolder: str | None = None,
        format: str = "peft",
        **hf_options: Any,
    ) -> PeftModel:
        """Put a saved adapter into a base model.

        Args:
            model: the base model; changed in place.
            model_id: local folder that pyfused or HF PEFT wrote.
            adapter_name: name of the adapter here.
            is_trainable: False: the adapter is frozen and the model put into evaluation mode.
            config: in place of the one in the folder.
            autocast_adapter_dtype: see :func:`get_peft_model`.
            subfolder: of ``model_id``.
            format: "peft", or "adapterhub" for a folder that AdapterHub's ``save_adapter(..., use_safetensors=True)``
                wrote.
            **hf_options: options of HF PEFT that make no difference here and are passed over: those for the Hugging
                Face hub, and ``device_map``, ``torch_dtype``, ``torch_device``, ``low_cpu_mem_usage``, since an adapter
                goes where its layer is.

        Raises:
            TypeError, ValueError, NotImplementedError: the folder, its files or its configuration are no good, or do
                not fit the model. The model is unchanged.
        """
        folder = local_folder(model_id, subfolder, hf_options)
        config, tensors = read_saved(folder, is_trainable, config, format, model)
        first = _first_plan(model, config, adapter_name, loading=True)
        check_against_plan(model, first, tensors, str(folder))
        self = cls.__new__(cls, model)
        self._init_from_plan(model, first, adapter_name, autocast_adapter_dtype)
        set_peft_model_state_dict(self, tensors, adapter_name)
        if not is_trainable:
            self.eval()
        return self

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        *,
        autocast_adapter_dtype: bool = True,
        subfolder: str | None = None,
        format: str = "peft",
        **hf_options: Any,
    ) -> _IncompatibleKeys:
        """Add a saved adapter, not active; or read the weights of one that is there anew.

        Args: as :meth:`from_pretrained`; without ``is_trainable`` the whole model goes into evaluation mode.

        Returns:
            ``missing_keys`` and ``unexpected_keys``, see :func:`pyfused.checkpoint.set_peft_model_state_dict`.

        Raises:
            TypeError, ValueError, NotImplementedError: as :meth:`from_pretrained`. The model is unchanged.
        """
        folder = local_folder(model_id, subfolder, hf_options)
        config, tensors = read_saved(folder, is_trainable, None, format, self.get_base_model())
        if adapter_name in self.peft_config:
            check_same_meaning(self.peft_config[adapter_name], config, f"{folder}, adapter {adapter_name!r}")
        else:
            added = self.base_model.plan(config, adapter_name, loading=True)
            check_against_plan(self.get_base_model(), added, tensors, str(folder))
            if self.peft_config:
                warn_if_base_changed([config, *self.peft_config.values()])
            self.base_model.inject(added, adapter_name, autocast_adapter_dtype)
            if is_trainable:
                self.base_model.set_requires_grad(adapter_name)
        result = set_peft_model_state_dict(self, tensors, adapter_name, saved_config=config)
        if not is_trainable and self._trains():
            self.eval()
        return result


def _first_plan(model: nn.Module, peft_config: PeftConfig, adapter_name: str, loading: bool = False) -> Plan:
    if any(isinstance(module, AdapterLayer) for module in model.modules()):
        raise ValueError("model has adapters already: add one by add_adapter or load_adapter, or call unload() first")
    return plan(model, peft_config, adapter_name, loading=loading)


def _new_peft_model(cls: type[PeftModel], model_class: type[nn.Module]) -> PeftModel:
    return nn.Module.__new__(class_for(cls, model_class))
