"""One way to time every op of pyfused against what it replaces.

A benchmark describes its cases and, for each, builds one :class:`Workload` per provider on the same tensors. The
harness times them interleaved, so that a slow moment of the machine falls on all of them, and gives the minimum and
percentiles per call, and the ratio to the first provider, the frozen base. It knows nothing of what is computed.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

# A sample shorter than this is timer noise to a good part; calls are repeated within it to be at least as long.
SAMPLE_US = 200.0
MIN_ROUNDS = 7
# How many times the rounds of a case may be run anew and added, see `again` of measure().
REPEATS = 3


@dataclass(frozen=True)
class Workload:
    """What one provider computes in one case.

    Attributes:
        call: one forward; returns a tensor, or a tuple of them where several layers share an input.
        inputs: the tensors that the backward differentiates; empty for an inference case.
        grad_output: gradient of ``call``'s result, its shape and dtype (a tuple as well); None for an inference case.
        weights: the tensors that exist anyway (parameters), left out of :func:`saved_bytes`.
        repeats: how many forwards one ``call`` stands for, as in a CUDA graph of several layers; times are per forward.
    """

    call: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...] = ()
    grad_output: Tensor | tuple[Tensor, ...] | None = None
    weights: tuple[Tensor, ...] = ()
    repeats: int = 1

    def train_step(self) -> tuple[Tensor, ...]:
        """Forward and backward; the results of ``call`` and the gradients of ``inputs``."""
        y = self.call()
        grads = torch.autograd.grad(y, self.inputs, self.grad_output)
        return (*y, *grads) if isinstance(y, tuple) else (y, *grads)

    def outputs(self) -> list[Tensor]:
        """What there is to verify: those of :meth:`train_step`, without gradients the results of ``call``."""
        if self.inputs:
            return list(self.train_step())
        with torch.no_grad():
            y = self.call()
        return list(y) if isinstance(y, tuple) else [y]


class Case(Protocol):
    """What a benchmark measures: a frozen dataclass, whose fields become columns.

    Attributes:
        stage: "train" or "infer".
        label: one line that tells the case apart, beginning with the stage.
    """

    stage: str

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Stats:
    """Microseconds per call over the samples of one provider.

    ``spread`` is how far apart the minima of the first and of the second half of the samples are, over the smaller:
    what the same code differs from itself, so that a difference below it says nothing.
    """

    min_us: float
    p20_us: float
    p50_us: float
    p80_us: float
    spread: float


@dataclass(frozen=True)
class Result:
    """One row: a case, a mode of it ("forward", "backward" or "full") and a provider; ``extra`` are further columns."""

    case: Case
    mode: str
    provider: str
    stats: Stats
    ratio_min: float
    ratio_p50: float
    samples: int
    calls_per_sample: int
    saved_bytes: int | None
    extra: Mapping[str, object] = field(default_factory=dict, hash=False)


class Clock(Protocol):
    """Takes the time of a sample: ``prepare``, then ``mark`` before and after the calls, then ``wait``."""

    def mark(self) -> object: ...

    def prepare(self) -> None: ...

    def wait(self) -> None: ...

    def microseconds(self, start, stop) -> float: ...


class _HostClock:
    def mark(self) -> int:
        return time.perf_counter_ns()

    def prepare(self) -> None:
        """Nothing is flushed on CPU: weights that stay in the cache from call to call do so in a model's loop too."""

    def wait(self) -> None:
        """Nothing is asynchronous on CPU."""

    def microseconds(self, start: int, stop: int) -> float:
        return (stop - start) / 1e3


def summarize(samples: Sequence[float]) -> Stats:
    """Minimum and 20th, 50th and 80th percentile (linear interpolation) of at least two samples, in their order."""
    if len(samples) < 2:
        raise ValueError(f"samples: expected at least two, got {len(samples)}")
    p20, p50, p80 = np.percentile(np.asarray(samples, dtype=np.float64), (20, 50, 80))
    low, high = sorted((min(samples[: len(samples) // 2]), min(samples[len(samples) // 2 :])))
    return Stats(float(low), float(p20), float(p50), float(p80), float(high / low - 1.0))


def measure(
    case: Case,
    workloads: Mapping[str, Workload],
    budget_s: float = 3.0,
    clock: Clock | None = None,
    seed: int = 0,
    sample_us: float = SAMPLE_US,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int | None = None,
    again: Callable[[list[Result]], bool] = lambda results: False,
) -> list[Result]:
    """Time the workloads of one case, interleaved in an order that is drawn anew in each round.

    An inference workload (no ``inputs``) gives mode "forward", under ``torch.no_grad``. A training workload gives
    "forward" (the graph is built), "backward" and "full" from the same steps: the backward always follows its forward,
    as in training, and no graph is kept for a second backward.

    Args:
        case: goes into the results as it is.
        workloads: by provider name; the first is the one that ratios refer to.
        budget_s: about how long the samples may take together.
        clock: the host's where None; ``cuda_timing.CudaClock`` on a GPU.
        seed: of the order within the rounds.
        sample_us: how long a sample should be at least, by repeating the call; 0 for one call a sample.
        min_rounds: so many rounds are run, however long they take.
        max_rounds: no more rounds than these, however small the case is.
        again: told the results so far; True for as many rounds again, up to :data:`REPEATS` times. All samples count.

    Returns:
        A result for each mode and provider.
    """
    clock = clock or _HostClock()
    samplers = {name: _sampler(work, clock) for name, work in workloads.items()}
    estimates = {name: _estimate_us(sample) for name, sample in samplers.items()}
    saved = {name: saved_bytes(work) if work.inputs else None for name, work in workloads.items()}
    # The same number of calls for all: a minimum over longer means would be a milder one.
    calls = max(1, math.ceil(sample_us / min(estimates.values())))
    rounds = max(min_rounds, int(budget_s * 1e6 / (calls * sum(estimates.values()))))
    rounds = rounds if max_rounds is None else min(rounds, max_rounds)
    times: dict[str, dict[str, list[float]]] = {name: {} for name in workloads}
    order, shuffle = list(workloads), random.Random(seed).shuffle
    gc.collect()
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(1 + REPEATS):
            for _ in range(rounds):
                shuffle(order)
                for name in order:
                    for mode, microseconds in samplers[name](calls).items():
                        times[name].setdefault(mode, []).append(microseconds)
            results = _results(case, times, calls, saved)
            if not again(results):
                break
    finally:
        if gc_was_on:
            gc.enable()
    return results


def _results(case, times, calls, saved) -> list[Result]:
    baseline = next(iter(times))
    results = []
    for mode in times[baseline]:
        base = summarize(times[baseline][mode])
        for name, by_mode in times.items():
            stats = summarize(by_mode[mode])
            ratios = stats.min_us / base.min_us, stats.p50_us / base.p50_us
            results.append(Result(case, mode, name, stats, *ratios, len(by_mode[mode]), calls, saved[name]))
    return results


def _sampler(work: Workload, clock: Clock) -> Callable[[int], dict[str, float]]:
    """A function that runs the workload some times and gives the mean microseconds per call of each mode."""

    def infer(calls: int) -> dict[str, float]:
        with torch.no_grad():
            clock.prepare()
            start = clock.mark()
            for _ in range(calls):
                work.call()
            stop = clock.mark()
        clock.wait()
        return {"forward": clock.microseconds(start, stop) / (calls * work.repeats)}

    def train(calls: int) -> dict[str, float]:
        marks = []
        clock.prepare()
        for _ in range(calls):
            start = clock.mark()
            y = work.call()
            middle = clock.mark()
            grads = torch.autograd.grad(y, work.inputs, work.grad_output)
            del y, grads  # freeing them is part of the step
            marks.append((start, middle, clock.mark()))
        clock.wait()
        forward = sum(clock.microseconds(start, middle) for start, middle, _ in marks) / calls
        backward = sum(clock.microseconds(middle, stop) for _, middle, stop in marks) / calls
        return {"forward": forward, "backward": backward, "full": forward + backward}

    return train if work.inputs else infer


def _estimate_us(sample: Callable[[int], dict[str, float]]) -> float:
    """Microseconds of one call; also the warm-up: the first call may compile, and is not counted."""
    sample(1)
    end = time.perf_counter() + 0.02
    best = max(sample(1).values())
    while time.perf_counter() < end:
        best = min(best, max(sample(1).values()))
    return best


def saved_bytes(work: Workload) -> int:
    """Bytes that one forward keeps for the backward, without ``work.weights``; x counts where it is kept."""
    weights = {weight.untyped_storage().data_ptr() for weight in work.weights}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = work.call()  # held to the end: memory that is freed could come back under the same address
    total = sum(saved.values())
    del y
    return total


def relative_error(got: Tensor, expected: Tensor, size: Tensor | None = None) -> float:
    """``|got - expected| / |size|`` in Frobenius norms; ``size`` is ``expected`` where None."""
    difference = torch.linalg.vector_norm(got.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm((expected if size is None else size).detach().double()))


def check_outputs(
    label: str, provider: str, names: Iterable[str], got: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float
) -> None:
    """Hold what a provider computes against plain PyTorch.

    Raises:
        RuntimeError: it is something else.
    """
    for what, one, other in zip(names, got, expected, strict=False):
        error = relative_error(one, other)
        if not error <= tolerance:  # also where it is NaN
            raise RuntimeError(f"{label}: {provider} computes a wrong {what}: relative difference {error:.3g}")


def losses(
    results: Iterable[Result], candidate: str, rivals: Sequence[str], limit: Callable[[Case, str], float]
) -> list[tuple[Result, Result, float]]:
    """Where the candidate is too slow, by the minimum.

    Args:
        results: of any number of cases.
        candidate, rivals: provider names.
        limit: from a case and a mode, the ratio to each rival up to which the candidate has not lost; 1.0 means that it
            must be faster.

    Returns:
        (the candidate's result, the rival's, their ratio) for each rival that wins a cell.
    """
    table: dict[tuple[Case, str], dict[str, Result]] = {}
    for result in results:
        table.setdefault((result.case, result.mode), {})[result.provider] = result
    lost = []
    for (case, mode), by_provider in table.items():
        for rival in rivals:
            if candidate not in by_provider or rival not in by_provider:
                continue
            ratio = by_provider[candidate].stats.min_us / by_provider[rival].stats.min_us
            bound = limit(case, mode)
            if ratio > bound or (bound == 1.0 and ratio == 1.0):
                lost.append((by_provider[candidate], by_provider[rival], ratio))
    return lost
