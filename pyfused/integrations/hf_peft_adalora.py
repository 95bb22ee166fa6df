"""The tuner layers that ``fuse`` makes out of HF PEFT's for AdaLoRA. Importing this file imports peft."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor

from .. import ops
from ..nn.shared_input import Arguments, SharedInput, op_arguments, rejoin
from ..nn.svd import PrunedFactors, RankScale, evaluates
from .hf_peft_adapters import add_adapter, dropout_obstacle, fits, keeps_pefts_forward, stands_for, weights_for


class FusedSVD:
    """For HF PEFT's AdaLoRA layers: another ``forward``, see :class:`pyfused.integrations.hf_peft_layer.FusedForward`.

    In evaluation pruned ranks are left out, as in :class:`pyfused.nn.AdaLoraLinear`; what is kept for it is not part of
    copies and pickles.
    """

    _pruned: PrunedFactors | None = None
    _shared_input: SharedInput | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rejoin(self)

    def train(self, mode: bool = True) -> FusedSVD:
        vars(self).pop("_pruned", None)
        return super().train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``base(x) + drop(x) (A * E)^T B^T * scaling / (ranknum + 1e-5)`` for each active adapter in turn.

        Args:
            x: ``[..., in_features]``; never cast as a whole to the adapter's dtype.
            *args, **kwargs: what PEFT's forward takes besides, which is then the one that runs.

        Returns:
            ``[..., out_features]`` in the dtype of the base layer's output.
        """
        adapters = None if args or kwargs else self._adapters_to_fuse(x)
        if adapters is None:
            return super().forward(x, *args, **kwargs)
        y, arguments = None, self._first_arguments(x, adapters)
        if arguments is not None:
            if len(adapters) == 1 and self._shared_input is not None and not torch.compiler.is_compiling():
                return self._shared_input.linear(self, x, arguments)
            y = ops.lora_linear(x, *op_arguments(arguments))
            adapters = adapters[1:]
        if y is None:
            y = self._modules["base_layer"](x)
        for a, b, scale, *options in adapters:
            y = add_adapter(y, x, (*scale.factors(a, b), *options))
        return y

    def fused_arguments(self, x: Tensor) -> Arguments | None:
        """As :meth:`pyfused.nn.AdaLoraLinear.fused_arguments`."""
        adapters = self._adapters_to_fuse(x)
        return self._first_arguments(x, adapters) if adapters and len(adapters) == 1 else None

    def _first_arguments(self, x: Tensor, adapters: list[tuple]) -> Arguments | None:
        weights = weights_for(self._modules["base_layer"], x) if adapters else None
        return None if weights is None else (*weights, *adapters[0])

    def _adapters_to_fuse(self, x: Tensor) -> list[tuple] | None:
        """``a, b, scale, dropout_p, training`` of each active adapter with ranks; None: PEFT's forward has to run."""
        if keeps_pefts_forward(self, x):
            return None
        names = self._active_adapter
        modules = self._modules  # nn.Module's own attribute lookup is slow
        adapters = []
        for name in (names,) if isinstance(names, str) else names:
            if name not in modules["lora_A"]._parameters:
                continue
            dropout = modules["lora_dropout"]._modules[name]
            if dropout_obstacle(name, dropout) is not None:
                return None
            a, b, e, ranknum = (modules[key]._parameters[name] for key in ("lora_A", "lora_B", "lora_E", "ranknum"))
            if not all(fits(tensor, x) for tensor in (a, b, e, ranknum)):
                return None
            if a.shape[0] == 0:
                continue
            scaling = self.scaling[name]
            if evaluates(self.training, x, a, b, e, ranknum):
                if self._pruned is None:
                    self._pruned = PrunedFactors()
                factors = self._pruned.get(name, a, b, e, ranknum, scaling)
                if factors is None:
                    continue
                scale = RankScale(e, ranknum, scaling, known=factors)
            else:
                scale = RankScale(e, ranknum, scaling)
            adapters.append((a, b, scale, getattr(dropout, "p", 0.0), dropout.training))
        return adapters


@stands_for(SVDLinear)
class FusedSVDLinear(FusedSVD, SVDLinear):
    """HF PEFT's AdaLoRA layer on pyfused's ops."""
