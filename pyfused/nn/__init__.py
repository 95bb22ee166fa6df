"""Modules around a frozen layer: they own parameters and configuration, the arithmetic is :mod:`pyfused.ops`."""

from .adalora import AdaLoraLinear
from .adapter import AdapterLayer
from .bottleneck import Bottleneck
from .bottleneck_layer import BottleneckLayer, BottleneckOutput
from .ia3 import IA3Layer, IA3Linear
from .lora import LoraLinear
from .lora_conv import LoraConv
from .lora_conv1d import LoraConv1D
from .lora_embedding import LoraEmbedding
from .modules_to_save import ModulesToSaveWrapper
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding
from .prompt_encoders import PromptEncoders

__all__ = [
    "AdaLoraLinear",
    "AdapterLayer",
    "Bottleneck",
    "BottleneckLayer",
    "BottleneckOutput",
    "IA3Layer",
    "IA3Linear",
    "LoraConv",
    "LoraConv1D",
    "LoraEmbedding",
    "LoraLinear",
    "ModulesToSaveWrapper",
    "PrefixEncoder",
    "PromptEmbedding",
    "PromptEncoders",
]
