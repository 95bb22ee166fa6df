"""The command line of benchmarks whose cases are large: a file of results that may be measured part after part."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import records
from harness import Case, Result, Workload
from runner import RESULTS


def measure_in_parts(
    op: str,
    description: str,
    cases: Sequence[Case],
    build: Callable[[Case], dict[str, Workload]],
    arguments: list[str] | None,
    extra: Callable[[Result], dict[str, object]] | None = None,
) -> Path:
    """The command line of a benchmark whose cases are large: the file may be measured one part after another.

    Args:
        op: stem of the result file.
        build: verified workloads by provider for a case.
        extra: further columns of a result.

    Returns:
        The result file.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="cases whose label matches; the file keeps the other rows")
    parser.add_argument("--budget", type=float, default=6.0, metavar="S", help="seconds of samples a case")
    help_rounds = "so many samples of each provider, however long they take (default: %(default)s)"
    parser.add_argument("--rounds", type=int, default=harness.MIN_ROUNDS, help=help_rounds)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    cases = [case for case in cases if not options.only or re.search(options.only, case.label)]
    if not cases:
        parser.error(f"--only: no case matches {options.only!r}")
    info = records.environment()
    path = options.out / f"{records.result_name(op, info)}.csv"
    for case in cases:
        measured = harness.measure(case, build(case), options.budget, min_rounds=options.rounds)
        for result in measured if extra else ():
            result.extra.update(extra(result))
        whole = [result for result in measured if result.mode == measured[-1].mode]
        times = (f"{r.provider} {_readable(r.stats.min_us)} ({r.ratio_min:.2f})" for r in whole)
        print(case.label, *times, sep="  ")
        records.write_csv(path, info, measured, records.others(path, info, {case.label}))
    return path


def _readable(microseconds: float) -> str:
    return f"{microseconds:.1f} us" if microseconds < 1e3 else f"{microseconds / 1e3:.2f} ms"
