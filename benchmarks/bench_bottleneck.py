"""The bottleneck adapter: pyfused against its matrix products alone, plain PyTorch, torch.compile and AdapterHub's.

python benchmarks/bench_bottleneck.py --quick      # about a minute
python benchmarks/bench_bottleneck.py --check      # everything; exits with 1 where a goal is missed
python benchmarks/bench_bottleneck.py --device cuda --goals    # the cells that have a goal on an H200

AdapterHub's layer is among the providers where its library can be imported, as in the environment of its tests:
PYTHONPATH=. .venv-adapterhub/bin/python benchmarks/bench_bottleneck.py
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import harness
import torch
import torch.nn.functional as F
from gpu_goals import FLOOR, Goal
from harness import Workload
from lora_bytes import SIZES
from lora_common import DTYPES, TOLERANCE
from providers import Forced
from runner import Benchmark, OnGpu, bind, compiled
from torch import Tensor, nn

CPU = torch.device("cpu")
# Width and bottleneck of MiniLM, BERT base and Llama 3.2 1B.
_WIDTHS = ((384, 48), (768, 64), (2048, 64))
PATH = "PYFUSED_BOTTLENECK"
# M, D, H of the goals on an H200.
_GOAL_SHAPE = (8192, 4096, 64)


@dataclass(frozen=True)
class Case:
    """One cell: ``stage`` is "train" or "infer", ``m`` rows, ``d`` the width, ``h`` the bottleneck's."""

    stage: str
    m: int
    d: int
    h: int
    dtype: str
    adapter_dtype: str
    dropout: float

    @property
    def label(self) -> str:
        dtype = self.dtype if self.adapter_dtype == self.dtype else f"{self.dtype}+{self.adapter_dtype}"
        dropout = f" p={self.dropout:g}" if self.stage == "train" else ""
        return f"{self.stage} M={self.m} D={self.d} H={self.h} {dtype}{dropout}"


def all_cases() -> list[Case]:
    shapes = ((512, 384, 48), (512, 768, 64), (2048, 768, 64), (2048, 2048, 64))
    train = [
        Case("train", *shape, *dtypes, dropout)
        for dtypes in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
        for shape in shapes
        for dropout in (0.0, 0.1)
    ]
    infer = [
        Case("infer", m, *width, dtype, dtype, 0.0)
        for dtype in ("fp32", "bf16")
        for width in _WIDTHS
        for m in (1, 4, 16, 512)
    ]
    return train + infer


def quick_cases() -> list[Case]:
    shape = (512, 768, 64)
    train = [Case("train", *shape, dtype, dtype, dropout) for dtype in ("fp32", "bf16") for dropout in (0.0, 0.1)]
    return train + [Case("infer", m, 768, 64, dtype, dtype, 0.0) for dtype in ("fp32", "bf16") for m in (1, 16)]


def cuda_cases() -> list[Case]:
    """The shape that a goal is set for, with more and fewer rows and hidden values; BERT's; decoding."""
    shapes = (_GOAL_SHAPE, (2048, 4096, 64), (8192, 4096, 128), (8192, 4096, 256), (8192, 768, 48))
    train = [
        Case("train", *shape, "bf16", adapter_dtype, dropout)
        for adapter_dtype in ("bf16", "fp32")
        for shape in shapes
        for dropout in (0.0, 0.1)
    ]
    train += [Case("train", *_GOAL_SHAPE, "fp32", "fp32", dropout) for dropout in (0.0, 0.1)]
    return train + [Case("infer", m, 4096, 64, "bf16", "bf16", 0.0) for m in (1, 16, 512, 8192)]


def floor_bytes(case: Case, mode: str) -> int:
    """The fewest bytes of a mode with the residual x: x or dY read once, the result written once, the matrices; in
    training the hidden values are kept, and the backward reads x and dY, and writes dX and the matrices' gradients."""
    size, adapter = SIZES[case.dtype], SIZES[case.adapter_dtype]
    matrices = adapter * (2 * case.d * case.h + case.d + case.h)
    wide, hidden = size * case.m * case.d, size * case.m * case.h
    forward = 2 * wide + matrices + (hidden if case.stage == "train" else 0)
    backward = 3 * wide + hidden + 2 * matrices
    return {"forward": forward, "backward": backward, "full": forward + backward}[mode]


def goals() -> list[Goal]:
    """On an H200: the forward within 1.4 of its bytes' floor, and 1.7 times as fast as eager, the whole step too."""
    infer = Case("infer", *_GOAL_SHAPE, "bf16", "bf16", 0.0)
    train = [replace(infer, stage="train", dropout=dropout) for dropout in (0.0, 0.1)]
    found = []
    for case in (infer, *train):
        least = floor_bytes(case, "forward")
        found.append(Goal(case, "pyfused", "forward", 1.4, over=FLOOR, floor_bytes=least, stated_us=31.0))
        modes = ("forward",) if case is infer else ("forward", "full")
        found += [Goal(case, "pyfused", mode, 1 / 1.7, over="eager") for mode in modes]
    return found


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share; the residual is x."""

    x: Tensor
    parameters: tuple[nn.Parameter, ...]  # w_down [H, D], b_down [H], w_up [D, H], b_up [D]
    grad_y: Tensor


def make_tensors(case: Case, device: torch.device = CPU, seed: int = 0) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: str, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(DTYPES[dtype])

    sizes = ((case.h, case.d), case.d**-0.5), ((case.h,), 1.0), ((case.d, case.h), case.h**-0.5), ((case.d,), 1.0)
    return Tensors(
        x=normal(case.m, case.d, dtype=case.dtype).requires_grad_(case.stage == "train"),
        parameters=tuple(nn.Parameter(normal(*shape, dtype=case.adapter_dtype, std=std)) for shape, std in sizes),
        grad_y=normal(case.m, case.d, dtype=case.dtype),
    )


class Products(torch.autograd.Function):
    """The two matrix products of the forward and the four of the backward alone; its values mean nothing."""

    @staticmethod
    def forward(ctx, x, w_down, b_down, w_up, b_up):
        z = x @ w_down.t()
        ctx.save_for_backward(x, z, w_down, w_up)
        return z @ w_up.t()

    @staticmethod
    def backward(ctx, grad_y):
        x, z, w_down, w_up = ctx.saved_tensors
        dz = grad_y @ w_up
        return dz @ w_down, dz.t() @ x, z[0], grad_y.t() @ z, grad_y[0]


class Eager(nn.Module):
    """The adapter as one writes it in PyTorch, computed in its own dtype."""

    def __init__(self, parameters: tuple[nn.Parameter, ...], dropout: float) -> None:
        super().__init__()
        self.w_down, self.b_down, self.w_up, self.b_up = parameters
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.linear(x.to(self.w_down.dtype), self.w_down, self.b_down))
        return x + self.dropout(F.linear(h, self.w_up, self.b_up)).to(x.dtype)


class AdapterHubLayer(nn.Module):
    """AdapterHub's own layer; x is cast to the adapter's dtype, which the library leaves to its caller."""

    def __init__(self, case: Case, parameters: tuple[nn.Parameter, ...]) -> None:
        from adapters import SeqBnConfig
        from adapters.methods.modeling import Adapter

        super().__init__()
        config = SeqBnConfig(reduction_factor=case.d / case.h, dropout=case.dropout)
        self.layer = Adapter("bench", case.d, case.h, config)
        linears = (self.layer.adapter_down[0], self.layer.adapter_up)
        for linear, weight, bias in zip(linears, parameters[::2], parameters[1::2], strict=True):
            linear.weight, linear.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.layer.adapter_up.weight.dtype), x)[0].to(x.dtype)


def _layer(case: Case, t: Tensors) -> nn.Module:
    from pyfused.nn import Bottleneck

    layer = Bottleneck(case.d, case.h, "relu", dropout=case.dropout).train(case.stage == "train")
    linears = (layer.adapter_down[0], layer.adapter_up)
    for linear, weight, bias in zip(linears, t.parameters[::2], t.parameters[1::2], strict=True):
        linear.weight, linear.bias = weight, bias
    return layer


def _with_residual(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x, x)


def _by_path(path: str) -> Callable[[Case, Tensors], Callable[[Tensor], Tensor]]:
    return lambda case, t: _with_residual(Forced(_layer(case, t), PATH, path))


def _eager(case: Case, t: Tensors) -> nn.Module:
    return Eager(t.parameters, case.dropout).train(case.stage == "train")


def _products(case: Case, t: Tensors) -> Callable[[Tensor], Tensor]:
    """In the dtype of x: what the products of a perfect adapter would cost."""
    weights = [nn.Parameter(parameter.detach().to(DTYPES[case.dtype])) for parameter in t.parameters]
    return lambda x: Products.apply(x, *weights)


PROVIDERS: dict[str, Callable[[Case, Tensors], Callable[[Tensor], Tensor]]] = {
    "products": _products,
    "eager": _eager,
    "compile": lambda case, t: compiled(_eager(case, t)),
    "pyfused": lambda case, t: _with_residual(_layer(case, t)),
}
if importlib.util.find_spec("adapters") is not None:
    PROVIDERS["adapterhub"] = lambda case, t: AdapterHubLayer(case, t.parameters).train(case.stage == "train")


# On a GPU each sets its path, the automatic one too.
GPU_PROVIDERS = PROVIDERS | {
    "pyfused-fused": _by_path("fused"),
    "pyfused-passes": _by_path("passes"),
    "pyfused": _by_path("auto"),
}


def applies(provider: str, case: Case) -> bool:
    """Whether a provider has this case on a GPU; torch.compile takes seconds each."""
    goal = (case.m, case.d, case.h) == _GOAL_SHAPE and case.adapter_dtype == case.dtype
    return provider != "compile" or goal or case.m == 1


def build(case: Case, names: Sequence[str], device: torch.device | None = None) -> dict[str, Workload]:
    """One workload per provider, on the same tensors; without a device those of the CPU's benchmark."""
    t = make_tensors(case, device or CPU)
    table = PROVIDERS if device is None else GPU_PROVIDERS
    training = case.stage == "train"
    workloads = {}
    for name in names:
        inputs = (t.x,) if name == "products" else (t.x, *t.parameters)
        call = bind(table[name](case, t), t.x)
        workloads[name] = Workload(call, inputs if training else (), t.grad_y if training else None, t.parameters)
    return workloads


def verify(case: Case, workloads: dict[str, Workload], device: torch.device | None = None) -> None:
    """Hold every provider but "products" against plain PyTorch, before it is timed; with dropout its rate alone.

    Raises:
        RuntimeError: a provider computes something else.
    """
    expected = build(replace(case, dropout=0.0), ["eager"], device)["eager"].outputs()
    x = make_tensors(case, device or CPU).x.detach()
    for name, work in workloads.items():
        if name == "products":
            continue
        got = work.outputs()
        if case.dropout:
            dropped = (got[0] == x).double().mean().item()
            if abs(dropped - case.dropout) > 0.02:
                raise RuntimeError(f"{case.label}: {name} drops {dropped:.3f} of the elements")
            continue
        names = ("y", "x", "w_down", "b_down", "w_up", "b_up")
        harness.check_outputs(case.label, name, names, got, expected, TOLERANCE[case.dtype] * 2)


def limit(case: Case, mode: str) -> float:
    """The ratio to eager that pyfused may have: the goals of docs/performance-bottleneck.md, where there is one."""
    if case.stage == "infer":
        return 1 / 1.5 if case.m <= 16 else 1.02
    if mode != "full" or case.adapter_dtype != case.dtype:
        return 1.02
    return {("fp32", False): 1 / 1.1, ("bf16", False): 1 / 1.3, ("fp32", True): 1 / 2, ("bf16", True): 1 / 3.5}[
        case.dtype, case.dropout > 0
    ]


BENCHMARK = Benchmark(
    op="bottleneck",
    description=__doc__,
    providers=list(PROVIDERS),
    all_cases=all_cases,
    quick_cases=quick_cases,
    build=build,
    verify=verify,
    limit=limit,
    on_gpu=OnGpu(cuda_cases, goals, list(GPU_PROVIDERS), applies, floor_bytes=floor_bytes),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
