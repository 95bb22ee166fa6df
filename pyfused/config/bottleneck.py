"""Bottleneck adapters: AdapterHub's fields, in a file of the layout that all methods have."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..nn.bottleneck import check_bottleneck_arguments
from .base import PeftConfig, PeftType, check_module_names


@dataclass
class BottleneckConfig(PeftConfig, method=PeftType.BOTTLENECK):
    """Bottleneck adapters; fields and meaning are those of AdapterHub ``adapters`` 1.3 (``BnConfig``).

    With h the output of a sub-layer, x the residual stream that enters it, LN a post-norm model's layer norm, and
    A the adapter: ``houlsby()`` makes ``LN(h + A(h) + x)``, ``pfeiffer()`` ``LN(A(LN(h + x)) + h + x)`` and
    ``parallel()`` ``LN(h + A(x) + x)``; in pre-norm models LN is left out. The defaults are ``houlsby()``'s.

    Attributes:
        mh_adapter, output_adapter: adapters behind the attention, behind the feed-forward part.
        reduction_factor: width over bottleneck width; or a dict from layer numbers as strings, and "default".
        non_linearity: the activation, see :func:`pyfused.ops.bottleneck`.
        original_ln_before: the adapter's input is ``LN(h + x)`` (``h + x``), else h.
        original_ln_after: ``LN(... + x)`` (``... + x``) behind the adapter. False in pre-norm models takes x off, in
            fp32 and fp64 alone, unless the residual is ``h + x``.
        residual_before_ln: True: the adapter's residual is h; False: its input; "post_add", in post-norm models:
            ``h + x`` where ``original_ln_before``.
        ln_before, ln_after, adapter_residual_before_ln, use_gating, scaling, dropout, init_weights: see
            :class:`pyfused.nn.Bottleneck`.
        is_parallel: the adapter's input is x and its residual h, added behind ``ln_after``, whatever
            ``original_ln_before``, ``residual_before_ln`` and ``adapter_residual_before_ln`` say.
        leave_out: numbers of layers without adapters; a decoder's go on from its encoder's.
        target_modules: names of modules as in :class:`pyfused.LoraConfig`, in any model, in place of ``mh_adapter`` and
            ``output_adapter``: their output h becomes ``h + A(h)``, or ``h + A(input)`` where ``is_parallel``.
        exclude_modules, modules_to_save: as in :class:`pyfused.LoraConfig`.

    The other fields are AdapterHub's; they are at their defaults, or raise NotImplementedError.
    """

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float | dict[str, float] = 16
    non_linearity: str = "swish"
    original_ln_before: bool = False
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: list[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    stochastic_depth: float = 0.0
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None

    _not_built: ClassVar[tuple[str, ...]] = (
        "init_weights_seed",
        "inv_adapter",
        "cross_adapter",
        "phm_layer",
        "stochastic_depth",
    )

    @classmethod
    def houlsby(cls, **changes: Any) -> BottleneckConfig:
        """Houlsby et al. 2019, AdapterHub's ``DoubleSeqBnConfig``: after attention and feed-forward part."""
        return cls(**changes)

    @classmethod
    def pfeiffer(cls, **changes: Any) -> BottleneckConfig:
        """Pfeiffer et al. 2020, AdapterHub's ``SeqBnConfig``: after the feed-forward part."""
        fields = {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
        return cls(**(fields | changes))

    @classmethod
    def parallel(cls, **changes: Any) -> BottleneckConfig:
        """He et al. 2021, AdapterHub's ``ParBnConfig``: beside the feed-forward part, scaled by 4."""
        fields = {
            "mh_adapter": False,
            "non_linearity": "relu",
            "reduction_factor": 2,
            "init_weights": "mam_adapter",
            "is_parallel": True,
            "scaling": 4.0,
        }
        return cls(**(fields | changes))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self._not_built:
            if getattr(self, name):
                raise NotImplementedError(f"BottleneckConfig: {name} is not built yet, got {getattr(self, name)!r}")
        check_bottleneck_arguments(self.non_linearity, self.scaling, self.dropout, self.init_weights)
        if self.residual_before_ln not in (True, False, "post_add"):
            raise ValueError(f"residual_before_ln must be True, False or 'post_add', got {self.residual_before_ln!r}")
        factors = self.reduction_factor if isinstance(self.reduction_factor, dict) else {"": self.reduction_factor}
        for value in factors.values():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"reduction_factor must be a positive number or a dict of such, got {value!r}")
        if isinstance(self.reduction_factor, dict):
            self.reduction_factor = {str(name): value for name, value in self.reduction_factor.items()}
        if isinstance(self.leave_out, (str, int)) or not all(isinstance(item, int) for item in self.leave_out):
            raise TypeError(f"leave_out must be a list of integers, got {self.leave_out!r}")
        self.leave_out = list(self.leave_out)
        check_module_names(self)
        if self.target_modules is None and not (self.mh_adapter or self.output_adapter):
            raise ValueError("mh_adapter and output_adapter are both False, and target_modules names no modules")

    def bottleneck_size(self, hidden_size: int, layer: int | None) -> int:
        """The bottleneck's width in a layer of this number; ValueError where ``reduction_factor`` does not tell."""
        factor = self.reduction_factor
        if isinstance(factor, dict):
            factor = factor.get(str(layer), factor.get("default"))
            if factor is None:
                raise ValueError(f"reduction_factor names neither layer {layer} nor 'default'")
        return max(int(hidden_size // factor), 1)
