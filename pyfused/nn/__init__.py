"""Modules around a frozen layer: they own parameters and configuration, the arithmetic is :mod:`pyfused.ops`."""

from .adapter import AdapterLayer
from .bottleneck import Bottleneck
from .bottleneck_layer import BottleneckLayer, BottleneckOutput
from .lora import LoraLinear
from .modules_to_save import ModulesToSaveWrapper

__all__ = ["AdapterLayer", "Bottleneck", "BottleneckLayer", "BottleneckOutput", "LoraLinear", "ModulesToSaveWrapper"]
