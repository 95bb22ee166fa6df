"""Many LoRA adapters in one batch on one frozen linear layer: pyfused against the layer, gathering, and HF PEFT's loop.

python benchmarks/bench_multi_lora.py --quick      # under a minute
python benchmarks/bench_multi_lora.py              # everything
python benchmarks/bench_multi_lora.py --device cuda            # all
python benchmarks/bench_multi_lora.py --device cuda --goals    # the cells that have a goal on an H200

In inference. "decode": one row for each sequence; "prefill": 128 rows for each. The same buffers are used
at each call, as a model's weights are. "eager" gathers the adapters' matrices for each sequence and multiplies by bmm.
"pyfused" computes as a model's layers do with ``adapter_names=``, "pyfused-op" adds the op to the layer's result.
Mixed ranks ("r=8+16+32+64") are the adapters' in turn; "eager" pads them. On a GPU decoding is timed in CUDA graphs of
several layers, which HF PEFT's loop cannot be captured in; "vllm" is the layer with vLLM's Triton kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import harness
import providers
import shapes
import torch
import torch.nn.functional as F
import vllm_lora
from gpu_goals import FLOOR, Goal
from harness import Workload
from lora_bytes import SIZES
from runner import Benchmark, OnGpu
from torch import Tensor, nn

from pyfused.ops import LoraTable, frozen_linear, multi_lora_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of y's norm, against the delta in fp32.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
SCALE = 2.0
CPU = torch.device("cpu")
MIXED = "8+16+32+64"


@dataclass(frozen=True)
class Case:
    """``sequences`` of ``rows`` rows each, over ``adapters`` in turn, the last ``base`` of them without one.

    ``r`` is the rank of all, or the adapters' in turn: "8+64".
    """

    stage: str
    layer: str
    sequences: int
    rows: int
    k: int
    n: int
    r: str
    adapters: int
    base: int
    dtype: str

    @property
    def label(self) -> str:
        kind = "decode" if self.rows == 1 else "prefill"
        who = f"{self.adapters} adapters" + (f", {self.base} without" if self.base else "")
        return f"{self.stage} {self.layer} {kind} {self.sequences}x{self.rows} {who} r={self.r} {self.dtype}"

    @property
    def ranks(self) -> list[int]:
        """Each adapter's."""
        given = [int(rank) for rank in self.r.split("+")]
        return [given[place % len(given)] for place in range(self.adapters)]

    @property
    def places(self) -> list[int]:
        """Each sequence's adapter, -1 for none."""
        with_one = self.sequences - self.base
        return [sequence % self.adapters if sequence < with_one else -1 for sequence in range(self.sequences)]


def _case(shape: shapes.LinearShape, sequences: int, rows: int, r: int | str, adapters: int, dtype: str, base: int = 0):
    sizes = (shape.in_features, shape.out_features, str(r))
    return Case("infer", shape.name, sequences, rows, *sizes, adapters, base, dtype)


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


def decode_cases_on_gpu() -> list[Case]:
    """Llama 3 8B's square layer: 1 to 64 rows, each with an adapter of its own, of one rank or of several."""
    square = shapes.LLAMA3_ATTENTION
    one_rank = [_case(square, rows, 1, r, rows, "bf16") for rows in (1, 8, 32, 64) for r in (8, 16, 64)]
    return one_rank + [_case(square, rows, 1, MIXED, rows, "bf16") for rows in (8, 32, 64)]


def cuda_cases() -> list[Case]:
    """Decoding, also with fewer adapters than rows, and prompts."""
    square = shapes.LLAMA3_ATTENTION
    return [
        *decode_cases_on_gpu(),
        _case(square, 64, 1, 16, 8, "bf16"),
        _case(square, 64, 1, 16, 8, "bf16", base=32),
        *(_case(square, 8, rows, r, 8, "bf16") for rows in (128, 1024) for r in (16, MIXED)),
    ]


def adapter_bytes(case: Case) -> int:
    """The fewest bytes of the op alone: the matrices of adapters that have rows, and these rows of x and of y, which is
    read and written."""
    size, places = SIZES[case.dtype], case.places
    matrices = sum(case.ranks[place] for place in set(places) if place >= 0) * (case.k + case.n)
    rows = case.rows * sum(place >= 0 for place in places)
    return size * (matrices + rows * (case.k + 2 * case.n))


def floor_bytes(case: Case, mode: str = "forward") -> int:
    """The fewest bytes of the layer with its adapters: weight, x, matrices read once, y written once."""
    size, places = SIZES[case.dtype], case.places
    matrices = sum(case.ranks[place] for place in set(places) if place >= 0) * (case.k + case.n)
    return size * (case.k * case.n + matrices + case.sequences * case.rows * (case.k + case.n))


def goals() -> list[Goal]:
    """On an H200: one row costs at most 2.5 us in a graph; within 1.3 of the bytes' floor where that is above 8 us, of
    the layer with its adapters and of the adapters alone."""
    found = []
    for case in decode_cases_on_gpu():
        if case.sequences == 1:
            found.append(Goal(case, "pyfused", "forward", extra_us=2.5))
        floor = {"ratio": 1.3, "over": FLOOR, "above_us": 8.0}
        found.append(Goal(case, "pyfused", "forward", **floor, floor_bytes=floor_bytes(case)))
        found.append(Goal(case, "pyfused", "forward", **floor, floor_bytes=adapter_bytes(case), extra_only=True))
    return found


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share; ``index``: the adapter of each sequence, -1 for none."""

    linear: nn.Linear
    x: Tensor
    a: list[Tensor]
    b: list[Tensor]
    index: Tensor


def make_tensors(case: Case, device: torch.device = CPU) -> Tensors:
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[case.dtype]

    def normal(*shape: int, std: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

    linear = nn.Linear(case.k, case.n, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(normal(case.n, case.k, std=case.k**-0.5), requires_grad=False)
    return Tensors(
        linear=linear,
        x=normal(case.sequences, case.rows, case.k, std=1.0),
        a=[normal(rank, case.k, std=case.k**-0.5) for rank in case.ranks],
        b=[normal(case.n, rank, std=rank**-0.5) for rank in case.ranks],
        index=torch.tensor(case.places, device=device),
    )


def _base(case: Case, t: Tensors) -> Callable[[], Tensor]:
    return lambda: t.linear(t.x)


def _eager(case: Case, t: Tensors) -> Callable[[], Tensor]:
    # A matrix of zeros stands for no adapter.
    rank = max(case.ranks)
    a = vllm_lora.padded([*t.a, torch.zeros_like(t.a[0])], 0, rank)
    b = vllm_lora.padded([*t.b, torch.zeros_like(t.b[0])], 1, rank)
    index = t.index % len(a)

    def call() -> Tensor:
        s = torch.bmm(t.x, a[index].transpose(1, 2))
        return torch.baddbmm(t.linear(t.x), s, b[index].transpose(1, 2), alpha=SCALE)

    return call


def _peft(case: Case, t: Tensors) -> Callable[[], Tensor]:
    from peft import LoraConfig, get_peft_model

    configs = [LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["linear"]) for rank in case.ranks]
    model = get_peft_model(nn.ModuleDict({"linear": t.linear}), configs[0], "0", autocast_adapter_dtype=False)
    for name in range(1, case.adapters):
        model.add_adapter(str(name), configs[name], autocast_adapter_dtype=False)
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
GPU_PROVIDERS = PROVIDERS | {
    "vllm": lambda case, t: vllm_lora.layer(t.linear, t.x, t.a, t.b, t.index, SCALE),
}


def applies(provider: str, case: Case) -> bool:
    """Whether a provider has this case on a GPU: HF PEFT's loop waits for the host and cannot be in a graph."""
    return provider != "peft" or case.rows > 1


def missing(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot be measured here at all; None where it can."""
    return vllm_lora.missing(device) if provider == "vllm" else providers.missing(provider, device)


def in_graphs(case: Case, workloads: dict[str, Workload], gpu) -> dict[str, Workload]:
    """Decoding as graphs of several layers, of which each has memory of its own; prompts as they are."""
    import cuda_timing

    if case.rows > 1:
        return workloads
    count = cuda_timing.layers_beyond_l2(floor_bytes(case), gpu)
    layers = [workloads, *(build(case, list(workloads), gpu.device) for _ in range(count - 1))]
    return cuda_timing.in_graphs(case.label, layers, TOLERANCE[case.dtype], gpu)


def build(case: Case, names: Sequence[str], device: torch.device | None = None) -> dict[str, Workload]:
    """One workload per provider, on the same tensors."""
    t = make_tensors(case, device or CPU)
    return {name: Workload(GPU_PROVIDERS[name](case, t)) for name in names}


def verify(case: Case, workloads: dict[str, Workload], device: torch.device | None = None) -> None:
    """Hold every provider against an fp32 computation before it is timed.

    Raises:
        RuntimeError: a provider computes something else.
    """
    t = make_tensors(case, device or CPU)
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
    on_gpu=OnGpu(cuda_cases, goals, list(GPU_PROVIDERS), applies, missing, in_graphs, floor_bytes),
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
