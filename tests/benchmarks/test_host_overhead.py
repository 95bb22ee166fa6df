"""bench_host_overhead.py: what is timed and held against plain PyTorch, the gradients in Python, the tables."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import native_autograd

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_host_overhead as bench
import records

from pyfused import _library

TRAIN_LORA = bench.Case("train", "lora")


@pytest.fixture(autouse=True)
def _threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.label)
def test_every_call_computes_what_it_should(case):
    workloads = bench.build(case)
    assert next(iter(workloads)) == "F.linear"
    assert all(bool(work.inputs) == (case.stage == "train") for work in workloads.values())
    in_cpp = {name.removesuffix(" (C++)") for name in workloads if name.endswith(" (C++)")}
    in_python = {name.removesuffix(" (Python)") for name in workloads if name.endswith(" (Python)")}
    assert len(in_python) >= 2
    assert in_cpp == (in_python if _library.autograd is not None else set())


@pytest.mark.parametrize("case", bench.CASES[:2], ids=lambda case: case.label)
def test_a_wrong_call_is_noticed(case, monkeypatch):
    def wrong(t):
        right = bench.lora_linear(t)
        return [replace(right, call=lambda: 1.001 * right.call())]

    monkeypatch.setitem(bench.TABLES, "lora", wrong)
    with pytest.raises(RuntimeError, match=r"ops.lora_linear \(Python\) computes a wrong result or gradient, number 0"):
        bench.build(case)


@native_autograd
def test_who_carries_the_gradient():
    work = bench.build(TRAIN_LORA)
    names = {path: work[f"ops.lora_linear ({path})"].call().grad_fn.name() for path in ("Python", "C++")}
    assert names["Python"] == "_LoraLinearBackward" != names["C++"]


def test_the_gradient_is_in_cpp_again_after_a_call_in_python():
    native, seen = _library.autograd, []
    assert bench.with_gradient_in_python(lambda: seen.append(_library.autograd) or 5)() == 5
    assert seen == [None]
    assert _library.autograd is native
    with pytest.raises(ZeroDivisionError):
        bench.with_gradient_in_python(lambda: 1 / 0)()
    assert _library.autograd is native


def row(table: str, stage: str, mode: str, provider: str, min_us: float) -> dict[str, str]:
    return {"table": table, "stage": stage, "mode": mode, "provider": provider, "min_us": str(min_us)}


def test_tables():
    rows = [
        row("lora", "infer", "forward", "nn.Linear", 5.0),
        row("lora", "infer", "forward", "nn.LoraLinear (C++)", 7.96),
        row("lora", "train", "forward", "nn.Linear", 1.0),  # a part of the step below
        row("lora", "train", "full", "nn.Linear", 20.0),
        row("lora", "train", "full", "nn.LoraLinear (C++)", 32.5),
        row("lora", "train", "full", "nn.LoraLinear (Python)", 60.0),
        row("others", "infer", "forward", "ops.ia3_scale (C++)", 2.04),
    ]
    head = ["| | without grad | with grad, forward and backward |", "|---|---:|---:|"]
    assert bench.tables(rows).splitlines() == [
        *head,
        "| nn.Linear | 5.0 | 20.0 |",
        "| nn.LoraLinear (C++) | 8.0 | 32.5 |",
        "| nn.LoraLinear (Python) |  | 60.0 |",
        "",
        *head,
        "| ops.ia3_scale (C++) | 2.0 |  |",
        "",
        "infer: nn.LoraLinear takes 3.0 us more than nn.Linear, goal 3: met",
        "train: nn.LoraLinear takes 12.5 us more than nn.Linear, goal 12: missed",
    ]
    assert "goal" not in bench.tables(rows[-1:])


def test_runs_end_to_end_in_parts(tmp_path, capsys):
    for part in ("infer lora", "train lora"):
        bench.main(["--only", part, "--budget", "0", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("host-overhead-cpu-*-t1.csv")
    info, rows = records.read_csv(path)
    assert info["threads"] == "1"
    assert {(row["stage"], row["mode"]) for row in rows} >= {("infer", "forward"), ("train", "full")}
    printed = capsys.readouterr().out
    assert "| nn.LoraLinear (Python) |" in printed
    assert "train: nn.LoraLinear takes" in printed


def test_no_case(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "nothing", "--out", str(tmp_path)])
    assert "no case matches 'nothing'" in capsys.readouterr().err
