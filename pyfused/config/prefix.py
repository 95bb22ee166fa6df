"""Prefix tuning's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from .base import PeftType
from .prompt import PromptLearningConfig


@dataclass
class PrefixTuningConfig(PromptLearningConfig, method=PeftType.PREFIX_TUNING):
    """Prefix tuning (Li and Liang 2021): trained keys and values in front of those of every layer.

    Attributes:
        init_weights: None, normal numbers; "zero", keys and values of zeros.
        encoder_hidden_size: width of the hidden layer of the projection; None: ``token_dim``.
        prefix_projection: train an embedding for each virtual token and a two-layer network that makes all keys and
            values of it. Only what it makes is saved, so such an adapter cannot be trained on from its file.
    """

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights must be None or 'zero', got {self.init_weights!r}")
        if not isinstance(self.prefix_projection, bool):
            raise TypeError(f"prefix_projection must be True or False, got {self.prefix_projection!r}")
        size = self.encoder_hidden_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise TypeError(f"encoder_hidden_size must be an integer, got {size!r}")
        if size is not None and size < 1:
            raise ValueError(f"encoder_hidden_size must be at least 1, got {size}")
