"""One adapter on a Llama without pyfused: HF PEFT's, and bottlenecks, which it lacks, in plain PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import bottleneck_cases
import peft
import torch
from torch import Tensor, nn

from pyfused.reference.bottleneck import activation_name

NAME = "alone"


def eager_adapter(base: nn.Module, method: str, options: dict[str, Any], autocast_adapter_dtype: bool) -> nn.Module:
    """``base`` with an adapter of such a configuration; its parameters are named as in pyfused, for :data:`NAME`."""
    if method == "BottleneckConfig":
        return EagerBottlenecks(base, options, autocast_adapter_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, method)(**options)
        return peft.get_peft_model(base, config, NAME, autocast_adapter_dtype=autocast_adapter_dtype)


class EagerBottlenecks(nn.Module):
    """Around a Llama: hooks that add ``scaling * (W_up f(W_down x + b_down) + b_up)`` where AdapterHub does."""

    def __init__(self, base: nn.Module, options: dict[str, Any], autocast_adapter_dtype: bool) -> None:
        super().__init__()
        self.base, self.options, self.streams = base.requires_grad_(False), options, {}
        dtype = torch.float32 if autocast_adapter_dtype else base.dtype
        width = base.config.hidden_size
        size = int(width // options["reduction_factor"])
        self.activation = activation_name(options["non_linearity"])
        self.parts: dict[str, dict[str, nn.Parameter]] = {}
        for place, block in enumerate(base.model.layers):
            for asked, norm, path in (
                ("mh_adapter", block.input_layernorm, "self_attn.o_proj"),
                ("output_adapter", block.post_attention_layernorm, "mlp"),
            ):
                if options[asked]:
                    key = f"base_model.model.model.layers.{place}.{path}.bottlenecks.{NAME}"
                    shapes = {"adapter_down.0.weight": (size, width), "adapter_down.0.bias": (size,)}
                    shapes |= {"adapter_up.weight": (width, size), "adapter_up.bias": (width,)}
                    self.parts[key] = {name: nn.Parameter(torch.zeros(s, dtype=dtype)) for name, s in shapes.items()}
                    norm.register_forward_pre_hook(lambda _, args, key=key: self.streams.__setitem__(key, args[0]))
                    block.get_submodule(path).register_forward_hook(lambda _, args, h, key=key: self._adapted(key, h))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for key, part in self.parts.items():
            yield from ((f"{key}.{name}", parameter) for name, parameter in part.items())

    def double(self) -> EagerBottlenecks:
        self.base.double()
        for parameter in self.parameters():
            parameter.data = parameter.data.double()
        return self

    def _adapted(self, key: str, h: Tensor) -> Tensor:
        x = self.streams.pop(key)
        if not self.options["is_parallel"]:
            x = h + x if self.options["original_ln_before"] else h
        return bottleneck_cases.eager(
            x, h, *self.parts[key].values(), activation=self.activation, scale=self.options["scaling"]
        )

    def forward(self, *args: Any, **kwargs: Any) -> object:
        return self.base(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> object:
        return self.base.generate(*args, **kwargs)
