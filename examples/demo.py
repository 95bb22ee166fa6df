"""Fine-tunes a real frozen model with the same LoRA three ways, HF PEFT, eager PyTorch and pyfused, and with pyfused's
IA3, and compares them.

python examples/demo.py            # what `make demo` runs: about nine minutes on two cores
python examples/demo.py --quick    # a few steps, to see that everything runs

The model is MiniLM, the task to tell which package of Python's standard library a docstring is from (docstrings.py).
Ends with exit code 1 if HF PEFT, given the adapter that pyfused has saved, predicts anything else than pyfused.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import docstrings
import memory
import paired
import peft
import report
import torch
from classifier import Classifier, Texts, apply, fit_probe, load_tokenizer, score, tokenize
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from training import Contender, Settings, overhead, train
from ways import EVERY, FROZEN, IA3_WAY, LORA, WAYS, build, head_and_adapters

import pyfused

MAX_LENGTH = 64
PROBE_PENALTIES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
QUICK_TEXTS, QUICK_STEPS = 96, 4
# Two programs round differently; a prediction counts as another one only where the logits are further apart.
LOGIT_TOLERANCE = 1e-3


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    console = Console(highlight=False)
    settings = Settings()
    data = read_data(options)
    tokenizer = load_tokenizer()
    train_texts, test_texts = (tokenize(tokenizer, side, MAX_LENGTH) for side in (data.train, data.test))
    console.print(
        f"[bold]1/5[/] {len(data.train)} docstrings to train on, {len(data.test)} held out, of Python "
        f"{platform.python_version()}; labels: {', '.join(data.packages)}"
    )

    with console.status("linear probe"):
        majority = score(most_frequent(train_texts.labels).expand(len(data.test), -1), test_texts.labels)
        probe_logits = probe(data, train_texts, test_texts)
        probe_scores = score(probe_logits, test_texts.labels)
    console.print(
        f"[bold]2/5[/] accuracy without an adapter: always the largest class {majority.accuracy:.1%}, "
        f"a linear probe on the frozen encoder {probe_scores.accuracy:.1%}"
    )

    console.print(f"[bold]3/5[/] training {len(WAYS) - 1} ways side by side, and timing the frozen model beside them")
    learning_rates = {IA3_WAY: settings.ia3_learning_rate}
    contenders = {name: Contender(build(name, options.seed), settings, learning_rates.get(name)) for name in WAYS}
    before = {name: score(logits_of(contenders[name].model, test_texts), test_texts.labels) for name in WAYS}
    train_with_progress(console, contenders, train_texts, settings, options)
    trained = {name: contender for name, contender in contenders.items() if name != FROZEN}
    logits = {name: logits_of(contender.model, test_texts) for name, contender in trained.items()}
    after = {FROZEN: probe_scores} | {name: score(logits[name], test_texts.labels) for name in trained}
    files = [docstring.file for docstring in data.test]
    gains = {name: paired.gain(logits[name], probe_logits, test_texts.labels, files) for name in trained}

    console.print("[bold]4/5[/] the adapter that pyfused saves, loaded in HF PEFT; memory, each way in its own process")
    with console.status("saving, loading, measuring"):
        agreement = agree_with_peft(contenders["pyfused"].model, test_texts, logits["pyfused"])
        memories = {name: memory.measure(name, settings.batch_size, MAX_LENGTH) for name in WAYS}

    steps_per_epoch = {name: math.ceil(len(data.train) / settings.batch_size / EVERY.get(name, 1)) for name in WAYS}
    rows = {
        name: report.Row(
            before=before[name],
            after=after[name],
            gain=gains.get(name),
            train_loss=statistics.mean(contender.losses[-steps_per_epoch[name] :]) if name in trained else None,
            parameters=sum(parameter.numel() for group in head_and_adapters(contender.model) for parameter in group),
            step_ms=1e3 * statistics.median(contender.step_seconds),
            overhead=overhead(contender, contenders[FROZEN]),
            memory=memories[name],
        )
        for name, contender in contenders.items()
    }
    losses = {name: contender.losses for name, contender in trained.items()}
    info = facts(options, settings, data, len(losses["pyfused"]))
    return tell(console, report.Result(majority, rows, losses, agreement, info), options)


def tell(console: Console, result: report.Result, options: argparse.Namespace) -> int:
    """Prints and writes the results; the exit code."""
    console.print("[bold]5/5[/] results\n", report.table(result))
    for note in report.notes(result):
        console.print(f"- {note}")
    for path in report.write(result, options.output, stem(options)):
        console.print(f"written: {path}")
    if different := result.agreement["different"]:
        console.print(f"[bold red]HF PEFT predicts otherwise for {different} texts[/]")
        return 1
    return 0


def stem(options: argparse.Namespace) -> str:
    """Of the result files: those of a quick run or of a validation split never take the place of the demo's."""
    fold = "" if options.fold is None else f"-fold{options.fold}"
    return "demo" + fold + ("-quick" if options.quick else "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        default=Path(__file__).parents[1] / "benchmarks" / "results",
        help="folder for the table and the picture (default: benchmarks/results)",
    )
    return parser.parse_args(argv)


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


def probe(data: docstrings.Dataset, train_texts: Texts, test_texts: Texts) -> Tensor:
    """Test logits of a linear probe on the frozen encoder.

    Its penalty is chosen by cross-validation over the training files, then it is fitted to all of them.
    """
    embed = Classifier().embed
    embeddings, labels = apply(embed, train_texts), train_texts.labels
    folds = []
    for salt in docstrings.FOLDS:
        heldout = {docstring.file for docstring in docstrings.hold_out(data, salt).test}
        folds.append(torch.tensor([docstring.file in heldout for docstring in data.train]))

    def validation_accuracy(penalty: float) -> float:
        def accuracy(heldout: Tensor) -> float:
            fitted = fit_probe(embeddings[~heldout], labels[~heldout], penalty)
            return score(fitted(embeddings[heldout]), labels[heldout]).accuracy

        return statistics.mean(accuracy(heldout) for heldout in folds)

    fitted = fit_probe(embeddings, labels, max(PROBE_PENALTIES, key=validation_accuracy))
    return fitted(apply(embed, test_texts)).detach()


def logits_of(model: nn.Module, texts: Texts) -> Tensor:
    model.eval()
    logits = apply(model, texts)
    model.train()
    return logits


def train_with_progress(
    console: Console, contenders: dict[str, Contender], texts: Texts, settings: Settings, options: argparse.Namespace
) -> None:
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("loss")

        def on_step(done: int, steps: int) -> None:
            losses = {name: statistics.mean(c.losses[-20:]) for name, c in contenders.items() if name != FROZEN}
            text = "loss  " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            progress.update(task, completed=done, total=steps, description=text)

        train(contenders, texts, settings, options.seed, QUICK_STEPS if options.quick else None, on_step)


def agree_with_peft(model: pyfused.PeftModel, texts: Texts, logits: Tensor) -> dict[str, float]:
    """Saves the adapter, loads it with HF PEFT on a fresh model and compares its logits with ``logits``."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = peft.PeftModel.from_pretrained(Classifier(), folder).eval()
    theirs = apply(loaded, texts)
    predicted = theirs.argmax(1)
    behind = logits.max(1).values - logits.gather(1, predicted.unsqueeze(1)).squeeze(1)
    return {
        "texts": len(texts.ids),
        "equal": int((logits.argmax(1) == predicted).sum()),
        "different": int((behind > LOGIT_TOLERANCE).sum()),
        "max_difference": (logits - theirs).abs().max().item(),
    }


def facts(options: argparse.Namespace, settings: Settings, data: docstrings.Dataset, steps: int) -> dict:
    """What the results were found on."""
    largest = statistics.mode(docstring.label for docstring in data.train)
    return {
        "seed": options.seed,
        "fold": options.fold,
        "steps": steps,
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


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    sys.exit(main())
