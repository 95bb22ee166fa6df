"""LoRA on one frozen embedding: pyfused against torch's own functions, which are the baseline, and HF PEFT.

python benchmarks/bench_lora_embedding.py --quick      # under a minute
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import torch
from harness import Workload
from lora_common import DTYPES, TOLERANCE
from runner import Benchmark, bind
from torch import Tensor, nn

RANK = 8


@dataclass(frozen=True)
class Case:
    """One cell: ``m`` tokens of ``count``, rows of ``dim``; the adapter is in fp32 beside a 16-bit base."""

    stage: str
    layer: str
    m: int
    count: int
    dim: int
    dtype: str
    adapter_dtype: str = "fp32"

    @property
    def label(self) -> str:
        dtype = self.dtype if self.adapter_dtype == self.dtype else f"{self.dtype}+{self.adapter_dtype}"
        return f"{self.stage} {self.layer} M={self.m} {dtype}"


_LAYERS = {"bert-768": (30522, 768), "llama-2048": (32000, 2048)}


def all_cases() -> list[Case]:
    return [
        Case(stage, name, m, count, dim, dtype)
        for stage, rows in (("train", (512, 4096)), ("infer", (1, 512)))
        for name, (count, dim) in _LAYERS.items()
        for m in rows
        for dtype in ("fp32", "bf16")
    ]


def quick_cases() -> list[Case]:
    return [case for case in all_cases() if case.layer == "bert-768"]


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share: ids ``[M]``, a ``[R, V]``, b ``[D, R]``, grad_y ``[M, D]``."""

    embedding: nn.Embedding
    ids: Tensor
    a: nn.Parameter
    b: nn.Parameter
    grad_y: Tensor


def make_tensors(case: Case, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    dtype, adapter = DTYPES[case.dtype], DTYPES[case.adapter_dtype]
    weight = torch.randn(case.count, case.dim, generator=generator).to(dtype)
    return Tensors(
        embedding=nn.Embedding.from_pretrained(weight),
        ids=torch.randint(0, case.count, (case.m,), generator=generator),
        a=nn.Parameter(torch.randn(RANK, case.count, generator=generator).to(adapter)),
        b=nn.Parameter(torch.randn(case.dim, RANK, generator=generator).to(adapter)),
        grad_y=torch.randn(case.m, case.dim, generator=generator).to(dtype),
    )


class EagerLora(nn.Module):
    """LoRA on an embedding as one writes it in PyTorch."""

    def __init__(self, t: Tensors) -> None:
        super().__init__()
        self.embedding, self.a, self.b = t.embedding, t.a, t.b

    def forward(self, ids: Tensor) -> Tensor:
        y = self.embedding(ids)
        return (y + nn.functional.embedding(ids, self.a.T) @ self.b.T * 2.0).to(y.dtype)


def _peft(case: Case, t: Tensors) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["embedding"])
    model = get_peft_model(nn.ModuleDict({"embedding": t.embedding}), config)
    return _with_factors(model.base_model.model["embedding"], t)


def _pyfused(case: Case, t: Tensors) -> nn.Module:
    from pyfused.nn import LoraEmbedding

    return _with_factors(LoraEmbedding(t.embedding, r=RANK, lora_alpha=2 * RANK), t)


def _with_factors(layer: nn.Module, t: Tensors) -> nn.Module:
    """A layer in HF PEFT's form with the parameters that all share."""
    layer.lora_embedding_A["default"], layer.lora_embedding_B["default"] = t.a, t.b
    return layer


PROVIDERS: dict[str, Callable[[Case, Tensors], nn.Module]] = {
    "eager": lambda case, t: EagerLora(t),
    "peft": _peft,
    "pyfused": _pyfused,
}


def build(case: Case, providers: Sequence[str]) -> dict[str, Workload]:
    """One workload per provider, on the same tensors. There is none for the base: it has nothing to differentiate."""
    t = make_tensors(case)
    training = case.stage == "train"
    workloads = {}
    for name in providers:
        layer = PROVIDERS[name](case, t).train(training)
        inputs = (t.a, t.b) if training else ()
        weights = (t.embedding.weight, t.a, t.b)
        workloads[name] = Workload(bind(layer, t.ids), inputs, t.grad_y if training else None, weights)
    return workloads


def verify(case: Case, workloads: dict[str, Workload]) -> None:
    """Hold every provider against plain PyTorch before it is timed.

    Raises:
        RuntimeError: a provider computes something else.
    """
    expected = build(case, ["eager"])["eager"].outputs()
    for name, work in workloads.items():
        harness.check_outputs(
            case.label, name, ("y", "grad_a", "grad_b"), work.outputs(), expected, TOLERANCE[case.dtype]
        )


BENCHMARK = Benchmark(
    op="lora_embedding",
    description=__doc__,
    providers=list(PROVIDERS),
    all_cases=all_cases,
    quick_cases=quick_cases,
    build=build,
    verify=verify,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
