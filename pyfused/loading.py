"""Adapters in folders, as :class:`pyfused.PeftModel` asks for them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from .checkpoint import read_adapter
from .config import PeftConfig
from .integrations import adapterhub
from .methods import method_of


def read_saved(
    folder: Path, is_trainable: bool, config: PeftConfig | None, format: str, model: nn.Module
) -> tuple[PeftConfig, dict[str, Any]]:
    """Configuration and tensors in a folder; ``config``, where given, in place of the one there."""
    check_format(format, ("peft", "adapterhub"))
    theirs = format == "adapterhub"
    if config is None:
        config = adapterhub.read_config(folder) if theirs else PeftConfig.from_pretrained(folder)
    config = copy.deepcopy(config)
    config.inference_mode = not is_trainable
    return config, adapterhub.read_weights(folder, model) if theirs else read_adapter(folder)


def check_format(format: str, known: Sequence[str]) -> None:
    if format not in known:
        raise ValueError(f"format must be {' or '.join(map(repr, known))}, got {format!r}")


def check_same_meaning(own: PeftConfig, saved: PeftConfig, source: str) -> None:
    """Weights are worth what the configuration makes of them; what shows in a file's shapes need not be asked."""
    for name in ("peft_type", *method_of(own).meaning):
        if getattr(own, name) != getattr(saved, name):
            raise ValueError(
                f"{source}: {name} is {getattr(saved, name)!r} in the file and {getattr(own, name)!r} in the model; "
                "load it under another name"
            )
