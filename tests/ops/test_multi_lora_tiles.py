"""multi_lora in bf16: one row and many rows are summed by other instructions at level AMX, and must not show it."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_error_rule, cpu_kernels_only, readable_id

from pyfused.ops import LoraTable, lora_linear, multi_lora, multi_lora_
from pyfused.reference import multi_lora as reference

pytestmark = cpu_kernels_only

RANKS = (1, 5, 8, 12, 16, 24, 33, 64, 130, 256)
ROWS = (1, 2, 3, 4, 5, 16, 17, 64, 129)
BF16 = torch.bfloat16


def make(rows: int, n: int, k: int, r: int, std: float = 1.0):
    generator = torch.Generator().manual_seed(rows + r)
    y, x = torch.randn(rows, n, generator=generator), torch.randn(rows, k, generator=generator)
    a, b = torch.randn(r, k, generator=generator) * k**-0.5, torch.randn(n, r, generator=generator) * r**-0.5
    return y.to(BF16) * std, x.to(BF16), a.to(BF16), (b * std).to(BF16)


def add(y, x, a, b, scale: float = 0.7):
    return multi_lora_(y.clone(), x, LoraTable([(a, b, scale)]), torch.zeros(len(x), dtype=torch.int64))


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize(("n", "k"), [(96, 128), (67, 530), (16, 32), (5, 7), (300, 1100)], ids=str)
def test_a_row_has_the_bits_of_a_row_of_a_prompt(n, k, r):
    y, x, a, b = make(max(ROWS), n, k, r)
    whole = add(y, x, a, b)
    for rows in ROWS:
        for first in {0, max(ROWS) - rows}:
            some = slice(first, first + rows)
            assert torch.equal(bits(add(y[some], x[some], a, b)), bits(whole[some])), (rows, first)


@pytest.mark.parametrize("r", [1, 8, 12, 16, 24, 40])
@pytest.mark.parametrize("std", [2.0**-124, 2.0**-130, 2.0**124], ids=readable_id)
def test_the_same_at_the_ends_of_the_range(r, std):
    """Sums that are subnormal on the way, or zero with a sign, and ones that overflow."""
    y, x, a, b = make(64, 48, 64, r, std)
    y[::2, ::3] = -0.0
    b[::3] *= 2.0**-9
    whole = add(y, x, a, b)
    for rows in (1, 3, 16):
        assert torch.equal(bits(add(y[:rows], x[:rows], a, b)), bits(whole[:rows])), rows


@pytest.mark.parametrize("rows", [1, 64])
def test_subnormal_numbers_of_the_caller_stay(rows):
    """Tiles take them for zero, and so do the vectors beside them, in the same thread."""
    add(*make(rows, 48, 64, 8))
    half = torch.tensor([2.0**-126]) * 0.5
    assert half.item() == 2.0**-127


@pytest.mark.parametrize("r", [8, 33])
def test_rows_of_other_adapters_between(r):
    """Rows that lie evenly spaced, and ones that do not."""
    y, x, a, b = make(120, 67, 96, r)
    others = make(120, 67, 96, 5)[2:]
    table = LoraTable([(a, b, 0.7), (*others, 1.0)])
    whole = add(y, x, a, b)
    for index in (torch.arange(120) % 3 - 1, torch.randint(-1, 2, (120,), generator=torch.Generator().manual_seed(0))):
        got = multi_lora_(y.clone(), x, table, index)
        assert torch.equal(got[index == 0], whole[index == 0])
        assert torch.equal(got[index < 0], y[index < 0])


@pytest.mark.parametrize("k", [96, 1100])
def test_dropout_of_a_row_in_a_prompt(k):
    y, x, a, b = make(64, 80, k, 20)
    table, seed = LoraTable([(a, b, 0.7, 0.3)]), torch.tensor([5])
    index = torch.zeros(64, dtype=torch.int64)
    whole = multi_lora(y, x, table, index, training=True, seeds=[seed])
    for rows in (1, 4, 17):
        got = multi_lora(y[:rows], x[:rows], table, index[:rows], training=True, seeds=[seed])
        assert torch.equal(got, whole[:rows]), rows


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("r", RANKS)
def test_matches_the_reference(r, rows):
    y, x, a, b = make(rows, 130, 200, r)
    index = torch.zeros(rows, dtype=torch.int64)
    exact = reference.multi_lora(y.double(), x.double(), [(a.double(), b.double(), 0.7, 0.0)], index)
    plain = y + (x @ a.t() * 0.7) @ b.t()
    assert_error_rule("out", add(y, x, a, b), plain, exact)


@pytest.mark.parametrize("rows", [1, 64])
def test_infinities_and_nan_stay_in_their_row_and_column(rows):
    y, x, a, b = make(rows, 40, 64, 8)
    expected = add(y, x, a, b)
    y[0, 3], y[-1, 5] = float("inf"), float("nan")
    got = add(y, x, a, b)
    assert got[0, 3].isinf() and got[-1, 5].isnan()
    got[0, 3], got[-1, 5] = expected[0, 3], expected[-1, 5]
    assert torch.equal(got, expected)
    x[0, 1] = float("inf")
    got = add(y, x, a, b)
    assert not got[0].isfinite().any()
    assert torch.equal(got[1:-1], expected[1:-1])


@pytest.mark.parametrize("r", [5, 24])
def test_infinities_in_an_adapter_stay_in_their_column(r):
    y, x, a, b = make(64, 67, 96, r)
    expected = add(y, x, a, b)
    b[3, 0], b[66, 4] = float("inf"), float("nan")
    whole = add(y, x, a, b)
    assert not whole[:, [3, 66]].isfinite().any()
    others = [column for column in range(67) if column not in (3, 66)]
    assert torch.equal(whole[:, others], expected[:, others])
    for rows in (1, 3, 16):
        some = add(y[:rows], x[:rows], a, b)
        assert torch.equal(some.isnan(), whole[:rows].isnan())
        assert torch.equal(some[:, others], whole[:rows, others])


@pytest.mark.parametrize("r", [1, 8, 24, 64])
def test_few_rows_have_the_bits_of_the_op_for_one_adapter(r):
    _, x, a, b = make(16, 96, 128, r)
    weight = make(96, 128, 128, 1)[1]
    for rows in (1, 4, 5, 16):
        base = torch.nn.functional.linear(x[:rows], weight)
        assert torch.equal(lora_linear(x[:rows], weight, None, a, b, 0.7), add(base, x[:rows], a, b)), rows
