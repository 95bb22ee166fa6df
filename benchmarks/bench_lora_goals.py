"""LoRA's goals on CPU: the layer over the frozen one, forward and backward or decoding, beside what it should cost.

python benchmarks/bench_lora_goals.py --threads 2
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 PYFUSED_CPU_CAPABILITY=AVX512_BF16 python benchmarks/bench_lora_goals.py

The second is as on a machine without AMX.

A few cells of bench_lora.py, pyfused alone, in under a minute, into a file of their own and a picture of it.

python benchmarks/bench_lora_goals.py --near    # into another file; --only REGEX measures a part and keeps the rest

Shapes, row counts and ranks near those of the table, under four minutes. What a case is to reach follows from the
nearest row of the table, of the same stage, dtypes and dropout (with or without): that row's ratio, plus 1.5 (r' - r)
(1/K + 1/N) where the case has rank r' and the row r; K and N are the case's. This is the arithmetic of the further
ranks over the frozen layer's, forward and backward. Nearest is by the distance of (log M, log K, log N). A case has the
row's rank where it is not one of another rank.
"""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import harness
import plot
import records
import shapes
import torch
from bench_lora import Case, build, verify
from runner import RESULTS


@dataclass(frozen=True)
class Goal:
    """``ratio``: time over the frozen layer's, at most; by the minimum, forward and backward with dX together."""

    case: Case
    ratio: float


def _case(stage: str, shape: shapes.LinearShape, m: int, dtype: str, adapter: str, p: float = 0.0, r: int = 8) -> Case:
    return Case(stage, shape.name, m, shape.in_features, shape.out_features, r, dtype, adapter, p)


def _goal(ratio: float, *cell, **options) -> Goal:
    return Goal(_case(*cell, **options), ratio)


GOALS = [
    _goal(1.08, "train", shapes.BERT_768, 512, "fp32", "fp32", 0.1),
    _goal(1.10, "train", shapes.BERT_768, 512, "bf16", "bf16", 0.0),
    _goal(1.15, "train", shapes.BERT_768, 512, "bf16", "bf16", 0.1),
    _goal(1.18, "train", shapes.BERT_768, 512, "bf16", "fp32", 0.1),
    _goal(1.08, "train", shapes.LLAMA_2048, 512, "bf16", "fp32", 0.1, r=16),
    _goal(1.06, "train", shapes.LLAMA_2048, 512, "bf16", "bf16", 0.1, r=16),
    _goal(1.04, "train", shapes.LLAMA_2048, 512, "fp32", "fp32", 0.05, r=16),
    _goal(1.10, "train", shapes.BERT_FFN, 1024, "bf16", "bf16", 0.1, r=12),
    _goal(1.15, "infer", shapes.BERT_768, 1, "bf16", "bf16"),
    _goal(1.06, "infer", shapes.LLAMA_2048, 1, "bf16", "bf16", r=16),
    _goal(1.10, "infer", shapes.BERT_768, 24, "bf16", "bf16"),
]


# x, adapter and dropout: those of the table's rows of 768, and of 2048.
_KINDS_768 = (("fp32", "fp32", 0.1), ("bf16", "bf16", 0.0), ("bf16", "bf16", 0.1), ("bf16", "fp32", 0.1))
_KINDS_2048 = (("fp32", "fp32", 0.05), ("bf16", "bf16", 0.1), ("bf16", "fp32", 0.1))
_NEAR_768 = (
    (shapes.MINILM_384, 512),
    (shapes.MINILM_384, 1024),
    (shapes.BERT_768, 256),
    (shapes.BERT_768, 384),
    (shapes.BERT_768, 1024),
    (shapes.BERT_LARGE_1024, 512),
    (shapes.LLAMA_KEY_VALUE, 512),
)
NEAR_CASES = [
    *(_case("train", shape, m, *kind) for shape, m in _NEAR_768 for kind in _KINDS_768),
    *(_case("train", shapes.LLAMA_2048, 256, *kind, r=16) for kind in _KINDS_2048),
    _case("train", shapes.BERT_FFN, 512, "bf16", "bf16", 0.1, r=12),
    *(
        _case("train", shapes.BERT_768, 512, dtype, adapter, 0.1, r=r)
        for dtype, adapter in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
        for r in (4, 16, 32, 64)
    ),
    _case("infer", shapes.BERT_LARGE_1024, 1, "bf16", "bf16"),
    _case("infer", shapes.LLAMA_4096, 1, "bf16", "bf16", r=16),
    _case("infer", shapes.BERT_768, 16, "bf16", "bf16"),
    _case("infer", shapes.BERT_768, 32, "bf16", "bf16"),
]


def nearest(case: Case) -> Goal:
    """The row of the table that the goal of a case follows from; the top of this file has the rule."""

    def kind(of: Case) -> tuple[str, str, str, bool]:
        return of.stage, of.dtype, of.adapter_dtype, of.dropout > 0.0

    def place(of: Case) -> list[float]:
        return [math.log(size) for size in (of.m, of.k, of.n)]

    rows = [goal for goal in GOALS if kind(goal.case) == kind(case)]
    return min(rows, key=lambda goal: math.dist(place(goal.case), place(case)))


def goal_near(case: Case) -> Goal:
    row = nearest(case)
    return Goal(case, round(row.ratio + 1.5 * (case.r - row.case.r) * (1.0 / case.k + 1.0 / case.n), 4))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--near", action="store_true", help="cases near those of the table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=3.0, metavar="S", help="seconds a case (default: %(default)s)")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="goals whose label matches; without --near the file has no others"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV and the plot")
    options = parser.parse_args(arguments)
    goals = [goal_near(case) for case in NEAR_CASES] if options.near else GOALS
    goals = [goal for goal in goals if re.search(options.only, goal.case.label)]
    if not goals:
        parser.error(f"--only: no goal matches {options.only!r}")
    torch.set_num_threads(options.threads)
    info, suffix = records.vendor_limit(records.environment())
    op = "lora-goals-near" if options.near else "lora-goals"
    path = options.out / f"{records.result_name(op, info)}{suffix}.csv"
    print("\n".join(f"{key}: {value}" for key, value in info.items()))
    print(f"{'case':52} {'frozen, us':>10} {'pyfused':>8} {'median':>7} {'goal':>5}")
    results: list[harness.Result] = []
    for goal in goals:
        workloads = build(goal.case, ["base", "pyfused"])
        verify(goal.case, workloads)
        measured = harness.measure(goal.case, workloads, options.budget)
        # The last mode is the whole: "full" of a training case, "forward" of an inference case.
        base, ours = (replace(result, extra={"goal": goal.ratio}) for result in measured[-2:])
        met = "met" if ours.ratio_min <= goal.ratio else ""
        print(
            f"{goal.case.label:52} {base.stats.min_us:10.1f} {ours.ratio_min:8.3f} {ours.ratio_p50:7.3f} "
            f"{goal.ratio:5.2f} {met}",
            flush=True,
        )
        results += base, ours
    before = records.others(path, info, {goal.case.label for goal in goals}) if options.near else ()
    records.write_csv(path, info, results, before)
    print(f"written: {path.name}, {plot.draw(path).name}")


if __name__ == "__main__":
    main()
