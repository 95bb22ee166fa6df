"""The demo's results as a table for the terminal, a Markdown file, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from classifier import Scores
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from memory import Memory
from paired import Gain
from rich.table import Table
from training import Overhead
from ways import EVERY, FROZEN, IA3_WAY

# Okabe and Ito's palette: told apart with colour-blind eyes.
COLOURS = {FROZEN: "#999999", "HF PEFT": "#E69F00", "eager": "#56B4E9", "pyfused": "#D55E00", IA3_WAY: "#009E73"}


@dataclass(frozen=True)
class Row:
    """What was found about one way: ``before`` and ``after`` are test scores with the head untrained and at the end (of
    the frozen model: with a linear probe for its head), ``gain`` what it gains over that probe, ``train_loss`` the mean
    over the last epoch."""

    before: Scores
    after: Scores
    gain: Gain | None
    train_loss: float | None
    parameters: int
    step_ms: float
    overhead: Overhead
    memory: Memory


@dataclass(frozen=True)
class Result:
    """All that the demo found. ``majority`` is what always the largest class scores, ``rows`` has the ways in the order
    of the table, ``losses`` those of all steps, ``agreement`` what HF PEFT made of the adapter that pyfused saved,
    ``info`` the machine, the settings and the data's sizes."""

    majority: Scores
    rows: dict[str, Row]
    losses: dict[str, list[float]]
    agreement: dict[str, float]
    info: dict[str, Any]


def cells(result: Result) -> list[list[str]]:
    """The table: a header and one line for each quantity, the ways as columns."""
    rows = result.rows.values()

    def line(name: str, text) -> list[str]:
        return [name, *(text(row) for row in rows)]

    return [
        ["", *result.rows],
        line("test accuracy before", lambda row: f"{row.before.accuracy:.1%}"),
        line("test accuracy after", lambda row: f"{row.after.accuracy:.1%}"),
        line("over the linear probe, points", lambda row: "-" if row.gain is None else _points(row.gain.difference)),
        line("test macro-F1 before", lambda row: f"{row.before.macro_f1:.3f}"),
        line("test macro-F1 after", lambda row: f"{row.after.macro_f1:.3f}"),
        line("test loss before", lambda row: f"{row.before.loss:.3f}"),
        line("test loss after", lambda row: f"{row.after.loss:.3f}"),
        line("training loss, last epoch", lambda row: "-" if row.train_loss is None else f"{row.train_loss:.3f}"),
        line("trainable parameters", lambda row: f"{row.parameters:,}"),
        line("ms per step, median", lambda row: f"{row.step_ms:.0f}"),
        line("overhead over frozen, by minimum", lambda row: f"{row.overhead.minimum - 1:+.1%}"),
        line("overhead over frozen, by median", lambda row: f"{row.overhead.median - 1:+.1%}"),
        line("peak memory of a step, MB", lambda row: f"{row.memory.peak / 1e6:.0f}"),
        line("saved for backward, MB", lambda row: f"{row.memory.saved / 1e6:.1f}"),
    ]


def notes(result: Result) -> list[str]:
    """What one must know to read the table."""
    info, agreement, gain = result.info, result.agreement, result.rows["pyfused"].gain
    side = "the test side" if info["fold"] is None else f"validation split {info['fold']} of the training files"
    return [
        f"LoRA - probe: {_points(gain.difference)} points, 95 % interval {_range(gain.interval)} (pyfused's; paired "
        f"bootstrap over test docstrings, standard error {100 * gain.standard_error:.1f} points). Drawing whole files, "
        f"as docstrings of one file are alike: {_range(gain.file_interval)}.",
        f"Docstrings of Python {info['python']}'s standard library: {info['train_texts']} to train on; "
        f"{info['test_texts']} to test on, from {info['test_files']} source files that training never saw: {side}.",
        f"{len(info['packages'])} classes: {', '.join(info['packages'])}. Always the largest, {info['largest_class']}: "
        f"accuracy {result.majority.accuracy:.1%}, macro-F1 {result.majority.macro_f1:.3f}.",
        "Before: an untrained head. After, frozen: a linear probe, logistic regression on the encoder's standardised "
        "output, its penalty chosen by cross-validation over the training files.",
        "Overhead: forward + backward over those of the frozen encoder under the same head on the same batches, with "
        "the gradient carried down to the embeddings in both.",
        f"Memory: a batch of {info['memory_batch'][0]} x {info['memory_batch'][1]} tokens; the peak is above the "
        "loaded model, each in a process of its own.",
        f"The adapter saved by pyfused, loaded in HF PEFT: {agreement['equal']:.0f} of {agreement['texts']:.0f} "
        f"predictions equal, largest difference of a logit {agreement['max_difference']:.1e}.",
        f"{info['steps']} steps of {info['settings']['batch_size']} ({IA3_WAY}: every second of them), fp32, seed "
        f"{info['seed']}. {info['cpu']}, {info['cpu_capability']}, {info['threads']} threads, torch {info['torch']}, "
        f"peft {info['peft']}, transformers {info['transformers']}.",
    ]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _range(interval: tuple[float, float]) -> str:
    return f"{_points(interval[0])} to {_points(interval[1])}"


def table(result: Result) -> Table:
    header, *lines = cells(result)
    made = Table(title="The same LoRA three ways, and IA3")
    made.add_column(header[0])
    for name in header[1:]:
        made.add_column(name, justify="right", style="bold" if name == "pyfused" else None)
    for line in lines:
        made.add_row(*line)
    return made


def write(result: Result, folder: Path, stem: str) -> list[Path]:
    """Writes ``stem.json``, ``stem.md`` and ``stem.png`` into the folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}{suffix}" for suffix in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(asdict(result), indent=1) + "\n")
    paths[1].write_text(markdown(result))
    draw(result, paths[2])
    return paths


def markdown(result: Result) -> str:
    header, *lines = cells(result)
    rows = [header, ["---", *["---:"] * len(result.rows)], *lines]
    text = [f"| {' | '.join(row)} |" for row in rows] + [""] + [f"- {note}" for note in notes(result)]
    return "\n".join(text) + "\n"


def draw(result: Result, path: Path) -> None:
    """The table as a picture: quality, time and memory as bars, the training loss as lines."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    _draw_quality(axes[0, 0], result)
    _draw_losses(axes[0, 1], result.losses)
    _draw_overhead(axes[1, 0], {name: row for name, row in result.rows.items() if name != FROZEN})
    _draw_memory(axes[1, 1], result.rows)
    info = result.info
    figure.suptitle(
        f"LoRA r={info['lora']['r']} and IA3 on frozen MiniLM: which package is a docstring from?\n"
        f"{info['cpu']}, {info['threads']} threads, fp32, dropout {info['lora']['lora_dropout']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_quality(axis: Axes, result: Result) -> None:
    scores = {"largest class": result.majority} | {name: row.after for name, row in result.rows.items()}
    scores = {"frozen,\nlinear probe" if name == FROZEN else name: found for name, found in scores.items()}
    places = range(len(scores))
    width = 0.38
    for shift, quantity, hatch in ((-width / 2, "accuracy", ""), (width / 2, "macro_f1", "//")):
        bars = axis.bar(
            [place + shift for place in places],
            [getattr(score, quantity) for score in scores.values()],
            width,
            color=["#cccccc", *(COLOURS[name] for name in result.rows)],
            hatch=hatch,
            edgecolor="white",
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=8)
    axis.set_xticks(places, scores)
    axis.set_ylim(0, 1)
    axis.set_title("accuracy (plain) and macro-F1 (hatched) on held-out files")


def _draw_losses(axis: Axes, losses: dict[str, list[float]]) -> None:
    # LoRA's lines lie on each other: each is thinner than the one below it.
    for (name, values), width in zip(losses.items(), (6, 3.5, 1.5, 1.5), strict=True):
        smooth = [values[0]]
        for value in values[1:]:
            smooth.append(0.9 * smooth[-1] + 0.1 * value)
        every = EVERY.get(name, 1)
        axis.plot(range(1, every * len(values) + 1, every), smooth, color=COLOURS[name], linewidth=width, label=name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_title("training loss, running mean")
    axis.legend(frameon=False)


def _draw_overhead(axis: Axes, rows: dict[str, Row]) -> None:
    percent = [100 * (row.overhead.minimum - 1) for row in rows.values()]
    bars = axis.bar(list(rows), percent, color=[COLOURS[name] for name in rows])
    labels = [f"{cost:+.1f} %\n{row.step_ms:.0f} ms a step" for cost, row in zip(percent, rows.values(), strict=True)]
    axis.bar_label(bars, labels)
    axis.axhline(0, color="black", linewidth=1)
    axis.margins(y=0.2)
    axis.set_ylabel("% over the frozen model")
    axis.set_title("what the adapter costs: forward + backward")


def _draw_memory(axis: Axes, rows: dict[str, Row]) -> None:
    width = 0.38
    for shift, quantity, hatch in ((-width / 2, "peak", ""), (width / 2, "saved", "//")):
        bars = axis.bar(
            [place + shift for place in range(len(rows))],
            [getattr(row.memory, quantity) / 1e6 for row in rows.values()],
            width,
            color=[COLOURS[name] for name in rows],
            hatch=hatch,
            edgecolor="white",
        )
        axis.bar_label(bars, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(rows)), rows)
    axis.margins(y=0.15)
    axis.set_ylabel("MB")
    axis.set_title("peak of a step (plain), saved for backward (hatched)")
