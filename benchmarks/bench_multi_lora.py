"""Many LoRA adapters in one batch on one frozen linear layer: pyfused against the layer, gathering, and HF PEFT's loop.

python benchmarks/bench_multi_lora.py --quick      # under a minute
python benchmarks/bench_multi_lora.py              # everything
python benchmarks/bench_multi_lora.py --device cuda

In inference. "decode": one row for each sequence; "prefill": 128 rows for each. The same buffers are used
at each call, as a model's weights are. "eager" gathers the adapters' matrices for each sequence and multiplies by bmm.
"pyfused" computes as a model's layers do with ``adapter_names=``, "pyfused-op" adds the op to the layer's result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import shapes
import torch
import torch.nn.functional as F
from harness import Workload
from runner import Benchmark
from torch import Tensor, nn

from pyfused.ops import LoraTable, frozen_linear, multi_lora_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of y's norm, against the delta in fp32.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
SCALE = 2.0


@dataclass(frozen=True)
class Case:
    """``sequences`` of ``rows`` rows each, over ``adapters`` in turn, the last ``base`` of them without one."""

    stage: str
    layer: str
    sequences: int
    rows: int
    k: int
    n: int
    r: int
    adapters: int
    base: int
    dtype: str

    @property
    def label(self) -> str:
        kind = "decode" if self.rows == 1 else "prefill"
        who = f"{self.adapters} adapters" + (f", {self.base} without" if self.base else "")
        return f"{self.stage} {self.layer} {kind} {self.sequences}x{self.rows} {who} r={self.r} {self.dtype}"


def _case(shape: shapes.LinearShape, sequences: int, rows: int, r: int, adapters: int, dtype: str, base: int = 0):
    return Case("infer", shape.name, sequences, rows, shape.in_features, shape.out_features, r, adapters, base, dtype)


def quick_cases() -> list[Case]:
    """The rows that goals are set for."""
    return [
        _case(shapes.BERT_768, 32, 1, 8, 32, "bf16"),
        _case(shapes.LLAMA_2048, 32, 1, 16, 32, "bf16"),
        _case(shapes.LLAMA_4096, 32, 1, 16, 32, "bf16"),
        _case(shapes.LLAMA_2048, 32, 1, 8, 5, "fp32"),
        _case(shapes.BERT_768, 8, 128, 8, 8, "bf16"),
        _case(shapes.BERT_768, 8, 128, 8, 8, "fp32"),
    ]


def all_cases() -> list[Case]:
    return [
        *quick_cases(),
        _case(shapes.BERT_768, 32, 1, 8, 32, "fp32"),
        _case(shapes.LLAMA_2048, 32, 1, 16, 32, "fp32"),
        _case(shapes.LLAMA_2048, 32, 1, 16, 1, "bf16"),
        _case(shapes.LLAMA_2048, 32, 1, 16, 8, "bf16"),
        _case(shapes.LLAMA_2048, 32, 1, 64, 32, "bf16"),
        _case(shapes.LLAMA_2048, 32, 1, 16, 8, "bf16", base=16),
        _case(shapes.LLAMA_2048, 32, 1, 16, 8, "bf16", base=32),
        _case(shapes.LLAMA_2048, 1, 1, 16, 1, "bf16"),
        _case(shapes.LLAMA_2048, 8, 128, 16, 8, "bf16"),
    ]


def cuda_cases() -> list[Case]:
    """Llama 3 8B's square layer: decode of 1 to 64 rows, each over as many adapters, and prompts."""
    square = shapes.LLAMA3_ATTENTION
    return [
        *(_case(square, rows, 1, r, rows, "bf16") for rows in (1, 8, 32, 64) for r in (8, 16, 64)),
        _case(square, 64, 1, 16, 8, "bf16"),
        _case(square, 64, 1, 16, 8, "bf16", base=32),
        *(_case(square, 8, rows, 16, 8, "bf16") for rows in (128, 1024)),
    ]


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share; ``index``: the adapter of each sequence, -1 for none."""

    linear: nn.Linear
    x: Tensor
    a: Tensor
    b: Tensor
    index: Tensor


def make_tensors(case: Case) -> Tensors:
    generator = torch.Generator("cpu").manual_seed(0)
    device = torch.get_default_device()
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * std).to(device, dtype)

    linear = nn.Linear(case.k, case.n, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(normal(case.n, case.k, std=case.k**-0.5), requires_grad=False)
    index = torch.arange(case.sequences) % case.adapters
    index[case.sequences - case.base :] = -1
    return Tensors(
        linear=linear,
        x=normal(case.sequences, case.rows, case.k, std=1.0),
        a=normal(case.adapters, case.r, case.k, std=case.k**-0.5),
        b=normal(case.adapters, case.n, case.r, std=case.r**-0.5),
        index=index,
    )


def _base(case: Case, t: Tensors) -> Callable[[], Tensor]:
    return lambda: t.linear(t.x)


def _eager(case: Case, t: Tensors) -> Callable[[], Tensor]:
    # A matrix of zeros stands for no adapter.
    a = torch.cat([t.a, torch.zeros_like(t.a[:1])])
    b = torch.cat([t.b, torch.zeros_like(t.b[:1])])
    index = t.index % len(a)

    def call() -> Tensor:
        s = torch.bmm(t.x, a[index].transpose(1, 2))
        return torch.baddbmm(t.linear(t.x), s, b[index].transpose(1, 2), alpha=SCALE)

    return call


def _peft(case: Case, t: Tensors) -> Callable[[], Tensor]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=case.r, lora_alpha=SCALE * case.r, target_modules=["linear"])
    model = get_peft_model(nn.ModuleDict({"linear": t.linear}), config, "0", autocast_adapter_dtype=False)
    for name in range(1, case.adapters):
        model.add_adapter(str(name), config, autocast_adapter_dtype=False)
    layer = model.eval().base_model.model["linear"]
    for name in range(case.adapters):
        layer.lora_A[str(name)].weight = nn.Parameter(t.a[name], requires_grad=False)
        layer.lora_B[str(name)].weight = nn.Parameter(t.b[name], requires_grad=False)
    names = ["__base__" if place < 0 else str(place) for place in t.index.tolist()]
    return lambda: layer(t.x, adapter_names=names)


def _table(t: Tensors) -> LoraTable:
    return LoraTable([(a, b, SCALE) for a, b in zip(t.a, t.b, strict=True)])


def _pyfused(case: Case, t: Tensors) -> Callable[[], Tensor]:
    table, weight = _table(t), t.linear.weight
    return lambda: multi_lora_(frozen_linear(t.x, weight, None), t.x, table, t.index)


def _op(case: Case, t: Tensors) -> Callable[[], Tensor]:
    table = _table(t)
    return lambda: multi_lora_(t.linear(t.x), t.x, table, t.index)


PROVIDERS: dict[str, Callable[[Case, Tensors], Callable[[], Tensor]]] = {
    "base": _base,
    "eager": _eager,
    "peft": _peft,
    "pyfused": _pyfused,
    "pyfused-op": _op,
}


def build(case: Case, providers: Sequence[str]) -> dict[str, Workload]:
    """One workload per provider, on the same tensors."""
    t = make_tensors(case)
    return {name: Workload(PROVIDERS[name](case, t)) for name in providers}


def verify(case: Case, workloads: dict[str, Workload]) -> None:
    """Hold every provider against an fp32 computation before it is timed.

    Raises:
        RuntimeError: a provider computes something else.
    """
    t = make_tensors(case)
    with torch.no_grad():
        base = t.linear(t.x).float()
        exact = base.clone()
        for sequence, place in enumerate(t.index.tolist()):
            if place >= 0:
                s = F.linear(t.x[sequence].float(), t.a[place].float())
                exact[sequence] += SCALE * F.linear(s, t.b[place].float())
        for name, work in workloads.items():
            error = harness.relative_error(work.call(), exact) if name != "base" else 0.0
            if not error <= TOLERANCE[case.dtype]:  # also where it is NaN
                raise RuntimeError(f"{case.label}: {name} computes something else: relative difference {error:.3g}")


BENCHMARK = Benchmark(
    op="multi_lora",
    description=__doc__,
    providers=list(PROVIDERS),
    all_cases=all_cases,
    quick_cases=quick_cases,
    build=build,
    verify=verify,
    cuda_cases=cuda_cases,
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
