"""The methods: one object each, which says what a configuration makes of which layers. Everything else is common."""

from __future__ import annotations

from ..config import PeftConfig, PeftType
from .adalora import AdaLora
from .base import FILE_PREFIX, Method, Target
from .bottleneck import BottleneckMethod
from .ia3 import IA3
from .lora import Lora
from .prefix import PrefixTuning
from .prompt import PromptTuning
from .prompt_learning import PromptLearningMethod

__all__ = ["FILE_PREFIX", "METHODS", "Method", "PromptLearningMethod", "Target", "method_of"]

METHODS: dict[PeftType, Method] = {
    PeftType.LORA: Lora(),
    PeftType.ADALORA: AdaLora(),
    PeftType.IA3: IA3(),
    PeftType.BOTTLENECK: BottleneckMethod(),
    PeftType.PREFIX_TUNING: PrefixTuning(),
    PeftType.PROMPT_TUNING: PromptTuning(),
}


def method_of(config: PeftConfig) -> Method:
    """The method of a configuration; TypeError for what is no configuration of pyfused."""
    if not isinstance(config, PeftConfig) or config.peft_type not in METHODS:
        kind = type(config)
        built = " or ".join(f"pyfused.{PeftConfig.class_of(method).__name__}" for method in METHODS)
        raise TypeError(f"config must be a {built}, got {kind.__module__}.{kind.__qualname__}")
    return METHODS[config.peft_type]
