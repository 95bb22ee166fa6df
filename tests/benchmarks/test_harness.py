"""The benchmark harness on a clock that the test moves, and a tiny run of the LoRA benchmark from end to end."""

from __future__ import annotations

import gc
import io
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_lora
import harness
import records

import pyfused


@dataclass(frozen=True)
class Case:
    stage: str
    size: int

    @property
    def label(self) -> str:
        return f"{self.stage} size={self.size}"


class Clock:
    """Stands still unless a workload advances it, so that every figure is known."""

    now = 0

    def mark(self) -> int:
        return Clock.now

    def prepare(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def microseconds(self, start: int, stop: int) -> float:
        return float(stop - start)


class Busy(torch.autograd.Function):
    """The identity, taking ``forward_us`` and ``backward_us`` on the clock."""

    @staticmethod
    def forward(ctx, x, forward_us, backward_us):
        Clock.now += forward_us
        ctx.backward_us = backward_us
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Clock.now += ctx.backward_us
        return grad, None, None


@pytest.fixture
def clock(monkeypatch):
    Clock.now = 0
    monkeypatch.setattr(harness, "_HostClock", Clock)


def busy(forward_us: int, backward_us: int | None = None, called: list[str] | None = None, name: str = ""):
    """A workload; one for training where ``backward_us`` is given."""
    training = backward_us is not None
    x = torch.ones(4, requires_grad=training)

    def call():
        if called is not None:
            called.append(name)
        return Busy.apply(x, forward_us, backward_us)

    return harness.Workload(call, (x,), torch.ones(4)) if training else harness.Workload(call)


def test_summarize():
    stats = harness.summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (stats.min_us, stats.p50_us) == (1.0, 3.0)
    assert stats.p20_us == pytest.approx(1.8) and stats.p80_us == pytest.approx(4.2)
    assert stats.spread == pytest.approx(1.0)  # 1 in the first half, 2 in the second
    with pytest.raises(ValueError, match="samples: expected at least two, got 1"):
        harness.summarize([1.0])


def test_inference_has_one_mode(clock):
    results = harness.measure(Case("infer", 1), {"base": busy(100), "other": busy(150)}, budget_s=0.005)
    assert [(r.mode, r.provider) for r in results] == [("forward", "base"), ("forward", "other")]
    base, other = results
    assert (base.stats.min_us, other.stats.p80_us) == (100.0, 150.0)
    assert (base.ratio_min, other.ratio_min, other.ratio_p50) == (1.0, 1.5, 1.5)
    assert base.saved_bytes is None
    # 200 us a sample are two calls of the fastest, and 5 ms hold ten rounds of 2 * (100 + 150) us.
    assert (base.calls_per_sample, base.samples) == (2, 10)


def test_training_has_three_modes(clock):
    results = harness.measure(Case("train", 1), {"base": busy(100, 300), "other": busy(200, 450)}, budget_s=0.0)
    table = {(r.mode, r.provider): r for r in results}
    assert {key: r.stats.min_us for key, r in table.items() if key[1] == "other"} == {
        ("forward", "other"): 200.0,
        ("backward", "other"): 450.0,
        ("full", "other"): 650.0,
    }
    assert table["backward", "other"].ratio_min == 1.5
    assert table["full", "other"].ratio_min == 1.625
    assert table["full", "base"].samples == harness.MIN_ROUNDS


def test_minimum_and_median_differ_where_samples_do(clock):
    times = iter([1000, *[1000] * 3, *[1000, 2000] * 100000])
    base = harness.Workload(lambda: setattr(Clock, "now", Clock.now + next(times)))
    (result,) = harness.measure(Case("infer", 1), {"base": base}, budget_s=0.1)
    assert result.stats.min_us == 1000.0 and result.stats.p80_us == 2000.0


def test_rounds_are_interleaved(clock):
    called: list[str] = []
    names = ["base", "a", "b"]
    workloads = {name: busy(1000, None, called, name) for name in names}
    (result, *_) = harness.measure(Case("infer", 1), workloads, budget_s=0.06)
    timed = called[-len(names) * result.samples :]  # one call a sample, after the warm-up
    rounds = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert len(set(rounds)) > 1


def test_garbage_collection_comes_back_after_an_error(clock):
    enabled = []

    def call():
        enabled.append(gc.isenabled())
        Clock.now += 1000
        if not enabled[-1]:
            raise RuntimeError("out of order")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="out of order"):
        harness.measure(Case("infer", 1), {"base": harness.Workload(call)}, budget_s=0.0)
    assert enabled[0] and not enabled[-1] and gc.isenabled()


def test_host_clock_is_in_microseconds():
    clock = harness._HostClock()
    start = clock.mark()
    assert clock.microseconds(start, start + 2500) == 2.5


def test_saved_bytes():
    x, weight = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    multiply = harness.Workload(lambda: x @ weight.t(), (x, weight), torch.ones(6, 5), (weight,))
    assert harness.saved_bytes(multiply) == x.numel() * 4
    frozen = harness.Workload(lambda: x @ weight.detach().t(), (x,), torch.ones(6, 5), (weight,))
    assert harness.saved_bytes(frozen) == 0
    twice = harness.Workload(lambda: x * x, (x,), torch.ones(6, 8))
    assert harness.saved_bytes(twice) == x.numel() * 4


def test_relative_error():
    expected = torch.tensor([3.0, 4.0])
    assert harness.relative_error(expected + torch.tensor([0.0, 1.0]), expected) == pytest.approx(0.2)
    assert harness.relative_error(expected, expected, torch.ones(1)) == 0.0
    assert math.isnan(harness.relative_error(expected * math.nan, expected))


def results_of(case, **minima: float) -> list[harness.Result]:
    stats = {name: harness.Stats(us, us, us, us, 0.01) for name, us in minima.items()}
    return [harness.Result(case, "full", name, s, 1.0, 1.0, 7, 1, None) for name, s in stats.items()]


def test_losses():
    results = results_of(Case("train", 1), eager=100.0, peft=102.0, ours=101.0)
    results += results_of(Case("train", 2), eager=100.0, peft=100.0, ours=100.0)
    assert [(ours.case.size, theirs.provider, ratio) for ours, theirs, ratio in harness.losses(
        results, "ours", ("eager", "peft"), lambda case, mode: 1.0
    )] == [(1, "eager", 1.01), (2, "eager", 1.0), (2, "peft", 1.0)]  # fmt: skip
    assert harness.losses(results, "ours", ("eager", "peft"), lambda case, mode: 1.02) == []
    assert len(harness.losses(results, "ours", ("eager",), lambda case, mode: 1.02 - 0.02 * (case.size == 1))) == 1
    assert harness.losses(results, "ours", ("absent",), lambda case, mode: 1.0) == []


def test_again_adds_samples_until_it_is_content(clock):
    asked = []

    def again(results):
        asked.append([result.samples for result in results])
        return len(asked) < 3

    results = harness.measure(
        Case("infer", 1), {"base": busy(100), "other": busy(150)}, budget_s=0.0, max_rounds=7, again=again
    )
    assert asked == [[7, 7], [14, 14], [21, 21]] and [result.samples for result in results] == [21, 21]
    never = harness.measure(
        Case("infer", 1), {"base": busy(100)}, budget_s=0.0, max_rounds=7, again=lambda results: True
    )
    assert never[0].samples == 7 * (1 + harness.REPEATS)


def test_check_measures_a_loss_for_longer_and_keeps_it():
    calls = []

    def measure(case, workloads, budget_s, again):
        lost = results_of(case, base=1.0, eager=100.0, pyfused=100.5 if case == SMALL else 99.0)
        calls.append(again(lost))
        return lost

    benchmark = replace(bench_lora.BENCHMARK, build=lambda case, providers: {}, verify=lambda case, workloads: None)
    console = Console(file=io.StringIO())
    cases = [SMALL, replace(SMALL, dropout=0.05)]
    for check, expected in (True, [True, False]), (False, [False, False]):
        calls.clear()
        results = list(benchmark.run(cases, ["base"], 0.0, console, measure, check))[-1]
        assert calls == expected and len(benchmark.losses(results)) == 1


def test_csv_round_trip(tmp_path, clock):
    results = harness.measure(Case("train", 3), {"base": busy(100, 300), "other": busy(150, 300)}, budget_s=0.0)
    path = tmp_path / "folder" / "op.csv"
    records.write_csv(path, {"cpu": "A: B, C", "threads": "2"}, results)
    info, rows = records.read_csv(path)
    assert info == {"cpu": "A: B, C", "threads": "2"}
    assert list(rows[0]) == [
        "label", "stage", "size", "mode", "provider", "min_us", "p20_us", "p50_us", "p80_us", "spread", "ratio_min",
        "ratio_p50", "samples", "calls_per_sample", "saved_bytes",
    ]  # fmt: skip
    assert [(row["mode"], row["provider"]) for row in rows] == [(r.mode, r.provider) for r in results]
    other = next(row for row in rows if row["mode"] == "forward" and row["provider"] == "other")
    assert (other["label"], other["size"], other["ratio_min"]) == ("train size=3", "3", "1.5000")
    assert float(other["min_us"]) == 150.0 and other["saved_bytes"] == "0"


def test_result_name():
    info = {"device": "cpu", "cpu": "Intel(R) Xeon(R) CPU E5 v4 @ 2.20GHz", "isa": "AVX512_BF16", "threads": "2"}
    assert records.result_name("lora", info) == "lora-cpu-intel-xeon-e5-v4-avx512_bf16-t2"
    assert records.result_name("lora", info | {"device": "NVIDIA H200"}) == "lora-cuda-nvidia-h200"


def test_environment_says_what_a_result_depends_on():
    info = records.environment()
    assert info["torch"] == torch.__version__ and info["threads"] == str(torch.get_num_threads())
    assert {"cpu", "isa", "amx", "python", "peft", "pyfused", "commit", "date"} <= set(info)
    assert all(
        isinstance(value, str) and str(Path(harness.__file__).parents[1]) not in value for value in info.values()
    )


def test_an_emulated_level_is_named_so(monkeypatch):
    info = pyfused.build_info() | {"cpu_capability": "AMX", "cpu_capabilities_emulated": ["AMX"]}
    monkeypatch.setattr(pyfused, "build_info", lambda: info)
    environment = records.environment()
    assert environment["isa"] == "AMX (emulated)"
    assert "-amx-emulated-t" in records.result_name("lora", environment)


# The LoRA benchmark ---------------------------------------------------------------------------------------------------


def test_cases_are_distinct_and_quick_is_a_subset():
    cases, quick = bench_lora.all_cases(), bench_lora.quick_cases()
    assert len({case.label for case in cases}) == len(set(cases)) == len(cases)
    assert set(quick) <= set(cases)
    assert {case.stage for case in quick} == {"train", "infer"}


SMALL = bench_lora.Case("train", "minilm-384", 64, 384, 384, 8, "fp32", "fp32", 0.1)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_verify_accepts_what_is_right(dropout):
    case = replace(SMALL, dropout=dropout)
    bench_lora.verify(case, bench_lora.build(case, ["base", "eager", "peft", "pyfused"]))


@pytest.mark.parametrize(
    ("dropout", "spoil", "message"),
    [
        (0.0, lambda y: y * 1.01, "wrong y"),
        (0.0, lambda y: y * math.nan, "wrong y"),
        (0.1, lambda y: y + 1.0, "wrong y"),
        (0.0, lambda y: y.detach() + 0.5 * (y - y.detach()), "wrong grad_x"),
    ],
)
def test_verify_refuses_what_is_wrong(dropout, spoil, message):
    case = replace(SMALL, dropout=dropout)
    right = bench_lora.build(case, ["eager"])["eager"]
    wrong = replace(right, call=lambda: spoil(right.call()))
    with pytest.raises(RuntimeError, match=f"eager computes a {message}"):
        bench_lora.verify(case, {"eager": wrong})


def test_verify_refuses_a_provider_without_dropout():
    off = bench_lora.build(replace(SMALL, dropout=0.0), ["eager"])
    with pytest.raises(RuntimeError, match="wrong y"):
        bench_lora.verify(SMALL, off)


def test_check_names_the_loss():
    lost = results_of(SMALL, base=1.0, eager=100.0, peft=120.0, pyfused=100.5)
    text = io.StringIO()
    assert bench_lora.BENCHMARK.report_losses(lost, Console(file=text, width=400))
    assert (
        f"{SMALL.label} full: 100.5 us, 1.005 of eager's 100.0 us; must be below 1 (spreads: 1.0%, 1.0%)"
        in text.getvalue()
    )
    within = results_of(replace(SMALL, dropout=0.0), base=1.0, eager=100.0, peft=120.0, pyfused=100.5)
    assert not bench_lora.BENCHMARK.report_losses(within, Console(file=text))


def test_runs_end_to_end(tmp_path, capsys):
    only = "^(train|infer) minilm-384 M=(1|128) r=8 fp32( p=0.1)?$"
    arguments = ["--only", only, "--providers", "eager,peft,pyfused", "--budget", "0.01", "--out", str(tmp_path)]
    assert bench_lora.BENCHMARK.main(arguments) == 0
    (path,) = tmp_path.glob("*.csv")
    info, rows = records.read_csv(path)
    assert info["cases"] == "3 of 3"
    assert {row["provider"] for row in rows} == {"base", "eager", "peft", "pyfused"}
    assert {(row["stage"], row["mode"]) for row in rows} == {
        ("infer", "forward"),
        ("train", "forward"),
        ("train", "backward"),
        ("train", "full"),
    }
    assert all(0.0 < float(row["min_us"]) <= float(row["p50_us"]) for row in rows)
    assert all(row["ratio_min"] == "1.0000" for row in rows if row["provider"] == "base")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "losses to eager or HF PEFT" in capsys.readouterr().out


def test_a_part_is_added_to_the_whole(tmp_path):
    arguments = ["--add", "--providers", "eager,pyfused", "--budget", "0.01", "--out", str(tmp_path), "--only"]
    for m in (1, 16, 1):
        assert bench_lora.BENCHMARK.main([*arguments, f"^infer minilm-384 M={m} r=8 fp32$"]) == 0
    (path,) = tmp_path.glob("*.csv")
    info, rows = records.read_csv(path)
    assert not path.stem.endswith("-part") and info["cases"] == "2 of 2"
    assert [(row["m"], row["provider"]) for row in rows] == [
        (m, provider) for m in ("16", "1") for provider in ("base", "eager", "pyfused")
    ]
    text = re.sub("# commit: .*", "# commit: another", path.read_text())
    path.write_text(text)
    with pytest.raises(SystemExit, match="is of another commit or machine"):
        bench_lora.BENCHMARK.main([*arguments, "^infer minilm-384 M=1 r=8 fp32$"])
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--providers", "base,nobody"], "unknown nobody"), (["--only", "nothing"], "no case matches")],
)
def test_arguments_that_name_nothing(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench_lora.BENCHMARK.main(arguments)
    assert message in capsys.readouterr().err
