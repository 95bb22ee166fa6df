"""AdaLoRA around a frozen linear layer. State dict, initial weights, scaling and merging are HF PEFT's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Dropout

from .. import ops
from .adapter import remove_entry
from .arguments import check_alpha_and_dropout
from .base import copier, has_only_forward, is_conv1d, match_base, own_parameters, plain_weights
from .by_row import forget_adapter, rows_for
from .merging import MergeableLayer
from .shared_input import Arguments, SharedInput, op_arguments, rejoin
from .svd import PrunedFactors, RankScale, evaluates, fold_scale, rank_scale, select_ranks

# The dropout module that has to be called, if any, and ``a, b, scale, dropout_p, training``.
_Adapter = tuple[nn.Module | None, tuple[Tensor, Tensor, RankScale, float, bool]]


class AdaLoraLinear(MergeableLayer):
    r"""A frozen linear layer with AdaLoRA adapters by name:
    :math:`y = base(x) + \sum_i drop_i(x) A_i^T \, \mathrm{diag}(s_i E_i) \, B_i^T`.

    Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", eq. 3, where A is Q, B is P and
    E is Lambda. :math:`s = alpha / (ranknum + 10^{-5})`, where ranknum is the rank at the start. A rank is pruned by
    setting its E to 0 (:class:`pyfused.rank_allocator.RankAllocator`). State dict: ``base_layer.*``, ``lora_A.<name>``
    ``[r, in_features]``, ``lora_B.<name>`` ``[out_features, r]``, ``lora_E.<name>`` ``[r, 1]``, ``ranknum.<name>``
    ``[1]``, which is not trained.

    In evaluation, where no gradients of the adapter are asked for, pruned ranks are left out of the computation; in
    training, after :meth:`prune`.

    Args:
        linear: the layer to adapt, an ``nn.Linear`` or a subclass (quantised layers), or transformers' ``Conv1D``;
            frozen by this call.
        init_r: rank at the start, at least 0.
        lora_alpha: numerator of the scaling; where it is not above 0, ``init_r`` is.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        init_lora_weights: True: A and B normal with standard deviation 0.02, E zero. False: all three normal with 1, so
            the adapter changes the output from the start. Draws the numbers that HF PEFT draws for the same seed.
        ranks: which of the ``init_r`` ranks are there, where some were removed before; None: all.
        adapter_name: name of this first adapter, which is active.
        autocast_adapter_dtype: keep the adapter of a 16-bit (or 8-bit floating) layer in float32; otherwise it has the
            layer's dtype. In both cases the initial values are rounded to the layer's dtype.

    Attributes:
        ranks: for each adapter, which of its first ``init_r`` ranks are there; True for as many as A has rows.

    Raises:
        TypeError: ``linear`` is no linear layer, or an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    containers = ("lora_A", "lora_B", "lora_E", "ranknum")
    follows_rows = True
    place = 1
    _shared_input: SharedInput | None = None

    def __init__(
        self,
        linear: nn.Module,
        init_r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
        ranks: Sequence[bool] | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        features = linear_features(linear)
        super().__init__(linear, adapter_name)
        self.in_features, self.out_features = features
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout = nn.ModuleDict()
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.lora_E = nn.ParameterDict()
        self.ranknum = nn.ParameterDict()
        self.ranks: dict[str, list[bool]] = {}
        self._kept: dict[str, tuple[list[int], Tensor]] = {}
        self._pruned = PrunedFactors()
        self.add_adapter(
            adapter_name, init_r, lora_alpha, lora_dropout, init_lora_weights, ranks, autocast_adapter_dtype
        )
        linear.requires_grad_(False)
        self.train(linear.training)

    def train(self, mode: bool = True) -> AdaLoraLinear:
        self._pruned.clear()
        return super().train(mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rejoin(self)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[..., in_features]`` -> ``[..., out_features]`` in the dtype of the base layer's output.

        One fused op for the base and the first active adapter where calling the base would do nothing but
        a linear layer on plain tensors; else the base is called (with ``args`` and ``kwargs``), the adapters are added.
        """
        if self._looks_for_rows:
            rows = rows_for(self)
            if rows is not None:
                return rows.linear(self, x, *args, **kwargs)
        adapters, y = self._adapters(x), None
        if adapters and not (args or kwargs):
            arguments = self._first_arguments(x, adapters[0])
            if arguments is not None:
                if len(adapters) == 1 and self._shared_input is not None and not torch.compiler.is_compiling():
                    return self._shared_input.linear(self, x, arguments)
                y = ops.lora_linear(x, *op_arguments(arguments))
                adapters = adapters[1:]
        if y is None:
            y = self._modules["base_layer"](x, *args, **kwargs)
        if adapters and x.dtype != y.dtype:  # quantised layers may change the dtype
            x = x.to(y.dtype)
        return self._add(y, x, adapters)

    def _add(self, y: Tensor, x: Tensor, adapters: list[_Adapter]) -> Tensor:
        for dropout, (a, b, scale, *options) in adapters:
            y = ops.lora_delta(y, x if dropout is None else dropout(x), *scale.factors(a, b), *options)
        return y

    def fused_arguments(self, x: Tensor) -> Arguments | None:
        """As :meth:`pyfused.nn.LoraLinear.fused_arguments`, with a :class:`RankScale` for a scale."""
        adapters = self._adapters(x)
        return self._first_arguments(x, adapters[0]) if len(adapters) == 1 else None

    def _first_arguments(self, x: Tensor, adapter: _Adapter) -> Arguments | None:
        plain = plain_weights(self._called_base())
        dropout, factors = adapter
        # Where F.linear would refuse x's dtype, the base layer is called and says so itself.
        if plain is None or dropout is not None:
            return None
        if x.dtype != plain[0].dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        return (*plain, *factors)

    def add_adapters(self, y: Tensor, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """The base layer's y with these adapters, one after the other."""
        return self._add(y, x, self._adapters(x, adapter_names))

    def table_entry(self, adapter_name: str) -> ops.LoraAdapter | None:
        """An adapter for ``ops.LoraTable``; None where it has no ranks, or its dropout has to be called."""
        adapter = self._arguments(adapter_name, self.lora_A[adapter_name])
        if adapter is None or adapter[0] is not None:
            return None
        a, b, scale, dropout_p, _ = adapter[1]
        factors = scale.factors(a, b)
        a, b = self._pruned.folded(adapter_name, factors) if factors is scale.known else fold_scale(*factors)
        return ops.LoraAdapter(a, b, 1.0, dropout_p) if b.stride(-1) == 1 else None

    @torch.no_grad()
    def folded_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """``a [r, in]`` in fp32 or more and ``b [out, r]`` whose product is the change of weight; no pruned ranks."""
        a, b, e, ranknum = (own_parameters(self._modules[key])[adapter_name] for key in self.containers)
        scale = rank_scale(e, ranknum, self.scaling[adapter_name])
        return fold_scale(*select_ranks(a, b, scale, scale.nonzero().view(-1)))

    def _adapters(self, x: Tensor, names: Sequence[str] | None = None) -> list[_Adapter]:
        """Those of ``names``, by default of the active ones, that have ranks."""
        found = (self._arguments(name, x) for name in (self._in_forward if names is None else names))
        return [adapter for adapter in found if adapter is not None]

    def _arguments(self, name: str, x: Tensor) -> _Adapter | None:
        """None without ranks. Read without nn.Module's slow attribute lookup."""
        modules = self._modules
        a, b, e, ranknum = (own_parameters(modules[key])[name] for key in self.containers)
        if a.shape[0] == 0:
            return None
        scaling = self.scaling[name]
        if evaluates(self.training, x, a, b, e, ranknum):
            factors = self._pruned.get(name, a, b, e, ranknum, scaling)
            if factors is None:
                return None
            scale = RankScale(e, ranknum, scaling, known=factors)
        else:
            scale = RankScale(e, ranknum, scaling, self._kept_ranks(name, a))
        dropout = modules["lora_dropout"]._modules[name]
        if type(dropout) is not Dropout or not has_only_forward(dropout):
            return dropout, (a, b, scale, 0.0, False)
        return None, (a, b, scale, dropout.p, dropout.training)

    def _kept_ranks(self, name: str, a: Tensor) -> Tensor | None:
        """The indices of :meth:`prune` on a's device."""
        if name not in self._kept:
            return None
        places, kept = self._kept[name]
        if kept.device != a.device:
            kept = kept.to(a.device)
            self._kept[name] = places, kept
        return kept

    # Adapters ---------------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        init_r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
        ranks: Sequence[bool] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; it is neither active nor trainable until :meth:`set_adapter`. Arguments as for the class."""
        self._check_new(adapter_name)
        check_adalora_arguments(init_r, ranks, lora_alpha, lora_dropout)
        ranks = [True] * init_r if ranks is None else list(ranks)
        rows = sum(ranks)
        # The order of the draws is HF PEFT's; it draws ranknum, too.
        a, e = torch.randn(rows, self.in_features), torch.randn(rows, 1)
        b, ranknum = torch.randn(self.out_features, rows), torch.randn(1).fill_(init_r)
        if init_lora_weights:
            e.zero_()
            a.normal_(0.0, 0.02)
            b.normal_(0.0, 0.02)
        trainable = adapter_name in self._active_adapters
        for name, tensor in (("lora_A", a), ("lora_B", b), ("lora_E", e), ("ranknum", ranknum)):
            tensor = match_base(tensor, self.get_base_layer(), autocast_adapter_dtype)
            parameter = nn.Parameter(tensor, requires_grad=trainable and name != "ranknum")
            self._modules[name][adapter_name] = parameter
        for attribute, value in self._settings(init_r, lora_alpha, lora_dropout, ranks).items():
            getattr(self, attribute)[adapter_name] = value
        self._update_forward()

    def _settings(self, init_r: int, lora_alpha: float, lora_dropout: float, ranks: list[bool]) -> dict[str, Any]:
        """What an adapter has beside its tensors, by attribute."""
        return {
            "ranks": ranks,
            "lora_alpha": lora_alpha,
            "scaling": lora_alpha if lora_alpha > 0 else float(init_r),
            "lora_dropout": nn.Dropout(lora_dropout).train(self.training),
        }

    @torch.no_grad()
    def detached_adapter(
        self,
        tensors: Mapping[str, Tensor],
        *,
        autocast_adapter_dtype: bool = True,
        init_r: int = 12,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: bool = True,
        ranks: Sequence[bool] | None = None,
    ) -> dict[str, Any]:
        check_adalora_arguments(init_r, ranks, lora_alpha, lora_dropout)
        ranks = [True] * init_r if ranks is None else list(ranks)
        all_tensors = {**tensors, "ranknum": torch.tensor([float(init_r)])}
        parameter = copier(self.get_base_layer(), autocast_adapter_dtype)
        parts = {name: parameter(all_tensors[name]) for name in self.containers}
        return parts | self._settings(init_r, lora_alpha, lora_dropout, ranks)

    @property
    def r(self) -> dict[str, int]:
        """How many ranks each adapter has, pruned ones included as long as :meth:`keep_ranks` did not remove them."""
        return {name: a.shape[0] for name, a in self.lora_A.items()}

    def prune(self, adapter_name: str, kept: Sequence[bool] | None) -> None:
        """Leave ranks out in training as well, from now on; their E has to be 0. They get no gradients from here.

        Args:
            kept: for each of the ``r`` ranks whether it stays; None: all.
        """
        places = [] if kept is None else [place for place, stays in enumerate(kept) if stays]
        known = self._kept.get(adapter_name)
        if kept is None or all(kept):
            self._kept.pop(adapter_name, None)
        elif known is None or known[0] != places:
            device = self.lora_A[adapter_name].device
            self._kept[adapter_name] = places, torch.tensor(places, dtype=torch.int64, device=device)

    @torch.no_grad()
    def keep_ranks(self, adapter_name: str, kept: Sequence[bool]) -> None:
        """Remove the other ranks: the adapter has new, smaller parameters, which an optimizer does not know.

        Args:
            kept: for each of the ``r`` ranks whether it stays. ranknum does, so that the ranks left act as before.
        """
        a, b, e = (self._modules[name][adapter_name] for name in ("lora_A", "lora_B", "lora_E"))
        if len(kept) != a.shape[0]:
            raise ValueError(f"kept must have {a.shape[0]} entries, one for each rank, got {len(kept)}")
        left = iter(kept)
        self.ranks[adapter_name] = [there and next(left) for there in self.ranks[adapter_name]]
        kept = torch.tensor(kept, dtype=torch.bool, device=a.device)
        for name, old, new in (("lora_A", a, a[kept]), ("lora_B", b, b[:, kept]), ("lora_E", e, e[kept])):
            self._modules[name][adapter_name] = nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
        self._kept.pop(adapter_name, None)

    def _adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in self.containers[:3]:  # ranknum is never trained
            yield from self._modules[name].items()

    def _remove(self, adapter_name: str) -> None:
        forget_adapter(self, adapter_name)
        super()._remove(adapter_name)
        remove_entry(self.lora_dropout, adapter_name)
        for values in (self.ranks, self.lora_alpha, self.scaling):
            del values[adapter_name]
        self._kept.pop(adapter_name, None)
        self._pruned.forget(adapter_name)

    def adapter_keys(self, adapter_name: str) -> dict[str, str]:
        return {name: f"{name}.{adapter_name}" for name in self.containers[:3]}

    # Merging ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def delta_weight(self, adapter_name: str) -> Tensor:
        """``B diag(E) A * scaling / (ranknum + 1e-5)`` as the base layer's weight lies, in the adapter's dtype."""
        a, b, e, ranknum = (own_parameters(self._modules[key])[adapter_name] for key in self.containers)
        delta = b @ (a * e)
        return (delta.T if is_conv1d(self.get_base_layer()) else delta) * self.scaling[adapter_name] / (ranknum + 1e-5)

    def _merge_into(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        tensors["weight"] += self.delta_weight(adapter_name)

    def _take_out(self, tensors: dict[str, Tensor], adapter_name: str) -> None:
        tensors["weight"] -= self.delta_weight(adapter_name)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """How many features go into a linear layer and come out of it; TypeError for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return tuple(module.weight.shape)
    raise TypeError(f"AdaLoraLinear: linear must be an nn.Linear or transformers' Conv1D, got {type(module).__name__}")


def check_adalora_arguments(init_r: int, ranks: Sequence[bool] | None, lora_alpha: float, lora_dropout: float) -> None:
    """TypeError or ValueError where an AdaLoRA adapter cannot be made of these values."""
    if isinstance(init_r, bool) or not isinstance(init_r, int):
        raise TypeError(f"init_r must be an integer, got {init_r!r}")
    if init_r < 0:
        raise ValueError(f"init_r must be at least 0, got {init_r}")
    if ranks is not None and (len(ranks) != init_r or not all(isinstance(there, bool) for there in ranks)):
        raise ValueError(f"ranks must be None or init_r = {init_r} bools, got {ranks!r}")
    check_alpha_and_dropout(lora_alpha, lora_dropout)
