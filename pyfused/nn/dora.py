"""DoRA's magnitude, and the norm that it is divided by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class DoraMagnitude(nn.Module):
    """The learned magnitude of one adapter; remembers norms as long as what they are of does not change.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation". In training the squares of the frozen weight's rows
    are remembered, which every step needs; in evaluation the norm itself. Both only while the tensors are the same, in
    the same version: what autograd sees as a change in place is seen here (optimizers, ``load_state_dict``, ``copy_``).
    A change behind its back, ``parameter.data.mul_(2)``, is seen at the next ``train()`` or ``eval()``.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._known: dict[str, tuple[tuple, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}}  # copies have tensors of their own

    def train(self, mode: bool = True) -> DoraMagnitude:
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Compute norms anew: something changed without a trace."""
        self._known.clear()

    def factor(self, weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
        """``m / ||weight + scale * b a||`` ``[N]`` by rows; the norm is a constant to autograd."""
        if self.training:
            squares = self._remember("squares", (weight,), None, lambda: ops.row_squares(weight))
            return self.factor_of(self.weight, weight, a, b, scale, squares)
        of = (weight, a, b, scale) if isinstance(scale, Tensor) else (weight, a, b)
        norm = self._remember("norm", of, scale, lambda: ops.dora_norm(weight, a, b, scale))
        return self.weight.view(-1) / norm

    @staticmethod
    def factor_of(
        magnitude: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None
    ) -> Tensor:
        """:meth:`factor` with nothing remembered."""
        return magnitude.view(-1) / ops.dora_norm(weight, a, b, scale, squares)

    def _remember(self, name: str, tensors: tuple[Tensor, ...], scale: Any, compute: Any) -> Tensor:
        if torch.compiler.is_compiling() or any(type(t) not in _PLAIN or t.is_inference() for t in tensors):
            return compute()
        scale = None if isinstance(scale, Tensor) else scale
        state = (scale, *((t._version, t.data_ptr(), t.dtype, t.device) for t in tensors))
        known = self._known.get(name)
        if known is None or known[0] != state:
            known = self._known[name] = (state, compute())
        return known[1]


_PLAIN = (nn.Parameter, Tensor)


@torch.no_grad()
def initial_magnitude(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``||weight + scale * b a||`` ``[N]`` as HF PEFT computes it before training: in the weight's dtype.

    An adapter of the same seed starts with the same numbers there, rounding included; so this is done with a dense
    product, once in an adapter's life. ``a`` and ``b`` hold values of the weight's dtype, whatever they are held in.
    """
    dtype = weight.dtype
    if dtype == torch.float16:
        product = (b.float() @ a.float()).half()
    else:
        product = b.to(dtype) @ a.to(dtype)
    return torch.linalg.norm(weight + scale * product, dim=1).to(dtype)


def dora_linear(
    layer: Any, x: Tensor, adapter_name: str, weight: Tensor, bias: Tensor | None, y: Tensor | None
) -> Tensor:
    r"""A DoRA adapter of a linear layer on top of y; None: on top of the base layer, which need not be called.

    :math:`y = g \odot (y - bias + s \, x A^T B^T) + bias` with :math:`g = m / ||W + s B A||`. Where dropout is on, it
    is on the whole adapted product, as in HF PEFT:
    :math:`y + g \odot (drop(x) W^T + s \, drop(x) A^T B^T) - drop(x) W^T`.

    Args:
        weight, bias: the base layer's, ``[N, K]`` and ``[N]``.
    """
    (a, b), scale = layer.matrices(adapter_name), layer.scaling[adapter_name]
    if isinstance(scale, Tensor):  # one number, see pyfused.hotswap
        scale = scale.expand(a.shape[0])
    factor, dropout = layer.dora_factor(adapter_name), layer.lora_dropout[adapter_name]
    if dropout.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0.0:
        dropped = dropout(x)
        adapted = ops.ia3_scale(ops.lora_linear(dropped, weight, None, a, b, scale), factor)
        if y is None:  # one product of the base for y and what is taken from it
            return torch.nn.functional.linear(x - dropped, weight, bias) + adapted
        return y + adapted - torch.nn.functional.linear(dropped, weight)
    if y is None:
        adapted = ops.lora_linear(x, weight, None, a, b, scale)
    else:
        adapted = ops.lora_delta(y if bias is None else y - bias.to(y.dtype), x, a, b, scale)
    adapted = ops.ia3_scale(adapted, factor)
    return adapted if bias is None else adapted + bias.to(adapted.dtype)


def check_dora_base(base: nn.Module, name: str = "") -> None:
    """NotImplementedError where DoRA's norm of a layer's weight cannot be computed from the weight as it is."""
    weight = base.weight
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not weight.is_floating_point():
        where = f"of {name!r} " if name else ""
        raise NotImplementedError(
            f"use_dora: the base weight {where}must be a plain floating-point tensor, got {type(weight).__name__} of "
            f"{weight.dtype} in {type(base).__name__}"
        )
