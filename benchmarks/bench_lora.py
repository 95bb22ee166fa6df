"""LoRA on one frozen linear layer: pyfused against the frozen base, plain PyTorch, torch.compile and HF PEFT.

python benchmarks/bench_lora.py --quick      # under two minutes
python benchmarks/bench_lora.py --check      # everything; exits with 1 where pyfused is slower than it may be

On the CPU. bench_lora_cuda.py does the same on a GPU.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import harness
import shapes
import torch
from harness import Workload
from lora_common import DTYPES, TOLERANCE, EagerLora, limit
from runner import Benchmark, bind, compiled
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One cell: ``stage`` is "train" or "infer", ``m`` the rows of x, ``dtype`` x's and the base's."""

    stage: str
    layer: str
    m: int
    k: int
    n: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: float

    @property
    def label(self) -> str:
        dtype = self.dtype if self.adapter_dtype == self.dtype else f"{self.dtype}+{self.adapter_dtype}"
        dropout = f" p={self.dropout:g}" if self.stage == "train" else ""
        return f"{self.stage} {self.layer} M={self.m} r={self.r} {dtype}{dropout}"


def all_cases() -> list[Case]:
    """The full matrix; README.md says why these."""
    dtypes = (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
    train_rows = {
        shapes.MINILM_384: (128, 512, 1024),
        shapes.BERT_768: (64, 512, 1024),
        shapes.BERT_FFN: (512,),
        shapes.LLAMA_2048: (128, 512),
        shapes.LLAMA_4096: (1024,),
    }
    infer_rows = {shape: (1, 16, 128) for shape in shapes.LINEAR_SHAPES}
    infer_rows[shapes.BERT_768] = infer_rows[shapes.LLAMA_2048] = (1, 4, 16, 128, 1024)
    cases = [
        _case("train", shape, m, dtype, adapter_dtype, dropout)
        for dtype, adapter_dtype in dtypes
        for shape, rows in train_rows.items()
        for m in rows
        for dropout in (0.0, 0.1)
    ]
    cases += [
        _case("infer", shape, m, dtype, adapter_dtype)
        for dtype, adapter_dtype in dtypes
        for shape, rows in infer_rows.items()
        for m in rows
    ]
    # Rank: one cell with eight times as much adapter. fp16: one of each, its base product is slow on most CPUs.
    cases += [_case("train", shapes.BERT_768, 512, dtype, "fp32", 0.1, r=64) for dtype in ("fp32", "bf16")]
    cases += [_case("train", shapes.BERT_768, 128, "fp16", "fp16", dropout) for dropout in (0.0, 0.1)]
    cases += [_case("infer", shapes.BERT_768, m, "fp16", "fp16") for m in (1, 128)]
    return cases


def quick_cases() -> list[Case]:
    """A subset for under two minutes: the design's CPU rows and the smallest layer."""
    return [
        _case("train", shapes.BERT_768, 512, "fp32", "fp32", 0.1),
        _case("train", shapes.BERT_768, 512, "fp32", "fp32", 0.0),
        _case("train", shapes.BERT_768, 512, "bf16", "bf16", 0.1),
        _case("train", shapes.BERT_768, 512, "bf16", "bf16", 0.0),
        _case("train", shapes.BERT_768, 512, "bf16", "fp32", 0.1),
        _case("train", shapes.LLAMA_2048, 512, "bf16", "bf16", 0.1),
        _case("train", shapes.MINILM_384, 512, "fp32", "fp32", 0.1),
        _case("infer", shapes.MINILM_384, 128, "fp32", "fp32"),
        _case("infer", shapes.BERT_768, 1, "bf16", "bf16"),
        _case("infer", shapes.BERT_768, 1, "fp32", "fp32"),
        _case("infer", shapes.LLAMA_2048, 16, "bf16", "fp32"),
    ]


def _case(stage, shape, m, dtype, adapter_dtype, dropout=0.0, r=None) -> Case:
    k, n = shape.in_features, shape.out_features
    rank = r or (8 if k < 2048 else 16)
    return Case(stage, shape.name, m, k, n, rank, dtype, adapter_dtype, dropout)


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share: x ``[M, K]``, a ``[R, K]``, b ``[N, R]``, grad_y ``[M, N]``."""

    linear: nn.Linear
    x: Tensor
    a: nn.Parameter
    b: nn.Parameter
    grad_y: Tensor
    alpha: int


def make_tensors(case: Case, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    dtype, adapter_dtype = DTYPES[case.dtype], DTYPES[case.adapter_dtype]

    def normal(rows: int, cols: int, std: float, to: torch.dtype) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) * std).to(to)

    bias = shapes.named(case.layer).bias
    linear = nn.Linear(case.k, case.n, bias=bias, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(normal(case.n, case.k, case.k**-0.5, dtype), requires_grad=False)
    if bias:
        linear.bias = nn.Parameter(normal(1, case.n, 1.0, dtype)[0], requires_grad=False)
    # b is not zero as at the start of a training run: the correctness gate would not see the adapter.
    return Tensors(
        linear=linear,
        x=normal(case.m, case.k, 1.0, dtype).requires_grad_(case.stage == "train"),
        a=nn.Parameter(normal(case.r, case.k, case.k**-0.5, adapter_dtype)),
        b=nn.Parameter(normal(case.n, case.r, case.r**-0.5, adapter_dtype)),
        grad_y=normal(case.m, case.n, 1.0, dtype),
        alpha=2 * case.r,
    )


def _eager(case: Case, t: Tensors) -> nn.Module:
    return EagerLora(t.linear, t.a, t.b, t.alpha / case.r, case.dropout)


def _compiled(case: Case, t: Tensors) -> nn.Module:
    return compiled(_eager(case, t))


def _peft(case: Case, t: Tensors) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.r, lora_alpha=t.alpha, lora_dropout=case.dropout, target_modules=["linear"])
    upcast = case.adapter_dtype == "fp32"
    model = get_peft_model(nn.ModuleDict({"linear": t.linear}), config, autocast_adapter_dtype=upcast)
    return _with_adapter(model.base_model.model["linear"], t)


def _pyfused(case: Case, t: Tensors) -> nn.Module:
    from pyfused.nn import LoraLinear

    return _with_adapter(LoraLinear(t.linear, r=case.r, lora_alpha=t.alpha, lora_dropout=case.dropout), t)


def _with_adapter(layer: nn.Module, t: Tensors) -> nn.Module:
    """A layer in HF PEFT's form with the parameters that all share."""
    layer.lora_A["default"].weight = t.a
    layer.lora_B["default"].weight = t.b
    return layer


PROVIDERS: dict[str, Callable[[Case, Tensors], nn.Module]] = {
    "base": lambda case, t: t.linear,
    "eager": _eager,
    "compile": _compiled,
    "peft": _peft,
    "pyfused": _pyfused,
}


def build(case: Case, providers: list[str]) -> dict[str, Workload]:
    """One workload per provider, on the same tensors."""
    t = make_tensors(case)
    training = case.stage == "train"
    workloads = {}
    for name in providers:
        layer = PROVIDERS[name](case, t).train(training)
        inputs = () if not training else (t.x,) if name == "base" else (t.x, t.a, t.b)
        weights = (*t.linear.parameters(), t.a, t.b)
        workloads[name] = Workload(bind(layer, t.x), inputs, t.grad_y if training else None, weights)
    return workloads


def verify(case: Case, workloads: dict[str, Workload]) -> None:
    """Hold every provider against plain PyTorch without dropout, before it is timed.

    Errors are relative to the adapter's own part of y and of the gradients. With dropout they must be about what
    leaving out a share p of x makes of it, sqrt(p / (1 - p)): neither less (dropout is off) nor more.

    Raises:
        RuntimeError: a provider computes something else.
    """
    reference = build(replace(case, dropout=0.0), ["base", "eager"])
    base, expected = reference["base"].outputs(), reference["eager"].outputs()
    parts = [e.double() - b.double() for e, b in zip(expected, base, strict=False)] + expected[len(base) :]
    low, high = 0.0, TOLERANCE[case.dtype]
    if case.dropout:
        noise = math.sqrt(case.dropout / (1.0 - case.dropout))
        low, high = 0.6 * noise, 1.6 * noise
    for name, work in workloads.items():
        if name == "base":
            continue
        names = ("y", "grad_x", "grad_a", "grad_b")[: len(expected)]
        for what, got, want, part in zip(names, work.outputs(), expected, parts, strict=True):
            error = harness.relative_error(got, want, part)
            if not low <= error <= high:  # also where it is NaN
                raise RuntimeError(
                    f"{case.label}: {name} computes a wrong {what}: relative difference to plain PyTorch without "
                    f"dropout {error:.3g}, expected {low:.3g} to {high:.3g}"
                )


BENCHMARK = Benchmark(
    op="lora",
    description=__doc__,
    providers=list(PROVIDERS),
    all_cases=all_cases,
    quick_cases=quick_cases,
    build=build,
    verify=verify,
    limit=limit,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
