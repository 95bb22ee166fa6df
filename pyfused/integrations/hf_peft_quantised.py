"""The tuner layers that ``fuse`` makes out of HF PEFT's for quantised bases: the base is called, the adapter fused.

Importing this file imports peft, which has the classes for bitsandbytes only where that is installed. AdaLoRA and IA3
on torchao's weights need none of their own, in PEFT as here.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available, is_bnb_available
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor

from .hf_peft_adalora import FusedSVD
from .hf_peft_adapters import FusedForms, stands_for
from .hf_peft_by_row import FusedByRow
from .hf_peft_layer import FusedForward, FusedIA3


class _FusedLora(FusedByRow, FusedForms, FusedForward):
    """For HF PEFT's LoRA layers around quantised ones."""


class _FusedIA3(FusedIA3):
    """For HF PEFT's IA3 layers around those of bitsandbytes, which compute in float32 and give that."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not (self._disable_adapters or args or kwargs or torch.is_autocast_enabled()):
            x = x.float()
        return super().forward(x, *args, **kwargs)


@stands_for(TorchaoLoraLinear)
class FusedTorchaoLoraLinear(_FusedLora, TorchaoLoraLinear):
    """HF PEFT's LoRA layer around a linear layer with torchao's weights."""


# The files cannot be imported without bitsandbytes.
if is_bnb_available():
    from peft.tuners.adalora.bnb import SVDLinear8bitLt
    from peft.tuners.ia3 import bnb as ia3_bnb
    from peft.tuners.lora import bnb as lora_bnb

    @stands_for(lora_bnb.Linear8bitLt)
    class FusedLinear8bitLt(_FusedLora, lora_bnb.Linear8bitLt):
        """HF PEFT's LoRA layer around bitsandbytes' 8-bit layer."""

    @stands_for(SVDLinear8bitLt)
    class FusedSVDLinear8bitLt(FusedSVD, SVDLinear8bitLt):
        """HF PEFT's AdaLoRA layer around bitsandbytes' 8-bit layer."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = super().forward(x, *args, **kwargs)
            # HF PEFT's output has the dtype of ranknum, by which it divides what it adds.
            names = () if self._disable_adapters else (name for name in self.active_adapters if name in self.ranknum)
            dtypes = (self.ranknum[name].dtype for name in names)
            return y.to(functools.reduce(torch.promote_types, dtypes, y.dtype))

    @stands_for(ia3_bnb.Linear8bitLt)
    class FusedIA3Linear8bitLt(_FusedIA3, ia3_bnb.Linear8bitLt):
        """HF PEFT's IA3 layer around bitsandbytes' 8-bit layer."""


if is_bnb_4bit_available():
    from peft.tuners.adalora.bnb import SVDLinear4bit

    @stands_for(lora_bnb.Linear4bit)
    class FusedLinear4bit(_FusedLora, lora_bnb.Linear4bit):
        """HF PEFT's LoRA layer around bitsandbytes' 4-bit layer."""

    @stands_for(SVDLinear4bit)
    class FusedSVDLinear4bit(FusedSVD, SVDLinear4bit):
        """HF PEFT's AdaLoRA layer around bitsandbytes' 4-bit layer."""

    @stands_for(ia3_bnb.Linear4bit)
    class FusedIA3Linear4bit(_FusedIA3, ia3_bnb.Linear4bit):
        """HF PEFT's IA3 layer around bitsandbytes' 4-bit layer."""
