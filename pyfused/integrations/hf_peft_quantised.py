"""The tuner layers that ``fuse`` makes out of HF PEFT's for quantised bases: the base is called, the adapter fused.

Importing this file imports peft, which has the classes for bitsandbytes only where that is installed.
"""

from __future__ import annotations

from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.torchao import TorchaoLoraLinear

from .hf_peft_layer import FUSED_CLASSES, FusedForward


class FusedTorchaoLoraLinear(FusedForward, TorchaoLoraLinear):
    """HF PEFT's LoRA layer around a linear layer with torchao's weights."""


FUSED_CLASSES[TorchaoLoraLinear] = FusedTorchaoLoraLinear

# The file cannot be imported without bitsandbytes.
if is_bnb_available():
    from peft.tuners.lora import bnb

    class FusedLinear8bitLt(FusedForward, bnb.Linear8bitLt):
        """HF PEFT's LoRA layer around bitsandbytes' 8-bit layer."""

    FUSED_CLASSES[bnb.Linear8bitLt] = FusedLinear8bitLt

if is_bnb_4bit_available():

    class FusedLinear4bit(FusedForward, bnb.Linear4bit):
        """HF PEFT's LoRA layer around bitsandbytes' 4-bit layer."""

    FUSED_CLASSES[bnb.Linear4bit] = FusedLinear4bit
