"""A small model of layers that share their input, and how runs of it are compared."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pyfused import LoraConfig, get_peft_model
from pyfused.nn import LoraLinear


class Attention(nn.Module):
    """Query, key and value of one x (or key and value of another), then one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 24)
        self.between = None

    def forward(self, x, other=None):
        other = x if other is None else other
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        return self.o(q[..., :16] * F.silu(self.k(other)) + self.v(other)) + x


def make(depth=2, dropout=0.2, share=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = nn.Sequential(*(Attention() for _ in range(depth))).to(dtype)
    options = {"r": 4, "target_modules": ["q", "k", "v", "o"], "init_lora_weights": False} | options
    model = get_peft_model(base, LoraConfig(lora_dropout=dropout, **options)).train()
    if not share:
        for layer in layers(model):
            layer._shared_input = None
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def step(model, x, seed=3):
    """Result, gradients, and where it leaves torch's generator."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return y.detach(), grads, torch.get_rng_state()


def assert_same_step(got, expected):
    """The same bits; but x's gradient is a sum in another order, and the backward of earlier layers begins with it."""
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    assert_near(got[1], expected[1])


def assert_near(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())
