"""What the IA3 tests share: random calls, plain PyTorch as one writes it, and results by the error rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_error_rule
from torch import Tensor

from pyfused.ops import ia3_scale
from pyfused.reference import ia3 as reference

SIDES = ("output", "input")
NEEDS = ("x", "scale", "weight", "bias")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one ``ia3_linear`` and the gradient that flows into its result."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor
    side: str
    grad_y: Tensor

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor replaced by what ``function`` makes of it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Case(**{name: function(v) if isinstance(v, Tensor) else v for name, v in fields.items()})

    def to(self, dtype: torch.dtype) -> Case:
        return self.map(lambda tensor: tensor.to(dtype))

    def on(self, device: torch.device | str) -> Case:
        """The same numbers on a device."""
        return self.map(lambda tensor: tensor.to(device))


def make_case(
    lead: int | tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    *,
    side: str = "output",
    bias: bool = True,
    seed: int = 0,
) -> Case:
    """Random case of order one, with zeros in the vector: nothing may divide by it."""
    generator = torch.Generator().manual_seed(seed)
    lead = (lead,) if isinstance(lead, int) else lead

    def normal(*shape: int, to: torch.dtype = dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * std).to(DEVICE, to)

    scale = normal(n if side == "output" else k, to=scale_dtype or dtype) + 1.0
    scale[::3] = 0.0
    return Case(
        x=normal(*lead, k),
        weight=normal(n, k, std=max(k, 1) ** -0.5),
        bias=normal(n) if bias else None,
        scale=scale,
        side=side,
        grad_y=normal(*lead, n),
    )


def eager_linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor, side: str) -> Tensor:
    """What one writes without pyfused: the product in the wider of both dtypes, rounded to x's."""
    if side == "input":
        return F.linear((x * scale).to(x.dtype), weight, bias)
    y = F.linear(x, weight, bias)
    return (y * scale).to(y.dtype)


def evaluate(op: Callable[..., Tensor], case: Case, needs: Iterable[str] = ("x", "scale")) -> dict[str, Tensor]:
    """The result ``y`` and the gradients ``grad_<name>`` of what ``needs`` names, strides kept."""
    tensors = {name: getattr(case, name) for name in ("x", "weight", "bias", "scale")}
    leaves = {name: tensors[name].detach().requires_grad_() for name in needs if tensors[name] is not None}
    y = op(**(tensors | leaves), side=case.side)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y) if leaves else ()
    return {"y": y.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_matches_reference(
    op: Callable[..., Tensor], case: Case, needs: Iterable[str] = ("x", "scale")
) -> dict[str, Tensor]:
    """Result and gradients of ``op`` on ``case`` by the error rule; returns them."""
    needs = tuple(needs)
    got = evaluate(op, case, needs)
    exact = evaluate(reference.ia3_linear, case.to(torch.float64), needs)
    eager = evaluate(eager_linear, case, needs)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_error_rule(name, value, eager[name], exact[name])
    return got


def assert_scale_matches(x: Tensor, scale: Tensor, dim: int, grad: Tensor) -> None:
    """``ia3_scale`` and its gradients by the error rule."""

    def run(op, dtype=None):
        leaves = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in (x, scale)]
        y = op(*leaves, dim)
        return (y.detach(), *torch.autograd.grad(y, leaves, grad if dtype is None else grad.to(dtype)))

    def eager(x, scale, dim):
        shape = [1] * x.dim()
        shape[dim] = -1
        return (x * scale.view(shape)).to(x.dtype)

    names = ("y", "grad_x", "grad_scale")
    for name, got, plain, exact in zip(
        names, run(ia3_scale), run(eager), run(reference.ia3_scale, torch.float64), strict=True
    ):
        assert_error_rule(name, got, plain, exact)
