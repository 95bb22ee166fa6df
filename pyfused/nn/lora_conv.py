"""LoRA around a frozen convolution, in plain PyTorch. State dict, initial weights and scaling are HF PEFT's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .arguments import check_lora_arguments
from .base import own_parameters
from .dora import check_dora_base
from .lora_init import initialise
from .lora_layer import LoraLayer
from .quantised import dense_weight

_CLASSES = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
CONVOLUTIONS = tuple(_CLASSES.values())


class LoraConv(LoraLayer):
    r"""A frozen ``nn.Conv1d``, ``Conv2d`` or ``Conv3d`` with LoRA adapters by name.

    An adapter is a convolution to r channels with the base's kernel, stride, padding and dilation, and one of size 1
    from there: :math:`y = base(x) + \sum_i s_i B_i(A_i(drop_i(x)))`. A sees all input channels, whatever the base's
    groups; with groups an adapter cannot be merged. State dict: ``base_layer.*``, ``lora_A.<name>.weight``
    ``[r, in_channels, *kernel]``, ``lora_B.<name>.weight`` ``[out_channels, r / groups, 1...]``, with ``lora_bias``
    ``lora_B.<name>.bias`` ``[out_channels]``, with ``use_dora`` ``lora_magnitude_vector.<name>.weight``
    ``[1, out_channels, 1...]``.

    Args:
        conv: the layer to adapt; frozen by this call.
        r: rank, a multiple of the base's groups.
        init_lora_weights: True, False or "gaussian".
        others: as for :class:`pyfused.nn.LoraLinear`.

    Raises:
        TypeError: ``conv`` is none of these, or an argument has the wrong type.
        ValueError: an argument is outside its range.
        NotImplementedError: ``use_dora`` on a convolution with groups or with another padding than zeros.
    """

    containers = ("lora_A", "lora_B", "lora_magnitude_vector")

    def __init__(
        self,
        conv: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(
            conv,
            adapter_name,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
            init_lora_weights=init_lora_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def features(cls, conv: nn.Module) -> tuple[int, int]:
        """``in_channels, out_channels`` of a layer; TypeError for what this class cannot adapt."""
        if not isinstance(conv, CONVOLUTIONS):
            raise TypeError(f"{cls.__name__}: conv must be an nn.Conv1d, Conv2d or Conv3d, got {type(conv).__name__}")
        return conv.in_channels, conv.out_channels

    @classmethod
    def adapter_shapes(
        cls, conv: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors on such a layer, by their names in its file."""
        in_channels, out_channels = cls.features(conv)
        ones = (1,) * len(conv.kernel_size)
        shapes = {
            "lora_A.weight": (r, in_channels, *conv.kernel_size),
            "lora_B.weight": (out_channels, r // conv.groups, *ones),
        }
        shapes |= {"lora_B.bias": (out_channels,)} if lora_bias else {}
        return shapes | ({"lora_magnitude_vector": (1, out_channels, *ones)} if use_dora else {})

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer takes and gives; the adapters' sum is in the wider dtype and rounded once."""
        base = self.base_layer
        y = base(x, *args, **kwargs)
        dtype = y.dtype
        for name in self._in_forward:
            a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            x = x.to(a.weight.dtype)
            dropped = dropout(x)
            delta = b(a(dropped)) * self.scaling[name]
            if name not in self.lora_magnitude_vector:
                y = y + delta
                continue
            channels = (-1, *[1] * len(base.kernel_size))
            factor = self.dora_factor(name).view(channels)
            if dropout.training and dropout.p > 0.0:
                product = base._conv_forward(dropped, dense_weight(base).to(dropped.dtype), None)
                y = y + (factor - 1.0) * product + factor * delta
            else:
                bias = 0.0 if base.bias is None else own_parameters(base)["bias"].view(channels)
                y = factor * (y - bias + delta) + bias
        return y.to(dtype)

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        modules = self.lora_A[adapter_name], self.lora_B[adapter_name]
        return tuple(own_parameters(module)["weight"].flatten(1) for module in modules)

    # Adapters ---------------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; it is neither active nor trainable until :meth:`set_adapter`. Arguments as for the class."""
        self._check_new(adapter_name)
        check_lora_arguments(r, lora_alpha, lora_dropout, use_dora, lora_bias, init_lora_weights)
        check_conv(self.base_layer, r, use_dora, init_lora_weights)
        base, kind = self.base_layer, _CLASSES[self.base_layer.weight.dim()]
        # The order of the draws is HF PEFT's.
        a = kind(base.in_channels, r, base.kernel_size, base.stride, base.padding, dilation=base.dilation, bias=False)
        b = kind(r, base.out_channels, 1, groups=base.groups, bias=lora_bias)
        initialise(a, b, init_lora_weights, r)
        self._register(adapter_name, r, lora_alpha, lora_dropout, use_rslora)
        self._add_modules(adapter_name, a, b, use_dora, lora_bias, autocast_adapter_dtype)

    def _magnitude_shape(self) -> tuple[int, ...]:
        return (1, -1, *[1] * len(self.base_layer.kernel_size))

    def check_mergeable(self, action: str, adapter_names: Any = ()) -> dict[str, nn.Parameter]:
        base = self.base_layer
        if base.groups > 1 or base.padding_mode != "zeros":
            raise NotImplementedError(
                f"{action}: not built for a convolution with groups or another padding than zeros, got "
                f"groups={base.groups} and padding_mode={base.padding_mode!r}"
            )
        return super().check_mergeable(action, adapter_names)


def check_conv(conv: nn.Module, r: int, use_dora: bool, init_lora_weights: bool | str, name: str = "") -> None:
    """ValueError or NotImplementedError where a convolution cannot have such an adapter."""
    where = f" of {name!r}" if name else ""
    if r % conv.groups:
        raise ValueError(f"r must be a multiple of the groups{where}, {conv.groups}, got {r}")
    if not isinstance(init_lora_weights, bool) and init_lora_weights != "gaussian":
        raise ValueError(
            f"init_lora_weights must be True, False or 'gaussian' for the convolution{where}, got {init_lora_weights!r}"
        )
    if not use_dora:
        return
    check_dora_base(conv, name)
    if conv.groups > 1 or conv.padding_mode != "zeros":
        raise NotImplementedError(
            f"use_dora: not built for a convolution with groups or another padding than zeros{where}, got "
            f"groups={conv.groups} and padding_mode={conv.padding_mode!r}"
        )
