"""Which of HF PEFT's adapters are computed by pyfused's ops, and how those that are more than A and B are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from .. import ops
from ..nn.base import has_only_forward, is_plain_linear, plain_weights
from ..nn.dora import DoraMagnitude, dora_linear
from ..nn.quantised import dense_weight, is_quantised_linear

# HF PEFT's classes, and what `fuse` makes of their objects.
FUSED_CLASSES: dict[type, type] = {}

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def stands_for(kind: type) -> Callable[[type], type]:
    """A class decorator: ``fuse`` makes the class of objects of HF PEFT's class ``kind``.

    It has that class's name, since ``repr`` of a model and messages show it, and PEFT looks at it; pickles go by the
    qualified name, which stays.
    """

    def register(fused: type) -> type:
        fused.__name__ = kind.__name__
        FUSED_CLASSES[kind] = fused
        return fused

    return register


def adapter_obstacle(layer: Linear, name: str, forms: bool = False) -> str | None:
    """Why adapter ``name`` is more than ``lora_B(lora_A(dropout(x))) * scaling``; None where it is just that.

    Args:
        forms: None also where it is DoRA, or has a bias on ``lora_B``.
    """
    dora = name in layer.lora_variant
    if dora and not (forms and type(layer.lora_variant[name]) is DoraLinearVariant):
        variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
        return f"adapter {name!r} is the LoRA variant {variant}"
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if not is_plain_linear(a) or not is_plain_linear(b):
        return f"lora_A or lora_B of adapter {name!r} is no plain nn.Linear or has hooks"
    if a._parameters["bias"] is not None or (b._parameters["bias"] is not None and not forms):
        return f"adapter {name!r} has a bias (lora_bias)"
    dropout = modules["lora_dropout"]._modules[name]
    obstacle = dropout_obstacle(name, dropout)
    return _dora_obstacle(layer, name, dropout) if dora and obstacle is None else obstacle


def dropout_obstacle(name: str, dropout: nn.Module) -> str | None:
    """Why adapter ``name``'s dropout has to be called; None where it drops as the ops do, or not at all."""
    if not has_only_forward(dropout):
        return f"the dropout of adapter {name!r} has hooks"
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.inplace or dropout.p >= 1.0):
        return f"the dropout of adapter {name!r} is {dropout!r}"
    return None


def _dora_obstacle(layer: Linear, name: str, dropout: nn.Module) -> str | None:
    if plain_weights(layer.base_layer) is None and not is_quantised_linear(layer.base_layer):
        return f"adapter {name!r} is DoRA and its base layer has to be called"
    if layer.ephemeral_gpu_offload or isinstance(layer.scaling[name], Tensor):
        return f"adapter {name!r} is DoRA with ephemeral_gpu_offload or prepared for hotswapping"
    if not has_only_forward(layer.lora_magnitude_vector[name]) or dropout.training is not layer.training:
        return f"adapter {name!r} is DoRA with hooks, or with dropout in another mode than its layer"
    return None


def is_plain(x: Tensor, features: int, dim: int = -1) -> bool:
    """False for tensor subclasses (DTensor), nested and sparse tensors, and inside ``torch.func`` transforms.

    And where x's size in ``dim`` (negative) is not ``features``, which the base layer says in its own words.
    """
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.layout is torch.strided
        and not x.is_nested
        and x.dtype in _FLOAT_DTYPES
        and x.dim() >= -dim
        and x.shape[dim] == features
        and not torch._C._are_functorch_transforms_active()
    )


def keeps_pefts_forward(layer: Linear, x: Tensor) -> bool:
    """Whether a LoRA or AdaLoRA layer's state, or x, is nothing for the ops."""
    off = layer._disable_adapters or layer.merged_adapters or not layer.cast_input_dtype_enabled
    return off or not is_plain(x, layer.in_features)


def weights_for(base: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """``plain_weights(base)``; None as well where the base layer would refuse x's dtype, which it says itself."""
    weights = plain_weights(base)
    if weights is None or x.dtype == weights[0].dtype or torch.is_autocast_enabled(x.device.type):
        return weights
    return None


def fits(parameter: Tensor, x: Tensor) -> bool:
    dtype = parameter.dtype
    return dtype in _FLOAT_DTYPES and (dtype != torch.float64 or x.dtype == torch.float64)


def add_adapter(y: Tensor, x: Tensor, adapter: tuple) -> Tensor:
    if x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type):
        return ops.lora_delta(y, x, *adapter)
    # A base that returns another dtype than it is given: compute in the wider of the two, so that neither loses bits.
    wide = torch.promote_types(x.dtype, y.dtype)
    return ops.lora_delta(y.to(wide), x.to(wide), *adapter).to(y.dtype)


class FusedForms:
    """For a linear layer of HF PEFT's: its forward where an active adapter is DoRA or has a bias on ``lora_B``."""

    def _forward_of_forms(self, x: Tensor) -> Tensor | None:
        """``forward(x)``; None where PEFT's has to run."""
        if keeps_pefts_forward(self, x):
            return None
        names = [name for name in self.active_adapters if name in self.lora_A]
        for name in names:
            if adapter_obstacle(self, name, forms=True) is not None:
                return None
            if not all(fits(matrix, x) for matrix in self.matrices(name)):
                return None
        base, y = self._modules["base_layer"], None
        weights = weights_for(base, x)
        for name in names:
            if y is None and weights is None:
                y = base(x)
            if name in self.lora_variant:
                y = dora_linear(self, x if y is None else x.to(y.dtype), name, y)
                continue
            dropout, extra, scale = self.lora_dropout[name], self.lora_B[name].bias, self.scaling[name]
            extra = None if extra is None else extra * scale
            if isinstance(scale, Tensor):
                scale = scale.expand(self.lora_A[name].weight.shape[0])
            adapter = (*self.matrices(name), scale, getattr(dropout, "p", 0.0), dropout.training)
            if y is None:
                weight, bias = weights
                if extra is not None:
                    bias = (extra if bias is None else bias + extra).to(weight.dtype)
                y = ops.lora_linear(x, weight, bias, *adapter)
                continue
            y = add_adapter(y, x, adapter)
            y = y if extra is None else y + extra.to(y.dtype)
        return y

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def dora_weight(self) -> Tensor:
        """As of :class:`pyfused.nn.lora_layer.LoraLayer`."""
        weights = plain_weights(self.base_layer)
        return dense_weight(self.base_layer) if weights is None else weights[0]

    def dora_factor(self, adapter_name: str, weight: Tensor | None = None) -> Tensor:
        """As of :class:`pyfused.nn.lora_layer.LoraLayer`; nothing is remembered, since PEFT merges behind autograd."""
        weight = self.dora_weight() if weight is None else weight
        magnitude = self.lora_magnitude_vector[adapter_name].weight
        return DoraMagnitude.factor_of(magnitude, weight, *self.matrices(adapter_name), self.scaling[adapter_name])
