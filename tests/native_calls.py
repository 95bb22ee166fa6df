"""Calls of the ops that have their gradient in C++, for what is to hold of each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import bottleneck_cases
import ia3_cases
import torch
from helpers import leaves_mask, make_case
from projections import GROUPS, make_group
from torch import Tensor

from pyfused.ops import bottleneck, ia3_linear, ia3_scale, lora_linear, lora_linear_shared

DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]


@dataclasses.dataclass
class Call:
    """One call of an op as a function of the tensors that may get a gradient."""

    op: str
    tensors: dict[str, Tensor]
    forward: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    grads: tuple[Tensor, ...]
    reference: str
    raw: tuple[str, ...]  # ops of a forward and a backward

    def __call__(self, needs=()) -> tuple[Tensor, ...]:
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in needs)
        return self.forward(self.tensors)


def raw_ops(*names: str) -> tuple[str, ...]:
    return tuple(f"pyfused::{name}" for name in names)


def forward_op(name: str, dtypes, rows: int, p: float) -> str:
    """In AMX tiles a forward in bf16 with dropout leaves its mask."""
    with_mask = p > 0.0 and leaves_mask(dtypes[0], rows, 48, 40, 4)
    return f"{name}_with_mask{'s' * ('shared' in name)}" if with_mask else name


def lora_call(dtypes, vector, p, rows=37):
    case = make_case(rows, 48, 40, 4, *dtypes, vector=vector, dropout_p=p)
    tensors = {name: getattr(case, name) for name in ("x", "bias", "a", "b", "scale")}
    if not vector:
        del tensors["scale"]

    def forward(t):
        c = case.replace(**t)
        return (lora_linear(c.x, c.weight, c.bias, c.a, c.b, c.scale, **c.options),)

    raw = raw_ops(forward_op("_lora_linear_forward", dtypes, rows, p), "_lora_backward")
    return Call("lora_linear", tensors, forward, (case.grad_y,), "pyfused.reference.lora.lora_linear", raw)


def ia3_call(dtypes, side, bias):
    case = ia3_cases.make_case((5, 7), 24, 20, *dtypes, side=side, bias=bias)
    return Call(
        "ia3_linear",
        {"x": case.x, "scale": case.scale},
        lambda t: (ia3_linear(t["x"], case.weight, case.bias, t["scale"], side),),
        (case.grad_y,),
        "pyfused.reference.ia3.ia3_linear",
        raw_ops("_ia3_linear_forward", "_ia3_linear_backward"),
    )


def scale_call(dtypes, dim):
    case = ia3_cases.make_case((3, 20, 5), 20, 20, *dtypes)
    x = case.x[..., :5].contiguous()
    scale = case.scale[: x.shape[dim]].clone()
    return Call(
        "ia3_scale",
        {"x": x, "scale": scale},
        lambda t: (ia3_scale(t["x"], t["scale"], dim),),
        (torch.ones_like(x),),
        "pyfused.reference.ia3.ia3_scale",
        raw_ops("_ia3_scale_forward", "_ia3_scale_backward"),
    )


def bottleneck_call(dtypes, residual, scale, biases, p):
    case = bottleneck_cases.make_case(
        37, 24, 8, *dtypes, residual=residual, scale=scale, biases=biases, dropout_p=p, activation="silu"
    )
    fields = {name: getattr(case, name) for name in bottleneck_cases.TENSORS}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    if residual == "x":
        del tensors["residual"]

    def forward(t):
        arguments = fields | t
        if residual == "x":
            arguments["residual"] = arguments["x"]
        return (bottleneck(**arguments, **case.options),)

    raw = raw_ops("_bottleneck_forward", "_bottleneck_backward")
    return Call("bottleneck", tensors, forward, (case.grad_y,), "pyfused.reference.bottleneck.bottleneck", raw)


def shared_call(dtypes, group, p, rows=37):
    x, projections, grads = make_group(GROUPS[group], rows, 40, *dtypes, dropout_p=p)
    tensors = {"x": x}
    for i, projection in enumerate(projections):
        for name in ("bias", "a", "b", "scale"):
            if isinstance(getattr(projection, name), Tensor):
                tensors[f"{i}.{name}"] = getattr(projection, name)

    def forward(t):
        given = [
            p._replace(**{key.split(".")[1]: value for key, value in t.items() if key.startswith(f"{i}.")})
            for i, p in enumerate(projections)
        ]
        return lora_linear_shared(t["x"], given)

    raw = raw_ops(forward_op("_lora_linear_shared_forward", dtypes, rows, p), "_lora_linear_shared_backward")
    return Call("lora_linear_shared", tensors, forward, tuple(grads), "pyfused.reference.lora.lora_linear", raw)


CALLS = {
    "lora": lambda dtypes: lora_call(dtypes, False, 0.0),
    "lora-vector": lambda dtypes: lora_call(dtypes, True, 0.3),
    "ia3-output": lambda dtypes: ia3_call(dtypes, "output", True),
    "ia3-output-no-bias": lambda dtypes: ia3_call(dtypes, "output", False),
    "ia3-input": lambda dtypes: ia3_call(dtypes, "input", True),
    "ia3-scale": lambda dtypes: scale_call(dtypes, -1),
    "ia3-scale-rows": lambda dtypes: scale_call(dtypes, 1),
    "bottleneck": lambda dtypes: bottleneck_call(dtypes, "x", "float", True, 0.0),
    "bottleneck-parallel": lambda dtypes: bottleneck_call(dtypes, "other", "learned", True, 0.3),
    "bottleneck-bare": lambda dtypes: bottleneck_call(dtypes, None, "channels", False, 0.0),
    "shared": lambda dtypes: shared_call(dtypes, "qkv", 0.0),
    "shared-some": lambda dtypes: shared_call(dtypes, "some", 0.3),
    "shared-one": lambda dtypes: shared_call(dtypes, "one", 0.3),
    "shared-none": lambda dtypes: shared_call(dtypes, "none", 0.0),
}
# Whose forward may leave dropout's mask, which is saved in place of the seed.
MASKED = {
    "lora-bf16-dropout": lambda _: lora_call(DTYPES[1], False, 0.3, 70),
    "shared-bf16-dropout": lambda _: shared_call(DTYPES[1], "qkv", 0.3, 70),
}
