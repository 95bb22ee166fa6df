"""Configurations. Field names, defaults and the file ``adapter_config.json`` are HF PEFT's (0.21.2)."""

from .base import CONFIG_NAME, PEFT_VERSION, NotBuiltConfig, PeftConfig, PeftType, TaskType, local_folder
from .bottleneck import BottleneckConfig
from .lora import LoraConfig

__all__ = [
    "CONFIG_NAME",
    "PEFT_VERSION",
    "AdaLoraConfig",
    "BottleneckConfig",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "TaskType",
    "local_folder",
]


class AdaLoraConfig(NotBuiltConfig, method=PeftType.ADALORA):
    """AdaLoRA (Zhang et al. 2023)."""

    _name = "AdaLoRA"


class IA3Config(NotBuiltConfig, method=PeftType.IA3):
    """IA3 (Liu et al. 2022)."""

    _name = "IA3"


class PrefixTuningConfig(NotBuiltConfig, method=PeftType.PREFIX_TUNING):
    """Prefix tuning (Li and Liang 2021)."""

    _name = "prefix tuning"


class PromptTuningConfig(NotBuiltConfig, method=PeftType.PROMPT_TUNING):
    """Prompt tuning (Lester et al. 2021)."""

    _name = "prompt tuning"
