"""Training several models side by side, one step each in turn on the same batch, and timing every step.

Side by side means that a slow moment of the machine falls on all of them, and that the ratio between two of them is
taken under the same conditions. Each model has its own optimizer and its own random numbers: what it learns is what it
would learn alone.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .classifier import Batch, Texts, epoch
from .ways import FROZEN, Way, head_and_adapters


@dataclass(frozen=True)
class Settings:
    """Hyper-parameters, chosen by cross validation over the training files; the test side had no part in it."""

    epochs: int = 3
    batch_size: int = 16
    head_learning_rate: float = 4e-3
    probe_learning_rate: float = 2e-3  # of a head that starts from the linear probe
    weight_decay: float = 0.1
    label_smoothing: float = 0.1
    dropped_tokens: float = 0.3  # share
    warmup: float = 0.1  # share of the steps


class Contender:
    """A model in training.

    Attributes:
        way: how it is adapted, and how fast and how often it is trained.
        losses: of each of its steps.
        seconds: of forward and backward, by the number of the step in the whole training.
        step_seconds: the same with the optimizer's step.
        shapes: ``(B, T)`` of each step's batch.
    """

    def __init__(self, model: nn.Module, settings: Settings, way: Way) -> None:
        self.model = model
        self.way = way
        self._label_smoothing = settings.label_smoothing
        self.losses: list[float] = []
        self.seconds: dict[int, float] = {}
        self.step_seconds: dict[int, float] = {}
        self.shapes: dict[int, tuple[int, int]] = {}
        head, adapters = head_and_adapters(model)
        groups = [
            {"params": head, "peak": settings.probe_learning_rate if way.is_short else settings.head_learning_rate},
            {"params": adapters, "peak": way.learning_rate},
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self._random_state = torch.get_rng_state()

    def step(self, number: int, batch: Batch, warmth: float | None) -> None:
        """Step ``number`` of a training, with ``warmth`` times the learning rates; None: the gradients are dropped."""
        torch.set_rng_state(self._random_state)
        start = time.perf_counter()
        loss = loss_of(self.model, batch, self._label_smoothing)
        loss.backward()
        middle = time.perf_counter()
        if warmth is not None:
            for group in self._optimizer.param_groups:
                group["lr"] = warmth * group["peak"]
            self._optimizer.step()
            if allocate := getattr(self.model, "update_and_allocate", None):
                allocate(len(self.losses))  # AdaLoRA distributes its ranks, by what gradients say of them
        self._optimizer.zero_grad()
        end = time.perf_counter()
        self._random_state = torch.get_rng_state()
        self.losses.append(loss.item())
        self.seconds[number] = middle - start
        self.step_seconds[number] = end - start
        self.shapes[number] = tuple(batch.ids.shape)


@dataclass(frozen=True)
class Overhead:
    """Time of forward and backward over that of the frozen model: by the minimum and by the median of each shape."""

    minimum: float
    median: float


def loss_of(model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(model(batch.ids, batch.mask), batch.labels, label_smoothing=label_smoothing)


def train(
    contenders: Mapping[str, Contender],
    texts: Texts,
    settings: Settings,
    seed: int,
    max_steps: int | None,
    on_step: Callable[[int, int], None],
    max_seconds: float = math.inf,
) -> int:
    """Trains all contenders; the one named ``FROZEN`` only computes its gradients, to be timed.

    Each takes part in its share of the steps, on the same schedule of the learning rate. Where the time would not do
    for all steps, the rate falls with the time that is left in place of the steps, and is as low at the end.

    Args:
        contenders: by name; changed in place.
        texts: what to train on.
        seed: of the order of the texts.
        max_steps: end after so many steps; None: after all epochs.
        on_step: called after each step with the number of steps done and of all steps.
        max_seconds: end after this time, but with at least one step of each contender.

    Returns:
        The number of steps.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = (epoch(texts, settings.batch_size, settings.dropped_tokens, generator) for _ in range(settings.epochs))
    batches = list(islice(chain.from_iterable(epochs), max_steps))
    turns = random.Random(seed)
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        done = min(max(step / len(batches), (time.perf_counter() - start) / max_seconds), 1.0)
        if done >= 1.0 and all(contender.losses for contender in contenders.values()):
            return step
        warming = (step + 1) / (settings.warmup * len(batches))
        warmth = min(warming, (1.0 - done) / (1.0 - settings.warmup), 1.0)
        taking_part = [name for name, contender in contenders.items() if contender.way.takes_part(step)]
        turns.shuffle(taking_part)  # none has always the same predecessor's caches
        for name in taking_part:
            contenders[name].step(step, batch, None if name == FROZEN else warmth)
        on_step(step + 1, len(batches))
    return len(batches)


def overhead(contender: Contender, frozen: Contender) -> Overhead:
    """How long a contender's forward and backward take beside the frozen model's, in the steps that both took part in:
    the minimum of more steps would be a smaller one.

    Each shape counts as often as it occurs in them.
    """
    steps: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step in common_steps(contender, frozen):
        steps[frozen.shapes[step]].append(step)

    def ratio(typical: Callable[[list[float]], float]) -> float:
        def total(of: Contender) -> float:
            return sum(len(chosen) * typical([of.seconds[step] for step in chosen]) for chosen in steps.values())

        return total(contender) / total(frozen)

    return Overhead(minimum=ratio(min), median=ratio(statistics.median))


def common_steps(contender: Contender, other: Contender) -> list[int]:
    return sorted(contender.seconds.keys() & other.seconds.keys())
