"""LoRA on a GPU: pyfused against the frozen layer, plain PyTorch, torch.compile, HF PEFT and Unsloth's scheme.

python benchmarks/bench_lora_cuda.py --quick             # under two minutes
python benchmarks/bench_lora_cuda.py --stage train       # 96 cells, some minutes; likewise decode and shared
python benchmarks/bench_lora_cuda.py --goals             # the cells that have a goal on an H200, and whether it is met
python benchmarks/bench_lora_cuda.py --only 'kv.*p=0.1'
"""

from __future__ import annotations

import argparse
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import gpu_goals
import harness
import lora_bytes
import lora_cuda
import plot
import records
import torch
from cuda_timing import Gpu, in_graphs, layers_beyond_l2
from harness import Result, Workload
from lora_common import TOLERANCE, limit
from lora_cuda import PROVIDERS, UPDATE, Case, Tensors
from providers import kept_environment, told, working
from runner import bind
from torch import Tensor

from pyfused._library import has_kernel

RESULTS = Path(__file__).parent / "results"
STAGES = {"train": lora_cuda.train_cases, "decode": lora_cuda.decode_cases, "shared": lora_cuda.shared_cases}
MAX_ROUNDS = 60
FORCED = ("pyfused-after", "pyfused-before", "pyfused-concat")
GOALS = {(goal.case, goal.provider, goal.mode): goal for goal in lora_cuda.goals()}


def build(case: Case, providers: list[str], t: Tensors) -> dict[str, Workload]:
    """One workload per provider that has the case, on the same tensors."""
    training = case.stage == "train"
    workloads = {}
    for name in providers:
        layer = PROVIDERS[name](case, t).train(training)
        inputs = () if not training else (t.x,) if name == "base" else (t.x, *t.adapters)
        workloads[name] = Workload(bind(layer, t.x), inputs, t.grad_y if training else None, t.weights)
    return workloads


def refused(name: str, case: Case, t: Tensors) -> str | None:
    """What a forced update says that cannot do this shape; None for all others."""
    if name not in FORCED:
        return None
    try:
        build(case, [name], t)[name].outputs()
    except Exception as error:  # any other error is told where it comes again
        return str(error).splitlines()[0] if UPDATE in str(error) else None
    return None


def expected_of(case: Case, t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of plain PyTorch in fp64 without dropout, and the adapter's part of them."""
    reference = build(replace(case, dropout=0.0), ["base", "eager"], t.double())
    base, expected = reference["base"].outputs(), reference["eager"].outputs()
    return expected, [e - b for e, b in zip(expected, base, strict=False)] + expected[len(base) :]


def verify(
    case: Case, workloads: dict[str, Workload], t: Tensors, against: tuple[list[Tensor], list[Tensor]] | None = None
) -> None:
    """Hold every provider against plain PyTorch, see :func:`expected_of`, before it is timed.

    The rule is ``bench_lora.verify``'s: errors relative to the adapter's part, with dropout about what dropout makes.

    Raises:
        RuntimeError: a provider computes something else.
    """
    expected, parts = against or expected_of(case, t)
    low, high = 0.0, TOLERANCE[case.dtype]
    if case.dropout:
        noise = math.sqrt(case.dropout / (1.0 - case.dropout))
        low, high = 0.6 * noise, 1.6 * noise
    names = [f"y[{i}]" for i in range(len(case.outputs))]
    if case.stage == "train":
        names += ["grad_x", *(f"grad_{which}[{i}]" for which in "ab" for i in range(len(case.outputs)))]
    for provider, work in workloads.items():
        if provider == "base":
            continue
        for what, got, want, part in zip(names, work.outputs(), expected, parts, strict=True):
            error = harness.relative_error(got, want, part)
            if not low <= error <= high:  # also where it is NaN
                raise RuntimeError(
                    f"{case.label}: {provider} computes a wrong {what}: relative difference to plain PyTorch in fp64 "
                    f"without dropout {error:.3g}, expected {low:.3g} to {high:.3g}"
                )


def decode_workloads(case: Case, providers: list[str], t: Tensors, gpu: Gpu) -> dict[str, Workload]:
    """Each provider's forward of several copies of the layer in a row as one CUDA graph."""
    of_one = sum(weight.numel() * weight.element_size() for weight in t.weights)
    copies = [t, *(t.copy() for _ in range(layers_beyond_l2(of_one, gpu) - 1))]
    return in_graphs(case.label, [build(case, providers, copy) for copy in copies], TOLERANCE[case.dtype], gpu)


def measure(
    case: Case, providers: list[str], budget_s: float, gpu: Gpu, place: str, say: Callable[[str], object] = print
) -> list[Result]:
    """The results of a case, and a line for it that begins with ``place``; ``say`` is told of providers left out."""
    torch._dynamo.reset()  # each case has its own graphs
    t = lora_cuda.make_tensors(case, gpu.device)
    training = case.stage == "train"
    chosen = [name for name in providers if lora_cuda.applies(name, case)]
    for name in list(chosen):
        reason = refused(name, case, t)
        if reason is not None:
            print(f"  {case.label}: without {name}: {reason}")
            chosen.remove(name)
    against = expected_of(case, t)
    host, peak = {}, {}

    def attempt(name: str) -> Workload:
        (work,) = build(case, [name], t).values()
        verify(case, {name: work}, t, against)
        if not training:
            return decode_workloads(case, [name], t, gpu)[name]
        host[name], peak[name] = gpu.host_us(work), gpu.peak_bytes(work)
        return work

    timed = working(case.label, chosen, attempt, say)
    clock = gpu.clock()
    measured = harness.measure(case, timed, budget_s, clock, sample_us=0.0, max_rounds=MAX_ROUNDS)
    ratios = (f"{r.provider} {r.ratio_p50:.3f}" for r in measured if r.mode == measured[-1].mode)
    base = measured[-len(timed)].stats.p50_us
    late = f" ({clock.late} of {clock.samples} samples late)" if clock.late > 0.1 * clock.samples else ""
    print(f"{place} {case.label}: {base:,.1f} us; {', '.join(ratios)}{late}", flush=True)
    return [with_model(result, measured, host, peak) for result in measured]


def run(
    cases: list[Case], providers: list[str], budget_s: float, gpu: Gpu, say: Callable[[str], object]
) -> Iterator[list[Result]]:
    """Measure case by case, with a line for each; yields all results so far. What fails is left out, and said."""
    results: list[Result] = []
    for number, case in enumerate(cases, 1):
        try:
            results += measure(case, providers, budget_s, gpu, f"[{number}/{len(cases)}]", say)
        except Exception as error:
            traceback.print_exc()
            say(f"wrong: {told(case.label, 'all', error)}")
            if not gpu.answers():
                say(f"wrong: the GPU answers no more in this process; {len(cases) - number} cases are left out")
                return
            continue
        yield results


def once(cases: list[Case], providers: list[str], gpu: Gpu) -> None:
    """One step of each provider of a case, untimed and on a line of its own: for a profiler such as ncu."""
    for case in cases:
        t = lora_cuda.make_tensors(case, gpu.device)
        chosen = [name for name in providers if lora_cuda.applies(name, case)]
        for name, work in build(case, chosen, t).items():
            print(f"{case.label}: {name}", flush=True)
            work.outputs()


def with_model(
    result: Result, measured: list[Result], host: dict[str, dict[str, float]], peak: dict[str, int]
) -> Result:
    """Further columns: rates of the base's work, the adapter's extra time and bytes, host time, peak memory."""
    case, mode = result.case, result.mode
    base = next(other for other in measured if other.mode == mode)
    flop, least_bytes = lora_bytes.base_work(case.m, case.k, case.outputs, case.dtype, mode)
    moved = lora_bytes.extra_bytes(
        result.provider, mode, case.m, case.k, case.outputs, case.r, case.dtype, case.adapter_dtype, case.dropout
    )
    extra_us = result.stats.p50_us - base.stats.p50_us
    is_base = result.provider == base.provider
    goal = GOALS.get((case, result.provider, mode))
    host_us = host.get(result.provider, {}).get(mode)
    return replace(
        result,
        extra={
            "base_tflop_s": f"{flop / result.stats.p50_us / 1e6:.1f}",
            "base_tb_s": f"{least_bytes / result.stats.p50_us / 1e6:.3f}",
            "extra_us": "" if is_base else f"{extra_us:.2f}",
            "extra_bytes": "" if is_base or moved is None else moved,
            "extra_tb_s": "" if is_base or not moved or min(moved, extra_us) <= 0 else f"{moved / extra_us / 1e6:.3f}",
            "host_us": "" if host_us is None else f"{host_us:.1f}",
            "peak_bytes": peak.get(result.provider, ""),
            "goal": "" if goal is None else str(goal),
        },
    )


def print_table(results: list[Result]) -> None:
    """The last mode of each case by the median: the base in microseconds, the others over it."""
    last = {result.case: result.mode for result in results}
    providers = list(dict.fromkeys(result.provider for result in results))
    width = max(len(case.label) for case in last)
    print(f"\n{'median, the base in us, the others over it':<{width}}", *(f"{name:>14}" for name in providers))
    for case, mode in last.items():
        cells = {r.provider: r for r in results if r.case == case and r.mode == mode}
        texts = []
        for name in providers:
            cell = cells.get(name)
            figure = "-" if cell is None else f"{cell.stats.p50_us:,.1f}" if name == "base" else f"{cell.ratio_p50:.3f}"
            texts.append(f"{figure:>14}")
        print(f"{case.label:<{width}}", *texts)


def report(results: list[Result]) -> bool:
    """Print where pyfused loses to another provider, and where another update would be faster than the one it chose.

    Returns:
        Whether it loses to eager or HF PEFT, by the rule of ``lora_common.limit``.
    """
    lost = harness.losses(results, "pyfused", ("eager", "peft"), limit)
    behind = harness.losses(results, "pyfused", ("compile", "unsloth"), lambda case, mode: 1.02)
    better = harness.losses(results, "pyfused", FORCED, lambda case, mode: 1.03)
    for title, entries in (("loss", lost), ("behind", behind), ("auto chose worse", better)):
        for ours, theirs, ratio in entries:
            print(
                f"{title}: {ours.case.label} {ours.mode}: {ours.stats.min_us:.1f} us, {ratio:.3f} of "
                f"{theirs.provider}'s (spreads {ours.stats.spread:.1%}, {theirs.stats.spread:.1%})"
            )
    cells = len({(result.case, result.mode) for result in results})
    print(f"{cells} cells: {len(lost)} losses, {len(behind)} behind torch.compile or Unsloth's scheme")
    return bool(lost)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a subset, under two minutes")
    parser.add_argument("--goals", action="store_true", help="the cells that have a goal")
    parser.add_argument("--stage", choices=STAGES, action="append", help="part of the cases; default: all")
    parser.add_argument("--only", metavar="REGEX", help="cases whose label matches, as 'train attn.* p=0.1'")
    parser.add_argument("--once", action="store_true", help="each provider once, without times, for a profiler")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 where pyfused loses to eager or HF PEFT, or a goal is not met"
    )
    parser.add_argument("--list", action="store_true", help="print the labels of the cases and stop")
    parser.add_argument(
        "--providers", default=",".join(PROVIDERS), help="which, the base always (default: %(default)s)"
    )
    parser.add_argument("--budget", type=float, metavar="S", default=1.0, help="seconds of samples a case")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and the plot")
    options = parser.parse_args(arguments)
    options.providers = ["base", *(name for name in options.providers.split(",") if name != "base")]
    unknown = sorted(set(options.providers) - set(PROVIDERS))
    if unknown:
        parser.error(f"--providers: unknown {', '.join(unknown)}; there are {', '.join(PROVIDERS)}")
    if bool(options.quick) + bool(options.goals) + bool(options.stage) > 1:
        parser.error("--quick, --goals, --stage: give one of them")
    stages = options.stage or list(STAGES)
    options.cases = lora_cuda.quick_cases() if options.quick else [c for stage in stages for c in STAGES[stage]()]
    if options.goals:
        options.cases = list(dict.fromkeys(goal.case for goal in lora_cuda.goals()))
    if options.only:
        options.cases = [case for case in options.cases if re.search(options.only, case.label)]
        if not options.cases:
            parser.error(f"--only: no case matches {options.only!r}; --list prints them")
    # A run of a part must not take the place of the whole.
    part = options.only or len(options.providers) < len(PROVIDERS)
    whole = "-quick" if options.quick else "-goals" if options.goals else "".join(f"-{s}" for s in options.stage or ())
    options.suffix = "-part" if part else whole
    return options


def main(arguments: list[str] | None = None, gpu: Gpu | None = None) -> int:
    options = parse(arguments)
    if options.list:
        print("\n".join(case.label for case in options.cases))
        return 0
    if gpu is None:
        if not torch.cuda.is_available():
            print("bench_lora_cuda: torch finds no CUDA device", file=sys.stderr)
            return 2
        if not has_kernel("cuda"):
            print("bench_lora_cuda: this pyfused was built without CUDA kernels (PYFUSED_CUDA=ON)", file=sys.stderr)
            return 2
        gpu = Gpu()
    left_out = {name: lora_cuda.missing(name, gpu.device) for name in options.providers}
    left_out = {name: reason for name, reason in left_out.items() if reason is not None}
    for name, reason in left_out.items():
        print(f"without {name}: {reason}")
    providers = [name for name in options.providers if name not in left_out]
    if options.once:
        once(options.cases, providers, gpu)
        return 0
    info = gpu.environment() | gpu.ceilings()
    info |= {"left_out": "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "none"}
    for key, value in info.items():
        print(f"{key}: {value}")
    path = options.out / f"{records.result_name('lora', info)}{options.suffix}.csv"
    results: list[Result] = []
    goals: list[gpu_goals.Verdict] = []
    wrong: list[str] = []

    def say(line: str) -> None:
        wrong.append(line)
        print(line, flush=True)

    with kept_environment():
        for results in run(options.cases, providers, options.budget, gpu, say):
            done = {"clocks_at_end": gpu.clocks(), "cases": f"{len({r.case for r in results})} of {len(options.cases)}"}
            records.write_csv(path, info | done, results)
            newest = [result for result in results if result.case == results[-1].case]
            # Goals are meant for an H200.
            found = gpu_goals.verdicts(GOALS.values(), newest, float(info["copy_tb_s"]), options.providers)
            print(*found, sep="\n", end="\n" if found else "", flush=True)
            goals += found
    if not results:
        print("nothing was measured")
        return 1
    print_table(results)
    lost = report(results)
    try:
        print(f"written: {path.name}, {plot.draw(path).name}")
    except ImportError as error:
        print(f"written: {path.name}; no picture: {error}")
    return 1 if wrong or (options.check and (lost or not gpu_goals.all_met(goals))) else 0


if __name__ == "__main__":
    sys.exit(main())
