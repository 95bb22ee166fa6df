"""The demo's results as a table for the terminal, a Markdown file, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich import box
from rich.table import Table

from .classifier import Scores
from .memory import Memory
from .paired import Gain
from .training import Overhead
from .ways import EAGER, FROZEN, HF_PEFT, PYFUSED

# Okabe and Ito's palette: told apart with colour-blind eyes.
_COLOURS = {FROZEN: "#999999", HF_PEFT: "#E69F00", EAGER: "#56B4E9", PYFUSED: "#D55E00"}
_OTHER_COLOURS = ("#009E73", "#0072B2", "#CC79A7", "#F0E442", "#000000")


@dataclass(frozen=True)
class Row:
    """What was found about one way: test scores ``after`` training (of the frozen model: with the linear probe for its
    head), ``gain`` over that probe, ``train_loss``, the mean over the last epoch, and ``steps``, those it took."""

    steps: int
    after: Scores
    gain: Gain | None
    train_loss: float | None
    parameters: int
    step_ms: float
    overhead: Overhead
    memory: Memory


@dataclass(frozen=True)
class Result:
    """All that the demo found. ``majority`` is what always the largest class scores, ``before`` the head that training
    starts from, ``rows`` has the ways in the order of the tables, ``losses`` those of all their steps, ``agreement``
    what HF PEFT made of the adapter that pyfused saved (None for a method that it does not have), ``info`` the machine,
    the settings and the data's sizes."""

    majority: Scores
    before: Scores
    rows: dict[str, Row]
    losses: dict[str, list[float]]
    agreement: dict[str, float] | None
    info: dict[str, Any]

    @property
    def subject(self) -> str:
        """The way that the notes are about: LoRA by pyfused, or the one method that was trained."""
        return PYFUSED if PYFUSED in self.rows else list(self.rows)[-1]


Cells = list[list[str]]


def quality(result: Result) -> Cells:
    """A header, and one line for each way: what it learns."""

    def scores(found: Scores) -> list[str]:
        return [f"{found.accuracy:.1%}", f"{found.macro_f1:.3f}", f"{found.loss:.3f}"]

    lines = [["", "steps", "test accuracy", "macro-F1", "loss", "over the probe, points", "train loss"]]
    lines.append(["largest class", "-", *scores(result.majority), "-", "-"])
    lines.append(["untrained head", "-", *scores(result.before), "-", "-"])
    for name, row in result.rows.items():
        gain = "-" if row.gain is None else f"{_points(row.gain.difference)} ({_range(row.gain.interval)})"
        train_loss = "-" if row.train_loss is None else f"{row.train_loss:.3f}"
        steps = "-" if name == FROZEN else str(row.steps)
        lines.append([_title(name), steps, *scores(row.after), gain, train_loss])
    return lines


def cost(result: Result) -> Cells:
    """A header, and one line for each way: what it costs."""
    header = ["", "parameters", "ms a step", "overhead by minimum", "by median", "peak MB", "saved MB"]
    return [header] + [
        [
            name,
            f"{row.parameters:,}",
            f"{row.step_ms:.0f}",
            f"{row.overhead.minimum - 1:+.1%}",
            f"{row.overhead.median - 1:+.1%}",
            f"{row.memory.peak / 1e6:.0f}",
            f"{row.memory.saved / 1e6:.1f}",
        ]
        for name, row in result.rows.items()
    ]


def notes(result: Result) -> list[str]:
    """What one must know to read the tables."""
    info, agreement, gain = result.info, result.agreement, result.rows[result.subject].gain
    side = "the test side" if info["fold"] is None else f"validation split {info['fold']} of the training files"
    lines = [
        f"{result.subject} - probe: {_points(gain.difference)} points, 95 % interval {_range(gain.interval)} (paired "
        f"bootstrap over test docstrings, standard error {100 * gain.standard_error:.1f} points). Drawing whole files, "
        f"as docstrings of one file are alike: {_range(gain.file_interval)}.",
        f"Docstrings of Python {info['python']}'s standard library: {info['train_texts']} to train on; "
        f"{info['test_texts']} to test on, from {info['test_files']} source files that training never saw: {side}.",
        f"{len(info['packages'])} classes: {', '.join(info['packages'])}. The largest is {info['largest_class']}.",
        f"{_title(FROZEN)}: logistic regression on the encoder's standardised output, its penalty chosen by "
        "cross-validation over the training files.",
        f"Fewer than {info['steps']} steps are a short run: a part of the same batches, on the same schedule, and its "
        "head starts from the linear probe.",
        "Overhead: forward + backward over those of the frozen encoder under the same head on the same batches, with "
        "the gradient carried down to the embeddings in both; ms a step: with the optimizer, median.",
        f"Memory: a batch of {info['memory_batch'][0]} x {info['memory_batch'][1]} tokens; the peak of a step is above "
        "the loaded model, each way in a process of its own; saved: what autograd keeps for backward.",
    ]
    if info["steps"] < info["planned_steps"]:
        lines.append(
            f"This machine is slow: training ended after {info['steps']} of {info['planned_steps']} steps, for all to "
            "take less than ten minutes; the learning rate fell with the time that was left."
        )
    if agreement is not None:
        lines.append(
            f"The adapter saved by pyfused, loaded in HF PEFT: {agreement['equal']:.0f} of {agreement['texts']:.0f} "
            f"predictions equal, largest difference of a logit {agreement['max_difference']:.1e}."
        )
    lines.append(
        f"Batches of {info['settings']['batch_size']}, fp32, seed {info['seed']}. {info['cpu']}, "
        f"{info['cpu_capability']}, {info['threads']} threads, torch {info['torch']}, peft {info['peft']}, "
        f"transformers {info['transformers']}. All of it took {info['seconds'] / 60:.1f} minutes."
    )
    return lines


def _title(name: str) -> str:
    return "linear probe" if name == FROZEN else name


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _range(interval: tuple[float, float]) -> str:
    return f"{_points(interval[0])} to {_points(interval[1])}"


def tables(result: Result) -> list[Table]:
    return [_table("what it learns", quality(result)), _table("what it costs", cost(result))]


def _table(title: str, cells: Cells) -> Table:
    (first, *others), *lines = cells
    made = Table(title=f"\n{title}", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
    made.add_column(first, no_wrap=True)
    for name, *values in zip(others, *(line[1:] for line in lines), strict=True):
        # Headers are broken between words, values never: so the table fits 80 columns.
        made.add_column(name, justify="right", width=max(map(len, [*name.split(), *values])))
    for line in lines:
        made.add_row(*line, style="bold" if line[0] == PYFUSED else None)
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
    parts = [_markdown_table(quality(result)), _markdown_table(cost(result)), [f"- {note}" for note in notes(result)]]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _markdown_table(cells: Cells) -> list[str]:
    header, *lines = cells
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *lines)]


def draw(result: Result, path: Path) -> None:
    """The tables as a picture: quality, time and memory as bars, the training loss as lines."""
    others = iter(_OTHER_COLOURS)
    colours = {name: _COLOURS.get(name) or next(others) for name in result.rows}
    figure, axes = plt.subplots(2, 2, figsize=(13, 8), layout="constrained")
    _draw_quality(axes[0, 0], result, colours)
    _draw_losses(axes[0, 1], result, colours)
    _draw_overhead(axes[1, 0], {name: row for name, row in result.rows.items() if name != FROZEN}, colours)
    _draw_memory(axes[1, 1], result.rows, colours)
    info = result.info
    figure.suptitle(
        f"Frozen MiniLM fine-tuned: which package is a docstring from?\n{info['cpu']}, {info['threads']} threads, fp32",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


Colours = dict[str, str]


def _bars(axis: Axes, names: list[str], values: list[float], colours: list[str], label: Callable | str) -> None:
    """Horizontal bars, the first name at the top."""
    bars = axis.barh(names, values, color=colours)
    axis.bar_label(bars, [label(i) for i in range(len(values))] if callable(label) else None, padding=3, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_quality(axis: Axes, result: Result, colours: Colours) -> None:
    scores = {"largest class": result.majority} | {_title(name): row.after for name, row in result.rows.items()}
    values = list(scores.values())

    def label(i: int) -> str:
        return f"{values[i].accuracy:.1%}   macro-F1 {values[i].macro_f1:.2f}"

    _bars(axis, list(scores), [found.accuracy for found in values], ["#cccccc", *colours.values()], label)
    axis.set_title("accuracy on held-out files")


def _draw_losses(axis: Axes, result: Result, colours: Colours) -> None:
    steps = max(map(len, result.losses.values()))
    for i, (name, values) in enumerate(result.losses.items()):
        smooth = [values[0]]
        for value in values[1:]:
            smooth.append(0.9 * smooth[-1] + 0.1 * value)
        places = [(place + 1) * steps / len(values) for place in range(len(values))]
        # LoRA's lines lie on each other: each is thinner than the one below it.
        axis.plot(places, smooth, color=colours[name], linewidth=(6, 3.5, 1.5)[min(i, 2)], label=name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_title("training loss, running mean")
    axis.legend(frameon=False)


def _draw_overhead(axis: Axes, rows: dict[str, Row], colours: Colours) -> None:
    percent = [100 * (row.overhead.minimum - 1) for row in rows.values()]
    times = [row.step_ms for row in rows.values()]

    def label(i: int) -> str:
        return f"{percent[i]:+.1f} %, {times[i]:.0f} ms a step"

    _bars(axis, list(rows), percent, [colours[name] for name in rows], label)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("% over the frozen model")
    axis.set_title("what the adapter costs: forward + backward")


def _draw_memory(axis: Axes, rows: dict[str, Row], colours: Colours) -> None:
    values = [(row.memory.peak / 1e6, row.memory.saved / 1e6) for row in rows.values()]

    def label(i: int) -> str:
        return "{:.0f}, saved {:.0f}".format(*values[i])

    _bars(axis, list(rows), [peak for peak, _ in values], [colours[name] for name in rows], label)
    axis.barh(list(rows), [saved for _, saved in values], 0.4, color="none", hatch="//", edgecolor="white")
    axis.set_xlabel("MB")
    axis.set_title("memory of a step: peak, and saved for backward (hatched)")
