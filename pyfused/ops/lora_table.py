"""The adapters that one linear layer may apply to the rows of a batch: :class:`LoraTable`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .common import FLOAT_DTYPES, check_dropout

# A descriptor's dtypes, as csrc/common/dtype.h numbers them.
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(FLOAT_DTYPES)}


class LoraAdapter(NamedTuple):
    """One adapter of a :class:`LoraTable`."""

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scale: float = 1.0
    dropout_p: float = 0.0


class LoraTable:
    """The adapters that a linear layer may apply, each with its own rank, scale and dtype.

    The matrices are neither copied nor padded: what is written into them later counts. A table keeps the memory that
    they had when it was made; one whose parameters have moved since (``model.to``), or were given another shape, has to
    be made again.

    Args:
        adapters: for each adapter ``(a, b, scale, dropout_p)``, a :class:`LoraAdapter` or a plain tuple of its first
            two to four fields; a ``[R, K]`` and b ``[N, R]`` in fp32, bf16, fp16 or fp64 with rows of unit stride,
            R >= 1; K and N are the same for all. None: rows of this adapter stay as they are.

    Attributes:
        adapters: tuple of :class:`LoraAdapter` and None.
        in_features, out_features: K and N; 0 where all entries are None.

    Raises:
        TypeError, ValueError: an entry is no adapter, or does not fit the others; the message has its place.
    """

    def __init__(self, adapters: Sequence[LoraAdapter | tuple | None]) -> None:
        if isinstance(adapters, Tensor) or not isinstance(adapters, Sequence):
            raise TypeError(f"LoraTable: adapters must be a sequence of tuples, got {type(adapters).__name__}")
        self.adapters = tuple(_adapter(place, entry) for place, entry in enumerate(adapters))
        there = [(place, entry) for place, entry in enumerate(self.adapters) if entry is not None]
        self.in_features = self.out_features = 0
        self.device: torch.device | None = None
        if there:
            first = there[0][1]
            self.in_features, self.out_features = first.a.shape[1], first.b.shape[0]
            self.device = first.a.device
        for place, entry in there:
            self._check_like_first(f"LoraTable: adapters[{place}]", entry)
        # Detached aliases keep the memory behind the addresses.
        self._kept = [(entry.a.detach(), entry.b.detach()) for _, entry in there]
        self._first_places = self._places()
        self._descriptor: Tensor | None = None

    def __len__(self) -> int:
        return len(self.adapters)

    def is_current(self) -> bool:
        """Whether all matrices still are where they were when the table was made, and as large."""
        return self._places() == self._first_places

    def _places(self) -> list[tuple[int, int, int, int]]:
        # Asked in each call of a layer: to read shapes, strides and dtypes as well would take three times as long.
        there = (entry for entry in self.adapters if entry is not None)
        # Not nbytes: Dynamo asks for it where sizes are unknown, and torch has none.
        return [(a.data_ptr(), a.numel(), b.data_ptr(), b.numel()) for a, b, *_ in there]

    @property
    def descriptor(self) -> Tensor:
        """int64 ``[len(self), 10]``: addresses, rank, K, N, strides, dtypes, and the bits of the scale in fp64."""
        if self._descriptor is None:
            kept, rows = iter(self._kept), []
            for entry in self.adapters:
                if entry is None:
                    rows.append([0] * 10)
                    continue
                a, b = next(kept)
                sizes = (a.shape[0], a.shape[1], b.shape[0], a.stride(0), b.stride(0))
                rows.append(descriptor_row(a.data_ptr(), b.data_ptr(), sizes, a.dtype, b.dtype, entry.scale))
            self._descriptor = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 10)
        return self._descriptor

    def descriptor_for(self, x: Tensor) -> Tensor:
        """:attr:`descriptor`, whose addresses are followed on x's device."""
        if self.device is not None and self.device != x.device:
            raise TypeError(f"LoraTable: its matrices are on {self.device}, x is on {x.device}")
        return self.descriptor

    def _check_like_first(self, place: str, entry: LoraAdapter) -> None:
        for name, matrix, size, dim in (("a", entry.a, self.in_features, 1), ("b", entry.b, self.out_features, 0)):
            if matrix.shape[dim] != size:
                raise ValueError(f"{place}: {name} must have {size} in dimension {dim}, got {list(matrix.shape)}")
            if matrix.device != self.device:
                raise TypeError(f"{place}: {name} must be on {self.device} like the others, got {matrix.device}")


def descriptor_row(
    a: int, b: int, sizes: tuple[int, ...], dtype_a: torch.dtype, dtype_b: torch.dtype, scale: float
) -> list[int]:
    """An adapter in a table's descriptor. a, b: addresses; sizes: rank, K, N and the strides of a's and b's rows."""
    (bits,) = struct.unpack("q", struct.pack("d", scale))
    return [a, b, *sizes, _DTYPE_NUMBERS[dtype_a], _DTYPE_NUMBERS[dtype_b], bits]


def _adapter(place: int, entry) -> LoraAdapter | None:
    op = f"LoraTable: adapters[{place}]"
    if entry is None:
        return None
    if not isinstance(entry, tuple) or not 2 <= len(entry) <= 4:
        got = f"{len(entry)} entries" if isinstance(entry, tuple) else type(entry).__name__
        raise TypeError(f"{op} must be None or a tuple (a, b, scale, dropout_p), got {got}")
    adapter = LoraAdapter(*entry)
    a, b = adapter.a, adapter.b
    if not isinstance(a, Tensor):
        raise TypeError(f"{op}: a must be a tensor, got {type(a).__name__}")
    for name, matrix in (("a", a), ("b", b)):
        if not isinstance(matrix, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(matrix).__name__}")
        if matrix.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {matrix.dtype}")
    if a.dim() != 2 or a.shape[0] == 0:
        raise ValueError(f"{op}: a must have shape [R, K] with R >= 1, got {list(a.shape)}")
    if b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise ValueError(f"{op}: b must have shape [N, {a.shape[0]}] (a is {list(a.shape)}), got {list(b.shape)}")
    for name, matrix in (("a", a), ("b", b)):
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{op}: {name} must have rows of unit stride, got strides {list(matrix.stride())}")
        if not torch.compiler.is_compiling() and matrix.is_neg():
            raise ValueError(f"{op}: {name} must have its numbers in memory, got a negative view (resolve_neg)")
    if not isinstance(adapter.scale, (int, float)):
        raise TypeError(f"{op}: scale must be a float, got {type(adapter.scale).__name__}")
    check_dropout(op, adapter.dropout_p)
    return adapter
