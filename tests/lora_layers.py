"""What the module's tests share: adapted layers, the formula in fp64, and bases that have to be called."""

from __future__ import annotations

from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pyfused import ops
from pyfused.nn import LoraLinear
from pyfused.nn.shared_input import SharedInput


def make(dtype: torch.dtype = torch.float32, base: nn.Linear | None = None, **options) -> LoraLinear:
    base = nn.Linear(24, 20, dtype=dtype) if base is None else base
    return LoraLinear(base, **({"r": 6, "lora_alpha": 13, "init_lora_weights": False} | options))


def expected(layer: LoraLinear, x: Tensor, *names: str) -> Tensor:
    """The formula in fp64, without dropout."""
    y = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    for name in names:
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        y = y + layer.scaling[name] * F.linear(F.linear(x.double(), a), b)
    return y


def assert_near(got: Tensor, exact: Tensor) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(got.dtype, 4 * torch.finfo(got.dtype).eps)
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


class Subclass(nn.Linear):
    pass


class Widening(nn.Linear):
    """Computes in fp32 whatever it is given, as quantised layers may."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight, self.bias)


def with_hook(register: str) -> nn.Linear:
    linear = nn.Linear(24, 20)
    getattr(linear, register)(lambda *args: None)
    return linear


def with_own_forward() -> nn.Linear:
    linear = nn.Linear(24, 20)
    linear.forward = lambda x: F.linear(x, linear.weight, linear.bias)
    return linear


class TracedTensor(Tensor):
    """A tensor subclass that keeps its class in what is computed with it, as DTensor does."""


def with_weight_subclass() -> nn.Linear:
    linear = nn.Linear(24, 20)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(TracedTensor))
    return linear


NOT_PLAIN = {
    "subclass": lambda: Subclass(24, 20),
    "forward_hook": lambda: with_hook("register_forward_hook"),
    "forward_pre_hook": lambda: with_hook("register_forward_pre_hook"),
    "full_backward_hook": lambda: with_hook("register_full_backward_hook"),
    "own_forward": with_own_forward,
    "parametrized": lambda: parametrizations.spectral_norm(nn.Linear(24, 20)),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(24, 20)),
    "weight_subclass": with_weight_subclass,
}


def count_calls(monkeypatch) -> Counter[str]:
    """From now on: how many layers ran on each op, by the op's name; a layer of a group runs on ``lora_linear`` too."""
    counter: Counter[str] = Counter()
    inside = []  # a group that computes a layer alone must not count it twice

    def counted(owner, attribute: str, name: str) -> None:
        function = getattr(owner, attribute)

        def call(*args, **kwargs):
            counter[name] += not inside
            inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        monkeypatch.setattr(owner, attribute, call)

    counted(ops, "lora_linear", "lora_linear")
    counted(ops, "lora_delta", "lora_delta")
    counted(SharedInput, "linear", "lora_linear")
    return counter
