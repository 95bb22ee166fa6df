"""LoRA's goals on CPU: the layer over the frozen one, forward and backward or decoding, beside what it should cost.

python benchmarks/bench_lora_goals.py --threads 2
ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 PYFUSED_CPU_CAPABILITY=AVX512_BF16 python benchmarks/bench_lora_goals.py

The second is as on a machine without AMX.

A few cells of bench_lora.py, pyfused alone, in under a minute, into a file of their own.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

import harness
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


def _goal(ratio: float, stage: str, shape: shapes.LinearShape, m: int, dtype: str, adapter: str, p=0.0, r=8) -> Goal:
    case = Case(stage, shape.name, m, shape.in_features, shape.out_features, r, dtype, adapter, p)
    return Goal(case, ratio)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=3.0, metavar="S", help="seconds a case (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="REGEX", help="goals whose label matches; the file has no others")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    info, suffix = records.vendor_limit(records.environment())
    path = options.out / f"{records.result_name('lora-goals', info)}{suffix}.csv"
    print("\n".join(f"{key}: {value}" for key, value in info.items()))
    print(f"{'case':52} {'frozen, us':>10} {'pyfused':>8} {'median':>7} {'goal':>5}")
    results: list[harness.Result] = []
    for goal in GOALS:
        if not re.search(options.only, goal.case.label):
            continue
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
    records.write_csv(path, info, results)
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
