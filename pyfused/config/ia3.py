"""IA3's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PeftConfig, PeftType, check_module_names, names_or_pattern


@dataclass
class IA3Config(PeftConfig, method=PeftType.IA3):
    """IA3 (Liu et al. 2022) on linear layers and convolutions.

    Attributes:
        target_modules: which layers. Names, each of which matches whole or as the end of a layer's name after a dot; or
            one regular expression that matches the whole name; or "all-linear", every linear layer but the output
            layer. None: the usual ones of a known architecture.
        exclude_modules: layers to leave out, names or a regular expression like ``target_modules``.
        feedforward_modules: those of the target modules whose input is scaled, and not their output: names, each of
            which matches as the end of a layer's name, or a regular expression that matches the whole name. [] for
            none. None: the usual ones of a known architecture.
        fan_in_fan_out: True for transformers' ``Conv1D``, False for ``nn.Linear``; set to what it must be, with a
            warning.
        modules_to_save: modules to train in full and save with the adapter, by the end of their names.
        init_ia3_weights: start with ones, so that the adapter changes nothing at first; False: with normal numbers.
    """

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    feedforward_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_module_names(self)
        self.feedforward_modules = names_or_pattern("feedforward_modules", self.feedforward_modules)
        if not isinstance(self.init_ia3_weights, bool):
            raise TypeError(f"init_ia3_weights must be True or False, got {self.init_ia3_weights!r}")
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            others = sorted(self.feedforward_modules - self.target_modules)
            if others:
                raise ValueError(f"feedforward_modules must be a subset of target_modules, which lacks {others}")
