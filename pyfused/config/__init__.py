"""Configurations. Field names, defaults and the file ``adapter_config.json`` are HF PEFT's (0.21.2)."""

from .adalora import AdaLoraConfig
from .base import CONFIG_NAME, PEFT_VERSION, PeftConfig, PeftType, TaskType, get_peft_config, local_folder
from .bottleneck import BottleneckConfig
from .ia3 import IA3Config
from .lora import LoraConfig
from .prefix import PrefixTuningConfig
from .prompt import PromptEncoderConfig, PromptLearningConfig, PromptTuningConfig, PromptTuningInit

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
    "PromptEncoderConfig",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "get_peft_config",
    "local_folder",
]
