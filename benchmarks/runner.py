"""The command line that benchmarks share: which cases, measured how, where the results go, who is too slow."""

from __future__ import annotations

import argparse
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gpu_goals
import harness
import plot
import providers
import records
import torch
from gpu_goals import Goal
from harness import Case, Result, Workload
from providers import kept_environment, told, working
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
# Up to this ratio to a rival pyfused has not lost, where a benchmark says nothing else.
SLOWER = 1.02


def compiled(module: nn.Module) -> nn.Module:
    """``module`` under ``torch.compile``, one graph for one case."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # else its worker processes start while the first cells are timed
    torch._dynamo.reset()  # each case has its own graph, and the number of graphs for one forward is limited
    return torch.compile(module, fullgraph=True, dynamic=False)


def find_gpu():
    """The GPU, for ``--device cuda``.

    Raises:
        SystemExit: there is none, or pyfused has no kernels for it.
    """
    from cuda_timing import Gpu

    from pyfused._library import has_kernel

    if not torch.cuda.is_available() or not has_kernel("cuda"):
        raise SystemExit("--device cuda: needs a CUDA device and a pyfused built with PYFUSED_CUDA=ON")
    return Gpu()


def measure_on(gpu) -> Callable[..., list[Result]]:
    """``harness.measure`` by the GPU's clock."""

    def measure(case: Case, workloads: Mapping[str, Workload], budget_s: float, **options) -> list[Result]:
        clock = gpu.clock()
        results = harness.measure(case, workloads, budget_s, clock, sample_us=0.0, max_rounds=60, **options)
        if clock.late > 0.1 * clock.samples:
            print(f"{case.label}: the host was late for {clock.late} of {clock.samples} samples")
        return results

    return measure


def bind(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _as_built(case: Case, workloads: dict[str, Workload], gpu) -> dict[str, Workload]:
    return workloads


@dataclass(frozen=True)
class OnGpu:
    """What a benchmark has for ``--device cuda``.

    Attributes:
        cases: those of a full run; there is no ``--quick``.
        goals: what cells are to reach on an H200; their cases are those of ``--goals``.
        providers: names; the first is the baseline, called "base" or not.
        applies: whether a provider has a case.
        missing: why a provider cannot be measured on a device; None where it can.
        timed: from the verified workloads what is timed, such as graphs of them.
        floor_bytes: the fewest bytes that a cell moves, by case and mode; None for no such column.
    """

    cases: Callable[[], list[Case]]
    goals: Callable[[], list[Goal]]
    providers: Sequence[str]
    applies: Callable[[str, Case], bool] = lambda provider, case: True
    missing: Callable[[str, torch.device], str | None] = providers.missing
    timed: Callable[[Case, dict[str, Workload], Any], dict[str, Workload]] = _as_built
    floor_bytes: Callable[[Case, str], int | None] = lambda case, mode: None


@dataclass(frozen=True)
class Benchmark:
    """What one ``bench_<op>.py`` measures.

    Attributes:
        op: stem of the result files.
        description: what ``--help`` says.
        providers: names; the first is the baseline.
        all_cases, quick_cases: the cases of a full run and of ``--quick``.
        build: workloads by provider for a case, on the same tensors; on a GPU called with the device after these.
        verify: RuntimeError where one of them computes something else; likewise.
        limit: the ratio to eager and HF PEFT that pyfused may have in a case and mode, on a CPU; on a GPU it is 1.02.
        on_gpu: None: the benchmark is for the CPU.
    """

    op: str
    description: str
    providers: Sequence[str]
    all_cases: Callable[[], list[Case]]
    quick_cases: Callable[[], list[Case]]
    build: Callable[..., dict[str, Workload]]
    verify: Callable[..., None]
    limit: Callable[[Case, str], float] = lambda case, mode: SLOWER
    on_gpu: OnGpu | None = None

    def run(
        self,
        cases: list[Case],
        providers: list[str],
        budget_s: float,
        console: Console,
        measure: Callable[..., list[Result]] = harness.measure,
        check: bool = False,
        gpu=None,
    ) -> Iterator[list[Result]]:
        """Measure case by case, with a progress bar and a line for each; yields all results so far.

        With ``check``, a case where pyfused seems too slow is measured for longer: of 250 cells some always have a
        rival's luckiest sample, and a loss that is one stays when there are more samples of both. A case that fails
        ends the run, but for a GPU's, which is lent for minutes: that is said.
        """

        def again(so_far: list[Result]) -> bool:
            return check and bool(self.losses(so_far))

        results: list[Result] = []
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # Without auto_refresh: the thread that redraws the bar would wake up within samples.
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.label, refresh=True)
                try:
                    workloads = self._verified(case, providers, gpu, console)
                    measured = measure(case, workloads, budget_s, again=again)
                except Exception as error:
                    if gpu is None:
                        raise
                    traceback.print_exc()
                    _say(console, f"wrong: {told(case.label, 'all', error)}")
                    if not gpu.answers():
                        _say(console, "wrong: the GPU answers no more in this process; no further case is measured")
                        return
                    continue
                # The last mode is the whole: "full" of a training case, "forward" of an inference case.
                ratios = (f"{r.provider} {_ratio(r, gpu):.2f}" for r in measured if r.mode == measured[-1].mode)
                console.print(f"{case.label}: {', '.join(ratios)}", highlight=False, soft_wrap=True)
                results += measured
                progress.advance(task)
                yield results

    def _verified(self, case: Case, providers: list[str], gpu, console: Console) -> dict[str, Workload]:
        """What is timed; on a GPU without what fails, see ``providers.working``."""
        if gpu is None:
            workloads = self.build(case, providers)
            self.verify(case, workloads)
            return workloads

        def attempt(name: str) -> Workload:
            workloads = self.build(case, [name], gpu.device)
            self.verify(case, workloads, gpu.device)
            return self.on_gpu.timed(case, workloads, gpu)[name]

        names = [name for name in providers if self.on_gpu.applies(name, case)]
        return working(case.label, names, attempt, lambda line: _say(console, line))

    def losses(self, results: list[Result]) -> list[tuple[Result, Result, float]]:
        """Where pyfused is slower than it may be, see ``harness.losses``."""
        return harness.losses(results, "pyfused", ("eager", "peft"), self.limit)

    def with_goals(self, result: Result, copy_tb_s: float) -> Result:
        """A GPU's further columns: the goals of the cell, the floor of its bytes and the median over that."""
        cell = (result.case, result.provider, result.mode)
        goals = [str(goal) for goal in self.on_gpu.goals() if (goal.case, goal.provider, goal.mode) == cell]
        least = self.on_gpu.floor_bytes(result.case, result.mode)
        floor = None if least is None else gpu_goals.floor_us(least, copy_tb_s)
        extra = {
            "goal": "; ".join(goals),
            "floor_bytes": "" if least is None else least,
            "floor_us": "" if floor is None else f"{floor:.2f}",
            "over_floor": "" if floor is None else f"{result.stats.p50_us / floor:.3f}",
        }
        return replace(result, extra={**result.extra, **extra})

    def report_losses(self, results: list[Result], console: Console) -> bool:
        """Print every cell where pyfused is slower than it may be; True where there is one."""
        lost = self.losses(results)
        for ours, theirs, ratio in lost:
            bound = self.limit(ours.case, ours.mode)
            allowed = "below 1" if bound == 1.0 else f"at most {bound:g}"
            console.print(
                f"[red]loss[/] {ours.case.label} {ours.mode}: {ours.stats.min_us:.1f} us, {ratio:.3f} of "
                f"{theirs.provider}'s {theirs.stats.min_us:.1f} us; must be {allowed} "
                f"(spreads: {ours.stats.spread:.1%}, {theirs.stats.spread:.1%})",
                soft_wrap=True,
            )
        # Slower than torch.compile, also where the limit asks for more than to be faster than eager.
        behind = harness.losses(results, "pyfused", ("compile",), lambda case, mode: max(self.limit(case, mode), 1.0))
        for ours, theirs, ratio in behind:
            console.print(
                f"behind torch.compile: {ours.case.label} {ours.mode}: {ratio:.3f} of {theirs.stats.min_us:.1f} us",
                soft_wrap=True,
            )
        cells = len({(result.case, result.mode) for result in results})
        console.print(f"{cells} cells: {len(lost)} losses to eager or HF PEFT, {len(behind)} to torch.compile")
        return bool(lost)

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        parser = argparse.ArgumentParser(
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.add_argument("--quick", action="store_true", help="a subset, under two minutes")
        parser.add_argument("--check", action="store_true", help="exit with 1 where pyfused is slower than it may be")
        parser.add_argument("--only", metavar="REGEX", help="cases whose label matches, as 'train bert.* bf16'")
        help_add = "into the whole run's file, which keeps the cases that other calls measured at the same commit"
        parser.add_argument("--add", action="store_true", help=help_add)
        parser.add_argument("--list", action="store_true", help="print the labels of the cases and stop")
        parser.add_argument("--providers", help="which, the baseline always (default: all)")
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
        parser.set_defaults(device="cpu", goals=False)
        if self.on_gpu is not None:
            parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu; cuda has no --quick")
            help_goals = (
                "on a GPU: the cells that have a goal on an H200; with --check exit with 1 where one is not met"
            )
            parser.add_argument("--goals", action="store_true", help=help_goals)
        parser.add_argument("--budget", type=float, metavar="S", help="seconds of samples a case (default: 4, quick 2)")
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and the plot")
        options = parser.parse_args(arguments)
        cuda = options.device == "cuda"
        if (options.goals and not cuda) or (options.quick and cuda):
            parser.error("--goals goes with --device cuda, --quick without it")
        known = list(self.on_gpu.providers if cuda else self.providers)
        asked = options.providers.split(",") if options.providers else known
        options.providers = [known[0], *(name for name in asked if name != known[0])]
        unknown = sorted(set(options.providers) - set(known))
        if unknown:
            parser.error(f"--providers: unknown {', '.join(unknown)}; there are {', '.join(known)}")
        options.budget = options.budget or (2.0 if options.quick else 4.0)
        if options.goals:
            options.cases = list(dict.fromkeys(goal.case for goal in self.on_gpu.goals()))
        elif cuda:
            options.cases = self.on_gpu.cases()
        else:
            options.cases = self.quick_cases() if options.quick else self.all_cases()
        if options.only:
            options.cases = [case for case in options.cases if re.search(options.only, case.label)]
            if not options.cases:
                parser.error(f"--only: no case matches {options.only!r}; --list prints them")
        # A run of a part must not take the place of the whole.
        is_part = not options.add and (options.only or len(options.providers) < len(known))
        options.suffix = "-part" if is_part else "-quick" if options.quick else "-goals" if options.goals else ""
        return options

    def main(self, arguments: list[str] | None = None, gpu=None) -> int:
        """The command line; ``gpu`` stands for the one that --device cuda would find."""
        options = self.parse(arguments)
        console = Console()
        if options.list:
            console.print("\n".join(case.label for case in options.cases))
            return 0
        torch.set_num_threads(options.threads)
        with kept_environment():
            if options.device == "cuda":
                this = replace(self, limit=lambda case, mode: SLOWER)  # the others are a CPU's
                results, path, met, wrong = this._on_gpu(options, console, gpu or find_gpu())
            else:
                this, met, wrong = self, True, False
                results, path = self._measured(options, console, records.environment(), harness.measure)
                console.print(table_of(results, options.providers, lambda r: r.stats.min_us, "minimum"))
        if not results:
            console.print("nothing was measured")
            return 1
        lost = this.report_losses(results, console)
        console.print(f"written: {path.name}, {plot.draw(path).name}")
        return 1 if wrong or (options.check and (lost or not met)) else 0

    def _on_gpu(self, options: argparse.Namespace, console: Console, gpu) -> tuple[list[Result], Path, bool, bool]:
        """The results and their file, whether all goals are met, and whether a provider was wrong."""
        left_out = {name: self.on_gpu.missing(name, gpu.device) for name in options.providers}
        left_out = {name: reason for name, reason in left_out.items() if reason is not None}
        for name, reason in left_out.items():
            console.print(f"without {name}: {reason}", highlight=False, soft_wrap=True)
        asked, options.providers = options.providers, [name for name in options.providers if name not in left_out]
        info = gpu.environment() | gpu.ceilings()
        info |= {"left_out": "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "none"}
        verdicts: list[gpu_goals.Verdict] = []

        def judge(results: list[Result]) -> None:
            found = gpu_goals.verdicts(self.on_gpu.goals(), results, float(info["copy_tb_s"]), asked)
            for verdict in found:
                _say(console, str(verdict))
            verdicts.extend(found)

        results, path = self._measured(options, console, info, measure_on(gpu), gpu, judge)
        console.print(table_of(results, options.providers, lambda r: r.stats.p50_us, "median"))
        measured = {(result.case, result.provider) for result in results}
        wrong = any(
            self.on_gpu.applies(name, case) and (case, name) not in measured
            for case in options.cases
            for name in options.providers
        )
        return results, path, gpu_goals.all_met(verdicts), wrong

    def _measured(
        self, options: argparse.Namespace, console: Console, info: dict[str, str], measure, gpu=None, judge=None
    ) -> tuple[list[Result], Path]:
        """All results, in a file that has those so far after each case; ``judge`` is given a case's as they come."""
        path = options.out / f"{records.result_name(self.op, info)}{options.suffix}.csv"
        for key, value in info.items():
            console.print(f"{key}: {value}", highlight=False, soft_wrap=True)
        if options.add and path.exists() and not records.is_same_run(records.read_csv(path)[0], info):
            raise SystemExit(
                f"--add: {path.name} is of another commit or machine; remove it to begin a new one in parts"
            )
        before = records.others(path, info, {case.label for case in options.cases}) if options.add else []
        kept = len({row["label"] for row in before})
        results: list[Result] = []
        run = self.run(options.cases, options.providers, options.budget, console, measure, options.check, gpu)
        for so_far in run:
            results = [self.with_goals(r, float(info["copy_tb_s"])) for r in so_far] if gpu else so_far
            finished = kept + len({result.case for result in results})
            done = {"cases": f"{finished} of {kept + len(options.cases)}"}
            done |= {"clocks_at_end": gpu.clocks()} if gpu else {}
            records.write_csv(path, info | done, results, before)
            if judge is not None:
                judge([result for result in results if result.case == results[-1].case])
        return results, path


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _ratio(result: Result, gpu) -> float:
    return result.ratio_p50 if gpu else result.ratio_min


def table_of(results: list[Result], providers: list[str], time: Callable[[Result], float], what: str) -> Table:
    base = providers[0]
    table = Table("case", "mode", title=f"{what} of a call: {base} in microseconds, the others over {base}")
    for name in providers:
        table.add_column(name, justify="right", no_wrap=True)
    cells: dict[tuple[Case, str], dict[str, float]] = {}
    for result in results:
        cells.setdefault((result.case, result.mode), {})[result.provider] = time(result)
    for (case, mode), times in cells.items():
        ratios = (f"{times[name] / times[base]:.3f}" if name in times else "-" for name in providers[1:])
        table.add_row(case.label, mode, f"{times[base]:,.1f}", *ratios)
    return table
