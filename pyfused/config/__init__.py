"""Configurations. Field names, defaults and the file ``adapter_config.json`` are HF PEFT's (0.21.2)."""

from .base import CONFIG_NAME, PEFT_VERSION, NotBuiltConfig, PeftConfig, PeftType, TaskType, local_folder
from .bottleneck import BottleneckConfig
from .ia3 import IA3Config
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


class PrefixTuningConfig(NotBuiltConfig, method=PeftType.PREFIX_TUNING):
    """Prefix tuning (Li and Liang 2021)."""

    _name = "prefix tuning"


class PromptTuningConfig(NotBuiltConfig, method=PeftType.PROMPT_TUNING):
    """Prompt tuning (Lester et al. 2021)."""

    _name = "prompt tuning"
