"""LoRA around a frozen linear layer. State dict, initial weights and scaling are those of HF PEFT's layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Dropout, Linear

from .. import ops
from .arguments import check_adapter_name, check_lora_arguments
from .base import adapter_device, has_only_forward, is_plain_linear


class LoraLinear(nn.Module):
    r"""A frozen ``nn.Linear`` with LoRA adapters by name: :math:`y = base(x) + \sum_i s_i \, drop_i(x) A_i^T B_i^T`.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3. The sum goes over the active adapters
    in the order in which they were set; :math:`s = alpha / r`, or :math:`alpha / \sqrt r` with ``use_rslora``
    (Kalajdzievski 2023). State dict: ``base_layer.*``, ``lora_A.<name>.weight`` ``[r, in_features]``,
    ``lora_B.<name>.weight`` ``[out_features, r]``.

    Args:
        linear: the layer to adapt, an ``nn.Linear`` or a subclass (quantised layers); frozen by this call.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        use_rslora: divide alpha by the square root of r.
        use_dora, lora_bias: not yet built; True raises NotImplementedError.
        init_lora_weights: True: A Kaiming-uniform, B zero. "gaussian": A normal with standard deviation 1/r, B zero.
            False: both as ``nn.Linear`` makes them, so the adapter changes the output from the start. Draws the numbers
            that HF PEFT draws for the same seed.
        adapter_name: name of this first adapter, which is active.
        autocast_adapter_dtype: keep the adapter of a 16-bit (or 8-bit floating) layer in float32; otherwise it has the
            layer's dtype. In both cases the initial values are rounded to the layer's dtype.

    Raises:
        TypeError: ``linear`` is no ``nn.Linear``, or an argument has the wrong type.
        ValueError: an argument is outside its range.
        NotImplementedError: a variant of LoRA that is not built.
    """

    def __init__(
        self,
        linear: nn.Linear,
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
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"LoraLinear: linear must be an nn.Linear, got {type(linear).__name__}")
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._active_adapters = [adapter_name]
        self._disabled = False
        self._remerge: list[str] = []
        self._shared_weight: nn.Parameter | None = None
        self.add_adapter(
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
        linear.requires_grad_(False)
        self.train(linear.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]`` in the dtype of the base layer's output.

        One fused op for the base and the first active adapter where calling the base would do nothing but
        ``F.linear`` on plain tensors; else the base is called (with ``args`` and ``kwargs``), the adapters are added.
        An adapter whose modules were given hooks or replaced is called, too.
        """
        base = self._modules["base_layer"]
        names = self._in_forward
        if not names:
            return base(x, *args, **kwargs)
        if not (args or kwargs) and is_plain_linear(base):
            weight = base._parameters["weight"]
            # Where F.linear would refuse x's dtype, the base layer is called and says so itself.
            if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
                adapter = self._arguments(names[0])
                if adapter is not None:
                    y = ops.lora_linear(x, weight, base._parameters["bias"], *adapter)
                    return y if len(names) == 1 else self._add(y, x, names[1:])
        y = base(x, *args, **kwargs)
        return self._add(y, x if x.dtype == y.dtype else x.to(y.dtype), names)  # quantised layers may change the dtype

    def _add(self, y: Tensor, x: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            adapter = self._arguments(name)
            if adapter is not None:
                y = ops.lora_delta(y, x, *adapter)
                continue
            a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            delta = b(a(dropout(x.to(next(a.parameters()).dtype)))) * self.scaling[name]
            y = (y + delta).to(y.dtype)
        return y

    def _arguments(self, name: str) -> tuple[Tensor, Tensor, float, float, bool] | None:
        """``a, b, scale, dropout_p, training`` of an adapter; None where its modules have to be called.

        Read without nn.Module's slow attribute lookup.
        """
        modules = self._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        if (
            type(a) is not Linear
            or type(b) is not Linear
            or type(dropout) is not Dropout
            or not has_only_forward(a)
            or not has_only_forward(b)
            or not has_only_forward(dropout)
        ):
            return None
        return a._parameters["weight"], b._parameters["weight"], self.scaling[name], dropout.p, dropout.training

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
        check_adapter_name(adapter_name)
        if adapter_name in self.lora_A:
            raise ValueError(f"adapter_name: this layer already has an adapter {adapter_name!r}")
        check_lora_arguments(r, lora_alpha, lora_dropout, use_dora, lora_bias, init_lora_weights)
        # The order of the draws is HF PEFT's: A and B as nn.Linear makes them, then A once more.
        a = nn.Linear(self.in_features, r, bias=False)
        b = nn.Linear(r, self.out_features, bias=False)
        if init_lora_weights is not False:
            if init_lora_weights is True:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            else:
                nn.init.normal_(a.weight, std=1 / r)
            nn.init.zeros_(b.weight)
        trainable = adapter_name in self._active_adapters
        for module in (a, b):
            self._match_base(module, autocast_adapter_dtype)
            module.requires_grad_(trainable)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.use_rslora[adapter_name] = use_rslora
        self.scaling[adapter_name] = lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r
        self.lora_dropout[adapter_name] = nn.Dropout(lora_dropout).train(self.training)
        self.lora_A[adapter_name] = a.train(self.training)
        self.lora_B[adapter_name] = b.train(self.training)
        self._update_forward()

    def _match_base(self, module: nn.Linear, autocast_adapter_dtype: bool) -> None:
        weight = self.base_layer.weight
        dtype = getattr(self.base_layer, "compute_dtype", weight.dtype)  # bitsandbytes' 4-bit weights are integers
        dtype = dtype if dtype is not None and dtype.is_floating_point else None
        module.to(adapter_device(self.base_layer), dtype=dtype)
        if autocast_adapter_dtype and module.weight.dtype.itemsize < 4:
            module.weight = nn.Parameter(module.weight.detach().to(torch.float32))

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; some may belong to other layers of the model only."""
        return list(self._active_adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, in this order; names that this layer does not have are passed over.

        They become trainable, unless ``inference_mode``; all others of the layer are frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for matrices in ("lora_A", "lora_B"):
            for name, module in self._modules[matrices]._modules.items():
                module._parameters["weight"].requires_grad = name in names and not inference_mode
        self._active_adapters = names
        self._update_forward()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Thaw or freeze adapters without making them active."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for matrices in (self.lora_A, self.lora_B):
            for name in names:
                if name in matrices:
                    matrices[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one, the first of the others by name becomes active.

        Raises:
            ValueError: the adapter is merged.
        """
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter_name: {adapter_name!r} is merged into the base layer; unmerge it first")
        if adapter_name in self.lora_A:
            for entries in (self.lora_A, self.lora_B, self.lora_dropout):
                del entries[adapter_name]
            for values in (self.r, self.lora_alpha, self.use_rslora, self.scaling):
                del values[adapter_name]
        if adapter_name in self._active_adapters:
            remaining = [name for name in self._active_adapters if name != adapter_name]
            self.set_adapter(remaining or sorted(self.lora_A)[:1])

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters of the layer on or off. Merged ones are taken out of the weight while they are off."""
        if enabled == (not self._disabled):
            return
        if not enabled and self.merged:
            names = list(self.merged_adapters)
            self.unmerge()
            self._remerge = names
        self._disabled = not enabled
        self._update_forward()
        if enabled and self._remerge:
            names, self._remerge = self._remerge, []
            self.merge(adapter_names=names)

    def _update_forward(self) -> None:
        off = self._disabled or self.merged_adapters
        present = self._modules["lora_A"]._modules
        self._in_forward = () if off else tuple(name for name in self._active_adapters if name in present)

    # Merging ----------------------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self._disabled

    @torch.no_grad()
    def delta_weight(self, adapter_name: str) -> Tensor:
        """``scaling * B A``, ``[out_features, in_features]`` in B's dtype; 16-bit factors on CPU multiply in fp32."""
        a, b = self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight
        if b.device.type == "cpu" and b.dtype.itemsize < 4:
            return ((b.float() @ a.float()) * self.scaling[adapter_name]).to(b.dtype)
        return (b @ a) * self.scaling[adapter_name]

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add adapters to the base weight, which is rounded once per adapter; the layer then costs what the base costs.

        Args:
            safe_merge: compute the new weight next to the old one, and keep the old one where the new has an infinity
                or a NaN.
            adapter_names: None for the active adapters.

        Raises:
            TypeError: ``adapter_names`` is a string.
            ValueError: the result is not finite (``safe_merge``), or adapters are switched off; the layer is unchanged.
            NotImplementedError: the base weight is no plain floating-point tensor.
        """
        names = self._names_to_merge(adapter_names)
        if not names:
            return
        weight = self.check_mergeable("merge")
        if safe_merge:
            weight.data = self.checked_merge(names)
        else:
            for name in names:
                weight.data += self.delta_weight(name)
        self.merged_adapters.extend(names)
        self._update_forward()

    def checked_merge(self, adapter_names: Sequence[str]) -> Tensor:
        """The weight ``[out_features, in_features]`` that :meth:`merge` leaves; ValueError where it is not finite."""
        merged = self.check_mergeable("merge").detach().clone()
        for name in adapter_names:
            if name in self.lora_A:
                merged += self.delta_weight(name)
                if not torch.isfinite(merged).all():
                    raise ValueError(f"NaNs detected in the merged weights: adapter {name!r} is not finite")
        return merged

    def unmerge(self) -> None:
        """Subtract what :meth:`merge` added, last merged first. Exact but for the rounding of a 16-bit base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.check_mergeable("unmerge")
        while self.merged_adapters:
            weight.data -= self.delta_weight(self.merged_adapters.pop()).to(weight.dtype)
        if self._shared_weight is not None:
            self.base_layer.weight, self._shared_weight = self._shared_weight, None
        self._update_forward()

    def own_weight(self) -> None:
        """Give the base layer a copy of its weight until it is unmerged: the tensor is tied to another layer."""
        if self._shared_weight is None:
            self._shared_weight = self.base_layer.weight
            self.base_layer.weight = nn.Parameter(self._shared_weight.detach().clone(), requires_grad=False)

    def _names_to_merge(self, adapter_names: Sequence[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names or None, got the string {adapter_names!r}")
        names = self._active_adapters if adapter_names is None else adapter_names
        names = [name for name in dict.fromkeys(names) if name in self.lora_A]
        if not self.merged_adapters:
            return names
        names = [name for name in names if name not in self.merged_adapters]
        if names:
            warnings.warn(
                f"Already following adapters were merged {','.join(self.merged_adapters)}. You are now additionally "
                f"merging {','.join(names)}.",
                stacklevel=3,
            )
        else:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
        return names

    @property
    def is_untied(self) -> bool:
        """The base layer has a weight of its own in place of one that it shared, see :meth:`own_weight`."""
        return self._shared_weight is not None

    def check_mergeable(self, action: str) -> Tensor:
        """The base weight; ValueError while adapters are off, NotImplementedError where nothing can be added to it."""
        if self._disabled:
            raise ValueError(f"{action}: adapters are disabled, enable them first")
        weight = self.base_layer.weight
        if type(weight) is not nn.Parameter or weight.layout is not torch.strided or not weight.is_floating_point():
            raise NotImplementedError(
                f"{action}: the base weight must be a plain floating-point tensor, got {type(weight).__name__} of "
                f"{weight.dtype} in {type(self.base_layer).__name__}; merging into quantised or sharded weights is not "
                "built"
            )
        return weight

    # What the models read from a linear layer -------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Linear:
        return self.base_layer

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: T5 and others look at its dtype."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias
