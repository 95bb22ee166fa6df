"""Adapters into folders, as :class:`pyfused.PeftModel` is asked to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .checkpoint import write_adapter

if TYPE_CHECKING:
    from .model import PeftModel


def checked_names(
    model: PeftModel, folder: Path, safe_serialization: bool, selected_adapters: Sequence[str] | None
) -> list[str]:
    """The adapters to save; errors as :meth:`pyfused.PeftModel.save_pretrained`."""
    if not safe_serialization:
        raise ValueError("safe_serialization must be True: adapters are written as safetensors, never as pickles")
    if folder.is_file():
        raise ValueError(f"save_directory must be a folder, got the file {folder}")
    if not model.peft_config:
        raise ValueError("save_pretrained: the model has no adapters (they were unloaded or deleted)")
    names = list(model.peft_config if selected_adapters is None else selected_adapters)
    unknown = sorted(set(names) - set(model.peft_config))
    if unknown:
        raise ValueError(f"selected_adapters: no adapters {unknown}, there are {sorted(model.peft_config)}")
    return names


def write(model: PeftModel, folder: Path, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """One adapter's two files; its configuration says ``inference_mode``, as HF PEFT's does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_adapter(folder, tensors)
    config, base = model.peft_config[adapter_name], model.get_base_model()
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = name_or_path(base)
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    inference_mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder, auto_mapping_dict=mapping)
    finally:
        config.inference_mode = inference_mode


def name_or_path(model: nn.Module) -> str | None:
    """Where a transformers model came from; models made from a configuration have an empty name."""
    return vars(model).get("name_or_path") or None
