"""LoRA on a GPU: the cases that are measured, and each provider on the same tensors.

A case is one frozen layer, or several that share x (query, key and value); a provider is a module from x to a tuple of
their outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import providers
import torch
from gpu_goals import Goal
from lora_common import DTYPES, EagerLora
from providers import Forced
from shapes import GPU_SHAPES, LLAMA3_ATTENTION, LLAMA3_DOWN, LLAMA3_UP, LinearShape
from torch import Tensor, nn

import pyfused
from pyfused import ops

UPDATE = "PYFUSED_LORA_UPDATE"


@dataclass(frozen=True)
class Case:
    """One cell: ``stage`` is "train" or "infer", ``m`` the rows of x, ``n`` the widths of the outputs: "4096+1024"."""

    stage: str
    layer: str
    m: int
    k: int
    n: str
    r: int
    dtype: str
    adapter_dtype: str
    dropout: float

    @property
    def label(self) -> str:
        dtype = self.dtype if self.adapter_dtype == self.dtype else f"{self.dtype}+{self.adapter_dtype}"
        dropout = f" p={self.dropout:g}" if self.stage == "train" else ""
        return f"{self.stage} {self.layer} M={self.m} r={self.r} {dtype}{dropout}"

    @property
    def outputs(self) -> tuple[int, ...]:
        return tuple(map(int, self.n.split("+")))


ADAPTER_DTYPES = ("bf16", "fp32")
RANKS = (8, 16, 64)
# name -> K and the widths of layers that share x: attention's three, the two of grouped queries alone, gate and up.
SHARED = {
    "qkv-4096": (4096, "4096+1024+1024"),
    "gqa-kv-4096": (4096, "1024+1024"),
    "gate-up-4096": (4096, "14336+14336"),
}


def train_cases() -> list[Case]:
    return [
        _case("train", shape, m, r, adapter, dropout)
        for shape in GPU_SHAPES
        for m in (2048, 8192)
        for adapter in ADAPTER_DTYPES
        for r in RANKS
        for dropout in (0.0, 0.1)
    ]


def decode_cases() -> list[Case]:
    return [
        _case("infer", shape, m, r, adapter)
        for shape in GPU_SHAPES
        for m in (1, 8, 64)
        for adapter in ADAPTER_DTYPES
        for r in RANKS
    ]


def shared_cases() -> list[Case]:
    return [
        _shared_case(name, m, adapter, dropout)
        for name in SHARED
        for m in (2048, 8192)
        for adapter in ADAPTER_DTYPES
        for dropout in (0.0, 0.1)
    ]


def goals() -> list[Goal]:
    """Each in one cell, r = 16 in bf16 with 8192 rows in training: with the vendor's GEMM, and with one of our own."""
    one_layer = [(LLAMA3_ATTENTION, 1.12, 1.08), (LLAMA3_UP, 1.07, 1.06), (LLAMA3_DOWN, 1.09, 1.06)]
    found = []
    for shape, vendors, own in one_layer:
        case = _case("train", shape, 8192, 16, "bf16", 0.1)
        found += [Goal(case, "pyfused", "full", vendors), Goal(case, "pyfused-concat", "full", own)]
    shared = [("qkv-4096", "forward", 1.06), ("gqa-kv-4096", "full", 1.15), ("gate-up-4096", "full", 1.07)]
    found += [Goal(_shared_case(name, 8192, "bf16", 0.1), "pyfused-shared", mode, r) for name, mode, r in shared]
    return [*found, Goal(_case("infer", LLAMA3_ATTENTION, 1, 16, "bf16"), "pyfused", "forward", extra_us=2.5)]


def quick_cases() -> list[Case]:
    """One of each that says something else."""
    cases = [_case("train", shape, 8192, 16, "bf16", 0.1) for shape in GPU_SHAPES]
    cases += [_case("train", LLAMA3_ATTENTION, 8192, 16, "bf16", 0.0)]
    cases += [_case("train", LLAMA3_ATTENTION, 8192, 16, "fp32", 0.1)]
    cases += [_case("train", LLAMA3_ATTENTION, 2048, 16, "bf16", 0.1)]
    cases += [_case("infer", LLAMA3_ATTENTION, m, 16, "bf16") for m in (1, 8, 64)]
    cases += [case for case in shared_cases() if (case.m, case.adapter_dtype, case.dropout) == (8192, "bf16", 0.1)]
    return cases


def _shared_case(name: str, m: int, adapter_dtype: str, dropout: float) -> Case:
    k, n = SHARED[name]
    return Case("train", name, m, k, n, 16, "bf16", adapter_dtype, dropout)


def _case(stage: str, shape: LinearShape, m: int, r: int, adapter_dtype: str, dropout: float = 0.0) -> Case:
    return Case(stage, shape.name, m, shape.in_features, str(shape.out_features), r, "bf16", adapter_dtype, dropout)


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share: x ``[M, K]``, and for each layer W ``[N, K]``, a ``[R, K]``, b ``[N, R]``."""

    linears: list[nn.Linear]
    x: Tensor
    a: list[nn.Parameter]
    b: list[nn.Parameter]
    grad_y: tuple[Tensor, ...]
    alpha: int

    @property
    def adapters(self) -> tuple[Tensor, ...]:
        return (*self.a, *self.b)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return (*(linear.weight for linear in self.linears), *self.adapters)

    def copy(self) -> Tensors:
        """The same numbers in layers with memory of their own; x stays."""
        linears = [_linear(linear.weight.detach().clone()) for linear in self.linears]
        a, b = ([nn.Parameter(p.detach().clone()) for p in group] for group in (self.a, self.b))
        return Tensors(linears, self.x, a, b, self.grad_y, self.alpha)

    def double(self) -> Tensors:
        linears = [_linear(linear.weight.detach().double()) for linear in self.linears]
        a, b = ([nn.Parameter(p.detach().double()) for p in group] for group in (self.a, self.b))
        x = self.x.detach().double().requires_grad_(self.x.requires_grad)
        return Tensors(linears, x, a, b, tuple(grad.double() for grad in self.grad_y), self.alpha)


def make_tensors(case: Case, device: torch.device, seed: int = 0) -> Tensors:
    """Random numbers; b is not zero as at the start of a training run, or no check would see the adapter."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype, adapter_dtype = DTYPES[case.dtype], DTYPES[case.adapter_dtype]

    def normal(rows: int, cols: int, std: float, to: torch.dtype) -> Tensor:
        return (torch.randn(rows, cols, generator=generator, device=device) * std).to(to)

    x = normal(case.m, case.k, 1.0, dtype).requires_grad_(case.stage == "train")
    linears, a, b, grads = [], [], [], []
    for n in case.outputs:
        linears.append(_linear(normal(n, case.k, case.k**-0.5, dtype)))
        a.append(nn.Parameter(normal(case.r, case.k, case.k**-0.5, adapter_dtype)))
        b.append(nn.Parameter(normal(n, case.r, case.r**-0.5, adapter_dtype)))
        grads.append(normal(case.m, n, 1.0, dtype))
    return Tensors(linears, x, a, b, tuple(grads), 2 * case.r)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


# Providers ------------------------------------------------------------------------------------------------------------


class Side(nn.Module):
    """Layers side by side on one x."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.layers)


class SharedX(nn.Module):
    """``ops.lora_linear_shared``."""

    def __init__(self, t: Tensors, scale: float, dropout: float) -> None:
        super().__init__()
        self.layers = [(linear.weight, None, a, b) for linear, a, b in zip(t.linears, t.a, t.b, strict=True)]
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return ops.lora_linear_shared(x, [(*p, self.scale, self.dropout, self.training) for p in self.layers])


class AddmmLora(torch.autograd.Function):
    """The scheme of Unsloth's kernels: plain GEMMs alone, the update added in place by ``addmm_``; no dropout.

    Saved are x and the parameters; x A^T is computed again in the backward. dX is one buffer for all layers on x.
    """

    @staticmethod
    def forward(ctx, x: Tensor, scale: float, count: int, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, a, b = (parameters[i * count : (i + 1) * count] for i in range(3))
        ctx.save_for_backward(x, *parameters)
        ctx.scale, ctx.count = scale, count
        results = []
        for weight, down, up in zip(weights, a, b, strict=True):
            y = x @ weight.t()
            y.addmm_(x @ down.to(x.dtype).t(), up.to(x.dtype).t(), alpha=scale)
            results.append(y)
        return tuple(results)

    @staticmethod
    def backward(ctx, *grad_ys: Tensor):
        x, *parameters = ctx.saved_tensors
        weights, a, b = (parameters[i * ctx.count : (i + 1) * ctx.count] for i in range(3))
        grad_x, grad_a, grad_b = None, [], []
        for grad_y, weight, down, up in zip(grad_ys, weights, a, b, strict=True):
            low, high = down.to(x.dtype), up.to(x.dtype)
            u = grad_y @ high
            grad_a.append((ctx.scale * (u.t() @ x)).to(down.dtype))
            grad_b.append((ctx.scale * (grad_y.t() @ (x @ low.t()))).to(up.dtype))
            grad_x = grad_y @ weight if grad_x is None else grad_x.addmm_(grad_y, weight)
            grad_x.addmm_(u, low, alpha=ctx.scale)
        return grad_x, None, None, *[None] * ctx.count, *grad_a, *grad_b


class Addmm(nn.Module):
    def __init__(self, t: Tensors, scale: float) -> None:
        super().__init__()
        self.parameters_of, self.scale = (*(linear.weight for linear in t.linears), *t.a, *t.b), scale

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return AddmmLora.apply(x, self.scale, len(self.parameters_of) // 3, *self.parameters_of)


def _eager(case: Case, t: Tensors) -> nn.Module:
    layers = zip(t.linears, t.a, t.b, strict=True)
    return Side([EagerLora(linear, a, b, t.alpha / case.r, case.dropout) for linear, a, b in layers])


def _compiled(case: Case, t: Tensors) -> nn.Module:
    # In a decode case several copies of a layer compile one after the other.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(_eager(case, t), fullgraph=True, dynamic=False)


def _peft(case: Case, t: Tensors) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = [str(i) for i in range(len(t.linears))]
    config = LoraConfig(r=case.r, lora_alpha=t.alpha, lora_dropout=case.dropout, target_modules=names)
    model = get_peft_model(nn.ModuleList(t.linears), config, autocast_adapter_dtype=case.adapter_dtype == "fp32")
    layers = list(model.base_model.model)
    for layer, a, b in zip(layers, t.a, t.b, strict=True):
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    return Side(layers)


def _pyfused(case: Case, t: Tensors) -> nn.Module:
    layers = []
    for linear, a, b in zip(t.linears, t.a, t.b, strict=True):
        layer = pyfused.nn.LoraLinear(linear, r=case.r, lora_alpha=t.alpha, lora_dropout=case.dropout)
        layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
        layers.append(layer)
    return Side(layers)


def _updating(update: str) -> Callable[[Case, Tensors], nn.Module]:
    return lambda case, t: Forced(_pyfused(case, t), UPDATE, update)


PROVIDERS: dict[str, Callable[[Case, Tensors], nn.Module]] = {
    "base": lambda case, t: Side(t.linears),
    "eager": _eager,
    "compile": _compiled,
    "peft": _peft,
    "unsloth": lambda case, t: Addmm(t, t.alpha / case.r),
    "pyfused-after": _updating("after"),
    "pyfused-before": _updating("before"),
    "pyfused-concat": _updating("concat"),
    "pyfused-shared": lambda case, t: Forced(SharedX(t, t.alpha / case.r, case.dropout), UPDATE, "auto"),
    "pyfused": _updating("auto"),
}


def missing(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot be measured here at all; None where it can."""
    if provider == "pyfused-concat" and device.type == "cuda":
        return providers.failing_tests("test_lora_cuda_gpu.py", "test_the_update_in_one_product", seconds=60)
    return providers.missing(provider, device)


def applies(provider: str, case: Case) -> bool:
    """Whether a provider has this case: no dropout in Unsloth's scheme; torch.compile in a share of the cells."""
    if provider == "unsloth":
        return case.dropout == 0.0
    if provider == "compile":  # seconds each
        return case.r == 16 and (case.dropout > 0.0 or case.m == 1)
    if provider == "pyfused-shared":
        return len(case.outputs) > 1
    return True
