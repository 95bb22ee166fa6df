"""Checks of arguments that modules and configurations share."""

from __future__ import annotations

import math
import re

from torch import nn


def check_adapter_name(name: str) -> None:
    """TypeError or ValueError where ``name`` cannot name an adapter."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a string, got {type(name).__name__}")
    if not name or "." in name or name == "__base__" or name in _TAKEN_NAMES:
        raise ValueError(
            "adapter_name must not be empty, hold a dot, be '__base__' or a name that nn.ModuleDict or "
            f"nn.ParameterDict uses, got {name!r}"
        )


# Adapters are kept in these under their names, and some of these names exist on an object only.
_TAKEN_NAMES = frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))


def check_lora_arguments(
    r: int, lora_alpha: float, lora_dropout: float, use_dora: bool, lora_bias: bool, init_lora_weights: bool | str
) -> None:
    """TypeError, ValueError or NotImplementedError where a LoRA adapter cannot be made of these values."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an integer, got {r!r}")
    if r <= 0:
        raise ValueError(f"r must be at least 1, got {r}")
    check_alpha_and_dropout(lora_alpha, lora_dropout)
    if lora_bias and use_dora:
        raise ValueError("lora_bias: DoRA has none; set lora_bias or use_dora to False")
    if lora_bias and not isinstance(init_lora_weights, bool):
        raise ValueError(f"lora_bias needs init_lora_weights True or False, got {init_lora_weights!r}")
    check_init(init_lora_weights)


def check_alpha_and_dropout(lora_alpha: float, lora_dropout: float) -> None:
    for name, value in (("lora_alpha", lora_alpha), ("lora_dropout", lora_dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")


_KNOWN_INITS = ("eva", "corda", "loftq", "mica", "lora_ga")


def check_init(init_lora_weights: bool | str) -> None:
    """NotImplementedError for an initialisation that HF PEFT has and pyfused has not, ValueError for an unknown one."""
    if isinstance(init_lora_weights, bool) or init_lora_weights in ("gaussian", "pissa", "olora", "orthogonal"):
        return
    if isinstance(init_lora_weights, str) and re.fullmatch(r"pissa_niter_\d+", init_lora_weights):
        return
    if isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_KNOWN_INITS):
        raise NotImplementedError(f"init_lora_weights: {init_lora_weights!r} is not built yet")
    raise ValueError(
        "init_lora_weights must be True, False, 'gaussian', 'orthogonal', 'olora', 'pissa' or 'pissa_niter_' and a "
        f"number, got {init_lora_weights!r}"
    )
