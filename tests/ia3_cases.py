"""What the IA3 tests share: random calls, plain PyTorch as one writes it, and results by the error rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_error_rule
from torch import Tensor

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

    def to(self, dtype: torch.dtype) -> Case:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Case(**{name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in fields.items()})


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
