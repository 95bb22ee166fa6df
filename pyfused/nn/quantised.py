"""Linear layers whose weight bitsandbytes or torchao holds in fewer bits: which they are, and the weight's values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import has_only_forward, own_parameters


def is_quantised(weight: Tensor) -> bool:
    """True for a weight of bitsandbytes, 4 or 8 bits, or of torchao.

    Known without importing either: bitsandbytes' by what it holds, since a pickle brings it back as a plain parameter.
    """
    if _has_4_bits(weight) or _has_8_bits(weight):
        return True
    return type(weight) not in (nn.Parameter, Tensor) and type(weight).__module__.startswith("torchao.")


def _has_4_bits(weight: Tensor) -> bool:
    return hasattr(weight, "quant_state")


def _has_8_bits(weight: Tensor) -> bool:
    return hasattr(weight, "SCB")


def is_quantised_linear(module: nn.Module) -> bool:
    """True where calling ``module`` multiplies by a quantised weight, and does nothing else that is known of here."""
    return isinstance(module, nn.Linear) and has_only_forward(module) and is_quantised(module.weight)


@torch.no_grad()
def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as a plain tensor: a quantised one dequantised, which is a copy ``[N, K]``, others as is.

    4-bit weights have the dtype that they were quantised from, 8-bit ones of bitsandbytes float32.
    """
    weight = module.weight
    if not is_quantised(weight):
        return own_parameters(module)["weight"] if weight.is_meta else weight
    if _has_4_bits(weight):
        return _from_4_bits(weight)
    if _has_8_bits(weight):
        return _from_8_bits(weight, module.state.SCB)
    return weight.dequantize()


def _from_8_bits(weight: Tensor, scale: Tensor | None) -> Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    # The scale is on the weight until the layer is called for the first time, in the layer's state from then on.
    scale = weight.SCB if scale is None else scale
    return weight.data if scale is None else int8_vectorwise_dequant(weight.data, scale.to(weight.device))


def _from_4_bits(weight: Tensor) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state
    if state is None:  # not quantised yet, which moving it to a device does
        return weight.data
    if not getattr(state, "packing_format_for_cpu", False):
        return dequantize_4bit(weight.data, state)
    # Layers on a CPU with AVX512-BF16 bring their weight into another order when they first evaluate: for 32 rows
    # [n] and each pair of columns [k] 32 bytes, where rows 0 to 15 are the low halves and rows 16 to 31 the high ones.
    n, k = state.shape
    packed = weight.data.view(torch.uint8).reshape(n // 32, k // 2, 32)
    codes = torch.cat([packed & 0xF, packed >> 4], -1).view(n // 32, k // 2, 32, 2).transpose(1, 2).reshape(n, k)
    scale = state.absmax.t().float().repeat_interleave(state.blocksize, 1)  # [N, K / blocksize] -> [N, K]
    return (state.code.to(weight.device)[codes.int()] * scale).to(getattr(state, "original_dtype", state.dtype))
