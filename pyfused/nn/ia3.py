"""IA3 around a frozen layer. State dict, initial values and merging are those of HF PEFT's layers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import copier, is_conv1d, is_plain_linear, match_base, own_parameters
from .by_row import RowAdapters, rows_for
from .merging import MergeableLayer


class IA3Layer(MergeableLayer):
    r"""A frozen layer whose output, or input, is multiplied by learned vectors: :math:`y = base(x) \odot \prod_i l_i`.

    Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section
    3.3. With ``is_feedforward``, :math:`y = base(x \odot \prod_i l_i)`. The product goes over the active adapters. The
    layer is called as it is; :class:`IA3Linear` computes layer and vector in one op. State dict: ``base_layer.*`` and
    ``ia3_l.<name>``: for linear layers ``[out_features, 1]``, with ``is_feedforward`` ``[1, in_features]``; for
    convolutions ``[1, channels, 1, 1]`` (``[1, channels, 1, 1, 1]``) of the side that is scaled.

    Args:
        base_layer: ``nn.Linear`` or a subclass (quantised layers), ``nn.Conv2d``, ``nn.Conv3d``, or transformers'
            ``Conv1D``; frozen by this call.
        is_feedforward: scale the input, for the second layer of a feed-forward block; else the output, its bias
            included.
        init_ia3_weights: True: ones, so that the adapter starts as nothing. False: normal numbers.
        adapter_name: name of this first adapter, which is active.
        autocast_adapter_dtype: keep the vector of a 16-bit (or 8-bit floating) layer in float32; otherwise it has the
            layer's dtype. The activations keep their dtype in both cases.

    Raises:
        TypeError: ``base_layer`` is none of these, or an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    containers = ("ia3_l",)
    follows_rows = True
    place = 2

    def __init__(
        self,
        base_layer: nn.Module,
        is_feedforward: bool = False,
        init_ia3_weights: bool = True,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        features(base_layer)
        super().__init__(base_layer, adapter_name)
        self.in_features, self.out_features = features(base_layer)
        self.is_feedforward = is_feedforward
        self.ia3_l = nn.ParameterDict()
        self.add_adapter(adapter_name, is_feedforward, init_ia3_weights, autocast_adapter_dtype)
        base_layer.requires_grad_(False)
        self.train(base_layer.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer takes and gives, in the dtype of the base layer's output."""
        rows = rows_for(self) if self._looks_for_rows else None
        if rows is not None:
            return self._forward_by_row(rows, x, *args, **kwargs)
        if not self._in_forward:
            return self.base_layer(x, *args, **kwargs)
        if self.is_feedforward:
            return self.base_layer(ops.ia3_scale(x, self._scale().view(-1), self._dim), *args, **kwargs)
        return ops.ia3_scale(self.base_layer(x, *args, **kwargs), self._scale().view(-1), self._dim)

    @property
    def _dim(self) -> int:
        """The dimension of features: a convolution's channels come before its spatial dimensions."""
        base = self.get_base_layer()
        return 1 - base.weight.dim() if isinstance(base, _CONVOLUTIONS) else -1

    def _forward_by_row(self, rows: RowAdapters, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        vectors = self._modules["ia3_l"]._parameters
        if self._disabled or not any(name in vectors for name in rows.adapters):
            return self.base_layer(x, *args, **kwargs)
        if self.is_feedforward:
            return self.base_layer(self._scale_rows(rows, x), *args, **kwargs)
        return self._scale_rows(rows, self.base_layer(x, *args, **kwargs))

    def _scale_rows(self, rows: RowAdapters, x: Tensor) -> Tensor:
        """x ``[samples, ...]`` times each sample's vector; 1 where it has none, which leaves its bits."""
        vectors = own_parameters(self._modules["ia3_l"])
        ones = torch.ones_like(next(iter(vectors.values()))).view(-1)
        # Row by row, so that the sum of a vector's gradients has a fixed order.
        scale = torch.stack([vectors[name].view(-1) if name in vectors else ones for name in rows.names_of(x)])
        scale = scale.view(len(scale), *[1] * (x.dim() + self._dim - 1), -1, *[1] * (-self._dim - 1))
        return (x * scale).to(x.dtype)

    def _scale(self) -> Tensor:
        """The product of the active vectors, in their shape; read without nn.Module's slow attribute lookup."""
        vectors = own_parameters(self._modules["ia3_l"])
        scale = vectors[self._in_forward[0]]
        for name in self._in_forward[1:]:
            scale = scale * vectors[name]
        return scale

    # Adapters ---------------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        is_feedforward: bool | None = None,
        init_ia3_weights: bool = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; it is neither active nor trainable until :meth:`set_adapter`. Arguments as for the class.

        Raises:
            ValueError: the name is taken, or ``is_feedforward`` is not that of the layer's other adapters.
        """
        self._check_new(adapter_name)
        self._check_side(is_feedforward)
        if not isinstance(init_ia3_weights, bool):
            raise TypeError(f"init_ia3_weights must be True or False, got {init_ia3_weights!r}")
        # Drawn in any case, as in HF PEFT: what is drawn after it is the same in both.
        vector = torch.randn(vector_shape(self.get_base_layer(), self.is_feedforward))
        if init_ia3_weights:
            vector.fill_(1.0)
        vector = match_base(vector, self.get_base_layer(), autocast_adapter_dtype)
        self.ia3_l[adapter_name] = nn.Parameter(vector, requires_grad=adapter_name in self._active_adapters)
        self._update_forward()

    @torch.no_grad()
    def detached_adapter(
        self,
        tensors: Mapping[str, Tensor],
        *,
        autocast_adapter_dtype: bool = True,
        is_feedforward: bool | None = None,
        init_ia3_weights: bool = True,
    ) -> dict[str, Any]:
        self._check_side(is_feedforward)
        return {"ia3_l": copier(self.get_base_layer(), autocast_adapter_dtype)(tensors["ia3_l"])}

    def _check_side(self, is_feedforward: bool | None) -> None:
        if is_feedforward not in (None, self.is_feedforward):
            raise ValueError(f"is_feedforward must be {self.is_feedforward}, as for this layer's other adapters")

    def adapter_keys(self, adapter_name: str) -> dict[str, str]:
        return {"ia3_l": f"ia3_l.{adapter_name}"}

    # Merging ----------------------------------------------------------------------------------------------------------

    @property
    def _merged_names(self) -> tuple[str, ...]:
        return ("weight",) if self.is_feedforward or self.bias is None else ("weight", "bias")

    def _factors(self, adapter_name: str) -> dict[str, Tensor]:
        """What multiplies the base layer's tensors, in shapes that broadcast against them."""
        base, vector = self.get_base_layer(), self.ia3_l[adapter_name].detach()
        factors = {"bias": vector.reshape(-1)}
        if is_conv1d(base):
            factors["weight"] = vector.T
        elif isinstance(base, nn.Linear):
            factors["weight"] = vector
        elif not self.is_feedforward:
            factors["weight"] = vector.transpose(0, 1)
        else:  # an output channel of a group sees the group's input channels only
            groups = base.groups
            per_group = vector.view(groups, 1, -1, *vector.shape[2:])
            per_group = per_group.expand(-1, base.out_channels // groups, *per_group.shape[2:])
            factors["weight"] = per_group.flatten(0, 1)
        return {key: factors[key] for key in self._merged_names}

    def _merge_into(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        for key, factor in self._factors(adapter_name).items():
            tensors[key].mul_(factor)

    def _take_out(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        zeros = int((self.ia3_l[adapter_name] == 0).sum())
        if zeros:
            warnings.warn(
                f"Unmerge result can be inaccurate for (IA)^3: {zeros} elements of adapter {adapter_name!r} are 0, and "
                "the weights that they scaled stay 0",
                stacklevel=3,
            )
        for key, factor in self._factors(adapter_name).items():
            tensors[key].div_(factor.masked_fill(factor == 0, 1.0))


class IA3Linear(IA3Layer):
    """:class:`IA3Layer` around an ``nn.Linear`` or a subclass, in one fused op where the base is a plain ``nn.Linear``.

    Args, state dict and errors are those of :class:`IA3Layer`.
    """

    def __init__(self, linear: nn.Linear, *args: Any, **options: Any) -> None:
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"IA3Linear: linear must be an nn.Linear, got {type(linear).__name__}")
        super().__init__(linear, *args, **options)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]`` in the dtype of the base layer's output.

        One fused op where calling the base would do nothing but ``F.linear`` on plain tensors; else the base is called
        (with ``args`` and ``kwargs``), and its output or input scaled.
        """
        base = self._modules["base_layer"]
        if type(base) is not nn.Linear:
            base = self._called_base()
        by_row = self._looks_for_rows and rows_for(self) is not None
        if self._in_forward and not (by_row or args or kwargs) and is_plain_linear(base):
            parameters = base._parameters
            weight = parameters["weight"]
            # Where F.linear would refuse x's dtype, the base layer is called and says so itself.
            if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
                return ops.ia3_layer(x, weight, parameters["bias"], self._scale(), self.is_feedforward)
        return super().forward(x, *args, **kwargs)


_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def features(module: nn.Module) -> tuple[int, int]:
    """How many features, or channels, go into a layer that IA3 can adapt and come out of it; TypeError for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _CONVOLUTIONS):
        return module.in_channels, module.out_channels
    if is_conv1d(module):
        return tuple(module.weight.shape)
    raise TypeError(f"IA3: a layer must be an nn.Linear, Conv1D, Conv2d or Conv3d, got {type(module).__name__}")


def vector_shape(module: nn.Module, is_feedforward: bool) -> tuple[int, ...]:
    """Shape of an adapter's ``ia3_l`` on this layer, see :class:`IA3Layer`."""
    size = features(module)[0 if is_feedforward else 1]
    if isinstance(module, _CONVOLUTIONS):
        return (1, size, *[1] * (module.weight.dim() - 2))
    return (1, size) if is_feedforward else (size, 1)
