"""Adapters stacked by slot: to the bit what multi_lora_ does with a table of the same matrices."""

from __future__ import annotations

import pytest
import torch
from helpers import CUDA_KERNELS, cpu_kernels_only, cpu_only, readable_id

from pyfused.ops import LoraTable, multi_lora_
from pyfused.ops.multi_lora_stacked import multi_lora_stacked_

SLOTS, RANK, K = 5, 6, 70
SLICES = (33, 16, 130)


def make(rows: int, dtype: torch.dtype, adapters: torch.dtype, sizes: tuple[int, ...] = SLICES):
    """y, x, a, b: slot 2 is empty, slot 3 has no adapter for the second slice."""
    y, x = torch.randn(rows, sum(sizes) + 4, dtype=dtype), torch.randn(rows, K, dtype=dtype)
    y[:, 0] = -0.0
    a = [torch.randn(SLOTS, 1, RANK, K, dtype=adapters) for _ in sizes]
    b = [torch.randn(SLOTS, 1, size, RANK, dtype=adapters) for size in sizes]
    for stack in (*a, *b):
        stack[2] = 0
    for stack in (a[1 % len(sizes)], b[1 % len(sizes)]):
        stack[3] = 0
    return y, x, a, b


def expected(y, x, a, b, scale, index):
    out, sizes = y.clone(), [one.shape[-2] for one in b]

    def adapter(a, b, slot):
        pair = tuple(one if one.dim() == 2 else one[slot, 0] for one in (a, b))
        return (*pair, scale) if all(one.any() for one in pair) else None

    tables = [LoraTable([adapter(*one, slot) for slot in range(SLOTS)]) for one in zip(a, b, strict=True)]
    multi_lora_(list(out[:, : sum(sizes)].split(sizes, dim=1)), x, tables, index[: len(x)])
    return out


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=readable_id,
)
def test_same_bits_as_with_a_table(dtypes, rows, integer):
    y, x, a, b = make(rows, *dtypes)
    index = torch.randint(-1, SLOTS, (rows + 3,), dtype=integer)
    index[rows:] = SLOTS + 9  # not read
    got, want = y.clone(), expected(y, x, a, b, 1.5, index)
    assert multi_lora_stacked_(got, x, a, b, 1.5, index) is None
    if CUDA_KERNELS:  # they add the zeros of an empty slot
        got, want = got + 0.0, want + 0.0
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def test_one_matrix_for_all_slots():
    y, x, a, b = make(9, torch.float32, torch.float32, (33,))
    index = torch.randint(-1, SLOTS, (9,))
    between = torch.zeros(9, RANK)
    multi_lora_stacked_(between, x, a, [torch.eye(RANK)], 2.0, index)
    assert torch.equal(between, expected(torch.zeros(9, RANK), x, a, [torch.eye(RANK)], 2.0, index))
    got = y.clone()
    multi_lora_stacked_(got, between, [torch.eye(RANK)], b, 1.0, index)
    assert torch.equal(got, expected(y, between, [torch.eye(RANK)], b, 1.0, index))


@cpu_kernels_only
def test_slots_are_read_when_the_op_runs():
    y, x, a, b = make(4, torch.float32, torch.float32)
    index = torch.full((4,), 2)
    empty = y.clone()
    multi_lora_stacked_(empty, x, a, b, 1.0, index)
    assert torch.equal(empty.view(torch.int32), y.view(torch.int32))
    for stack in (*a, *b):
        stack[2, 0, 1:].normal_()  # a first row of zeros
    filled = y.clone()
    multi_lora_stacked_(filled, x, a, b, 1.0, index)
    assert torch.equal(filled, expected(y, x, a, b, 1.0, index)) and not torch.equal(filled, y)


def test_a_batch_of_the_base_model_is_left_alone():
    y, x, a, b = make(4, torch.float32, torch.float32)
    got = y.clone()
    multi_lora_stacked_(got, x, a, b, 1.0, torch.full((4,), -1))
    assert torch.equal(got.view(torch.int32), y.view(torch.int32))


def test_y_without_the_form_of_a_matrix():
    y, x, a, b = make(7, torch.float32, torch.float32)
    index = torch.randint(0, SLOTS, (7,))
    got = y.t().contiguous().t()
    multi_lora_stacked_(got, x, a, b, 1.0, index)
    assert torch.equal(got, expected(y, x, a, b, 1.0, index))


def test_in_a_compiled_graph_nothing_is_copied():
    """The product's own memory is what the op adds to, and other numbers in the slots need no other graph."""
    y, x, a, b = make(7, torch.float32, torch.float32)
    weight = torch.randn(y.shape[1], K)

    def layer(x, index):
        y = x @ weight.t()
        multi_lora_stacked_(y, x, a, b, 1.0, index)
        return y * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (7, 5):
            index = torch.randint(-1, SLOTS, (rows,))
            torch.testing.assert_close(compiled(x[:rows], index), layer(x[:rows], index))
    torch.library.opcheck(torch.ops.pyfused._multi_lora_stacked_.default, (y, x, a, b, 1.0, torch.zeros(7).long()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"x": c["x"][0]}, "x must have shape"),
        (lambda c: c | {"x": c["x"][:2]}, "y must have shape"),
        (lambda c: c | {"x": c["x"].double()}, "x's dtype"),
        (lambda c: c | {"x": c["x"][:, 1:]}, "columns"),
        (lambda c: c | {"y": c["y"][:, :100]}, "columns of all slices"),
        (lambda c: c | {"a": c["a"][:2]}, "list of a's length"),
        (lambda c: c | {"a": [one[:3] for one in c["a"]]}, "as many slots"),
        (lambda c: c | {"a": [one[:, :, :3].contiguous() for one in c["a"]]}, "a's rank"),
        (lambda c: c | {"a": [one.transpose(2, 3) for one in c["a"]]}, "contiguous"),
        (lambda c: c | {"b": [one.repeat(1, 2, 1, 1) for one in c["b"]]}, "a matrix for each slot"),
        (lambda c: c | {"a": [c["a"][0][0, 0]], "b": [c["b"][0][0, 0]]}, "a stack among them"),
        (lambda c: c | {"index": c["index"][:3]}, "an entry for each row"),
        (lambda c: c | {"index": torch.zeros(7)}, "int32 or int64"),
    ],
)
def test_errors(change, message):
    y, x, a, b = make(7, torch.float32, torch.float32)
    call = change({"y": y, "x": x, "a": a, "b": b, "scale": 1.0, "index": torch.zeros(7, dtype=torch.int64)})
    with pytest.raises(RuntimeError, match=message):
        multi_lora_stacked_(**call)


@cpu_only  # an assertion on a GPU, after which nothing runs there
def test_a_slot_that_is_not_there():
    y, x, a, b = make(7, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match=r"index must be from -1 to (4|the table's last adapter)"):
        multi_lora_stacked_(y, x, a, b, 1.0, torch.full((7,), SLOTS))
