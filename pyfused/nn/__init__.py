"""Modules around a frozen layer: they own parameters and configuration, the arithmetic is :mod:`pyfused.ops`."""

from .adapter import AdapterLayer
from .lora import LoraLinear
from .modules_to_save import ModulesToSaveWrapper

__all__ = ["AdapterLayer", "LoraLinear", "ModulesToSaveWrapper"]
