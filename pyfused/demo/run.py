"""The demo: one frozen model, fine-tuned by the same LoRA three ways, HF PEFT, eager PyTorch and pyfused, and in short
runs by every other method of pyfused.

python -m pyfused.demo                        # what `make demo` runs: about eight minutes on two cores
python -m pyfused.demo --quick                # a few steps, to see that everything runs
python -m pyfused.demo --method IA3 --full    # one method alone, trained as long as it gains from it

The model is MiniLM, the task to tell which package of Python's standard library a docstring is from (docstrings.py).
Ends with exit code 1 if HF PEFT, given the adapter that pyfused has saved, predicts anything else than pyfused.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

import pyfused

from . import docstrings, memory, paired, report
from .classifier import Classifier, Texts, apply, fit_probe, load_tokenizer, score, tokenize
from .training import Contender, Settings, common_steps, overhead, train
from .ways import FROZEN, LORA, METHODS, PYFUSED, WAYS, Way, build, head_and_adapters

MAX_LENGTH = 64
PROBE_PENALTIES = (1e-2, 3e-2, 1e-1)
QUICK_TEXTS, QUICK_STEPS = 96, 12
FULL_EPOCHS = 8
# The demo is to end within ten minutes: training ends early where it would take longer than is left of these seconds.
# What comes after it was measured to take 3.3 times what comes before, and 3.9 times on a machine a third as fast.
SECONDS, AFTER_TO_BEFORE = 580.0, 3.5
# Two programs round differently; a prediction counts as another one only where the logits are further apart.
LOGIT_TOLERANCE = 1e-3


def main(argv: list[str] | None = None) -> int:
    start = time.perf_counter()
    options = parse(argv)
    console = Console(highlight=False)
    settings = Settings(epochs=FULL_EPOCHS) if options.full else Settings()
    ways = chosen_ways(options)
    data = read_data(options)
    tokenizer = load_tokenizer()
    train_texts, test_texts = (tokenize(tokenizer, side, MAX_LENGTH) for side in (data.train, data.test))
    console.print(
        f"[bold]1/5[/] {len(data.train)} docstrings to train on, {len(data.test)} held out, of Python "
        f"{platform.python_version()}; labels: {', '.join(data.packages)}"
    )

    with console.status("linear probe"):
        majority = score(most_frequent(train_texts.labels).expand(len(data.test), -1), test_texts.labels)
        torch.manual_seed(options.seed)
        untrained = Classifier()
        test_embeddings = apply(untrained.embed, test_texts)
        before = score(untrained.classifier(test_embeddings).detach(), test_texts.labels)
        probe = choose_probe(data, apply(untrained.embed, train_texts), train_texts.labels)
        probe_logits = probe(test_embeddings).detach()
        probe_scores = score(probe_logits, test_texts.labels)
    console.print(
        f"[bold]2/5[/] accuracy without an adapter: always the largest class {majority.accuracy:.1%}, "
        f"a linear probe on the frozen encoder {probe_scores.accuracy:.1%}"
    )

    console.print(f"[bold]3/5[/] training {len(ways) - 1} ways side by side, and timing the frozen model beside them")
    steps_per_epoch = math.ceil(len(data.train) / settings.batch_size)
    steps = QUICK_STEPS if options.quick else settings.epochs * steps_per_epoch
    contenders = {}
    for name, way in ways.items():
        head = probe if way.is_short else None  # a short run would not bring a random one to its best
        contenders[name] = Contender(build(way, options.seed, way.steps(steps), head), settings, way)
    prepared = time.perf_counter() - start
    max_seconds = math.inf if options.full else max(SECONDS - (1 + AFTER_TO_BEFORE) * prepared, prepared)
    taken = train_with_progress(console, contenders, train_texts, settings, options.seed, steps, max_seconds)
    trained = {name: contender for name, contender in contenders.items() if name != FROZEN}
    logits = {name: logits_of(contender.model, test_texts) for name, contender in trained.items()}
    after = {FROZEN: probe_scores} | {name: score(logits[name], test_texts.labels) for name in trained}
    files = [docstring.file for docstring in data.test]
    gains = {name: paired.gain(logits[name], probe_logits, test_texts.labels, files) for name in trained}

    console.print("[bold]4/5[/] the adapter that pyfused saves, loaded in HF PEFT; memory, each way in its own process")
    with console.status("saving, loading, measuring"):
        subject = options.method or PYFUSED
        agreement = agree_with_peft(contenders[subject].model, test_texts, logits[subject])
        memories = memory.measure(ways, settings.batch_size, MAX_LENGTH)

    frozen = contenders[FROZEN]
    rows = {
        name: report.Row(
            steps=len(contender.losses),
            after=after[name],
            gain=gains.get(name),
            train_loss=statistics.mean(contender.losses[-way.steps(steps_per_epoch) :]) if name in trained else None,
            parameters=sum(parameter.numel() for group in head_and_adapters(contender.model) for parameter in group),
            step_ms=1e3 * statistics.median(contender.step_seconds[i] for i in common_steps(contender, frozen)),
            overhead=overhead(contender, frozen),
            memory=memories[name],
        )
        for (name, contender), way in zip(contenders.items(), ways.values(), strict=True)
    }
    losses = {name: contender.losses for name, contender in trained.items()}
    counts = {"steps": taken, "planned_steps": steps}
    info = facts(options, settings, data) | counts | {"seconds": time.perf_counter() - start}
    return tell(console, report.Result(majority, before, rows, losses, agreement, info), options)


def tell(console: Console, result: report.Result, options: argparse.Namespace) -> int:
    """Prints and writes the results; the exit code."""
    console.print("[bold]5/5[/] results", *report.tables(result), "")
    for note in report.notes(result):
        console.print(f"- {note}")
    for path in report.write(result, options.output, stem(options)):
        console.print(f"written: {path}")
    if result.agreement and (different := result.agreement["different"]):
        console.print(f"[bold red]HF PEFT predicts otherwise for {different} texts[/]")
        return 1
    return 0


def stem(options: argparse.Namespace) -> str:
    """Of the result files: those of any other run never take the place of the demo's."""
    parts = {
        short(options.method or "").lower(): options.method is not None,
        "full": options.full,
        f"seed{options.seed}": options.seed != 0,
        f"fold{options.fold}": options.fold is not None,
        "quick": options.quick,
    }
    return "-".join(["demo", *(part for part, there in parts.items() if there)])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", type=method_named, help=f"this one alone: {', '.join(map(short, METHODS))}")
    parser.add_argument("--full", action="store_true", help=f"with --method: all steps of {FULL_EPOCHS} epochs")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps on {QUICK_TEXTS} texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--fold",
        type=int,
        choices=range(len(docstrings.FOLDS)),
        help="score on a part of the training files, as hyper-parameters were chosen, not on the test side",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("benchmarks") / "results",
        help="folder for the tables and the picture (default: benchmarks/results)",
    )
    options = parser.parse_args(argv)
    if options.full and options.method is None:
        parser.error("--full needs --method: all methods in full would take too long for one run")
    return options


def method_named(name: str) -> str:
    """The key of ``METHODS`` that is meant by this name, in any case."""
    for method in METHODS:
        if short(method).casefold() == name.casefold():
            return method
    raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(map(short, METHODS))}")


def short(method: str) -> str:
    return method.partition(",")[0].removesuffix(" tuning")


def chosen_ways(options: argparse.Namespace) -> dict[str, Way]:
    """The frozen model and the method that is asked for, else all."""
    if options.method is None:
        return WAYS
    way = WAYS[options.method]
    return {FROZEN: WAYS[FROZEN], options.method: replace(way, share=1.0) if options.full else way}


def read_data(options: argparse.Namespace) -> docstrings.Dataset:
    data = docstrings.load()
    if options.fold is not None:
        data = docstrings.hold_out(data, docstrings.FOLDS[options.fold])
    if options.quick:  # every n-th, so that all classes are there
        train_side, test_side = (side[:: -(-len(side) // QUICK_TEXTS)] for side in (data.train, data.test))
        data = docstrings.Dataset(data.packages, train_side, test_side)
    return data


def most_frequent(labels: Tensor) -> Tensor:
    """The best constant logits ``[classes]`` for labels ``[texts]``; each class counts once more than it occurs."""
    return (labels.bincount(minlength=docstrings.CLASSES) + 1).log().log_softmax(0)


def choose_probe(data: docstrings.Dataset, embeddings: Tensor, labels: Tensor) -> nn.Linear:
    """The linear probe on the frozen encoder's ``embeddings`` of the training side.

    Its penalty is chosen by cross-validation over the training files, then it is fitted to all of them.
    """
    folds = []
    for salt in docstrings.FOLDS:
        heldout = {docstring.file for docstring in docstrings.hold_out(data, salt).test}
        folds.append(torch.tensor([docstring.file in heldout for docstring in data.train]))

    def validation_accuracy(penalty: float) -> float:
        def accuracy(heldout: Tensor) -> float:
            fitted = fit_probe(embeddings[~heldout], labels[~heldout], penalty)
            return score(fitted(embeddings[heldout]), labels[heldout]).accuracy

        return statistics.mean(accuracy(heldout) for heldout in folds)

    return fit_probe(embeddings, labels, max(PROBE_PENALTIES, key=validation_accuracy))


def logits_of(model: nn.Module, texts: Texts) -> Tensor:
    model.eval()
    logits = apply(model, texts)
    model.train()
    return logits


def train_with_progress(
    console: Console,
    contenders: dict[str, Contender],
    texts: Texts,
    settings: Settings,
    seed: int,
    steps: int,
    max_seconds: float,
) -> int:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loss", total=steps)

        def on_step(done: int, steps: int) -> None:
            losses = (statistics.mean(c.losses[-20:]) for name, c in contenders.items() if name != FROZEN and c.losses)
            shown = "  ".join(f"{loss:.2f}" for loss in islice(losses, 3))  # LoRA's: there is no room for all
            progress.update(task, completed=done, description=f"loss  {shown}")

        return train(contenders, texts, settings, seed, steps, on_step, max_seconds)


def agree_with_peft(model: nn.Module, texts: Texts, logits: Tensor) -> dict[str, float] | None:
    """Saves the adapter, loads it with HF PEFT on a fresh model and compares its logits with ``logits``.

    None for a method that HF PEFT does not have.
    """
    adapted = model if isinstance(model, pyfused.PeftModel) else model.encoder
    if adapted.peft_config["default"].peft_type not in set(peft.PeftType):
        return None
    loaded = Classifier()
    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        if adapted is model:
            loaded = peft.PeftModel.from_pretrained(loaded, folder)
        else:
            loaded.encoder = peft.PeftModel.from_pretrained(loaded.encoder, folder)
            loaded.classifier.load_state_dict(model.classifier.state_dict())
    theirs = apply(loaded.eval(), texts)
    predicted = theirs.argmax(1)
    behind = logits.max(1).values - logits.gather(1, predicted.unsqueeze(1)).squeeze(1)
    return {
        "texts": len(texts.ids),
        "equal": int((logits.argmax(1) == predicted).sum()),
        "different": int((behind > LOGIT_TOLERANCE).sum()),
        "max_difference": (logits - theirs).abs().max().item(),
    }


def facts(options: argparse.Namespace, settings: Settings, data: docstrings.Dataset) -> dict:
    """What the results were found on."""
    largest = statistics.mode(docstring.label for docstring in data.train)
    return {
        "seed": options.seed,
        "fold": options.fold,
        "settings": asdict(settings),
        "lora": LORA,
        "max_length": MAX_LENGTH,
        "packages": data.packages,
        "train_texts": len(data.train),
        "test_texts": len(data.test),
        "test_files": len({docstring.file for docstring in data.test}),
        "largest_class": data.packages[largest],
        "memory_batch": (settings.batch_size, MAX_LENGTH),
        **pyfused.build_info(),
    }
