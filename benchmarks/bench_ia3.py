"""IA3 on one frozen linear layer: pyfused against the frozen base, plain PyTorch, torch.compile and HF PEFT.

python benchmarks/bench_ia3.py --quick      # under a minute
python benchmarks/bench_ia3.py --check      # everything; exits with 1 where pyfused is slower than it may be

The output side is that of keys and values, the input side that of the second feed-forward layer. On a GPU, with the
scale in a pass of its own ("pyfused") and in the base product ("pyfused-product"):

python benchmarks/bench_ia3.py --device cuda            # all
python benchmarks/bench_ia3.py --device cuda --goals    # the cells that have a goal on an H200, and whether it is met
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import providers
import shapes
import torch
from gpu_goals import Goal
from harness import Workload
from providers import Forced
from runner import Benchmark, OnGpu, bind, compiled
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATH = "PYFUSED_IA3"
PRODUCT = "pyfused-product"
SIDES = ("output", "input")
CPU = torch.device("cpu")
# Of the largest value of y or a gradient: products of two or three numbers, each rounded once.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2, "fp16": 5e-3}


@dataclass(frozen=True)
class Case:
    """One cell: ``stage`` is "train" or "infer", ``m`` the rows of x, ``dtype`` x's and the base's."""

    stage: str
    layer: str
    side: str
    m: int
    k: int
    n: int
    dtype: str
    vector_dtype: str

    @property
    def label(self) -> str:
        dtype = self.dtype if self.vector_dtype == self.dtype else f"{self.dtype}+{self.vector_dtype}"
        return f"{self.stage} {self.layer} {self.side} M={self.m} {dtype}"


def all_cases() -> list[Case]:
    dtypes = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
    train = {shapes.MINILM_384: (512,), shapes.BERT_768: (64, 512, 2048), shapes.LLAMA_2048: (512,)}
    infer = {shapes.BERT_768: (1, 128, 2048), shapes.LLAMA_2048: (1, 16)}
    cases = []
    for stage, rows in (("train", train), ("infer", infer)):
        for shape, counts in rows.items():
            for m in counts:
                for dtype, vector_dtype in dtypes:
                    for side in ("output", "input"):
                        cases.append(_case(stage, shape, side, m, dtype, vector_dtype))
    return cases


def quick_cases() -> list[Case]:
    """The rows that goals are set for."""
    return [
        _case("train", shape, side, 512, dtype, vector_dtype)
        for dtype, vector_dtype in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
        for shape in (shapes.BERT_768, shapes.LLAMA_2048)
        for side in ("output", "input")
    ]


def cuda_cases() -> list[Case]:
    """Layers of Llama 3 8B: keys and values, the square layer that a goal is set for, the second feed-forward layer."""
    square = shapes.LLAMA3_ATTENTION
    layers = [(shapes.LLAMA3_KEY_VALUE, "output"), (square, "output"), (square, "input"), (shapes.LLAMA3_DOWN, "input")]
    train = [
        _case("train", shape, side, m, "bf16", vector_dtype)
        for shape, side in layers
        for m in (2048, 8192)
        for vector_dtype in ("bf16", "fp32")
    ]
    return train + [_case("infer", shape, side, m, "bf16", "bf16") for shape, side in layers for m in (1, 64)]


def goals() -> list[Goal]:
    """On an H200, forward and backward over the frozen layer: one pass each way, or the forward's in the product."""
    found = []
    for vector_dtype in ("bf16", "fp32"):
        cases = {side: _case("train", shapes.LLAMA3_ATTENTION, side, 8192, "bf16", vector_dtype) for side in SIDES}
        found += [Goal(case, "pyfused", "full", 1.12) for case in cases.values()]
        found.append(Goal(cases["output"], PRODUCT, "full", 1.08))
    return found


def _case(stage, shape, side, m, dtype, vector_dtype) -> Case:
    return Case(stage, shape.name, side, m, shape.in_features, shape.out_features, dtype, vector_dtype)


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share: x ``[M, K]``, the vector in HF PEFT's shape, grad_y ``[M, N]``."""

    linear: nn.Linear
    x: Tensor
    vector: nn.Parameter
    grad_y: Tensor


def make_tensors(case: Case, device: torch.device = CPU, seed: int = 0) -> Tensors:
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * std

    bias = shapes.named(case.layer).bias
    linear = nn.Linear(case.k, case.n, bias=bias, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(normal(case.n, case.k, std=case.k**-0.5).to(dtype), requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(normal(case.n).to(dtype), requires_grad=False)
    shape = (case.n, 1) if case.side == "output" else (1, case.k)
    return Tensors(
        linear=linear,
        x=normal(case.m, case.k).to(dtype).requires_grad_(case.stage == "train"),
        vector=nn.Parameter(normal(*shape).to(DTYPES[case.vector_dtype])),
        grad_y=normal(case.m, case.n).to(dtype),
    )


class EagerIA3(nn.Module):
    """IA3 as one writes it in PyTorch."""

    def __init__(self, linear: nn.Linear, vector: nn.Parameter, side: str) -> None:
        super().__init__()
        self.linear, self.vector, self.side = linear, vector, side

    def forward(self, x: Tensor) -> Tensor:
        scale = self.vector.view(-1)
        if self.side == "input":
            return self.linear((x * scale).to(x.dtype))
        y = self.linear(x)
        return (y * scale).to(y.dtype)


def _eager(case: Case, t: Tensors) -> nn.Module:
    return EagerIA3(t.linear, t.vector, case.side)


def _peft(case: Case, t: Tensors) -> nn.Module:
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        target_modules=["linear"], feedforward_modules=["linear"] if case.side == "input" else [], fan_in_fan_out=False
    )
    upcast = case.vector_dtype == "fp32"
    model = get_peft_model(nn.ModuleDict({"linear": t.linear}), config, autocast_adapter_dtype=upcast)
    return _with_vector(model.base_model.model["linear"], t)


def _pyfused(case: Case, t: Tensors) -> nn.Module:
    from pyfused.nn import IA3Linear

    return _with_vector(IA3Linear(t.linear, is_feedforward=case.side == "input"), t)


def _with_vector(layer: nn.Module, t: Tensors) -> nn.Module:
    """A layer in HF PEFT's form with the parameter that all share."""
    layer.ia3_l["default"] = t.vector
    return layer


PROVIDERS: dict[str, Callable[[Case, Tensors], nn.Module]] = {
    "base": lambda case, t: t.linear,
    "eager": _eager,
    "compile": lambda case, t: compiled(_eager(case, t)),
    "peft": _peft,
    "pyfused": _pyfused,
}
# The paths by name, so that a variable from outside changes none of them.
GPU_PROVIDERS = PROVIDERS | {
    PRODUCT: lambda case, t: Forced(_pyfused(case, t), PATH, "product"),
    "pyfused": lambda case, t: Forced(_pyfused(case, t), PATH, "pass"),
}


def applies(provider: str, case: Case) -> bool:
    """Whether a provider has this case: the product is for the output side in 16 bits; torch.compile takes seconds."""
    if provider == PRODUCT:
        return case.side == "output" and case.dtype != "fp32"
    return provider != "compile" or case.m == 8192


def missing(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot be measured here at all; None where it can."""
    if provider == PRODUCT and device.type == "cuda":
        return providers.failing_tests("test_ia3_cuda_gpu.py", "test_the_factors_in_the_product", seconds=60)
    return providers.missing(provider, device)


def build(case: Case, names: Sequence[str], device: torch.device | None = None) -> dict[str, Workload]:
    """One workload per provider, on the same tensors; without a device those of the CPU's benchmark."""
    t = make_tensors(case, device or CPU)
    training = case.stage == "train"
    workloads = {}
    for name in names:
        layer = (PROVIDERS if device is None else GPU_PROVIDERS)[name](case, t).train(training)
        inputs = () if not training else (t.x,) if name == "base" else (t.x, t.vector)
        weights = (*t.linear.parameters(), t.vector)
        workloads[name] = Workload(bind(layer, t.x), inputs, t.grad_y if training else None, weights)
    return workloads


def verify(case: Case, workloads: dict[str, Workload], device: torch.device | None = None) -> None:
    """Hold every provider against plain PyTorch before it is timed.

    Raises:
        RuntimeError: a provider computes something else.
    """
    expected = build(case, ["eager"], device)["eager"].outputs()
    for name, work in workloads.items():
        if name == "base":
            continue
        harness.check_outputs(
            case.label, name, ("y", "grad_x", "grad_vector"), work.outputs(), expected, TOLERANCE[case.dtype]
        )


BENCHMARK = Benchmark(
    op="ia3",
    description=__doc__,
    providers=list(PROVIDERS),
    all_cases=all_cases,
    quick_cases=quick_cases,
    build=build,
    verify=verify,
    on_gpu=OnGpu(cuda_cases, goals, list(GPU_PROVIDERS), applies, missing),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
