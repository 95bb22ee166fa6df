"""Configurations. Field names, defaults and the file ``adapter_config.json`` are HF PEFT's (0.21.2)."""

from __future__ import annotations

import dataclasses
import enum
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ._files import replacing
from .nn.arguments import check_lora_arguments

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

    def __post_init__(self) -> None:
        if self.task_type is not None:
            self.task_type = _member(TaskType, "task_type", self.task_type)
        self.peft_version = self.peft_version or PEFT_VERSION

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
        text = json.dumps(values, indent=2, sort_keys=True)
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


@dataclass
class LoraConfig(PeftConfig):
    """LoRA (Hu et al. 2021) on linear layers.

    Attributes:
        r: rank.
        target_modules: which layers. Names, each of which matches whole or as the end of a layer's name after a dot; or
            one regular expression that matches the whole name; or "all-linear", every linear layer but the output
            layer. None: the usual ones of a known architecture.
        exclude_modules: layers to leave out, names or a regular expression like ``target_modules``.
        lora_alpha: numerator of the scaling ``lora_alpha / r``.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        fan_in_fan_out: for layers that store their weight transposed; turned off with a warning for ``nn.Linear``.
        bias: "none", "all" (all biases of the model are trained and saved) or "lora_only" (those of adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        modules_to_save: modules to train in full and save with the adapter, by the end of their names.
        init_lora_weights: True, False or "gaussian", see :class:`pyfused.nn.LoraLinear`.
        layers_to_transform: index or indices of the layers to adapt, for names in ``target_modules`` that are suffixes.
        layers_pattern: name, or names, of the list that ``layers_to_transform`` counts in, such as "layers".
        rank_pattern, alpha_pattern: other ranks or alphas for some layers: a regular expression that matches the end of
            the name, and the value.

    The other fields are HF PEFT's; they are at their defaults, or raise NotImplementedError.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: dict | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    use_dora: bool = False
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = _member(PeftType, "peft_type", self.peft_type or PeftType.LORA)
        if self.peft_type is not PeftType.LORA:
            raise ValueError(f"peft_type of a LoraConfig must be 'LORA', got {self.peft_type.value!r}")
        for name in _NOT_BUILT:
            if getattr(self, name):
                raise NotImplementedError(f"LoraConfig: {name} is not built yet, got {getattr(self, name)!r}")
        init = True if self.weights_must_be_loaded else self.init_lora_weights
        if self.eva_config and not self.weights_must_be_loaded:
            raise NotImplementedError("LoraConfig: eva_config is not built yet")
        check_lora_arguments(self.r, self.lora_alpha, self.lora_dropout, self.use_dora, self.lora_bias, init)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        self.target_modules = _names_or_pattern("target_modules", self.target_modules)
        self.exclude_modules = _names_or_pattern("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            self.modules_to_save = _strings("modules_to_save", self.modules_to_save)
            for name in self.modules_to_save:
                _check_regex("modules_to_save", name)  # what is saved in full is left out of target_modules by it
        self._check_layers()
        self._check_patterns()

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        for index in layers if isinstance(layers, (list, tuple)) else () if layers is None else (layers,):
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {layers!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be used when target_modules is a str (a regular expression)")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given: layers_to_transform must also be specified")
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        for pattern in _strings("layers_pattern", patterns):
            _check_regex("layers_pattern", pattern)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name) or {}
            if not isinstance(patterns, dict):
                raise TypeError(f"{name} must be a dict from names to values, got {type(patterns).__name__}")
            setattr(self, name, dict(patterns))
            for key in patterns:
                _check_regex(name, key)
        for key, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"rank_pattern must map to integers of at least 1, got {rank!r} for {key!r}")
        for key, alpha in self.alpha_pattern.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise TypeError(f"alpha_pattern must map to numbers, got {alpha!r} for {key!r}")

    @property
    def weights_must_be_loaded(self) -> bool:
        """The initialisation is not built, but it left the base alone: a file with all weights can be loaded."""
        return self.init_lora_weights in _INIT_OF_ADAPTER_ONLY


# Fields whose defaults are false and that change the result otherwise.
_NOT_BUILT = (
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "use_dora",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "lora_bias",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
_INIT_OF_ADAPTER_ONLY = ("eva", "orthogonal")


class _NotBuilt(PeftConfig):
    _method: str

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}: {self._method} is not built yet")


class AdaLoraConfig(_NotBuilt):
    """AdaLoRA (Zhang et al. 2023)."""

    _method = "AdaLoRA"


class IA3Config(_NotBuilt):
    """IA3 (Liu et al. 2022)."""

    _method = "IA3"


class BottleneckConfig(_NotBuilt):
    """Bottleneck adapters (Houlsby et al. 2019 and later)."""

    _method = "the bottleneck adapter"


class PrefixTuningConfig(_NotBuilt):
    """Prefix tuning (Li and Liang 2021)."""

    _method = "prefix tuning"


class PromptTuningConfig(_NotBuilt):
    """Prompt tuning (Lester et al. 2021)."""

    _method = "prompt tuning"


_CONFIG_CLASSES: dict[PeftType, type[PeftConfig]] = {
    PeftType.LORA: LoraConfig,
    PeftType.ADALORA: AdaLoraConfig,
    PeftType.IA3: IA3Config,
    PeftType.BOTTLENECK: BottleneckConfig,
    PeftType.PREFIX_TUNING: PrefixTuningConfig,
    PeftType.PROMPT_TUNING: PromptTuningConfig,
}


def local_folder(path: str | os.PathLike, subfolder: str | None, hf_options: dict[str, Any]) -> Path:
    """The folder of an adapter; TypeError for options that HF PEFT's loading functions do not have."""
    unknown = sorted(set(hf_options) - _PASSED_OVER)
    if unknown:
        raise TypeError(f"options that pyfused does not have: {', '.join(unknown)}")
    return Path(path, subfolder or "")


def _class_for(peft_type: Any, file: Path) -> type[PeftConfig]:
    known = [member.value for member in _CONFIG_CLASSES]
    if peft_type not in known:
        raise ValueError(f"{file}: peft_type must be one of {', '.join(known)}, got {peft_type!r}")
    return _CONFIG_CLASSES[PeftType(peft_type)]


def _known_fields(config_class: type[PeftConfig], values: dict[str, Any], file: Path) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(config_class)}
    unknown = {name: value for name, value in values.items() if name not in names}
    if unknown and not issubclass(config_class, _NotBuilt):
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


def _member(kind: type[enum.Enum], name: str, value: Any) -> Any:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ValueError(f"{name} must be one of {names}, got {value!r}") from None


def _strings(name: str, values: Any) -> list[str]:
    if isinstance(values, str) or not isinstance(values, (list, set, tuple)):
        raise TypeError(f"{name} must be a list of strings, got {values!r}")
    for value in values:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a list of strings, got {value!r} in it")
    return list(values)


def _names_or_pattern(name: str, value: Any) -> set[str] | str | None:
    if value is None:
        return None
    if isinstance(value, str):
        if value.lower() != "all-linear":
            _check_regex(name, value)
        return value
    return set(_strings(name, value))


def _check_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is no valid regular expression ({error})") from None
