"""Goals on a GPU: their cells, floors and verdicts, with made-up times; whole runs of the benchmarks on the CPU."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_bottleneck
import bench_ia3
import bench_multi_lora
import gpu_goals
import harness
import records
import vllm_lora
from gpu_goals import FLOOR, Goal
from host_gpu import HostGpu

BENCHMARKS = (bench_ia3.BENCHMARK, bench_bottleneck.BENCHMARK, bench_multi_lora.BENCHMARK)
CASE = bench_ia3.goals()[0].case


def results_of(case, mode: str, **medians: float) -> list[harness.Result]:
    return [
        harness.Result(case, mode, name, harness.Stats(us, us, us, us, 0.0), 1.0, 1.0, 2, 1, None)
        for name, us in medians.items()
    ]


def outcome(goal: Goal, copy_tb_s: float = 4.0, **medians: float) -> str:
    return gpu_goals.judge(goal, medians, copy_tb_s).outcome


def test_ratio_to_the_base():
    goal = Goal(CASE, "pyfused", "full", 1.12)
    assert outcome(goal, base=100.0, pyfused=111.9) == "met"
    assert outcome(goal, base=100.0, pyfused=112.1) == "missed"
    assert outcome(goal, base=100.0) == outcome(goal, pyfused=1.0) == "not measured"
    text = str(gpu_goals.judge(goal, {"base": 100.0, "pyfused": 112.1}, 4.0))
    assert text == f"goal missed: {CASE.label} full, pyfused: 112.1 us over 100.0 us, 1.121; at most 1.12"


def test_microseconds_more_than_the_base():
    goal = Goal(CASE, "pyfused", "forward", extra_us=2.5)
    assert outcome(goal, base=9.0, pyfused=11.5) == "met"
    assert outcome(goal, base=9.0, pyfused=11.6) == "missed"
    assert str(goal) == "base + 2.5 us"


def test_ratio_to_eager():
    goal = Goal(CASE, "pyfused", "full", 1 / 1.7, over="eager")
    assert outcome(goal, products=1.0, eager=170.0, pyfused=99.0) == "met"
    assert outcome(goal, products=1.0, eager=170.0, pyfused=101.0) == "missed"
    assert outcome(goal, products=1.0, pyfused=1.0) == "not measured"


def test_ratio_to_the_floor():
    goal = Goal(CASE, "pyfused", "forward", 1.4, over=FLOOR, floor_bytes=134_000_000, stated_us=31.0)
    assert gpu_goals.floor_us(134_000_000, 4.0) == 33.5
    assert outcome(goal, pyfused=46.8) == "met"
    assert outcome(goal, pyfused=47.0) == "missed"
    assert outcome(goal, copy_tb_s=3.0, pyfused=47.0) == "met"  # the same time on a slower memory
    text = str(gpu_goals.judge(goal, {"pyfused": 47.0}, 4.0))
    assert "the floor of 33.5 us (134.0 MB at 4.00 TB/s, 31 us by the goal), 1.403; at most 1.40 of floor" in text


def test_a_low_floor_sets_no_goal():
    goal = Goal(CASE, "pyfused", "forward", 1.3, over=FLOOR, floor_bytes=32_000_000, above_us=8.0)
    assert outcome(goal, copy_tb_s=4.0, pyfused=1000.0) == "does not stand"
    assert outcome(goal, copy_tb_s=3.9, pyfused=1000.0) == "missed"


def test_time_on_top_of_the_base():
    floor = {"over": FLOOR, "floor_bytes": 40_000_000, "above_us": 8.0, "extra_only": True}
    goal = Goal(CASE, "pyfused", "forward", 1.3, **floor)
    assert outcome(goal, base=20.0, pyfused=32.9) == "met"
    assert outcome(goal, base=20.0, pyfused=33.1) == "missed"
    assert outcome(goal, pyfused=1.0) == "not measured"


@pytest.mark.parametrize(
    "fields", [{}, {"ratio": 1.0, "extra_us": 1.0}, {"ratio": 1.0, "over": FLOOR}, {"ratio": 1.0, "floor_bytes": 1}]
)
def test_goals_that_make_no_sense(fields):
    with pytest.raises(ValueError, match="goal for"):
        Goal(CASE, "pyfused", "full", **fields)


def test_verdicts_are_those_of_what_was_measured_and_asked_for():
    goals = [Goal(CASE, name, "full", 1.1) for name in ("pyfused", "pyfused-product", "other")]
    goals.append(Goal(replace(CASE, m=1), "pyfused", "full", 1.1))
    results = results_of(CASE, "full", base=100.0, pyfused=105.0)
    found = gpu_goals.verdicts(goals, results, 4.0, ["base", "pyfused", "pyfused-product"])
    assert [(v.goal.provider, v.outcome) for v in found] == [("pyfused", "met"), ("pyfused-product", "not measured")]
    assert not gpu_goals.all_met(found)
    assert gpu_goals.all_met(found[:1])


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.op)
def test_cells_with_a_goal(benchmark):
    cases, goals = benchmark.on_gpu.cases(), benchmark.on_gpu.goals()
    assert len({case.label for case in cases}) == len(cases)
    assert {goal.case for goal in goals} <= set(cases)
    for goal in goals:
        assert goal.provider in benchmark.on_gpu.providers
        assert benchmark.on_gpu.applies(goal.provider, goal.case)
        assert goal.over == FLOOR or goal.over in benchmark.on_gpu.providers


def test_goals_are_the_issues():
    ia3 = {(g.provider, g.case.side): g.ratio for g in bench_ia3.goals()}
    assert ia3 == {("pyfused", "output"): 1.12, ("pyfused", "input"): 1.12, ("pyfused-product", "output"): 1.08}
    assert {(g.case.m, g.case.k, g.case.n) for g in bench_ia3.goals()} == {(8192, 4096, 4096)}
    forward = bench_bottleneck.goals()[0]
    # x and y of 64 MiB each, two matrices of half a MiB, biases: 31 us where a copy makes 4.3 TB/s.
    assert forward.floor_bytes == 2 * 2 * 8192 * 4096 + 2 * (2 * 64 * 4096 + 4096 + 64)
    assert gpu_goals.floor_us(forward.floor_bytes, 4.3) == pytest.approx(31.0, rel=0.02)
    multi = bench_multi_lora.goals()
    assert {g.case.sequences for g in multi} == {1, 8, 32, 64}
    assert {g.case.r for g in multi} == {"8", "16", "64", bench_multi_lora.MIXED}
    assert all((g.extra_us == 2.5) == (g.extra_us is not None) and (g.ratio in (None, 1.3)) for g in multi)
    assert {g.case.sequences for g in multi if g.extra_us} == {1}


def test_bytes_of_a_training_step():
    case = next(goal.case for goal in bench_bottleneck.goals() if goal.mode == "full")
    parts = [bench_bottleneck.floor_bytes(case, mode) for mode in ("forward", "backward", "full")]
    assert parts[0] + parts[1] == parts[2]
    assert parts[2] == pytest.approx(5 * 2 * 8192 * 4096, rel=0.03)


def test_bytes_of_many_adapters():
    one = bench_multi_lora._case(bench_multi_lora.shapes.LLAMA3_ATTENTION, 8, 1, "8+16", 4, "bf16", base=2)
    assert one.ranks == [8, 16, 8, 16]
    assert one.places == [0, 1, 2, 3, 0, 1, -1, -1]
    matrices, row = (8 + 16 + 8 + 16) * 8192, 4096
    assert bench_multi_lora.adapter_bytes(one) == 2 * (matrices + 6 * 3 * row)
    assert bench_multi_lora.floor_bytes(one) == 2 * (4096 * 4096 + matrices + 8 * 2 * row)


def tiny(case):
    if isinstance(case, bench_bottleneck.Case):
        return replace(case, m=96, d=64, h=8)
    if isinstance(case, bench_multi_lora.Case):
        sequences = min(case.sequences, 4)
        return replace(case, sequences=sequences, adapters=sequences, rows=min(case.rows, 3), k=64, n=32)
    return replace(case, m=24, k=32, n=32)


def shrunk(benchmark, keep=lambda case: True):
    """The benchmark with its goals in small cells."""
    goals = [replace(goal, case=tiny(goal.case)) for goal in benchmark.on_gpu.goals() if keep(goal.case)]
    names = [name for name in benchmark.on_gpu.providers if name not in ("compile", "adapterhub")]
    on_gpu = replace(benchmark.on_gpu, goals=lambda: goals, providers=names)
    return replace(benchmark, on_gpu=on_gpu)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.op)
def test_a_whole_run(benchmark, tmp_path, monkeypatch, capsys):
    one = {
        "ia3": lambda case: case.vector_dtype == "fp32",
        "multi_lora": lambda case: case.r in ("8", bench_multi_lora.MIXED),
    }
    small = shrunk(benchmark, one.get(benchmark.op, lambda case: True))
    monkeypatch.setenv(bench_ia3.PATH, "pass")
    torch.manual_seed(0)
    arguments = ["--device", "cuda", "--goals", "--budget", "0.01", "--out", str(tmp_path)]
    assert small.main(arguments, HostGpu()) == 0
    (written,) = tmp_path.glob(f"{benchmark.op}-cuda-*-goals.csv")
    info, rows = records.read_csv(written)
    cases = {goal.case for goal in small.on_gpu.goals()}
    assert info["cases"] == f"{len(cases)} of {len(cases)}"
    assert "copy_tb_s" in info and "clocks_at_end" in info
    assert ("vllm" in info["left_out"]) == (benchmark.op == "multi_lora")
    with_goal = {(row["label"], row["provider"], row["mode"]) for row in rows if row["goal"]}
    assert with_goal == {(g.case.label, g.provider, g.mode) for g in small.on_gpu.goals()}
    assert all(bool(row["floor_us"]) == (benchmark.op != "ia3") for row in rows)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("goal ")]
    assert len(lines) == len(small.on_gpu.goals())
    assert os.environ[bench_ia3.PATH] == "pass"
    assert bench_bottleneck.PATH not in os.environ


def test_check_fails_where_a_goal_is_missed(tmp_path, monkeypatch, capsys):
    small = shrunk(bench_ia3.BENCHMARK, lambda case: case.vector_dtype == "bf16" and case.side == "output")
    arguments = ["--device", "cuda", "--goals", "--check", "--budget", "0.01", "--out", str(tmp_path)]
    arguments += ["--providers", "base,pyfused"]
    for ratio, code, word in ((1000.0, 0, "met"), (0.001, 1, "missed")):
        goals = [replace(goal, ratio=ratio) for goal in small.on_gpu.goals() if goal.provider == "pyfused"]
        judged = replace(small, on_gpu=replace(small.on_gpu, goals=lambda goals=goals: goals))
        assert judged.main(arguments, HostGpu()) == code
        assert f"goal {word}: {goals[0].case.label} full, pyfused:" in capsys.readouterr().out


def test_a_provider_that_is_wrong_is_left_out_unless_it_is_pyfused(tmp_path, monkeypatch, capsys):
    small = shrunk(bench_ia3.BENCHMARK, lambda case: case.vector_dtype == "bf16" and case.side == "output")
    arguments = ["--device", "cuda", "--goals", "--budget", "0.01", "--out", str(tmp_path)]

    def with_wrong(name: str):
        def build(case, names, device=None):
            workloads = bench_ia3.build(case, names, device)
            if name in workloads:
                call = workloads[name].call
                workloads[name] = replace(workloads[name], call=lambda: 2 * call())
            return workloads

        return replace(small, build=build)

    assert with_wrong("pyfused-product").main(arguments, HostGpu()) == 1
    out = capsys.readouterr().out
    assert "wrong:" in out and "pyfused-product computes a wrong y" in out
    assert "goal not measured" in out
    assert with_wrong("pyfused").main(arguments, HostGpu()) == 1
    out = capsys.readouterr().out
    assert "pyfused computes a wrong y" in out and "nothing was measured" in out


@pytest.mark.parametrize("answers", [True, False])
def test_a_case_that_fails_is_left_out(answers, tmp_path, monkeypatch, capsys):
    small = shrunk(bench_ia3.BENCHMARK, lambda case: case.vector_dtype == "bf16")
    cases = list(dict.fromkeys(goal.case for goal in small.on_gpu.goals()))
    assert len(cases) == 2

    def build(case, names, device=None):
        if case == cases[0] and "eager" in names:
            raise TypeError("no such argument")
        return bench_ia3.build(case, names, device)

    gpu = HostGpu()
    gpu.answers = lambda: answers
    arguments = ["--device", "cuda", "--goals", "--budget", "0.01", "--out", str(tmp_path)]
    assert replace(small, build=build).main(arguments, gpu) == 1
    out = capsys.readouterr().out
    assert f"wrong: {cases[0].label}: eager: TypeError: no such argument" in out.splitlines()
    assert ("no further case is measured" in out) == ("nothing was measured" in out) == (not answers)
    written = list(tmp_path.glob("*.csv"))
    assert len(written) == answers
    assert not answers or {row["label"] for row in records.read_csv(written[0])[1]} == {cases[1].label}


def test_the_cpus_limits_are_not_a_gpus(tmp_path, monkeypatch, capsys):
    """A bottleneck as fast as eager loses on a CPU, where it has to be 1.3 times as fast, and not on a GPU."""
    case = next(c for c in bench_bottleneck.all_cases() if c.stage == "train" and c.dtype == "bf16")
    results = results_of(case, "full", products=1.0, eager=100.0, pyfused=100.0)
    assert bench_bottleneck.BENCHMARK.losses(results)

    def measure(case, workloads, budget_s, clock, **options):
        modes = ("forward", "backward", "full") if case.stage == "train" else ("forward",)
        return [r for mode in modes for r in results_of(case, mode, **dict.fromkeys(workloads, 100.0))]

    monkeypatch.setattr(harness, "measure", measure)
    small = shrunk(bench_bottleneck.BENCHMARK)
    arguments = ["--device", "cuda", "--goals", "--out", str(tmp_path)]
    assert small.main(arguments, HostGpu()) == 0
    assert ": 0 losses" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--goals"], "--goals goes with --device cuda"),
        (["--device", "cuda", "--quick"], "--quick without it"),
        (["--providers", "pyfused-product"], "unknown pyfused-product"),
        (["--device", "cuda", "--providers", "nobody"], "unknown nobody"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_ia3.BENCHMARK.main(arguments)
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        bench_ia3.BENCHMARK.main(["--device", "cuda", "--goals"])


def test_vllm_is_left_out_with_a_reason(monkeypatch):
    assert "need a CUDA device" in vllm_lora.missing(torch.device("cpu"))
    monkeypatch.setattr(vllm_lora.importlib.util, "find_spec", lambda name: None)
    assert vllm_lora.missing(torch.device("cuda")) == "vllm is not installed"


def test_padding():
    matrices = [torch.ones(2, 3), torch.full((4, 3), 2.0)]
    out = vllm_lora.padded(matrices, 0, 5)
    assert out.shape == (2, 5, 3)
    assert torch.equal(out[0, :2], matrices[0]) and torch.equal(out[1, :4], matrices[1])
    assert out.sum() == matrices[0].sum() + matrices[1].sum()
