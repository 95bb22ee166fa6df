"""A benchmark's CSV as a picture: for each case the ratio of every provider to the frozen base, and the goal for it.

python benchmarks/plot.py benchmarks/results/<name>.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import records

# Okabe and Ito's palette: told apart with colour-blind eyes; the marker says the same again.
STYLES = {
    "eager": ("o", "#56B4E9"),
    "compile": ("s", "#009E73"),
    "peft": ("D", "#E69F00"),
    "adapterhub": ("D", "#E69F00"),
    "pyfused": ("*", "#D55E00"),
    "pyfused-alone": ("x", "#000000"),
}


def draw(path: Path) -> Path:
    """Draw a panel for each stage beside the CSV: whole training steps ("full") and inference ("forward").

    Returns:
        The PNG's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    info, rows = records.read_csv(path)
    baseline = rows[0]["provider"]
    # A GPU's goals are for the median, and not all of them ratios to the baseline.
    has_goals = info["device"] == "cpu" and "goal" in rows[0]
    panels = {}
    for stage, mode, title in (("train", "full", "training: forward + backward"), ("infer", "forward", "inference")):
        chosen = [row for row in rows if row["stage"] == stage and row["mode"] == mode and row["provider"] != baseline]
        if chosen:
            panels[title] = chosen
    labels = {title: list(dict.fromkeys(_label(row) for row in chosen)) for title, chosen in panels.items()}
    most = max(len(names) for names in labels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(max(8 * len(panels), 13), 1.8 + 0.24 * most), squeeze=False, layout="constrained"
    )
    for axis, (title, chosen) in zip(axes[0], panels.items(), strict=True):
        places = {name: place for place, name in enumerate(labels[title])}
        for provider in dict.fromkeys(row["provider"] for row in chosen):
            marker, colour = STYLES.get(provider, ("x", "black"))
            mine = [row for row in chosen if row["provider"] == provider]
            ratios = [float(row["ratio_min"]) for row in mine]
            size = 90 if marker == "*" else 28
            heights = [places[_label(row)] for row in mine]
            axis.scatter(ratios, heights, size, colour, marker=marker, label=provider, zorder=3)
        axis.axvline(1.0, color="black", linewidth=1)
        if has_goals:  # a few points apart, so the scale is linear
            goals = [float(row["goal"]) for row in chosen]
            heights = [places[_label(row)] for row in chosen]
            axis.scatter(goals, heights, 150, "black", marker="|", label="goal: at most", zorder=4)
            axis.margins(x=0.06)
        else:
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            every = [float(row["ratio_min"]) for row in chosen]
            wide = max(every) > 20 * min(every)  # where a product is far slower than all that is on top of it
            axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10] if wide else [0.5, 1, 1.2, 1.5, 2, 3, 5, 10])
            axis.set_xlim(min(0.95, 0.97 * min(every)), max(2.2, 1.08 * max(every)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))  # a scale brings its own
        axis.set_yticks(range(len(places)), list(places), fontsize=8)
        axis.set_ylim(len(places) - 0.4, -0.6)
        axis.grid(color="#dddddd", linewidth=0.6)
        axis.set_title(title)
        axis.set_xlabel(f"time over {baseline} (minimum); left is better")
    machine = info["device"] if info["device"] != "cpu" else f"{info['cpu']}, {info['isa']}, threads: {info['threads']}"
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=len(names), frameon=False)
    figure.suptitle(
        f"{path.stem.split('-')[0]} on {machine}; torch {info['torch']}, pyfused {info['pyfused']} ({info['commit']})",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    return picture


def _label(row: dict[str, str]) -> str:
    return row["label"].removeprefix(row["stage"] + " ")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)).name)
