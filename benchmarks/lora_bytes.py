"""How many bytes LoRA moves through device memory on top of the frozen layer, by the passes that a provider makes.

A model, not a measurement: each pass over a large tensor reads or writes it once, nothing is found in a cache, and of
sums that are kept in parts only the result counts. Time over these bytes says how near a provider is to the memory's
bandwidth; where it comes out above that, something was hidden (under the base product, or in the L2 cache).
"""

from __future__ import annotations

SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}

# Passes over x [M, K] and y or dY [M, N] in a training step: (reads and writes of K-wide, of N-wide) by mode.
_FUSED = {
    # shrink reads x; y is read and written on top of what the base product writes. In the backward dY is read once for
    # two sums, x once for grad_a; dX is read and written.
    "after": {"forward": (1, 2), "backward": (3, 1)},
    # The delta is written first and read by the base product: as many bytes, but the read hides under a product that is
    # bound by arithmetic.
    "before": {"forward": (1, 2), "backward": (3, 1)},
    # In one product y and dX are written once, by the base product.
    "concat": {"forward": (1, 0), "backward": (1, 1)},
}


def base_work(m: int, k: int, outputs: tuple[int, ...], dtype: str, mode: str) -> tuple[float, float]:
    """(floating-point operations, fewest bytes) of the frozen layers; backward is dX alone."""
    size, n = SIZES[dtype], sum(outputs)
    products = 2 if mode == "full" else 1
    return products * 2.0 * m * k * n, products * float(size * (m * k + k * n + m * n))


def extra_bytes(
    provider: str,
    mode: str,
    m: int,
    k: int,
    outputs: tuple[int, ...],
    r: int,
    dtype: str,
    adapter_dtype: str,
    dropout: float,
) -> int | None:
    """Bytes that the adapter adds; None for a provider without a model (what a compiler or a library does).

    Args:
        provider: as in the benchmark.
        mode: "forward", "backward" or "full".
        outputs: N of each layer that shares x.
    """
    if mode == "full":
        parts = [
            extra_bytes(provider, part, m, k, outputs, r, dtype, adapter_dtype, dropout)
            for part in ("forward", "backward")
        ]
        return None if None in parts else sum(parts)
    x, a = SIZES[dtype], SIZES[adapter_dtype]
    count, n = len(outputs), sum(outputs)
    # a and b are read in both directions, grad_a and grad_b written; s is written, and read twice with u.
    small = a * r * (count * k + n) * (1 if mode == "forward" else 2) + 4 * m * r * count * 2
    if provider == "pyfused-shared":
        # One pass over x, one over dX; each product but one reads dX instead of autograd's sum of two in a third.
        wide = 1 if mode == "forward" else 3 - 2 * (count - 1)
        out = _FUSED["after"][mode][1]
        return x * (m * k * wide + m * n * out) + small
    if provider.startswith("pyfused"):
        wide, out = _FUSED.get(provider.removeprefix("pyfused-"), _FUSED["after"])[mode]
        return x * (m * k * wide * count + m * n * out) + small
    if provider == "unsloth":
        wide, out = {"forward": (1, 2), "backward": (4, 2)}[mode]  # x read again for s, dX read and written
        return x * (m * k * wide * count + m * n * out) + small
    if provider == "eager":
        return m * (count * k * _eager_wide(mode, x, a, dropout) + n * _eager_out(mode, x, a)) + small
    return None


def _eager_wide(mode: str, x: int, a: int, dropout: float) -> int:
    """Bytes per element of x: casts to the adapter's dtype and back, dropout with a stored mask, the product itself."""
    cast = x + a if x != a else 0
    mask = 2 * a + 1 if dropout else 0
    if mode == "forward":
        return cast + mask + a
    return a + a + mask + cast + 3 * x  # grad_a, the gradient of drop(x), its two steps back, and the sum in dX


def _eager_out(mode: str, x: int, a: int) -> int:
    """Bytes per element of y: the delta, its cast, the sum; backward reads dY twice, cast once where dtypes differ."""
    cast = x + a if x != a else 0
    return a + cast + 3 * x if mode == "forward" else cast + 2 * a
