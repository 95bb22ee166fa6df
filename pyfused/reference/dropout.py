"""The dropout mask as a pure function of (seed, row, column).

Philox-4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives
128 bits for one counter value; each element takes 16 of them. The layout is chosen for the kernels: one CPU vector
of 16 counters, or one CUDA thread with a tensor-core fragment, finds the bits of its elements without a shuffle.

For element (row, col), with ``block = col // 128``, ``word = col % 128 // 32``, ``pair = col % 32 // 2`` and
``half = col % 2``::

    out   = philox4x32_7(counter=(16 * block + pair, row & 0xffffffff, row >> 32, 0),
                         key=(seed & 0xffffffff, seed >> 32))
    value = (out[word] >> (16 * half)) & 0xffff
    keep  = value >= threshold(p)

``csrc/common/philox.h`` is the same function for the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def drop_threshold(p: float) -> int:
    """Number of the 65536 16-bit values that drop an element: ``p`` rounded to 1/65536, at least 1 where ``p > 0``.

    ``p`` is in [0, 1); the result is in [0, 65535], so an element can always be kept.
    """
    if p <= 0.0:
        return 0
    return min(max(int(p * 65536.0 + 0.5), 1), 65535)


def keep_scale(p: float) -> float:
    """Factor for kept elements, ``1 / (1 - p)`` for the ``p`` that is really used, so that the mean is unbiased."""
    return 65536.0 / (65536.0 - drop_threshold(p))


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the unsigned product of two 32-bit numbers held in int64."""
    product = b * a  # wraps like an unsigned product: the 64 bits are right, only the sign is not
    return (product >> 32) & _MASK32, product & _MASK32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-7 on int64 tensors that hold unsigned 32-bit values; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


def keep_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """True where dropout keeps an element.

    Args:
        seed: int64 tensor with one element; all of its 64 bits count.
        rows, cols: size of the matrix; row 0 and column 0 are its first.
        p: probability of dropping an element, in [0, 1).

    Returns:
        bool ``[rows, cols]`` on ``seed``'s device.
    """
    device = seed.device
    blocks = (cols + 127) // 128
    row = torch.arange(rows, device=device, dtype=torch.int64).unsqueeze(1)
    column_counter = torch.arange(16 * blocks, device=device, dtype=torch.int64).unsqueeze(0)
    seed = seed.reshape(1, 1)
    counter = (column_counter, row & _MASK32, row >> 32, torch.zeros_like(column_counter))
    words = torch.stack(philox(counter, (seed & _MASK32, (seed >> 32) & _MASK32)))  # [word, row, block and pair]
    words = words.view(4, rows, blocks, 16).permute(1, 2, 0, 3)
    values = torch.stack((words & 0xFFFF, words >> 16), -1)  # [row, block, word, pair, half]
    return (values.reshape(rows, 128 * blocks) >= drop_threshold(p))[:, :cols]


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x ``[..., K]``, an accumulator's dtype, with what the mask drops set to zero and the rest scaled."""
    keep = keep_mask(seed, x.numel() // max(x.shape[-1], 1), x.shape[-1], p).view(x.shape)
    return torch.where(keep, x * keep_scale(p), 0.0)


def dropout(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """:func:`drop` of any floating dtype, in fp32 (fp64 for fp64), rounded once."""
    return drop(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), p, seed).to(x.dtype)
