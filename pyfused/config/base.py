"""What the configurations of all methods share, and the file ``adapter_config.json``."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .._files import replacing

CONFIG_NAME = "adapter_config.json"
# Options of HF PEFT's loading functions that make no difference to an adapter in a local folder.
_PASSED_OVER = frozenset(
    "cache_dir device_map dtype force_download local_files_only low_cpu_mem_usage proxies resume_download revision "
    "token torch_device torch_dtype use_auth_token use_safetensors".split()
)
# The version of HF PEFT whose fields and meaning this file has; it is what `peft_version` says in files written here.
PEFT_VERSION = "0.21.2"


class TaskType(str, enum.Enum):
    """What the model is trained for; it decides which head is trained in full next to the adapter."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """The method of an adapter, by the names in its files."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    BOTTLENECK = "BOTTLENECK"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"


@dataclass
class PeftConfig:
    """What the configurations of all methods share.

    A subclass names its method, ``class LoraConfig(PeftConfig, method=PeftType.LORA)``; that is how its files find it.

    Attributes:
        task_type: a :class:`TaskType` or its name, or None.
        peft_type: the method; set by the subclass.
        auto_mapping: class and library of a base model without task type; filled in when it is saved.
        peft_version: version of HF PEFT whose format a file has.
        base_model_name_or_path, revision: the base model, as far as it is known.
        inference_mode: the adapter is frozen.
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # What holds for methods that have no such field.
    target_modules: ClassVar[set[str] | str | None] = None
    exclude_modules: ClassVar[set[str] | str | None] = None
    modules_to_save: ClassVar[list[str] | None] = None
    bias: ClassVar[str] = "none"

    _method: ClassVar[PeftType | None] = None
    _classes: ClassVar[dict[PeftType, type[PeftConfig]]] = {}

    def __init_subclass__(cls, method: PeftType | None = None) -> None:
        if method is not None:  # None: a user's own subclass of a configuration
            cls._method = method
            cls._classes[method] = cls

    @classmethod
    def class_of(cls, method: PeftType) -> type[PeftConfig]:
        """The class of a method's configurations."""
        return PeftConfig._classes[method]

    def __post_init__(self) -> None:
        if self._method is not None:
            given = member(PeftType, "peft_type", self.peft_type or self._method)
            if given is not self._method:
                name = type(self).__name__
                raise ValueError(f"peft_type must be {self._method.value!r} in {name}, got {given.value!r}")
            self.peft_type = given
        if self.task_type is not None:
            self.task_type = member(TaskType, "task_type", self.task_type)
        self.peft_version = self.peft_version or PEFT_VERSION

    @property
    def weights_must_be_loaded(self) -> bool:
        """The initialisation is not built, but it left the base alone: a file with all weights can be loaded."""
        return False

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens; trainers ask."""
        return self.peft_type in (PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING)

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are, in a new dict."""
        return dataclasses.asdict(self)

    def save_pretrained(self, save_directory: str | os.PathLike, auto_mapping_dict: dict | None = None) -> None:
        """Write ``adapter_config.json`` into ``save_directory``, which is made where it does not exist.

        Args:
            auto_mapping_dict: written in place of ``auto_mapping``.

        Raises:
            ValueError: ``save_directory`` is a file.
        """
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"save_directory must be a folder, got the file {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        values = {name: sorted(value) if isinstance(value, set) else value for name, value in self.to_dict().items()}
        if auto_mapping_dict is not None:
            values["auto_mapping"] = auto_mapping_dict
        # Fields by name; within them the order may matter: of several patterns the first that matches a layer counts.
        text = json.dumps(dict(sorted(values.items())), indent=2)
        with replacing(folder / CONFIG_NAME) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, subfolder: str | None = None, **hf_options: Any) -> PeftConfig:
        """The configuration in a folder that holds ``adapter_config.json``, or in its ``subfolder``.

        A field that this version does not know is passed over with a warning where its value is null, false, 0, {} or
        [], and an error where it is anything else. ``hf_options`` are those for the Hugging Face hub, and passed over.

        Raises:
            ValueError: no such file, a damaged one, a field that is not known, or another method than this class's.
            NotImplementedError: a method, or a field's value, that is not built.
        """
        file = local_folder(path, subfolder, hf_options) / CONFIG_NAME
        if not file.is_file():
            raise ValueError(f"Can't find '{CONFIG_NAME}' at '{path}' (pyfused reads local folders only)")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged: no valid JSON ({error})") from None
        if not isinstance(values, dict) or "peft_type" not in values:
            raise ValueError(f"{file} is no adapter configuration: it must be a JSON object with 'peft_type'")
        config_class = _class_for(values["peft_type"], file)
        if not issubclass(config_class, cls):
            raise ValueError(f"{file}: peft_type must be that of {cls.__name__}, got {values['peft_type']!r}")
        values.pop("runtime_config", None)  # describes a process, not an adapter; HF PEFT drops it too
        fields = _known_fields(config_class, values, file)
        try:
            return config_class(**fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from None


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration of the method that ``peft_type`` names, of the other entries.

    Raises:
        TypeError, ValueError, NotImplementedError: no such method or field, or a value that is not built.
    """
    values = dict(config_dict)
    if "peft_type" not in values:
        raise ValueError("config_dict must have an entry 'peft_type', which names the method")
    return _class_for(values.pop("peft_type"), "config_dict")(**values)


def local_folder(path: str | os.PathLike, subfolder: str | None, hf_options: dict[str, Any]) -> Path:
    """The folder of an adapter; TypeError for options that HF PEFT's loading functions do not have."""
    unknown = sorted(set(hf_options) - _PASSED_OVER)
    if unknown:
        raise TypeError(f"options that pyfused does not have: {', '.join(unknown)}")
    return Path(path, subfolder or "")


def _class_for(peft_type: Any, where: Path | str) -> type[PeftConfig]:
    known = [method.value for method in PeftType]
    if peft_type not in known:
        raise ValueError(f"{where}: peft_type must be one of {', '.join(known)}, got {peft_type!r}")
    return PeftConfig.class_of(PeftType(peft_type))


def _known_fields(config_class: type[PeftConfig], values: dict[str, Any], file: Path) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(config_class)}
    unknown = {name: value for name, value in values.items() if name not in names}
    if unknown:
        for name, value in unknown.items():
            if value:
                raise ValueError(
                    f"{file}: field {name!r} = {value!r} is not known to this version of pyfused and may change "
                    "the result"
                )
        warnings.warn(
            f"{file}: fields not known to this version of pyfused are at their defaults and were passed over: "
            f"{', '.join(sorted(unknown))}",
            stacklevel=3,
        )
    return {name: value for name, value in values.items() if name in names}


def member(kind: type[enum.Enum], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ValueError(f"{name} must be one of {names}, got {value!r}") from None


def strings(name: str, values: Any) -> list[str]:
    if isinstance(values, str) or not isinstance(values, (list, set, tuple)):
        raise TypeError(f"{name} must be a list of strings, got {values!r}")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a list of strings, got {value!r} in it")
    return list(values)


def check_module_names(config: PeftConfig) -> None:
    """Check the fields that name modules, and bring them to their forms: sets or patterns, and a list."""
    config.target_modules = names_or_pattern("target_modules", config.target_modules)
    config.exclude_modules = names_or_pattern("exclude_modules", config.exclude_modules)
    if config.modules_to_save is not None:
        config.modules_to_save = strings("modules_to_save", config.modules_to_save)
        for name in config.modules_to_save:
            check_regex("modules_to_save", name)  # what is saved in full is left out of target_modules by it


def names_or_pattern(name: str, value: Any) -> set[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value.lower() != "all-linear":
            check_regex(name, value)
        return value
    return set(strings(name, value))


def check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no valid regular expression ({error})") from None
