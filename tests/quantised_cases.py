"""A block of two linear layers whose weights bitsandbytes or torchao holds, and one with the same values in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pyfused.nn.quantised import dense_weight

bnb = pytest.importorskip("bitsandbytes")
quantization = pytest.importorskip("torchao.quantization")

KINDS = ("8bit", "4bit", "torchao")


class Block(nn.Module):
    """Two linear layers, bfloat16 in and out; the marks are those that transformers leaves on a quantised model."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.to(torch.bfloat16)
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = kind == "8bit", kind == "4bit"
        if kind == "torchao":
            quantization.quantize_(self, quantization.Int8WeightOnlyConfig())
            return
        for name in ("up", "down"):
            setattr(self, name, bitsandbytes_linear(getattr(self, name), kind))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def bitsandbytes_linear(linear: nn.Linear, kind: str, **options) -> nn.Module:
    sizes = {"input_features": linear.in_features, "output_features": linear.out_features}
    sizes["bias"] = linear.bias is not None
    if kind == "8bit":
        layer = bnb.nn.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=6.0)
    else:
        layer = bnb.nn.Linear4bit(**sizes, compute_dtype=torch.bfloat16, quant_type="nf4", **options)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")  # quantises


def exact_block(kind: str) -> nn.Module:
    """Plain layers with the values of ``Block(kind)``, in fp64."""
    block = Block(kind)
    exact = copy.deepcopy(block)
    for name in ("up", "down"):
        layer = getattr(block, name)
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.float64)
        linear.weight.data.copy_(dense_weight(layer))
        if layer.bias is not None:
            linear.bias.data.copy_(layer.bias)
        setattr(exact, name, linear)
    exact.is_loaded_in_8bit = exact.is_loaded_in_4bit = False
    return exact


def some_rows() -> Tensor:
    """x ``[3, 7, 64]``."""
    return torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def outputs_and_gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: tensor.grad for name, tensor in model.named_parameters() if tensor.grad is not None}
