"""The tuner layers that ``fuse`` makes out of HF PEFT's. Importing this file imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.ia3.layer import Conv2d as IA3Conv2d
from peft.tuners.ia3.layer import Conv3d as IA3Conv3d
from peft.tuners.ia3.layer import IA3Layer
from peft.tuners.ia3.layer import Linear as IA3Linear
from peft.tuners.lora.layer import Embedding, Linear
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn

from .. import ops
from ..nn.base import is_plain_linear
from ..nn.dora import DoraMagnitude
from ..nn.lora_embedding import gather_options
from ..nn.shared_input import Arguments, SharedInput, rejoin
from .hf_peft_adapters import (
    FUSED_CLASSES,
    FusedForms,
    adapter_obstacle,
    add_adapter,
    dropout_obstacle,
    fits,
    is_plain,
    keeps_pefts_forward,
    stands_for,
    weights_for,
)
from .hf_peft_by_row import FusedByRow


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
            y = None if args or kwargs else self._forward_of_forms(x)
            return super().forward(x, *args, **kwargs) if y is None else y
        base = self._modules["base_layer"]
        weights = weights_for(base, x)
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
            y = add_adapter(y, x, adapter)
        return y

    def fused_arguments(self, x: Tensor) -> Arguments | None:
        """What ``ops.lora_linear`` takes between x and the seed, where that call is all that ``forward(x)`` is."""
        adapters, weights = self._adapters_to_fuse(x), weights_for(self._modules["base_layer"], x)
        if not adapters or len(adapters) > 1 or weights is None:
            return None
        return (*weights, *adapters[0])

    def _adapters_to_fuse(self, x: Tensor) -> list[tuple] | None:
        """``(a, b, scale, dropout_p, training)`` per active adapter; None where one of them needs PEFT's forward."""
        if keeps_pefts_forward(self, x):
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
            if not (fits(a, x) and fits(b, x)):
                return None
            dropout, scale = dropouts[name], self.scaling[name]
            if isinstance(scale, Tensor):  # a scalar tensor, where peft's hotswap wants no recompilation
                scale = scale.expand(a.shape[0])
            p = dropout.p if type(dropout) is nn.Dropout else 0.0
            adapters.append((a, b, scale, p, dropout.training))
        return adapters

    def _forward_of_forms(self, x: Tensor) -> Tensor | None:
        """``forward(x)`` where an adapter is more than A and B; None where PEFT's forward has to run."""
        return None


@stands_for(Linear)
class FusedLinear(FusedByRow, FusedForms, FusedForward, Linear):
    """HF PEFT's LoRA layer on pyfused's ops."""


@stands_for(Embedding)
class FusedEmbedding(Embedding):
    """HF PEFT's LoRA layer around an embedding with another ``forward``, see :class:`FusedForward`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``base(x) + scaling * A^T[x] B^T`` for each active adapter in turn; DoRA's factor on all of it.

        Args:
            x: integers ``[...]``.
            *args, **kwargs: what PEFT's forward takes besides, which is then the one that runs.

        Returns:
            ``[..., embedding_dim]`` in the dtype of the base layer's output.
        """
        names = [name for name in self.active_adapters if name in self.lora_embedding_A]
        runs = not (args or kwargs or self._disable_adapters or self.merged_adapters)
        if not runs or not all(self._is_fused(name, x) for name in names):
            return super().forward(x, *args, **kwargs)
        base = self._modules["base_layer"]
        y = base(x)
        for name in names:
            a, b, scale = self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name]
            y = ops.lora_embedding(y, x, a, b, scale, **gather_options(base))
            if name in self.lora_variant:
                magnitude = self.lora_magnitude_vector[name].weight
                y = ops.ia3_scale(y, DoraMagnitude.factor_of(magnitude, base.weight.t(), a, b, scale))
        return y

    def _is_fused(self, name: str, x: Tensor) -> bool:
        variant = self.lora_variant.get(name)
        return (
            (variant is None or type(variant) is DoraEmbeddingVariant)
            and not (self.input_fns.get(name) or self.output_fns.get(name))
            and not isinstance(self.scaling[name], Tensor)
            and (type(x) is Tensor and x.dtype in (torch.int64, torch.int32))
            and not torch._C._are_functorch_transforms_active()
        )


class FusedVectors:
    """For HF PEFT's IA3 layers: the vectors of the active adapters."""

    _dim = -1  # of x, the one that has the features

    def _scale_to_fuse(self, x: Tensor) -> Tensor | None:
        """The product of the active vectors ``[features]``; None where PEFT's forward has to run."""
        if self._disable_adapters or self.merged_adapters or not is_plain(x, self.in_features, self._dim):
            return None
        names = self._active_adapter
        vectors = self._modules["ia3_l"]._parameters
        scale = None
        for name in (names,) if isinstance(names, str) else names:
            if name not in vectors:
                continue
            vector = vectors[name]
            if not fits(vector, x):
                return None
            vector = vector.view(-1)
            scale = vector if scale is None else scale * vector
        return scale


class FusedIA3(FusedVectors):
    """For HF PEFT's IA3 layers on linear layers: another ``forward``, see :class:`FusedForward`."""

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
        weights = weights_for(base, x) if is_plain_linear(base) else None
        if weights is not None:
            return ops.ia3_linear(x, *weights, scale, "input" if self.is_feedforward else "output")
        if self.is_feedforward:
            return base(ops.ia3_scale(x, scale))
        return ops.ia3_scale(base(x), scale)


class FusedIA3Conv(FusedVectors):
    """For HF PEFT's IA3 layers on convolutions: another ``forward``, see :class:`FusedForward`."""

    @property
    def _dim(self) -> int:
        return 1 - self._kernel_dim

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As of :class:`FusedIA3`; the convolution is called.

        Args:
            x: ``[samples, in_channels, *spatial]``; without samples PEFT's forward runs, which makes a batch of it.
            *args, **kwargs: what PEFT's forward takes besides, which is then the one that runs.

        Returns:
            ``[samples, out_channels, *spatial]`` in x's dtype, as PEFT's.
        """
        base = self._modules["base_layer"]
        # PEFT casts what goes into a feed-forward layer to the weight's dtype.
        same = x.dtype == self.get_base_layer().weight.dtype and x.dim() == self._kernel_dim
        scale = self._scale_to_fuse(x) if same and not (args or kwargs) else None
        if scale is None:
            return super().forward(x, *args, **kwargs)
        if self.is_feedforward:
            return base(ops.ia3_scale(x, scale, self._dim)).to(x.dtype)
        return ops.ia3_scale(base(x).to(x.dtype), scale, self._dim)


@stands_for(IA3Linear)
class FusedIA3Linear(FusedIA3, IA3Linear):
    """HF PEFT's IA3 layer on pyfused's ops."""


@stands_for(IA3Conv2d)
class FusedIA3Conv2d(FusedIA3Conv, IA3Conv2d):
    """HF PEFT's IA3 layer on pyfused's ops."""


@stands_for(IA3Conv3d)
class FusedIA3Conv3d(FusedIA3Conv, IA3Conv3d):
    """HF PEFT's IA3 layer on pyfused's ops."""


def adapter_obstacles(layer: nn.Module) -> list[str | None]:
    """For each adapter of a layer, why PEFT's forward runs while it is active; None where a fused one does."""
    if isinstance(layer, IA3Layer):
        return []
    if isinstance(layer, Embedding):
        others = {name: type(variant) for name, variant in layer.lora_variant.items()}
        return [
            None if others.get(name, DoraEmbeddingVariant) is DoraEmbeddingVariant else f"adapter {name!r} is a variant"
            for name in layer.lora_embedding_A
        ]
    if isinstance(layer, AdaLoraLayer):
        return [dropout_obstacle(name, layer.lora_dropout[name]) for name in layer.lora_A.keys()]
    forms = issubclass(FUSED_CLASSES.get(type(layer), type(layer)), FusedForms)
    return [adapter_obstacle(layer, name, forms) for name in layer.lora_A]
