"""The bottleneck adapter as a module. Parameters, names and initial values are those of AdapterHub ``adapters``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import Linear

from .. import ops
from ..reference.bottleneck import ACTIVATIONS, activation_name
from .base import is_plain_linear

_INITS = ("bert", "mam_adapter", "houlsby")


class Bottleneck(nn.Module):
    r"""Bottleneck adapter: :math:`y = residual + gate \cdot drop(s (W_{up} f(W_{down} x + b_{down}) + b_{up}))`.

    Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP"; scaling after He et al. 2021. One fused op
    where there is no gate and no layer norm behind it. State dict: ``adapter_down.0.*`` (``adapter_down.1.*`` behind a
    layer norm), ``adapter_up.*``, and ``scaling``, ``gate.*``, ``adapter_norm_after.*`` where they exist.

    Args:
        hidden_size: width D of the model.
        bottleneck_size: H, at least 1.
        activation: f, see :func:`pyfused.ops.bottleneck`.
        scaling: s, a float, "learned" (one number) or "channel" (one for each of D).
        dropout: probability in [0, 1) of dropping an element of the scaled output while training.
        ln_before, ln_after: a new layer norm on the input, or on the output.
        adapter_residual_before_ln: add the residual before ``ln_after`` and not behind it.
        use_gating: multiply by the mean over dimension 1 of sigmoid(gate(x)): one number for each sequence.
        init_weights: "bert": weights normal with standard deviation 0.02; "mam_adapter": W_down Kaiming-uniform, W_up
            zero, so that the adapter begins as the identity; "houlsby": normal with 0.01, cut at 0.02. Biases zero.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range.
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck_size: int,
        activation: str = "relu",
        scaling: float | str = 1.0,
        dropout: float = 0.0,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = False,
        use_gating: bool = False,
        init_weights: str = "bert",
    ) -> None:
        super().__init__()
        for name, value in (("hidden_size", hidden_size), ("bottleneck_size", bottleneck_size)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_bottleneck_arguments(activation, scaling, dropout, init_weights)
        self.activation = activation_name(activation)
        self.adapter_residual_before_ln = adapter_residual_before_ln
        down = nn.Linear(hidden_size, bottleneck_size)
        self.adapter_down = nn.Sequential(*([nn.LayerNorm(hidden_size)] if ln_before else []), down)
        self.adapter_up = nn.Linear(bottleneck_size, hidden_size)
        self.scaling = float(scaling) if not isinstance(scaling, str) else None
        if isinstance(scaling, str):
            del self.scaling
            self.scaling = nn.Parameter(torch.ones(1 if scaling == "learned" else hidden_size))
        self.adapter_norm_after = nn.LayerNorm(hidden_size) if ln_after else None
        self.gate = nn.Linear(hidden_size, 1) if use_gating else None
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters(init_weights)

    @torch.no_grad()
    def reset_parameters(self, init_weights: str = "bert") -> None:
        """New weights, see the class."""
        down, up = self.adapter_down[-1], self.adapter_up
        for linear in (down, up, *([self.gate] if self.gate is not None else [])):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        if init_weights == "mam_adapter":
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
        elif init_weights == "houlsby":
            for linear in (down, up):
                nn.init.trunc_normal_(linear.weight, std=0.01, a=-0.02, b=0.02)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[..., D]`` and ``[..., D]`` -> ``[..., D]``; no residual is a residual of 0."""
        gated, normed = self.gate is not None, self.adapter_norm_after is not None
        if not gated and not normed:
            return self._bottleneck(x, residual)
        y = self._bottleneck(x, residual if normed and self.adapter_residual_before_ln and not gated else None)
        if gated:
            y = y * torch.sigmoid(self.gate(x)).mean(dim=1, keepdim=True).to(y.dtype)
            if residual is not None and self.adapter_residual_before_ln:
                y = y + residual
        if normed:
            y = self.adapter_norm_after(y.to(self.adapter_norm_after.weight.dtype)).to(x.dtype)
        return y if residual is None or self.adapter_residual_before_ln else residual + y

    def _bottleneck(self, x: Tensor, residual: Tensor | None) -> Tensor:
        modules = self._modules
        *norm, down = modules["adapter_down"]._modules.values()
        up, dropout = modules["adapter_up"], modules["dropout"]
        z = norm[0](x.to(norm[0].weight.dtype)).to(x.dtype) if norm else x
        same = residual is x and z is x
        if is_plain_linear(down) and is_plain_linear(up):
            return ops.bottleneck(
                z,
                z if same else residual,
                down._parameters["weight"],
                down._parameters["bias"],
                up._parameters["weight"],
                up._parameters["bias"],
                self.activation,
                self.scaling,
                dropout.p,
                dropout.training,
            )
        # linear layers that were given hooks, or replaced
        h = ACTIVATIONS[self.activation](down(z.to(_dtype_of(down, z))))
        delta = dropout(up(h) * self.scaling).to(x.dtype)
        return delta if residual is None else residual + delta

    def extra_repr(self) -> str:
        scaling = self.scaling if isinstance(self.scaling, float) else f"learned [{self.scaling.numel()}]"
        return f"activation={self.activation!r}, scaling={scaling}"


def _dtype_of(linear: Linear, x: Tensor) -> torch.dtype:
    parameter = next(linear.parameters(), None)
    return x.dtype if parameter is None or not parameter.is_floating_point() else parameter.dtype


def check_bottleneck_arguments(activation: str, scaling: float | str, dropout: float, init_weights: str) -> None:
    """TypeError or ValueError where a bottleneck cannot be made of these values."""
    activation_name(activation)
    if isinstance(scaling, str):
        if scaling not in ("learned", "channel"):
            raise ValueError(f"scaling must be a number, 'learned' or 'channel', got {scaling!r}")
    elif isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"scaling must be a number, 'learned' or 'channel', got {scaling!r}")
    elif not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout must be a number, got {dropout!r}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if init_weights not in _INITS:
        raise ValueError(f"init_weights must be one of {', '.join(_INITS)}, got {init_weights!r}")
