"""Whether one classifier is better than another on the same texts: the difference of accuracies and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Gain:
    """``difference`` of two accuracies, a share, with its ``standard_error`` and its 95 % interval as ``(low, high)``:
    ``interval`` with texts as what is drawn, ``file_interval`` with whole files, whose texts are alike."""

    difference: float
    standard_error: float
    interval: tuple[float, float]
    file_interval: tuple[float, float]


def gain(logits: Tensor, other: Tensor, labels: Tensor, files: Sequence[str]) -> Gain:
    """What ``logits`` gain over ``other``, both ``[texts, classes]``, by a paired bootstrap.

    Each draw, with replacement, is the same for both classifiers.

    Args:
        logits: ``[texts, classes]``.
        other: ``[texts, classes]``.
        labels: ``[texts]``, int64.
        files: the file of each text.
    """
    differences = (logits.argmax(1) == labels).double() - (other.argmax(1) == labels).double()
    by_text = _resample(differences, torch.arange(len(labels)))
    place = {file: i for i, file in enumerate(dict.fromkeys(files))}
    by_file = _resample(differences, torch.tensor([place[file] for file in files]))
    return Gain(differences.mean().item(), by_text.std().item(), _interval(by_text), _interval(by_file))


def _resample(values: Tensor, groups: Tensor) -> Tensor:
    """Means of ``values`` ``[texts]`` in ``[_RESAMPLES]`` draws of as many groups as there are."""
    sums, counts = groups.bincount(values), groups.bincount()
    draws = torch.randint(len(sums), (_RESAMPLES, len(sums)), generator=torch.Generator().manual_seed(0))
    return sums[draws].sum(1) / counts[draws].sum(1)


def _interval(means: Tensor) -> tuple[float, float]:
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high
