"""The bottleneck adapter: pyfused against its matrix products alone, plain PyTorch, torch.compile and AdapterHub's.

python benchmarks/bench_bottleneck.py --quick      # about a minute
python benchmarks/bench_bottleneck.py --check      # everything; exits with 1 where a goal is missed

AdapterHub's layer is among the providers where its library can be imported, as in the environment of its tests:
PYTHONPATH=. .venv-adapterhub/bin/python benchmarks/bench_bottleneck.py
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import plot
import records
import torch
import torch.nn.functional as F
from harness import Result, Workload
from lora_common import DTYPES, TOLERANCE
from rich.console import Console
from runner import bind, on_device
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
# Width and bottleneck of MiniLM, BERT base and Llama 3.2 1B.
_WIDTHS = ((384, 48), (768, 64), (2048, 64))
# Providers on a GPU by what PYFUSED_BOTTLENECK says.
_PATHS = {"fused": "pyfused-fused", "passes": "pyfused-passes", "auto": "pyfused"}


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
    shapes = ((8192, 4096, 64), (2048, 4096, 64), (8192, 4096, 128), (8192, 4096, 256), (8192, 768, 48))
    train = [
        Case("train", *shape, "bf16", adapter_dtype, dropout)
        for adapter_dtype in ("bf16", "fp32")
        for shape in shapes
        for dropout in (0.0, 0.1)
    ]
    train += [Case("train", 8192, 4096, 64, "fp32", "fp32", dropout) for dropout in (0.0, 0.1)]
    return train + [Case("infer", m, 4096, 64, "bf16", "bf16", 0.0) for m in (1, 16, 512)]


@dataclass(frozen=True)
class Tensors:
    """What all providers of a case share; the residual is x."""

    x: Tensor
    parameters: tuple[nn.Parameter, ...]  # w_down [H, D], b_down [H], w_up [D, H], b_up [D]
    grad_y: Tensor


def make_tensors(case: Case, seed: int = 0) -> Tensors:
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()

    def normal(*shape: int, dtype: str, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * std).to(device, DTYPES[dtype])

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


def _compiled(case: Case, t: Tensors) -> Callable[[Tensor], Tensor]:
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # else its worker processes start while the first cells are timed
    torch._dynamo.reset()
    return torch.compile(Eager(t.parameters, case.dropout).train(case.stage == "train"), fullgraph=True, dynamic=False)


def _pyfused(case: Case, t: Tensors) -> Callable[[Tensor], Tensor]:
    from pyfused.nn import Bottleneck

    layer = Bottleneck(case.d, case.h, "relu", dropout=case.dropout).train(case.stage == "train")
    linears = (layer.adapter_down[0], layer.adapter_up)
    for linear, weight, bias in zip(linears, t.parameters[::2], t.parameters[1::2], strict=True):
        linear.weight, linear.bias = weight, bias
    return lambda x: layer(x, x)


def _by_path(path: str) -> Callable[[Case, Tensors], Callable[[Tensor], Tensor]]:
    """pyfused on a GPU with its path forced; the backward that follows a forward sees the same."""

    def make(case: Case, t: Tensors) -> Callable[[Tensor], Tensor]:
        layer = _pyfused(case, t)

        def call(x: Tensor) -> Tensor:
            os.environ["PYFUSED_BOTTLENECK"] = path
            return layer(x)

        return call

    return make


def _products(case: Case, t: Tensors) -> Callable[[Tensor], Tensor]:
    """In the dtype of x: what the products of a perfect adapter would cost."""
    weights = [nn.Parameter(parameter.detach().to(DTYPES[case.dtype])) for parameter in t.parameters]
    return lambda x: Products.apply(x, *weights)


PROVIDERS: dict[str, Callable[[Case, Tensors], Callable[[Tensor], Tensor]]] = {
    "products": _products,
    "eager": lambda case, t: Eager(t.parameters, case.dropout).train(case.stage == "train"),
    "compile": _compiled,
    "pyfused": _pyfused,
}
if importlib.util.find_spec("adapters") is not None:
    PROVIDERS["adapterhub"] = lambda case, t: AdapterHubLayer(case, t.parameters).train(case.stage == "train")


CUDA_PROVIDERS = {name: _by_path(path) for path, name in _PATHS.items()}


def build(case: Case, providers: list[str]) -> dict[str, Workload]:
    """One workload per provider, on the same tensors."""
    t = make_tensors(case)
    training = case.stage == "train"
    workloads = {}
    for name in providers:
        inputs = (t.x,) if name == "products" else (t.x, *t.parameters)
        call = bind((PROVIDERS | CUDA_PROVIDERS)[name](case, t), t.x)
        workloads[name] = Workload(call, inputs if training else (), t.grad_y if training else None, t.parameters)
    return workloads


def verify(case: Case, workloads: dict[str, Workload]) -> None:
    """Hold every provider but "products" against plain PyTorch, before it is timed; with dropout its rate alone.

    Raises:
        RuntimeError: a provider computes something else.
    """
    expected = build(replace(case, dropout=0.0), ["eager"])["eager"].outputs()
    x = make_tensors(case).x.detach()
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
    """The ratio to eager that pyfused may have: the goals of docs/performance.md, where there is one."""
    if case.stage == "infer":
        return 1 / 1.5 if case.m <= 16 else 1.02
    if mode != "full" or case.adapter_dtype != case.dtype:
        return 1.02
    return {("fp32", False): 1 / 1.1, ("bf16", False): 1 / 1.3, ("fp32", True): 1 / 2, ("bf16", True): 1 / 3.5}[
        case.dtype, case.dropout > 0
    ]


def run(
    cases: list[Case],
    providers: list[str],
    budget_s: float,
    console: Console,
    measure: Callable[..., list[Result]] = harness.measure,
) -> Iterator[list[Result]]:
    """Measure case by case, with a line for each; yields all results so far."""
    results: list[Result] = []
    for case in cases:
        workloads = build(case, providers)
        verify(case, workloads)
        measured = measure(case, workloads, budget_s)
        ratios = (f"{r.provider} {r.ratio_min:.2f}" for r in measured if r.mode == measured[-1].mode)
        console.print(f"{case.label}: {', '.join(ratios)}", highlight=False, soft_wrap=True)
        results += measured
        yield results


def report(results: list[Result], console: Console) -> bool:
    """Print every cell where pyfused misses its goal; True where there is one."""
    lost = harness.losses(results, "pyfused", ("eager",), limit)
    for ours, theirs, ratio in lost:
        console.print(
            f"missed: {ours.case.label} {ours.mode}: {ours.stats.min_us:.1f} us, {ratio:.3f} of eager's "
            f"{theirs.stats.min_us:.1f} us; goal {limit(ours.case, ours.mode):.3f}",
            soft_wrap=True,
        )
    console.print(f"{len({(result.case, result.mode) for result in results})} cells, {len(lost)} goals missed")
    return bool(lost)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda has no --quick")
    parser.add_argument("--only", metavar="REGEX", help="cases whose label matches, as 'train .* bf16'")
    parser.add_argument("--list", action="store_true", help="print the labels of the cases and stop")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=2.0, metavar="S", help="seconds of samples a case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and the plot")
    options = parser.parse_args(arguments)
    cases = [
        case
        for case in (cuda_cases() if options.device == "cuda" else quick_cases() if options.quick else all_cases())
        if not options.only or re.search(options.only, case.label)
    ]
    if not cases:
        parser.error(f"--only: no case matches {options.only!r}; --list prints them")
    console = Console()
    if options.list:
        console.print("\n".join(case.label for case in cases))
        return 0
    torch.set_num_threads(options.threads)
    info, measure = on_device(options.device)
    # on a GPU each provider sets its path, the automatic one too
    providers = [*PROVIDERS] if options.device == "cpu" else [*dict.fromkeys([*PROVIDERS, *CUDA_PROVIDERS])]
    part = "-part" if options.only else "-quick" if options.quick else ""
    path = options.out / f"{records.result_name('bottleneck', info)}{part}.csv"
    results: list[Result] = []
    for results in run(cases, providers, options.budget, console, measure):
        records.write_csv(path, info | {"cases": f"{len({r.case for r in results})} of {len(cases)}"}, results)
    picture = plot.draw(path)
    console.print(f"written: {path.name}, {picture.name}")
    return 1 if report(results, console) and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
