"""The command line that benchmarks share: which cases, measured how, where the results go, who is too slow."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import plot
import records
import torch
from harness import Case, Result, Workload
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"


def compiled(module: nn.Module) -> nn.Module:
    """``module`` under ``torch.compile``, one graph for one case."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # else its worker processes start while the first cells are timed
    torch._dynamo.reset()  # each case has its own graph, and the number of graphs for one forward is limited
    return torch.compile(module, fullgraph=True, dynamic=False)


def on_device(device: str) -> tuple[dict[str, str], Callable[..., list[Result]]]:
    """Facts of a device, and ``harness.measure`` on it; a GPU becomes torch's default device.

    Raises:
        SystemExit: there is no GPU, or pyfused has no kernels for it.
    """
    if device == "cpu":
        return records.environment(), harness.measure
    from cuda_timing import Gpu

    from pyfused._library import has_kernel

    if not torch.cuda.is_available() or not has_kernel("cuda"):
        raise SystemExit("--device cuda: needs a CUDA device and a pyfused built with PYFUSED_CUDA=ON")
    gpu = Gpu()
    torch.set_default_device(gpu.device)

    def measure(case: Case, workloads: Mapping[str, Workload], budget_s: float, **options) -> list[Result]:
        return harness.measure(case, workloads, budget_s, gpu.clock(), sample_us=0.0, max_rounds=60, **options)

    return gpu.environment() | gpu.ceilings(), measure


def bind(layer: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


@dataclass(frozen=True)
class Benchmark:
    """What one ``bench_<op>.py`` measures.

    Attributes:
        op: stem of the result files.
        description: what ``--help`` says.
        providers: names; the first is the baseline.
        all_cases, quick_cases: the cases of a full run and of ``--quick``.
        cuda_cases: those of ``--device cuda``, which has no ``--quick``; None: the benchmark is for the CPU.
        build: workloads by provider for a case, on the same tensors.
        verify: RuntimeError where one of them computes something else.
        limit: the ratio to eager and HF PEFT that pyfused may have in a case and mode.
    """

    op: str
    description: str
    providers: Sequence[str]
    all_cases: Callable[[], list[Case]]
    quick_cases: Callable[[], list[Case]]
    build: Callable[[Case, Sequence[str]], dict[str, Workload]]
    verify: Callable[[Case, dict[str, Workload]], None]
    limit: Callable[[Case, str], float] = lambda case, mode: 1.02
    cuda_cases: Callable[[], list[Case]] | None = None

    def run(
        self,
        cases: list[Case],
        providers: list[str],
        budget_s: float,
        console: Console,
        measure: Callable[..., list[Result]] = harness.measure,
        check: bool = False,
    ) -> Iterator[list[Result]]:
        """Measure case by case, with a progress bar and a line for each; yields all results so far.

        With ``check``, a case where pyfused seems too slow is measured for longer: of 250 cells some always have a
        rival's luckiest sample, and a loss that is one stays when there are more samples of both.
        """
        results: list[Result] = []
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        # Without auto_refresh: the thread that redraws the bar would wake up within samples.
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:
                progress.update(task, description=case.label, refresh=True)
                workloads = self.build(case, providers)
                self.verify(case, workloads)
                measured = measure(case, workloads, budget_s, again=lambda so_far: check and bool(self.losses(so_far)))
                # The last mode is the whole: "full" of a training case, "forward" of an inference case.
                ratios = (f"{r.provider} {r.ratio_min:.2f}" for r in measured if r.mode == measured[-1].mode)
                console.print(f"{case.label}: {', '.join(ratios)}", highlight=False, soft_wrap=True)
                results += measured
                progress.advance(task)
                yield results

    def losses(self, results: list[Result]) -> list[tuple[Result, Result, float]]:
        """Where pyfused is slower than it may be, see ``harness.losses``."""
        return harness.losses(results, "pyfused", ("eager", "peft"), self.limit)

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
        behind = harness.losses(results, "pyfused", ("compile",), self.limit)
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
        parser.add_argument("--list", action="store_true", help="print the labels of the cases and stop")
        parser.add_argument(
            "--providers", default=",".join(self.providers), help="which, the baseline always (default: %(default)s)"
        )
        parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
        if self.cuda_cases is not None:
            parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
        parser.add_argument("--budget", type=float, metavar="S", help="seconds of samples a case (default: 4, quick 2)")
        parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and the plot")
        options = parser.parse_args(arguments)
        options.providers = [
            self.providers[0],
            *(name for name in options.providers.split(",") if name != self.providers[0]),
        ]
        unknown = sorted(set(options.providers) - set(self.providers))
        if unknown:
            parser.error(f"--providers: unknown {', '.join(unknown)}; there are {', '.join(self.providers)}")
        options.budget = options.budget or (2.0 if options.quick else 4.0)
        options.device = getattr(options, "device", "cpu")
        if options.device == "cuda":
            options.cases = self.cuda_cases()
        else:
            options.cases = self.quick_cases() if options.quick else self.all_cases()
        if options.only:
            options.cases = [case for case in options.cases if re.search(options.only, case.label)]
            if not options.cases:
                parser.error(f"--only: no case matches {options.only!r}; --list prints them")
        return options

    def main(self, arguments: list[str] | None = None) -> int:
        options = self.parse(arguments)
        console = Console()
        if options.list:
            console.print("\n".join(case.label for case in options.cases))
            return 0
        torch.set_num_threads(options.threads)
        info, measure = on_device(options.device)
        # A run of a part must not take the place of the whole.
        is_part = options.only or len(options.providers) < len(self.providers)
        part = "-part" if is_part else "-quick" if options.quick else ""
        path = options.out / f"{records.result_name(self.op, info)}{part}.csv"
        for key, value in info.items():
            console.print(f"{key}: {value}")
        results: list[Result] = []
        for results in self.run(options.cases, options.providers, options.budget, console, measure, options.check):
            done = len({result.case for result in results})
            records.write_csv(path, info | {"cases": f"{done} of {len(options.cases)}"}, results)
        console.print(table_of(results, options.providers))
        picture = plot.draw(path)
        console.print(f"written: {path.name}, {picture.name}")
        lost = self.report_losses(results, console)
        return 1 if options.check and lost else 0


def measure_in_parts(
    op: str,
    description: str,
    cases: Sequence[Case],
    build: Callable[[Case], dict[str, Workload]],
    arguments: list[str] | None,
    extra: Callable[[Result], dict[str, object]] | None = None,
) -> None:
    """The command line of a benchmark whose cases are large: the file may be measured one part after another.

    Args:
        op: stem of the result file.
        build: verified workloads by provider for a case.
        extra: further columns of a result.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="cases whose label matches; the file keeps the other rows")
    parser.add_argument("--budget", type=float, default=6.0, metavar="S", help="seconds of samples a case")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    info = records.environment()
    path = options.out / f"{records.result_name(op, info)}.csv"
    for case in cases:
        if options.only and not re.search(options.only, case.label):
            continue
        measured = harness.measure(case, build(case), options.budget)
        for result in measured if extra else ():
            result.extra.update(extra(result))
        whole = [result for result in measured if result.mode == measured[-1].mode]
        print(case.label, *(f"{r.provider} {r.stats.min_us / 1e3:.2f} ms ({r.ratio_min:.2f})" for r in whole), sep="  ")
        records.write_csv(path, info, measured, records.others(path, info, {case.label}))


def table_of(results: list[Result], providers: list[str]) -> Table:
    base = providers[0]
    table = Table("case", "mode", title=f"minimum of a call: {base} in microseconds, the others over {base}")
    for name in providers:
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple[Case, str], list[str]] = {}
    for result in results:
        text = f"{result.stats.min_us:,.1f}" if result.provider == base else f"{result.ratio_min:.3f}"
        rows.setdefault((result.case, result.mode), []).append(text)
    for (case, mode), cells in rows.items():
        table.add_row(case.label, mode, *cells)
    return table
