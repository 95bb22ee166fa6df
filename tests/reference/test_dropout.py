"""The dropout mask: its generator against published vectors and another implementation, and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import seed_tensor

from pyfused.reference.dropout import drop_threshold, keep_mask, keep_scale, philox

_M32 = 0xFFFFFFFF


def philox4x32(counter: list[int], key: list[int], rounds: int) -> list[int]:
    """The generator in Python's own integers, written from the paper (SC 2011, section 3.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(rounds):
        if step:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right // 2**32) ^ c1 ^ k0, right % 2**32, (left // 2**32) ^ c3 ^ k1, left % 2**32
    return [c0, c1, c2, c3]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


# Known answers of Random123 (its kat_vectors file) for philox4x32 with 7 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "5f6fb709 0d893f64 4f121f81 4f730a48"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "4dfccaba 190a87f0 c47362ba b6b5242a"),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_known_answers(counter, key, expected):
    got = philox(tuple(map(torch.tensor, words(counter))), tuple(map(torch.tensor, words(key))))
    assert [int(word) for word in got] == words(expected)
    assert philox4x32(words(counter), words(key), 7) == words(expected)


def test_random_counters_against_python_integers():
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2**32, (200, 6), generator=generator, dtype=torch.int64)
    got = torch.stack(philox(tuple(values[:, :4].unbind(1)), tuple(values[:, 4:].unbind(1))), 1)
    assert got.tolist() == [philox4x32(row[:4], row[4:], 7) for row in values.tolist()]


def keeps(seed: int, row: int, col: int, p: float) -> bool:
    """The documented layout for one element, with Python's integers."""
    seed %= 2**64
    counter = [16 * (col // 128) + col % 32 // 2, row % 2**32, row // 2**32, 0]
    word = philox4x32(counter, [seed % 2**32, seed // 2**32], 7)[col % 128 // 32]
    return word // 65536 ** (col % 2) % 65536 >= drop_threshold(p)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**32, 0x1234_5678_9ABC_DEF0])
def test_mask_is_the_documented_function(seed):
    rows, cols, p = 5, 261, 0.5
    expected = [[keeps(seed, row, col, p) for col in range(cols)] for row in range(rows)]
    assert keep_mask(seed_tensor(seed), rows, cols, p).tolist() == expected


def test_mask_of_a_part_is_a_part_of_the_mask():
    whole = keep_mask(seed_tensor(5), 40, 700, 0.3)
    assert torch.equal(keep_mask(seed_tensor(5), 17, 131, 0.3), whole[:17, :131])


def test_mask_is_nested_in_p():
    """A smaller p drops a part of what a larger one drops."""
    small, large = (keep_mask(seed_tensor(5), 64, 256, p) for p in (0.1, 0.4))
    assert torch.all(small | ~large)


@pytest.mark.parametrize(
    "p, threshold",
    [(0.0, 0), (1e-9, 1), (1 / 65536, 1), (0.1, 6554), (0.5, 32768), (0.99999, 65535), (1 - 2**-53, 65535)],
)
def test_threshold(p, threshold):
    assert drop_threshold(p) == threshold
    assert keep_scale(p) == 65536 / (65536 - threshold)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_rate(p):
    """Dropped elements overall, in every row, in every column and in every 16-bit lane, to 5 standard deviations."""
    rows, cols = 1024, 512
    dropped = (~keep_mask(seed_tensor(11), rows, cols, p)).double()
    expected = drop_threshold(p) / 65536

    def within(means: torch.Tensor, count: int) -> None:
        deviation = math.sqrt(expected * (1 - expected) / count)
        assert (means - expected).abs().max() < 5 * deviation

    within(dropped.mean(), rows * cols)
    within(dropped.mean(1), cols)
    within(dropped.mean(0), rows)
    within(dropped.view(rows, cols // 128, 128).mean((0, 1)), rows * (cols // 128))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence(p):
    """No correlation between neighbours in a row or a column at any distance that the layout of the bits suggests."""
    size = 1024
    mask = keep_mask(seed_tensor(12), size, size, p).double()
    noise = mask - mask.mean()
    variance = noise.square().mean()

    def correlation(left: torch.Tensor, right: torch.Tensor) -> float:
        return abs(((left * right).mean() / variance).item()) * math.sqrt(left.numel())

    for distance in (1, 2, 3, 16, 31, 32, 64, 96, 127, 128, 256):
        assert correlation(noise[:, distance:], noise[:, :-distance]) < 4.5, f"columns {distance} apart"
        assert correlation(noise[distance:], noise[:-distance]) < 4.5, f"rows {distance} apart"
        assert correlation(noise[distance:, distance:], noise[:-distance, :-distance]) < 4.5, f"diagonal {distance}"


@pytest.mark.parametrize("other", [13 ^ (1 << bit) for bit in (0, 1, 2, 31, 32, 33, 62)] + [-13], ids="{:x}".format)
def test_seeds_are_independent(other):
    """Seeds that differ in any one bit, of the lower or the upper half, give masks without correlation."""
    first, second = (keep_mask(seed_tensor(seed), 512, 512, 0.5).double() - 0.5 for seed in (13, other))
    assert abs((first * second).mean().item() / 0.25) * 512 < 4.5


def test_mean_is_unbiased():
    x = torch.ones(2048, 1024, dtype=torch.float64)
    p = 0.1
    dropped = torch.where(keep_mask(seed_tensor(14), *x.shape, p), x * keep_scale(p), 0.0)
    assert abs(dropped.mean().item() - 1.0) < 5 * math.sqrt(p / (1 - p) / x.numel())
