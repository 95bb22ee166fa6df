"""LoRA around a frozen linear layer. State dict, initial weights and scaling are those of HF PEFT's layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Dropout, Linear

from .. import ops
from ..ops.multi_lora import sums_as_lora_linear
from .arguments import check_lora_arguments
from .base import adapter_device, has_only_forward, is_plain_linear, lora_arguments, plain_weights
from .by_row import RowAdapters, rows_for
from .dora import check_dora_base, dora_linear
from .lora_init import changes_base, check_init_fits, decompose, initialise, initialise_orthogonal
from .lora_layer import LoraLayer
from .shared_input import Arguments, SharedInput, rejoin


class LoraLinear(LoraLayer):
    r"""A frozen ``nn.Linear`` with LoRA adapters by name: :math:`y = base(x) + \sum_i s_i \, drop_i(x) A_i^T B_i^T`.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3. The sum goes over the active adapters
    in the order in which they were set; :math:`s = alpha / r`, or :math:`alpha / \sqrt r` with ``use_rslora``
    (Kalajdzievski 2023). State dict: ``base_layer.*``, ``lora_A.<name>.weight`` ``[r, in_features]``,
    ``lora_B.<name>.weight`` ``[out_features, r]``, with ``lora_bias`` ``lora_B.<name>.bias``, with ``use_dora``
    ``lora_magnitude_vector.<name>.weight``, both ``[out_features]``.

    Args:
        linear: the layer to adapt, an ``nn.Linear`` or a subclass (quantised layers); frozen by this call. For
            transformers' ``Conv1D`` see :class:`LoraConv1D`.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        use_rslora: divide alpha by the square root of r.
        use_dora: a learned magnitude for each output of the adapted layer (Liu et al. 2024), see
            :class:`pyfused.nn.lora_layer.LoraLayer`. Dropout is then on the base product, too, of which training
            computes two.
        lora_bias: a learned bias on B, scaled as B's product is. Not with ``use_dora``, and only with
            ``init_lora_weights`` True or False.
        init_lora_weights: True: A Kaiming-uniform, B zero. "gaussian": A normal with standard deviation 1/r, B zero.
            False: both as ``nn.Linear`` makes them, so the adapter changes the output from the start. "orthogonal":
            both random with B A = 0, for an even r. "pissa", "pissa_niter_N", "olora": a part of the base weight, which
            is taken out of the base, see :func:`pyfused.nn.lora_init.decompose`. Draws the numbers that HF PEFT draws
            for the same seed.
        adapter_name: name of this first adapter, which is active.
        autocast_adapter_dtype: keep the adapter of a 16-bit (or 8-bit floating) layer in float32; otherwise it has the
            layer's dtype. In both cases the initial values are rounded to the layer's dtype.

    Raises:
        TypeError: ``linear`` is no ``nn.Linear``, or an argument has the wrong type.
        ValueError: an argument is outside its range.
        NotImplementedError: a variant of LoRA that is not built.
    """

    containers = ("lora_A", "lora_B", "lora_magnitude_vector")
    follows_rows = True

    # Whether a base need not be called: the op takes its weight and bias.
    _is_plain = staticmethod(is_plain_linear)
    # Whom it may share a pass over x with; set where a model's names of layers suggest it.
    _shared_input: SharedInput | None = None

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
        super().__init__(
            linear,
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
    def features(cls, linear: nn.Module) -> tuple[int, int]:
        """``in_features, out_features`` of a layer; TypeError for what this class cannot adapt."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{cls.__name__}: linear must be an nn.Linear, got {type(linear).__name__}")
        return linear.in_features, linear.out_features

    @classmethod
    def adapter_shapes(
        cls, linear: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors on such a layer, by their names in its file."""
        in_features, out_features = cls.features(linear)
        shapes = {"lora_A.weight": (r, in_features), "lora_B.weight": (out_features, r)}
        shapes |= {"lora_B.bias": (out_features,)} if lora_bias else {}
        return shapes | ({"lora_magnitude_vector": (out_features,)} if use_dora else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rejoin(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]`` in the dtype of the base layer's output.

        One fused op for the base and the first active adapter where calling the base would do nothing but
        ``F.linear`` on plain tensors; else the base is called (with ``args`` and ``kwargs``), the adapters are added.
        An adapter whose modules were given hooks or replaced is called, too.
        """
        if self._looks_for_rows:
            rows = rows_for(self)
            if rows is not None:
                y = None if rows.alone is None or args or kwargs else self._with_one(rows, x)
                return rows.linear(self, x, *args, **kwargs) if y is None else y
        if not (args or kwargs):
            arguments = self.fused_arguments(x)
            if arguments is not None:
                if self._shared_input is None or torch.compiler.is_compiling():
                    return ops.lora_linear(x, *arguments)
                return self._shared_input.linear(self, x, arguments)
        base, names = self._modules["base_layer"], self._in_forward
        if not names:
            return base(x, *args, **kwargs)
        if not (args or kwargs):
            first = self._first(x, base, names[0])
            if first is not None:
                return self.add_adapters(first, x, names[1:])
        y = base(x, *args, **kwargs)
        # quantised layers may change the dtype
        return self.add_adapters(y, x if x.dtype == y.dtype else x.to(y.dtype), names)

    def _with_one(self, rows: RowAdapters, x: Tensor) -> Tensor | None:
        """The layer with the one adapter of all samples, where the op for one gives the bits of that for several."""
        if self._disabled or not (self.has_adapter(rows.alone) and sums_as_lora_linear(x)):
            return None
        arguments = self._first_arguments(x, self._modules["base_layer"], rows.alone)
        if arguments is None or not x.is_cpu:
            return None
        rows.index(x)  # checks the number of names
        return ops.lora_linear(x, *arguments)

    def fused_arguments(self, x: Tensor) -> Arguments | None:
        """What ``ops.lora_linear`` takes between x and the seed, where that call is all that ``forward(x)`` is.

        None with no or several active adapters, or where the base or the adapter's modules have to be called.
        """
        names = self._in_forward
        return self._first_arguments(x, self._modules["base_layer"], names[0]) if len(names) == 1 else None

    def _first(self, x: Tensor, base: nn.Module, name: str) -> Tensor | None:
        """The base layer and an adapter without a call of the base; None where it has to be called."""
        arguments = self._first_arguments(x, base, name)
        if arguments is not None:
            return ops.lora_linear(x, *arguments)
        form, weights = self._forms.get(name), plain_weights(base)
        if form is None or weights is None:
            return None
        weight, bias = weights
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        if form == "dora":
            return dora_linear(self, x, name, None)
        adapter = self._arguments(name)
        if adapter is None:
            return None
        extra = self.lora_B[name].bias * self.scaling[name]
        return ops.lora_linear(x, weight, (extra if bias is None else bias + extra).to(weight.dtype), *adapter)

    def _first_arguments(self, x: Tensor, base: nn.Module, name: str) -> Arguments | None:
        if name in self._forms:
            return None
        modules = self._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        found = lora_arguments(x, base, a, b, modules["lora_dropout"]._modules[name], self.scaling[name])
        if found is not None:
            return found
        if not self._is_plain(base):
            return None
        parameters = base._parameters
        weight = parameters["weight"].t() if self.output_dim else parameters["weight"]
        # Where F.linear would refuse x's dtype, the base layer is called and says so itself.
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        adapter = self._arguments(name)
        return None if adapter is None else (weight, parameters["bias"], *adapter)

    def add_adapters(self, y: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """The base layer's y with these adapters, one after the other."""
        for name in adapter_names:
            form = self._forms.get(name)
            if form == "dora":
                y = dora_linear(self, x, name, y)
                continue
            adapter = self._arguments(name)
            if adapter is not None:
                y = ops.lora_delta(y, x, *adapter)
                if form == "bias":
                    y = y + (self.lora_B[name].bias * self.scaling[name]).to(y.dtype)
                continue
            a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            delta = b(a(dropout(x.to(next(a.parameters()).dtype)))) * self.scaling[name]
            y = (y + delta).to(y.dtype)
        return y

    def _arguments(self, name: str) -> tuple[Tensor, Tensor, float, float, bool] | None:
        """``a, b, scale, dropout_p, training`` of an adapter; None where its modules have to be called.

        Read without nn.Module's slow attribute lookup; ``lora_arguments`` repeats what is asked here.
        """
        modules = self._modules
        a, b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        if (
            type(a) is not Linear
            or type(b) is not Linear
            or type(dropout) is not Dropout
            or not has_only_forward(a, b, dropout)
        ):
            return None
        a, b, scale = a._parameters["weight"], b._parameters["weight"], self.scaling[name]
        if type(scale) is Tensor:  # one number, see pyfused.hotswap
            scale = scale.expand(a.shape[0])
        return a, b, scale, dropout.p, dropout.training

    def table_entry(self, adapter_name: str) -> ops.LoraAdapter | None:
        """An adapter for ``ops.LoraTable``; None where it is more than A and B, or its modules have to be called."""
        arguments = None if adapter_name in self._forms else self._arguments(adapter_name)
        if arguments is None or isinstance(arguments[2], Tensor):
            return None
        a, b, scale, dropout_p, _ = arguments
        return ops.LoraAdapter(a, b, scale, dropout_p) if a.stride(-1) == 1 and b.stride(-1) == 1 else None

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
        check_init_fits(init_lora_weights, r, self.base_layer.weight)
        if use_dora:
            check_dora_base(self.base_layer)
        # The order of the draws is HF PEFT's: A and B as nn.Linear makes them, then what init_lora_weights draws.
        a = nn.Linear(self.in_features, r, bias=False)
        b = nn.Linear(r, self.out_features, bias=lora_bias)
        self._register(adapter_name, r, lora_alpha, lora_dropout, use_rslora)
        if changes_base(init_lora_weights):
            weight = self._weight_matrix(self.base_layer.weight.detach())
            parts = decompose(weight, r, self.scaling[adapter_name], init_lora_weights)
            a.weight.data, b.weight.data, rest = parts
            self.base_layer.weight.data = (rest.t() if self.output_dim else rest).contiguous()
            self._forget_norms()
        elif init_lora_weights == "orthogonal":
            initialise_orthogonal(a, b)
        else:
            initialise(a, b, init_lora_weights, r)
        self._add_modules(adapter_name, a, b, use_dora, lora_bias, autocast_adapter_dtype)

    def _detached_factors(
        self, tensors: Mapping[str, Tensor], parameter: Callable[[Tensor], nn.Parameter]
    ) -> dict[str, Any]:
        bias = tensors.get("lora_B.bias")
        return {
            "lora_A": _linear(parameter(tensors["lora_A.weight"]), None),
            "lora_B": _linear(parameter(tensors["lora_B.weight"]), None if bias is None else parameter(bias)),
        }

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        if self._arguments(adapter_name) is not None:
            return a.weight, b.weight
        # Weights that hooks bring (sharded, offloaded) are there while a module is called.
        columns = a(torch.eye(self.in_features, dtype=next(a.parameters()).dtype, device=adapter_device(a)))
        return columns.t(), b(torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)).t()


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """An ``nn.Linear`` of these; its constructor would draw others first."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.out_features, linear.in_features = weight.shape
    linear.weight, linear.bias = weight, bias
    return linear
