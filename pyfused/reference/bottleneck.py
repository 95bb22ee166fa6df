"""The bottleneck adapter in plain PyTorch (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP")."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import drop

# By the names that AdapterHub and transformers have for them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda z: F.gelu(z, approximate="tanh"),
}
_ALIASES = {
    "identity": "linear",
    "leakyrelu": "leaky_relu",
    "swish": "silu",
    "gelu_tanh": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
}


def activation_name(name: str) -> str:
    """The key of ``ACTIVATIONS`` for a name that AdapterHub or transformers has, whatever its case.

    Raises:
        TypeError, ValueError: it is no string, or not the name of an activation that is built.
    """
    if not isinstance(name, str):
        raise TypeError(f"activation must be a string, got {type(name).__name__}")
    known = _ALIASES.get(name.lower(), name.lower())
    if known not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join([*ACTIVATIONS, *_ALIASES])}, got {name!r}")
    return known


def bottleneck(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """``residual + drop(scale * (f(x w_down^T + b_down) w_up^T + b_up))`` in fp32 (fp64 for fp64), rounded once."""
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(acc)

    h = ACTIVATIONS[activation_name(activation)](F.linear(wide(x), wide(w_down), wide(b_down)))
    delta = F.linear(h, wide(w_up), wide(b_up)) * (wide(scale) if isinstance(scale, Tensor) else scale)
    if training and dropout_p > 0.0:
        if seed is None:
            raise ValueError("seed: the reference needs an int64 tensor with one element when dropout is on, got None")
        delta = drop(delta, dropout_p, seed)
    return (delta if residual is None else wide(residual) + delta).to(x.dtype)
