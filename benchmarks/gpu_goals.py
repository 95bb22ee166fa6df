"""What cells are to reach on an H200, and whether they do: by the median, over another provider or the bytes' floor.

The floor is the fewest bytes that a cell has to move through device memory (each input read once, each result written
once) at the rate at which a large copy moves them on the GPU of the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from harness import Case, Result

FLOOR = "floor"


@dataclass(frozen=True)
class Goal:
    """At most ``ratio`` times what it is held against, or at most ``extra_us`` microseconds more; one of the two.

    Attributes:
        over: the provider that it is held against, or FLOOR.
        floor_bytes: with FLOOR, the fewest bytes.
        above_us: with FLOOR, the goal stands where the floor is above this.
        stated_us: with FLOOR, what whoever set the goal took the floor to be; printed beside the floor.
        extra_only: what is judged is the time on top of the base's: an op that follows a layer, without the layer.
    """

    case: Case
    provider: str
    mode: str
    ratio: float | None = None
    extra_us: float | None = None
    over: str = "base"
    floor_bytes: int | None = None
    above_us: float = 0.0
    stated_us: float | None = None
    extra_only: bool = False

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.extra_us is None):
            raise ValueError(f"goal for {self.case.label}: give one of ratio and extra_us")
        if (self.over == FLOOR) != (self.floor_bytes is not None):
            raise ValueError(f"goal for {self.case.label}: floor_bytes goes with over=FLOOR")

    def __str__(self) -> str:
        over = "" if self.over == "base" and self.ratio is not None else f" of {self.over}"
        if self.ratio is None:
            return f"{self.over} + {self.extra_us:g} us"
        return f"{self.ratio:.2f}{over}"


@dataclass(frozen=True)
class Verdict:
    """``outcome`` is "met", "missed", "not measured", or "does not stand" where the floor is too low for the goal."""

    goal: Goal
    outcome: str
    text: str

    def __str__(self) -> str:
        goal = self.goal
        return f"goal {self.outcome}: {goal.case.label} {goal.mode}, {goal.provider}: {self.text}; at most {goal}"


def floor_us(bytes_moved: int, copy_tb_s: float) -> float:
    return bytes_moved / copy_tb_s / 1e6


def judge(goal: Goal, medians: Mapping[str, float], copy_tb_s: float) -> Verdict:
    """Whether a goal is met.

    Args:
        medians: microseconds by provider of the goal's case and mode.
        copy_tb_s: bytes read and written by a large copy, in 10^12 bytes a second.
    """
    needed = [goal.provider]
    needed += [goal.over] if goal.over != FLOOR else []
    needed += ["base"] if goal.extra_only else []
    missing = [name for name in needed if name not in medians]
    if missing:
        return Verdict(goal, "not measured", f"without {', '.join(missing)}")
    took, what = medians[goal.provider], ""
    if goal.extra_only:
        took, what = took - medians["base"], f" on top of the base's {medians['base']:,.1f} us"
    if goal.over == FLOOR:
        against = floor_us(goal.floor_bytes, copy_tb_s)
        stated = "" if goal.stated_us is None else f", {goal.stated_us:g} us by the goal"
        name = f"the floor of {against:,.1f} us ({goal.floor_bytes / 1e6:,.1f} MB at {copy_tb_s:.2f} TB/s{stated})"
        if against <= goal.above_us:
            return Verdict(goal, "does not stand", f"{took:,.1f} us{what}, {name} is not above {goal.above_us:g} us")
    else:
        against = medians[goal.over]
        name = f"{against:,.1f} us" if goal.over == "base" else f"{goal.over}'s {against:,.1f} us"
    most = against * goal.ratio if goal.extra_us is None else against + goal.extra_us
    outcome = "met" if took <= most else "missed"
    return Verdict(goal, outcome, f"{took:,.1f} us{what} over {name}, {took / against:.3f}")


def verdicts(
    goals: Iterable[Goal], results: Iterable[Result], copy_tb_s: float, asked: Collection[str] | None = None
) -> list[Verdict]:
    """Those of the goals whose cell was measured; ``asked`` are the providers that were asked for, None: all."""
    medians: dict[tuple[Case, str], dict[str, float]] = {}
    for result in results:
        medians.setdefault((result.case, result.mode), {})[result.provider] = result.stats.p50_us
    return [
        judge(goal, medians[goal.case, goal.mode], copy_tb_s)
        for goal in goals
        if (goal.case, goal.mode) in medians and (asked is None or goal.provider in asked)
    ]


def all_met(found: Iterable[Verdict]) -> bool:
    """A goal that was not measured is not met."""
    return all(verdict.outcome in ("met", "does not stand") for verdict in found)
