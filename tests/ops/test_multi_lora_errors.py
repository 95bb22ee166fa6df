"""What multi_lora refuses, and how it says so; what the raw op refuses that could reach beyond its memory."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, cpu_kernels_only, cpu_only

from pyfused.ops import LoraAdapter, LoraTable, multi_lora, multi_lora_

A, B = torch.zeros(2, 5), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (A, TypeError, "adapters must be a sequence of tuples, got Tensor"),
        ([A], TypeError, r"adapters\[0\] must be None or a tuple \(a, b, scale, dropout_p\), got Tensor"),
        ([None, (A,)], TypeError, r"adapters\[1\] must be None or a tuple .* got 1 entries"),
        ([(1, B)], TypeError, r"adapters\[0\]: a must be a tensor, got int"),
        ([(A, B.int())], TypeError, "b must be float32, bfloat16, float16 or float64, got torch.int32"),
        ([(A[0], B)], ValueError, r"a must have shape \[R, K\] with R >= 1, got \[5\]"),
        ([(A[:0], B[:, :0])], ValueError, r"a must have shape \[R, K\] with R >= 1, got \[0, 5\]"),
        ([(A, B.t())], ValueError, r"b must have shape \[N, 2\] \(a is \[2, 5\]\), got \[2, 3\]"),
        ([(A, B, "1")], TypeError, "scale must be a float, got str"),
        ([(A, B, 1.0, 1.0)], ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
        ([(torch.zeros(5, 2).t(), B)], ValueError, r"a must have rows of unit stride, got strides \[1, 2\]"),
        ([(A, torch._neg_view(B))], ValueError, "b must have its numbers in memory, got a negative view"),
        ([(A, B), (A[:, :4], B)], ValueError, r"adapters\[1\]: a must have 5 in dimension 1, got \[2, 4\]"),
        ([(A, B), (A, B[:2])], ValueError, r"adapters\[1\]: b must have 3 in dimension 0, got \[2, 2\]"),
        ([(A, B), (A.to("meta"), B)], TypeError, rf"adapters\[1\]: a must be on {DEVICE} like the others, got meta"),
    ],
)
def test_tables(adapters, error, message):
    with pytest.raises(error, match=message):
        LoraTable(adapters)


def test_fields_of_an_adapter():
    (entry,) = LoraTable([(A, B)]).adapters
    assert entry == LoraAdapter(A, B, 1.0, 0.0)


def call(op, **changes):
    arguments = {
        "y": torch.zeros(4, 3),
        "x": torch.zeros(4, 5),
        "table": LoraTable([(A, B), None]),
        "index": torch.tensor([0, 1, -1, 0]),
        "segments": None,
    } | changes
    with torch.no_grad():
        return op(**arguments)


@pytest.mark.parametrize("op", [multi_lora, multi_lora_])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": 1, "table": 1}, TypeError, "."),
        ({"x": 1}, TypeError, "x must be a tensor, got int"),
        ({"index": [0, 1]}, TypeError, "index must be a tensor, got list"),
        ({"table": [(A, B)]}, TypeError, "table must be a pyfused.ops.LoraTable, got list"),
        ({"y": torch.zeros(4, 2)}, ValueError, r"table must have adapters \[R, 5\] and \[2, R\]"),
        ({"y": torch.zeros(2, 3)}, ValueError, r"y must have shape \[4, 'N'\], got \[2, 3\]"),
        ({"y": torch.zeros(4, 3).double()}, TypeError, "y must have x's dtype and device"),
        ({"x": torch.zeros(4, 6)}, ValueError, r"table must have adapters \[R, 6\]"),
        ({"x": torch.zeros(4, 5).int()}, TypeError, "x must be float32, bfloat16, float16 or float64"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[..., K\], got a scalar"),
        ({"index": torch.tensor([0, 1])}, ValueError, r"index must have the shape of x's first dimensions, \[4\]"),
        ({"index": torch.zeros(4)}, TypeError, "index must be int32 or int64, got torch.float32"),
        ({"segments": torch.tensor([0, 4])}, ValueError, r"segments must have one entry more than index"),
        ({"segments": torch.tensor([0.0, 1, 2, 3, 4])}, TypeError, "segments must be int32 or int64"),
        ({"table": LoraTable([(A.double(), B)])}, TypeError, "float64 adapters only with a float64 x"),
        ({"y": [], "table": []}, ValueError, "table must be a sequence as long as y, got 0 for 0"),
        (
            {"y": [torch.zeros(4, 3)] * 2, "table": [LoraTable([(A, B), None]), LoraTable([None])]},
            ValueError,
            r"table must have the same adapters for each y, got \[2, 1\]",
        ),
    ],
)
def test_calls(op, changes, error, message):
    with pytest.raises(error, match=message):
        call(op, **changes)


@cpu_only  # an assertion on a GPU, see test_multi_lora_cuda_gpu.py, after which nothing runs there
@pytest.mark.parametrize("op", [multi_lora, multi_lora_])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"index": torch.tensor([0, 2, 0, 0])}, "index must be from -1 to 1, .* got 0 to 2"),
        ({"index": torch.tensor([0, -2, 0, 0])}, "index must be from -1 to 1, .* got -2 to 0"),
        ({"segments": torch.tensor([0, 1, 2, 3, 5])}, r"segments must ascend from 0 to .* rows, 4"),
        ({"segments": torch.tensor([1, 1, 2, 3, 4])}, r"segments must ascend from 0"),
        ({"segments": torch.tensor([0, 3, 2, 3, 4])}, r"segments must ascend from 0"),
    ],
)
def test_numbers(op, changes, message):
    with pytest.raises(ValueError, match=message):
        call(op, **changes)


@pytest.mark.parametrize("op", [multi_lora, multi_lora_])
def test_a_table_of_another_device(op):
    """Its addresses are not followed."""
    table = LoraTable([(A, B), None])
    table.device = torch.device("cuda", 7)
    with pytest.raises(TypeError, match=f"table must be on x's device {DEVICE}, got cuda:7"):
        call(op, table=table)


def test_seeds():
    with pytest.raises(ValueError, match="seeds must have one entry for each of 2 adapters, got 1"):
        call(multi_lora, training=True, seeds=[torch.tensor([1])], table=LoraTable([(A, B, 1.0, 0.5), None]))
    with pytest.raises(TypeError, match="seed must be an int64 tensor"):
        call(multi_lora, training=True, seeds=[1, None], table=LoraTable([(A, B, 1.0, 0.5), None]))


@cpu_kernels_only
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[0, 2:3].fill_(-1), "table must have no negative rank"),
        (lambda d: d[0, 0:1].zero_(), "table must have addresses, got null"),
        (lambda d: d[0, 3:4].fill_(6), "table must have adapters for x's 5 columns, got 6"),
        (lambda d: d[0, 4:5].fill_(4), "table must have adapters for y's 3 columns, got 4"),
        (lambda d: d[0, 7:8].fill_(4), "table must name a dtype by 0 to 3, got 4"),
        (lambda d: d[0, 8:9].fill_(3), "table must not be float64 where x is not"),
    ],
)
def test_descriptors(change, message):
    descriptor = LoraTable([(A, B)]).descriptor.clone()
    change(descriptor)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pyfused._multi_lora_([torch.zeros(1, 3)], torch.zeros(1, 5), [descriptor], torch.tensor([0]), None)


@cpu_kernels_only
def test_raw_arguments():
    y, x, table = torch.zeros(4, 3), torch.zeros(4, 5), LoraTable([(A, B)]).descriptor
    raw = torch.ops.pyfused._multi_lora_
    for arguments, message in (
        (([y], x, [table], torch.tensor([0, 0, 0]), None), "index must have an entry for each"),
        (([y], x, [table], torch.tensor([0, 0, 0, 1]), None), "index must be from -1 to 0"),
        (([y], x, [table], torch.tensor([0]), torch.tensor([0, 5])), "segments must ascend"),
        (([y], x, [table[:, :9]], torch.tensor([0] * 4), None), "table must"),
        (([y], x, [], torch.tensor([0] * 4), None), "tables must have one entry for each y"),
        (([y[:2]], x, [table], torch.tensor([0] * 4), None), "y must have x's leading dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            raw(*arguments)
