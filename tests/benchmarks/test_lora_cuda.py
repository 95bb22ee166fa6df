"""The GPU's benchmark as far as it goes without one: its cases, providers and tables, on the CPU with a host clock."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_lora_cuda
import harness
import lora_bytes
import lora_cuda
import providers
import records
from host_gpu import HostGpu


def small(case):
    return replace(case, m=min(case.m, 24), k=48, n="+".join(["32"] * len(case.outputs)), r=4)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # eager's dropout: with so few rows its noise is not always within the check's bounds


@pytest.fixture
def without_compile(monkeypatch):
    monkeypatch.delitem(lora_cuda.PROVIDERS, "compile")


def test_cases_are_distinct_and_quick_is_a_subset():
    cases = [case for stage in bench_lora_cuda.STAGES.values() for case in stage()]
    assert len({case.label for case in cases}) == len(cases) == 96 + 72 + 24
    assert set(lora_cuda.quick_cases()) <= set(cases)
    assert {goal.case for goal in lora_cuda.goals()} <= set(cases)


def test_goals_with_and_without_a_gemm_of_our_own_share_their_cases(capsys):
    goals = lora_cuda.goals()
    both = [case for case in dict.fromkeys(goal.case for goal in goals) if case.stage == "train" and "+" not in case.n]
    for case in both:
        ratios = {goal.provider: goal.ratio for goal in goals if goal.case == case}
        assert ratios["pyfused-concat"] < ratios["pyfused"], case.label
    assert len(both) == 3
    assert bench_lora_cuda.main(["--goals", "--list"]) == 0
    labels = capsys.readouterr().out.splitlines()
    assert len(labels) == len(set(labels)) == 7


def test_a_whole_run(tmp_path, monkeypatch, capsys, without_compile):
    cases = [small(case) for case in lora_cuda.quick_cases()]
    cases = [cases[4], cases[5], cases[8], cases[-1]]  # no dropout, fp32 adapters, decode, shared x
    monkeypatch.setattr(lora_cuda, "quick_cases", lambda: cases)
    arguments = ["--quick", "--budget", "0.01", "--out", str(tmp_path)]
    assert bench_lora_cuda.main(arguments, HostGpu()) == 0
    (written,) = tmp_path.glob("lora-cuda-*-quick.csv")
    info, rows = records.read_csv(written)
    assert info["cases"] == "4 of 4"
    assert {row["provider"] for row in rows} == set(lora_cuda.PROVIDERS)
    assert {row["mode"] for row in rows if row["label"] == cases[0].label} == {"forward", "backward", "full"}
    assert {row["mode"] for row in rows if row["label"] == cases[2].label} == {"forward"}
    shared = [row for row in rows if row["provider"] == "pyfused-shared"]
    assert {row["label"] for row in shared} == {cases[-1].label}
    by_after = next(row for row in rows if row["provider"] == "pyfused-after" and row["mode"] == "forward")
    assert int(by_after["extra_bytes"]) > 0
    assert "cells" in capsys.readouterr().out


@pytest.mark.parametrize("spoil", ["y", "grad_x"])
def test_verify_refuses_what_is_wrong(spoil, without_compile):
    case = small(lora_cuda.quick_cases()[4])
    t = lora_cuda.make_tensors(case, torch.device("cpu"))
    workloads = bench_lora_cuda.build(case, ["base", "eager", "unsloth", "pyfused"], t)
    bench_lora_cuda.verify(case, workloads, t)
    wrong = workloads["pyfused"]
    call = wrong.call
    if spoil == "y":
        changed = replace(wrong, call=lambda: tuple(y + 1 for y in call()))
    else:
        changed = replace(wrong, call=lambda: tuple(y.detach() + (y - y.detach()) * 2 for y in call()))
    with pytest.raises(RuntimeError, match=f"pyfused computes a wrong {'y' if spoil == 'y' else 'grad'}"):
        bench_lora_cuda.verify(case, workloads | {"pyfused": changed}, t)


def test_byte_model():
    """One layer in bf16, r = 16: what pyfused adds is x read in both directions, y and dX read and written, dY read."""
    m, k, n, r = 8192, 4096, 1024, 16
    got = lora_bytes.extra_bytes("pyfused", "full", m, k, (n,), r, "bf16", "bf16", 0.1)
    passes = 2 * m * (4 * k + 3 * n)
    assert passes <= got <= 1.1 * passes
    assert lora_bytes.extra_bytes("eager", "full", m, k, (n,), r, "bf16", "bf16", 0.1) > 2 * got
    assert lora_bytes.extra_bytes("compile", "full", m, k, (n,), r, "bf16", "bf16", 0.1) is None


def test_concat_is_left_out_where_its_tests_fail(monkeypatch):
    monkeypatch.setenv("PYFUSED_CUDA_TESTS_ON", "cpu")
    file = "test_lora_cuda_gpu.py"
    assert providers.failing_tests(file, "test_module_moved_to_the_gpu", seconds=100) is None
    assert "deselected" in providers.failing_tests(file, "no_test_of_that_name", seconds=100)
    assert "does not end" in providers.failing_tests(file, "test_module_moved_to_the_gpu", seconds=0.1)


def test_byte_model_of_shared_x():
    """Three layers: two passes over x less in the forward; in the backward dX is one tensor, which replaces autograd's
    two sums."""
    arguments = (8192, 4096, (4096, 1024, 1024), 16, "bf16", "bf16", 0.1)
    wide = 2 * 8192 * 4096
    for mode, saved in (("forward", 2), ("backward", 3 * 3 - 3 + 4)):
        alone = lora_bytes.extra_bytes("pyfused", mode, *arguments)
        assert alone - lora_bytes.extra_bytes("pyfused-shared", mode, *arguments) == saved * wide


def test_goals_are_judged(tmp_path, monkeypatch, capsys, without_compile):
    goals = [replace(goal, case=small(goal.case)) for goal in lora_cuda.goals()]
    kv = next(goal for goal in goals if goal.case.layer == "gqa-kv-4096")
    goals = [replace(kv, ratio=1000.0), replace(goals[-1], extra_us=-1e9)]
    monkeypatch.setattr(lora_cuda, "goals", lambda: goals)
    monkeypatch.setattr(bench_lora_cuda, "GOALS", {(goal.case, goal.provider, goal.mode): goal for goal in goals})
    assert bench_lora_cuda.main(["--goals", "--budget", "0.01", "--out", str(tmp_path)], HostGpu()) == 0
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in out if line.startswith("goal ")]
    assert len(lines) == 2
    # what is measured is said at once, for a run that does not come to its end
    assert out.index(lines[0]) < next(place for place, line in enumerate(out) if line.startswith("[2/2]"))
    assert lines[0].startswith("goal met: train gqa-kv-4096") and "pyfused-shared" in lines[0]
    assert lines[1].startswith("goal missed: infer attn") and lines[1].endswith("base + -1e+09 us")
    (written,) = tmp_path.glob("lora-cuda-*-goals.csv")
    _, rows = records.read_csv(written)
    assert [(row["provider"], row["mode"]) for row in rows if row["goal"]] == [
        ("pyfused-shared", "full"),
        ("pyfused", "forward"),
    ]


def two_small_cases(monkeypatch):
    cases = [small(case) for case in lora_cuda.quick_cases()]
    cases = [cases[5], cases[8]]
    monkeypatch.setattr(lora_cuda, "quick_cases", lambda: cases)
    return cases


def test_a_provider_that_fails_is_left_out(tmp_path, monkeypatch, capsys, without_compile):
    def fails(case, t):
        raise TypeError("no such argument")

    cases = two_small_cases(monkeypatch)
    monkeypatch.setitem(lora_cuda.PROVIDERS, "peft", fails)
    arguments = ["--quick", "--budget", "0.01", "--out", str(tmp_path)]
    assert bench_lora_cuda.main(arguments, HostGpu()) == 1
    out = capsys.readouterr().out
    assert out.count("no such argument") == 2
    assert f"wrong: {cases[0].label}: peft: TypeError: no such argument" in out.splitlines()
    _, rows = records.read_csv(next(tmp_path.glob("*.csv")))
    assert {row["label"] for row in rows} == {case.label for case in cases}
    assert {row["provider"] for row in rows} >= {"base", "eager", "pyfused"}
    assert "peft" not in {row["provider"] for row in rows}


@pytest.mark.parametrize("answers", [True, False])
def test_a_case_that_fails_is_left_out(answers, tmp_path, monkeypatch, capsys, without_compile):
    def fails(case, t):
        if case.stage == "train":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return pyfused(case, t)

    cases = two_small_cases(monkeypatch)
    pyfused = lora_cuda.PROVIDERS["pyfused"]
    monkeypatch.setitem(lora_cuda.PROVIDERS, "pyfused", fails)
    gpu = HostGpu()
    gpu.answers = lambda: answers
    assert bench_lora_cuda.main(["--quick", "--budget", "0.01", "--out", str(tmp_path)], gpu) == 1
    out = capsys.readouterr().out
    message = "pyfused: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert f"wrong: {cases[0].label}: {message}" in out.splitlines()
    assert ("1 cases are left out" in out) == ("nothing was measured" in out) == (not answers)
    written = list(tmp_path.glob("*.csv"))
    assert len(written) == answers
    assert not answers or {row["label"] for row in records.read_csv(written[0])[1]} == {cases[1].label}


def test_once_runs_every_provider_and_writes_nothing(tmp_path, monkeypatch, capsys):
    cases = [small(case) for case in dict.fromkeys(goal.case for goal in lora_cuda.goals())]
    calls = []
    outputs = harness.Workload.outputs
    monkeypatch.setattr(harness.Workload, "outputs", lambda work: calls.append(outputs(work)))
    cases = [cases[0], cases[-2], cases[-1]]
    bench_lora_cuda.once(cases, ["base", "pyfused", "pyfused-shared"], HostGpu())
    lines = capsys.readouterr().out.splitlines()
    shared = cases[1].label
    assert lines == [
        *(f"{cases[0].label}: {name}" for name in ("base", "pyfused")),
        *(f"{shared}: {name}" for name in ("base", "pyfused", "pyfused-shared")),
        *(f"{cases[2].label}: {name}" for name in ("base", "pyfused")),
    ]
    assert [len(results) for results in calls] == [2, 4, 3, 7, 7, 1, 1]
    monkeypatch.setattr(lora_cuda, "quick_cases", lambda: cases[:1])
    out = ["--quick", "--once", "--providers", "pyfused", "--out", str(tmp_path)]
    assert bench_lora_cuda.main(out, HostGpu()) == 0
    assert not list(tmp_path.iterdir())


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_lora_cuda.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
