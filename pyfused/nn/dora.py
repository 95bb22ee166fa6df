"""DoRA's magnitude, and the norm that it is divided by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .base import has_only_forward, own_parameters
from .quantised import is_quantised


class DoraMagnitude(nn.Module):
    """The learned magnitude of one adapter; remembers norms as long as what they are of does not change.

    Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation". In training the squares of the frozen weight's rows
    are remembered, which every step needs; in evaluation the norm itself. Both only while the tensors are the same, in
    the same version: what autograd sees as a change in place is seen here (optimizers, ``load_state_dict``, ``copy_``).
    A change behind its back, ``parameter.data.mul_(2)``, is seen at the next ``train()`` or ``eval()``. A quantised
    weight is dequantised where its values are needed: in each step of training, and in evaluation once.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._known: dict[str, tuple[tuple, Tensor, list[Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": {}}  # copies have tensors of their own

    def train(self, mode: bool = True) -> DoraMagnitude:
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Compute norms anew: something changed without a trace."""
        self._known.clear()

    def factor(
        self, weight: Tensor, a: Tensor, b: Tensor, scale: float | Tensor, matrix: Callable[[], Tensor]
    ) -> Tensor:
        """``m / ||matrix() + scale * b a||`` ``[N]`` by rows; the norm is a constant to autograd.

        Args:
            weight: the layer's parameter, by which changes are told.
            matrix: gives its values ``[N, K]``.
        """
        magnitude = own_parameters(self)["weight"]
        if self.training:
            values = matrix()
            squares = self._remember("squares", (weight,), None, lambda: ops.row_squares(values))
            return self.factor_of(magnitude, values, a, b, scale, squares)
        of = (weight, a, b, scale) if isinstance(scale, Tensor) else (weight, a, b)
        norm = self._remember("norm", of, scale, lambda: ops.dora_norm(matrix(), a, b, scale))
        return magnitude.view(-1) / norm

    @staticmethod
    def factor_of(
        magnitude: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None
    ) -> Tensor:
        """:meth:`factor` of a plain weight ``[N, K]``, with nothing remembered."""
        return magnitude.view(-1) / ops.dora_norm(weight, a, b, scale, squares)

    def _remember(self, name: str, tensors: tuple[Tensor, ...], scale: Any, compute: Callable[[], Tensor]) -> Tensor:
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # what is known would be a constant there
        if traced or not all(_can_be_told(tensor) for tensor in tensors):
            return compute()
        scale = None if isinstance(scale, Tensor) else scale
        state = (scale, *((t._version, _place(t), t.dtype, t.device) for t in tensors))
        known = self._known.get(name)
        # What inference mode has made, autograd cannot keep.
        usable = known is not None and (torch.is_inference_mode_enabled() or not known[1].is_inference())
        if not usable or known[0] != state:
            # Aliases, which keep the memory: nothing new can come to lie at its address while it is compared.
            known = self._known[name] = (state, compute(), [t.detach() for t in tensors if not is_quantised(t)])
        return known[1]


def _can_be_told(tensor: Tensor) -> bool:
    """Whether a change of it shows in its version or place."""
    is_known = type(tensor) in (nn.Parameter, Tensor) or is_quantised(tensor)
    return is_known and not (tensor.is_inference() or tensor.is_meta)  # meta: accelerate brings the values


def _place(tensor: Tensor) -> Any:
    """Where a tensor's values are; of torchao's, which have no address of their own, the tensor, compared as itself."""
    return _Itself(tensor) if is_quantised(tensor) else tensor.data_ptr()


class _Itself:
    """A tensor that equals itself alone; it stays alive, so that nothing else can be taken for it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.tensor is self.tensor

    __hash__ = None


@torch.no_grad()
def initial_magnitude(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``||weight + scale * b a||`` ``[N]`` as HF PEFT computes it before training: rounded to the tensors' dtypes.

    An adapter of the same seed starts with the same numbers there, rounding included; so this is done with a dense
    product, once in an adapter's life.
    """
    product = (b.float() @ a.float()).half() if b.dtype == torch.float16 else b @ a
    return torch.linalg.norm(weight + scale * product, dim=1)


def dora_linear(layer: Any, x: Tensor, adapter_name: str, y: Tensor | None) -> Tensor:
    r"""A DoRA adapter of a linear layer on top of y; None: on top of the base layer, which need not be called.

    :math:`y = g \odot (y - bias + s \, x A^T B^T) + bias` with :math:`g = m / ||W + s B A||`. Where dropout is on, it
    is on the whole adapted product, as in HF PEFT:
    :math:`y + g \odot (drop(x) W^T + s \, drop(x) A^T B^T) - drop(x) W^T`.

    Args:
        layer: of pyfused or HF PEFT, with ``dora_weight()``, the base layer's weight ``[N, K]``, which is not asked for
            where nothing is multiplied by it.
    """
    (a, b), scale, bias = layer.matrices(adapter_name), layer.scaling[adapter_name], layer.bias
    if bias is not None and bias.is_meta:
        bias = own_parameters(layer.get_base_layer())["bias"]
    if isinstance(scale, Tensor):  # one number, see pyfused.hotswap
        scale = scale.expand(a.shape[0])
    dropout = layer.lora_dropout[adapter_name]
    drops = dropout.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0.0
    weight = layer.dora_weight() if drops or y is None else None
    factor = layer.dora_factor(adapter_name, weight)
    # The ops are told that they drop nothing: of a default torch.compile(dynamic=True) makes an unknown number, which
    # it loses where several layers are checkpointed.
    if drops:
        is_plain = type(dropout) is nn.Dropout and dropout.p < 1.0 and has_only_forward(dropout)
        dropped = ops.dropout(x, dropout.p) if is_plain else dropout(x)
        weight = weight.to(x.dtype)
        adapted = ops.ia3_scale(ops.lora_linear(dropped, weight, None, a, b, scale, 0.0), factor)
        if y is None:  # one product of the base for y and what is taken from it
            return torch.nn.functional.linear(x - dropped, weight, bias) + adapted
        return y + adapted - torch.nn.functional.linear(dropped, weight)
    if y is None:
        adapted = ops.lora_linear(x, weight, None, a, b, scale, 0.0)
    else:
        adapted = ops.lora_delta(y if bias is None else y - bias.to(y.dtype), x, a, b, scale, 0.0)
    adapted = ops.ia3_scale(adapted, factor)
    return adapted if bias is None else adapted + bias.to(adapted.dtype)


def check_dora_base(base: nn.Module, name: str = "") -> None:
    """NotImplementedError where DoRA's norm of a layer's weight cannot be computed."""
    weight = base.weight
    if isinstance(base, nn.Linear) and is_quantised(weight):
        return
    if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not weight.is_floating_point():
        where = f"of {name!r} " if name else ""
        raise NotImplementedError(
            f"use_dora: the base weight {where}must be a plain floating-point tensor, or of bitsandbytes or torchao in "
            f"a linear layer, got {type(weight).__name__} of {weight.dtype} in {type(base).__name__}"
        )
