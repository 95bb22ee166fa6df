"""What the bottleneck's tests share: random cases, the three ways to compute one, and adapters of a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from helpers import DEVICE, assert_error_rule, seed_tensor
from torch import Tensor, nn

from pyfused.reference import bottleneck as reference
from pyfused.reference.dropout import keep_mask, keep_scale

TENSORS = ("x", "residual", "w_down", "b_down", "w_up", "b_up", "scale")


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call and the gradient that flows into its result."""

    x: Tensor
    residual: Tensor | None
    w_down: Tensor
    b_down: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    activation: str
    scale: float | Tensor
    dropout_p: float
    seed: Tensor
    grad_y: Tensor

    @property
    def options(self) -> dict[str, object]:
        return {
            "activation": self.activation,
            "dropout_p": self.dropout_p,
            "training": True,
            "seed": self.seed,
        }

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor replaced by what ``function`` makes of it; a residual that is x stays x."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        mapped = {name: function(v) if isinstance(v, Tensor) else v for name, v in fields.items()}
        if self.residual is self.x:
            mapped["residual"] = mapped["x"]
        return Case(**mapped)

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in one dtype."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def on(self, device: torch.device | str) -> Case:
        """The same numbers on a device."""
        return self.map(lambda tensor: tensor.to(device))


def make_case(
    lead: int | tuple[int, ...],
    d: int,
    h: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    *,
    activation: str = "gelu",
    residual: str | None = "x",
    scale: str = "float",
    biases: bool = True,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Case:
    """Random case whose terms are of order one; the same numbers on every device.

    Args:
        residual: "x", "other" (a tensor of its own), or None.
        scale: "float", "learned" ([1]) or "channels" ([D]).
    """
    generator = torch.Generator().manual_seed(2000 + seed)
    adapter_dtype = adapter_dtype or dtype
    lead = (lead,) if isinstance(lead, int) else lead

    def normal(*shape: int, to: torch.dtype = adapter_dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * std).to(DEVICE, to)

    x = normal(*lead, d, to=dtype)
    return Case(
        x=x,
        residual={"x": x, "other": normal(*lead, d, to=dtype), None: None}[residual],
        w_down=normal(h, d, std=max(d, 1) ** -0.5),
        b_down=normal(h) if biases else None,
        w_up=normal(d, h, std=h**-0.5),
        b_up=normal(d) if biases else None,
        activation=activation,
        scale={"float": 1.5, "learned": normal(1) + 2.0, "channels": normal(d) + 1.0}[scale],
        dropout_p=dropout_p,
        seed=seed_tensor(0x1234_5678_9ABC_DEF0 + seed),
        grad_y=normal(*lead, d, to=dtype),
    )


def eager(
    x: Tensor,
    residual: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    activation: str = "relu",
    scale: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """What one writes without pyfused, with the same mask; each step rounds to the wider of the dtypes."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, w_down.dtype), w_up.dtype)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    h = reference.ACTIVATIONS[activation](F.linear(cast(x), cast(w_down), cast(b_down)))
    delta = F.linear(h, cast(w_up), cast(b_up)) * (cast(scale) if isinstance(scale, Tensor) else scale)
    if dropout_p > 0.0:
        keep = keep_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], dropout_p).view(x.shape)
        delta = delta * keep * keep_scale(dropout_p)
    return (delta if residual is None else residual + delta).to(x.dtype)


def evaluate(op: Callable[..., Tensor], case: Case, needs: Iterable[str] = TENSORS) -> dict[str, Tensor]:
    """The result ``y`` and the gradients ``grad_<name>`` of what ``needs`` names (tensors only), strides kept.

    Where the residual is x there is one gradient for both, ``grad_x``.
    """
    shared = case.residual is case.x
    arguments = {name: getattr(case, name) for name in TENSORS}
    leaves = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not (shared and name == "residual"):
            arguments[name] = value.detach()
            if name in needs:
                leaves[name] = arguments[name].requires_grad_()
    if shared:
        arguments["residual"] = arguments["x"]
    y = op(**arguments, **case.options)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y) if leaves else ()
    return {"y": y.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def assert_matches_reference(op: Callable[..., Tensor], case: Case, needs: Iterable[str] = TENSORS) -> dict:
    """Result and gradients of ``op`` on ``case`` by the error rule; returns them.

    Two ulps: the products round to 16 bits, here as in eager, and in a tensor of a few elements eager may be lucky.
    """
    needs = tuple(needs)
    got = evaluate(op, case, needs)
    exact = evaluate(reference.bottleneck, case.to(torch.float64), needs)
    plain = evaluate(eager, case, needs)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_error_rule(name, value, plain[name], exact[name], ulps=2)
    return got


def trained(model: nn.Module) -> nn.Module:
    """Adapters as training might leave them; those of a new model change nothing, or little."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model.eval()
