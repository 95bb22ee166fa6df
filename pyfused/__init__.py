"""Fused kernels for parameter-efficient fine-tuning in PyTorch."""

from . import nn, ops
from ._info import build_info
from ._library import _C
from .auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .checkpoint import get_peft_model_state_dict, set_peft_model_state_dict
from .config import (
    AdaLoraConfig,
    BottleneckConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
)
from .hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from .integrations.hf_peft import fuse, unfuse
from .model import PeftModel, get_peft_model
from .pool import AdapterPool
from .prepare import prepare_model_for_kbit_training
from .residents import PoolStats
from .status import get_layer_status, get_model_status

# HF PEFT has a class for each task; here one does for all, and these names are for code that imports them.
PeftModelForCausalLM = PeftModelForSeq2SeqLM = PeftModelForFeatureExtraction = PeftModel
PeftModelForSequenceClassification = PeftModelForTokenClassification = PeftModelForQuestionAnswering = PeftModel

__version__: str = _C.build_info()["version"]

__all__ = [
    "AdaLoraConfig",
    "AdapterPool",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BottleneckConfig",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PoolStats",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "__version__",
    "build_info",
    "fuse",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "nn",
    "ops",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
    "unfuse",
]
