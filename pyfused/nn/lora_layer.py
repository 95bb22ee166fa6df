"""What LoRA's layers share, whatever they are around: ranks and scalings by adapter, DoRA's magnitudes, merging."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import remove_entry
from .arguments import check_lora_arguments
from .base import adapter_device, adapter_dtype, copier, layer_dtype, match_base
from .by_row import forget_adapter
from .dora import DoraMagnitude, initial_magnitude
from .merging import MergeableLayer
from .quantised import dense_weight


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """``alpha / r``, or with rsLoRA (Kalajdzievski 2023) ``alpha / sqrt(r)``."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class LoraLayer(MergeableLayer):
    """A frozen layer with LoRA adapters by name: the weight's change is ``scaling * B A``, as a matrix.

    A subclass says what it adapts (:meth:`features`) and which of the weight's dimensions is the output's
    (``output_dim``), gives an adapter's factors (:meth:`matrices`), and computes ``forward``. With ``use_dora`` (Liu et
    al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5) the adapted weight is
    ``m (W + scaling * B A) / ||W + scaling * B A||``, with the norm of each output's row and a learned magnitude m;
    state dict: ``lora_magnitude_vector.<name>.weight``.

    Args:
        base_layer: the layer to adapt; frozen by this call.
        adapter_name: name of the first adapter, which is active.
        **options: of that adapter, for ``add_adapter``.

    Attributes:
        in_features, out_features: what :meth:`features` says.
    """

    output_dim = 0

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any) -> None:
        features = self.features(base_layer)
        super().__init__(base_layer, adapter_name)
        self.in_features, self.out_features = features
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self._forms: dict[str, str] = {}  # adapters that are more than A and B, "dora" or "bias"
        self._merged_factors: dict[str, Tensor] = {}
        for name in self.containers[:2]:
            setattr(self, name, self._factors_in())
        self.lora_magnitude_vector = nn.ModuleDict()
        self.add_adapter(adapter_name, **options)
        base_layer.requires_grad_(False)
        self.train(base_layer.training)

    # For subclasses to define -----------------------------------------------------------------------------------------

    # What holds A, and B, of each adapter.
    _factors_in: ClassVar[type[nn.Module]] = nn.ModuleDict

    @classmethod
    def features(cls, base_layer: nn.Module) -> tuple[int, int]:
        """Numbers of the layer's inputs and outputs; TypeError for what this class cannot adapt."""
        raise NotImplementedError

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """An adapter's ``a [r, ...]`` and ``b [out, r]``, flattened to matrices; differentiable."""
        raise NotImplementedError

    def _detached_factors(
        self, tensors: Mapping[str, Tensor], parameter: Callable[[Tensor], nn.Parameter]
    ) -> dict[str, Any]:
        """A and B for :meth:`detached_adapter`."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------------------

    def _register(self, adapter_name: str, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> None:
        for attribute, value in self._settings(r, lora_alpha, lora_dropout, use_rslora).items():
            getattr(self, attribute)[adapter_name] = value

    def _settings(self, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool) -> dict[str, Any]:
        """What an adapter has beside its tensors, by attribute."""
        return {
            "r": r,
            "lora_alpha": lora_alpha,
            "use_rslora": use_rslora,
            "scaling": scaling_of(r, lora_alpha, use_rslora),
            "lora_dropout": nn.Dropout(lora_dropout).train(self.training),
        }

    @torch.no_grad()
    def detached_adapter(
        self,
        tensors: Mapping[str, Tensor],
        *,
        autocast_adapter_dtype: bool = True,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
    ) -> dict[str, Any]:
        check_lora_arguments(r, lora_alpha, lora_dropout, use_dora, lora_bias, init_lora_weights)
        parameter = copier(self.base_layer, autocast_adapter_dtype)
        parts = self._settings(r, lora_alpha, lora_dropout, use_rslora) | self._detached_factors(tensors, parameter)
        if use_dora:
            magnitude = parameter(tensors["lora_magnitude_vector"].reshape(self._magnitude_shape()))
            parts["lora_magnitude_vector"] = DoraMagnitude(magnitude)
        if use_dora or lora_bias:
            parts["_forms"] = "dora" if use_dora else "bias"
        return parts

    def _remove(self, adapter_name: str) -> None:
        forget_adapter(self, adapter_name)
        super()._remove(adapter_name)
        remove_entry(self.lora_dropout, adapter_name)
        for values in (self.r, self.lora_alpha, self.use_rslora, self.scaling):
            del values[adapter_name]
        self._merged_factors.pop(adapter_name, None)
        self._forms.pop(adapter_name, None)

    def _add_modules(
        self,
        adapter_name: str,
        a: nn.Module,
        b: nn.Module,
        use_dora: bool,
        lora_bias: bool,
        autocast_adapter_dtype: bool,
    ) -> None:
        """Take in a new adapter's modules, which hold its initial values; it is registered already."""
        for module in (a, b):
            for key, parameter in module.named_parameters():
                setattr(module, key, self._match(parameter, adapter_name, autocast_adapter_dtype))
        self.lora_A[adapter_name] = a.train(self.training)
        self.lora_B[adapter_name] = b.train(self.training)
        if use_dora or lora_bias:
            self._forms[adapter_name] = "dora" if use_dora else "bias"
        if use_dora:
            self._add_magnitude(adapter_name, autocast_adapter_dtype)
        self._update_forward()

    def _match(self, tensor: Tensor, adapter_name: str, autocast_adapter_dtype: bool) -> nn.Parameter:
        """A new adapter's tensor as a parameter, see :func:`match_base`."""
        values = match_base(tensor.detach(), self.base_layer, autocast_adapter_dtype)
        return nn.Parameter(values, requires_grad=adapter_name in self._active_adapters)

    # DoRA -------------------------------------------------------------------------------------------------------------

    def _add_magnitude(self, adapter_name: str, autocast_adapter_dtype: bool) -> None:
        """Start an adapter's magnitude at the norm of the adapted weight; its factors are there already."""
        # The factors hold values of the layer's dtype, whatever they are held in.
        a, b = (matrix.detach().to(layer_dtype(self.base_layer)) for matrix in self.matrices(adapter_name))
        norm = initial_magnitude(self.dora_weight(), a, b, self.scaling[adapter_name])
        norm = norm.to(adapter_device(self.base_layer)).view(self._magnitude_shape())
        norm = norm.to(adapter_dtype(norm.dtype, autocast_adapter_dtype))
        magnitude = DoraMagnitude(nn.Parameter(norm, requires_grad=adapter_name in self._active_adapters))
        self.lora_magnitude_vector[adapter_name] = magnitude.train(self.training)

    def _magnitude_shape(self) -> tuple[int, ...]:
        return (-1,)

    def dora_weight(self) -> Tensor:
        """The base layer's weight as ``[out, ...]``; a quantised one is dequantised."""
        return self._weight_matrix(dense_weight(self.base_layer))

    def dora_factor(self, adapter_name: str, weight: Tensor | None = None) -> Tensor:
        """``m / ||W + scaling * B A||`` ``[out]``; the norm is a constant to autograd (DoRA, section 4.3).

        Args:
            weight: :meth:`dora_weight`, where it is known.
        """
        a, b = self.matrices(adapter_name)
        return self.lora_magnitude_vector[adapter_name].factor(
            self.base_layer.weight,
            a,
            b,
            self.scaling[adapter_name],
            lambda: self.dora_weight() if weight is None else weight,
        )

    def _weight_matrix(self, weight: Tensor) -> Tensor:
        """A weight as ``[out, ...]``, a view."""
        return weight.t() if self.output_dim else weight.flatten(1)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._forget_norms()
        return super()._apply(*args, **kwargs)

    def _forget_norms(self) -> None:
        for magnitude in self.lora_magnitude_vector.values():
            magnitude.forget()

    def adapter_keys(self, adapter_name: str) -> dict[str, str]:
        names = ["lora_A.weight", "lora_B.weight"]
        names += ["lora_B.bias"] if self._forms.get(adapter_name) == "bias" else []
        keys = {name: name.replace(".", f".{adapter_name}.") for name in names}
        return keys | self._magnitude_key(adapter_name)

    def _magnitude_key(self, adapter_name: str) -> dict[str, str]:
        if adapter_name in self.lora_magnitude_vector:
            return {"lora_magnitude_vector": f"lora_magnitude_vector.{adapter_name}.weight"}
        return {}

    # Merging ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self, adapter_name: str) -> Tensor:
        """``scaling * B A`` in the weight's layout and B's dtype; 16-bit factors on CPU multiply in fp32."""
        a, b = self.matrices(adapter_name)
        scaling = self.scaling[adapter_name]
        if b.device.type == "cpu" and b.dtype.itemsize < 4:
            delta = ((b.float() @ a.float()) * scaling).to(b.dtype)
        else:
            delta = (b @ a) * scaling
        return delta.t() if self.output_dim else delta.view(self.base_layer.weight.shape)

    @property
    def _merged_names(self) -> tuple[str, ...]:
        biased = "bias" in self._forms.values() and self.base_layer.bias is not None
        return ("weight", "bias") if biased else ("weight",)

    def check_mergeable(self, action: str, adapter_names: Sequence[str] = ()) -> dict[str, nn.Parameter]:
        biased = [name for name in adapter_names if self._forms.get(name) == "bias"]
        if biased and self.base_layer.bias is None:
            raise RuntimeError(
                f"{action}: impossible to merge adapter {biased[0]!r}, which has lora_bias=True: the base layer has no "
                "bias"
            )
        return super().check_mergeable(action, adapter_names)

    def _prepare_merge(self, adapter_names: list[str]) -> None:
        """DoRA's norm is that of the unmerged weight, here as in ``forward``."""
        dora = [name for name in adapter_names if name in self.lora_magnitude_vector]
        if not dora:
            return
        weight = self.base_layer.weight
        if self.merged_adapters:
            tensors = {key: parameter.clone() for key, parameter in self.check_mergeable("merge").items()}
            for name in reversed(self.merged_adapters):
                self._take_out(tensors, name)
            weight = tensors["weight"]
        for name in dora:
            a, b = self.matrices(name)
            factor = DoraMagnitude.factor_of(
                self.lora_magnitude_vector[name].weight, self._weight_matrix(weight), a, b, self.scaling[name]
            )
            shape = [1] * weight.dim()
            shape[self.output_dim] = -1
            self._merged_factors[name] = factor.view(shape)

    def _merge_into(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        weight, delta = tensors["weight"], self.delta_weight(adapter_name)
        self._forget_norms()
        if adapter_name in self.lora_magnitude_vector:
            weight.copy_(self._merged_factors[adapter_name] * (weight + delta))
        else:
            weight += delta
        if self._forms.get(adapter_name) == "bias":
            tensors["bias"] += self.lora_B[adapter_name].bias * self.scaling[adapter_name]

    def _take_out(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        weight, delta = tensors["weight"], self.delta_weight(adapter_name)
        self._forget_norms()
        if adapter_name in self.lora_magnitude_vector:
            weight.copy_(weight / self._merged_factors[adapter_name] - delta)
        else:
            weight -= delta.to(weight.dtype)
        if self._forms.get(adapter_name) == "bias":
            tensors["bias"] -= self.lora_B[adapter_name].bias * self.scaling[adapter_name]
