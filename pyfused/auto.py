"""A base model and its adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from torch import nn

from .config import PeftConfig, TaskType, local_folder
from .model import PeftModel

# An adapter's configuration may name the module to import its base model's class from: only these, and what is in them.
_IMPORTED = ("diffusers", "transformers")
_OWN_OPTIONS = ("autocast_adapter_dtype", "subfolder")


class AutoPeftModel:
    """Loads the base model that an adapter's configuration names, and the adapter into it.

    For adapters saved without ``task_type``, whose configuration says the base model's class (``auto_mapping``); for
    others there is a class for each task, :class:`AutoPeftModelForCausalLM` and so on.
    """

    _task: ClassVar[TaskType | None] = None
    _transformers_class: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        name = type(self).__name__
        raise OSError(f"{name} is made by {name}.from_pretrained(folder)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base model and adapter.

        Where the folder holds a tokenizer of more tokens than the base model has embeddings, these are resized first.

        Args:
            pretrained_model_name_or_path: local folder of the adapter. The base model is what its configuration says,
                as the base class's ``from_pretrained`` takes it.
            adapter_name, is_trainable, config: see :meth:`PeftModel.from_pretrained`.
            revision: passed over, as folders have none.
            import_allowlist: packages that the base model's class may be imported from, in place of transformers and
                diffusers.
            **kwargs: for the base class's ``from_pretrained`` (``dtype``, ``device_map``, ...), but for
                ``autocast_adapter_dtype`` and ``subfolder``, which are :meth:`PeftModel.from_pretrained`'s.

        Raises:
            ImportError: transformers is not installed.
            ValueError: the adapter is for another task, its base model is not known, or its class is not in one of the
                allowed packages; what :meth:`PeftModel.from_pretrained` raises.
        """
        own = {name: kwargs.pop(name) for name in _OWN_OPTIONS if name in kwargs}
        folder = local_folder(pretrained_model_name_or_path, own.get("subfolder"), {})
        saved = PeftConfig.from_pretrained(folder)
        base_class = cls._base_class(saved, folder, _IMPORTED if import_allowlist is None else tuple(import_allowlist))
        if not saved.base_model_name_or_path:
            raise ValueError(f"{folder}: base_model_name_or_path is empty, so the base model is not known")
        base = base_class.from_pretrained(saved.base_model_name_or_path, revision=saved.revision, **kwargs)
        _make_room(base, folder)
        return PeftModel.from_pretrained(base, pretrained_model_name_or_path, adapter_name, is_trainable, config, **own)

    @classmethod
    def _base_class(cls, config: PeftConfig, folder: Path, allowed: tuple[str, ...]) -> Any:
        if config.task_type is None and config.auto_mapping:
            source = config.auto_mapping["parent_library"]
            if not source.startswith(tuple(f"{package}." for package in allowed)) and source not in allowed:
                raise ValueError(
                    f"{folder}: auto_mapping names {source!r}, which is not in one of the packages to import from, "
                    f"{', '.join(allowed)}; where it can be trusted, pass import_allowlist=[{source!r}]"
                )
            return getattr(importlib.import_module(source), config.auto_mapping["base_model_class"])
        if config.task_type != cls._task or cls._task is None:
            task = config.task_type and TaskType(config.task_type).value
            right = _CLASSES.get(config.task_type)
            raise ValueError(
                f"{folder}: an adapter for task_type {task}, which {cls.__name__} does not load"
                + (f"; use {right.__name__}" if right else "; use pyfused.PeftModel.from_pretrained")
            )
        try:
            transformers = importlib.import_module("transformers")
        except ImportError as error:
            raise ImportError(f"{cls.__name__} needs transformers: pip install transformers") from error
        return getattr(transformers, cls._transformers_class)


def _make_room(base: nn.Module, folder: Path) -> None:
    if not (folder / "tokenizer_config.json").is_file() or not hasattr(base, "get_input_embeddings"):
        return
    count = len(importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder))
    if count > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(count)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """:class:`AutoPeftModel` for ``CAUSAL_LM``."""

    _task, _transformers_class = TaskType.CAUSAL_LM, "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """:class:`AutoPeftModel` for ``SEQ_2_SEQ_LM``."""

    _task, _transformers_class = TaskType.SEQ_2_SEQ_LM, "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """:class:`AutoPeftModel` for ``SEQ_CLS``."""

    _task, _transformers_class = TaskType.SEQ_CLS, "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """:class:`AutoPeftModel` for ``TOKEN_CLS``."""

    _task, _transformers_class = TaskType.TOKEN_CLS, "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """:class:`AutoPeftModel` for ``QUESTION_ANS``."""

    _task, _transformers_class = TaskType.QUESTION_ANS, "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """:class:`AutoPeftModel` for ``FEATURE_EXTRACTION``."""

    _task, _transformers_class = TaskType.FEATURE_EXTRACTION, "AutoModel"


_CLASSES = {cls._task: cls for cls in AutoPeftModel.__subclasses__()}
