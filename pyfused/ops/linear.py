"""The frozen layer alone, in inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import _library
from .common import autocasts

# Rows up to which the op may be faster than F.linear; it has its bits for any number.
_FEW_ROWS = 32
_HAS_TILES = _library._C.cpu_capability() == "AMX"

_raw = torch.ops.pyfused._linear.default


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(x, weight, bias)`` where no gradient is recorded; same bits. A few rows of bf16 on a CPU with AMX go
    through a product of our own, which reads the weight once where the vendor's copies it first.
    """
    if (
        _HAS_TILES
        and x.dtype is torch.bfloat16
        and type(x) is Tensor
        and x.is_cpu
        and 0 < x.numel() <= _FEW_ROWS * x.shape[-1]
        and not autocasts(x)
    ):
        return _raw(x, weight, bias)
    return linear(x, weight, bias)


@torch.library.register_fake("pyfused::_linear")
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])
