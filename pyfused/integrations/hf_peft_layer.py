"""The tuner layers that ``fuse`` makes out of HF PEFT's. Importing this file imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from .. import ops
from ..nn.base import has_only_forward, is_plain_linear, plain_weights
from ..nn.shared_input import Arguments, SharedInput, rejoin

_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class FusedForward:
    """Another ``forward`` for HF PEFT's LoRA layers, whatever their base: a layer changes sides by its ``__class__``.

    All that it adds is ``_shared_input``, where ``fuse`` found neighbours that may read the same x.

    A class instead of a ``forward`` set on the instance: copies, pickles and ``isinstance`` checks stay right. PEFT
    finds linear layers by the word "Linear" in the name of the class.
    """

    _shared_input: SharedInput | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rejoin(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``y = base(x)``, then ``y = y + scaling * lora_B(lora_A(dropout(x)))`` for each active adapter in turn.

        Whatever decides between the fused ops and PEFT's own forward may change from one call to the next (active
        adapters, merging, hooks, ``adapter_names=``), so it is looked up at each of them.

        Args:
            x: ``[..., in_features]``; never cast as a whole to the adapter's dtype.
            *args, **kwargs: what PEFT's forward takes besides, which is then the one that runs.

        Returns:
            ``[..., out_features]`` in the dtype of the base layer's output.
        """
        adapters = None if args or kwargs else self._adapters_to_fuse(x)
        if not adapters:
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        weights = plain_weights(base)
        if weights is not None:
            first = (*weights, *adapters[0])
            shared = self._shared_input
            if shared is not None and len(adapters) == 1 and not torch.compiler.is_compiling():
                return shared.linear(self, x, first)
            y = ops.lora_linear(x, *first)
            adapters = adapters[1:]
        else:
            y = base(x)
        for adapter in adapters:
            y = _add_adapter(y, x, adapter)
        return y

    def fused_arguments(self, x: Tensor) -> Arguments | None:
        """What ``ops.lora_linear`` takes between x and the seed, where that call is all that ``forward(x)`` is."""
        adapters, weights = self._adapters_to_fuse(x), plain_weights(self._modules["base_layer"])
        if not adapters or len(adapters) > 1 or weights is None:
            return None
        return (*weights, *adapters[0])

    def _adapters_to_fuse(self, x: Tensor) -> list[tuple] | None:
        """``(a, b, scale, dropout_p, training)`` per active adapter; None where one of them needs PEFT's forward."""
        if self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled or not _is_plain(x):
            return None
        names = self._active_adapter
        if isinstance(names, str):
            names = (names,)
        modules = self._modules  # read directly: nn.Module's own attribute lookup costs more than all the checks here
        lora_a, lora_b = modules["lora_A"]._modules, modules["lora_B"]._modules
        dropouts = modules["lora_dropout"]._modules
        adapters = []
        for name in names:
            if name not in lora_a:
                continue
            if adapter_obstacle(self, name) is not None:
                return None
            a, b = lora_a[name]._parameters["weight"], lora_b[name]._parameters["weight"]
            if not (_fits(a, x) and _fits(b, x)):
                return None
            dropout, scale = dropouts[name], self.scaling[name]
            if isinstance(scale, Tensor):  # a scalar tensor, where peft's hotswap wants no recompilation
                scale = scale.expand(a.shape[0])
            p = dropout.p if type(dropout) is nn.Dropout else 0.0
            adapters.append((a, b, scale, p, dropout.training))
        return adapters


class FusedLinear(FusedForward, Linear):
    """HF PEFT's LoRA layer on pyfused's ops."""


class FusedIA3Linear(IA3Linear):
    """HF PEFT's IA3 layer with another ``forward``, see :class:`FusedForward`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``base(x) * l``, or ``base(x * l)`` on feed-forward layers, with the product of the active vectors.

        Args:
            x: ``[..., in_features]``; never cast to the vector's dtype.
            *args, **kwargs: what PEFT's forward takes besides, which is then the one that runs.

        Returns:
            ``[..., out_features]`` in the dtype of the base layer's output.
        """
        scale = None if args or kwargs else self._scale_to_fuse(x)
        if scale is None:
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        if is_plain_linear(base):
            parameters = base._parameters
            side = "input" if self.is_feedforward else "output"
            return ops.ia3_linear(x, parameters["weight"], parameters["bias"], scale, side)
        if self.is_feedforward:
            return base(ops.ia3_scale(x, scale))
        return ops.ia3_scale(base(x), scale)

    def _scale_to_fuse(self, x: Tensor) -> Tensor | None:
        """The product of the active vectors ``[features]``; None where PEFT's forward has to run."""
        if self._disable_adapters or self.merged_adapters or not _is_plain(x):
            return None
        names = self._active_adapter
        vectors = self._modules["ia3_l"]._parameters
        scale = None
        for name in (names,) if isinstance(names, str) else names:
            if name not in vectors:
                continue
            vector = vectors[name]
            if not _fits(vector, x):
                return None
            vector = vector.view(-1)
            scale = vector if scale is None else scale * vector
        return scale


# HF PEFT's classes, and what `fuse` makes of their objects; those for quantised bases join them.
FUSED_CLASSES = {Linear: FusedLinear, IA3Linear: FusedIA3Linear}


def adapter_obstacle(layer: Linear, name: str) -> str | None:
    """Why adapter ``name`` is more than ``lora_B(lora_A(dropout(x))) * scaling``; None where it is just that."""
    if name in layer.lora_variant:
        variant = type(layer.lora_variant[name]).__name__.removesuffix("LinearVariant")
        return f"adapter {name!r} is the LoRA variant {variant}"
    modules = layer._modules
    a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
    if not is_plain_linear(a) or not is_plain_linear(b):
        return f"lora_A or lora_B of adapter {name!r} is no plain nn.Linear or has hooks"
    if a._parameters["bias"] is not None or b._parameters["bias"] is not None:
        return f"adapter {name!r} has a bias (lora_bias)"
    dropout = modules["lora_dropout"]._modules[name]
    if not has_only_forward(dropout):
        return f"the dropout of adapter {name!r} has hooks"
    if type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.inplace and dropout.p < 1.0):
        return None
    return f"the dropout of adapter {name!r} is {dropout!r}"


def _add_adapter(y: Tensor, x: Tensor, adapter: tuple) -> Tensor:
    if x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type):
        return ops.lora_delta(y, x, *adapter)
    # A base that returns another dtype than it is given: compute in the wider of the two, so that neither loses bits.
    wide = torch.promote_types(x.dtype, y.dtype)
    return ops.lora_delta(y.to(wide), x.to(wide), *adapter).to(y.dtype)


def _is_plain(x: Tensor) -> bool:
    """False for tensor subclasses (DTensor), nested and sparse tensors, and inside ``torch.func`` transforms."""
    return (
        (type(x) is Tensor or type(x) is nn.Parameter)
        and x.layout is torch.strided
        and not x.is_nested
        and x.dtype in _FLOAT_DTYPES
        and not torch._C._are_functorch_transforms_active()
    )


def _fits(parameter: Tensor, x: Tensor) -> bool:
    dtype = parameter.dtype
    return dtype in _FLOAT_DTYPES and (dtype != torch.float64 or x.dtype == torch.float64)
