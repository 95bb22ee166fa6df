"""AdaLoRA's configuration."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from .base import PeftType
from .lora import LoraConfig

_DEFAULT_R = 8


@dataclass
class AdaLoraConfig(LoraConfig, method=PeftType.ADALORA):
    """AdaLoRA (Zhang et al. 2023) on linear layers: LoRA whose ranks are distributed over the layers while it trains.

    Training calls ``model.update_and_allocate(step)`` in each step. Until ``tinit`` all layers have ``init_r`` ranks;
    then the least important ones of all layers are taken out, and the number of those left falls with the third power
    of the time to ``target_r`` for each layer on average at step ``total_step - tfinal``; the rest of the training is
    with these.

    Attributes:
        target_r: ranks for each layer at the end, on average.
        init_r: ranks of each layer at the start.
        tinit: steps before the first rank is taken out.
        tfinal: steps after the last one is.
        deltaT: between ``tinit`` and the end, ranks are distributed anew in steps that this divides.
        beta1: factor of the running mean of a weight's importance, which is ``abs(weight * gradient)``; in (0, 1).
        beta2: factor of the running mean of the importance's distance from its mean; in (0, 1).
        orth_reg_weight: of the regularisation that is added to the loss of a model with a ``task_type``: the mean of
            ``||A A^T - I||`` and ``||B^T B - I||``.
        total_step: steps of the whole training; it has to be given.
        rank_pattern: for each layer, which of its ranks are left: filled in by ``update_and_allocate``.

    All other fields are those of :class:`LoraConfig`. ``r``, ``use_rslora`` and ``alpha_pattern`` mean nothing here, as
    in HF PEFT, and neither variants of LoRA nor ``lora_bias`` exist.
    """

    rank_pattern: dict[str, list[bool]] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def __post_init__(self) -> None:
        if self.use_dora:
            raise ValueError("use_dora: AdaLoRA does not support DoRA")
        if self.loftq_config:
            raise ValueError("loftq_config: AdaLoRA does not support LoftQ")
        if self.lora_bias:
            raise ValueError("lora_bias: AdaLoRA has no bias")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_lora_weights must be True or False in AdaLoRA, got {self.init_lora_weights!r}")
        super().__post_init__()
        ignored = [name for name in ("use_rslora", "alpha_pattern") if getattr(self, name)]
        if self.r != _DEFAULT_R:
            ignored.append("r (the rank at the start is init_r)")
        if ignored:
            warnings.warn(f"AdaLoraConfig: without a meaning in AdaLoRA: {', '.join(ignored)}", stacklevel=3)
        self._check_schedule()
        for name in ("beta1", "beta2"):
            value = _number(name, getattr(self, name))
            if not 0.0 < value < 1.0:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        if not _number("orth_reg_weight", self.orth_reg_weight) >= 0.0:
            raise ValueError(f"orth_reg_weight must be at least 0, got {self.orth_reg_weight}")

    def _check_schedule(self) -> None:
        if self.total_step is None:
            raise ValueError("total_step: AdaLoRA needs the number of steps of the training, got None")
        least = {"total_step": 1, "init_r": 0, "target_r": 0, "tinit": 0, "tfinal": 0, "deltaT": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {value}")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit must be less than total_step - tfinal, or the schedule has no budgeting phase; got tinit = "
                f"{self.tinit}, total_step = {self.total_step}, tfinal = {self.tfinal}"
            )

    def _check_patterns(self) -> None:
        """``rank_pattern`` is no pattern of names here, and ``alpha_pattern`` means nothing."""
        if self.rank_pattern is None:
            return
        if not isinstance(self.rank_pattern, dict):
            raise TypeError(f"rank_pattern must be a dict or None, got {type(self.rank_pattern).__name__}")
        for name, ranks in self.rank_pattern.items():
            if not isinstance(ranks, list) or not all(isinstance(kept, bool) for kept in ranks):
                raise TypeError(f"rank_pattern must map names to lists of True and False, got {ranks!r} for {name!r}")


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value
