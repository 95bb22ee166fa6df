"""opcheck on the raw ops of multi_lora, and torch.compile of the public ones."""

from __future__ import annotations

import pytest
import torch
from helpers import cpu_kernels_only
from multi_lora_cases import evaluate, make_batch

from pyfused.ops import LoraTable, multi_lora, multi_lora_

RAW = torch.ops.pyfused
pytestmark = cpu_kernels_only

SAMPLES = {
    "rows": make_batch(5, 6, 7, (2, 0, 3)),
    "segments": make_batch(9, 6, 7, (2, 3), segments=(4, 0, 5), dropout_p=0.5),
    "mixed": make_batch((2, 3), 6, 7, (2, 3), torch.bfloat16, torch.float32, dropout_p=0.5),
    "no-rows": make_batch((0,), 6, 7, (2,)),
    "fp64": make_batch(4, 6, 7, (2,), torch.float64),
}


def lists(batch):
    entries = batch.adapters
    a = [None if entry is None else entry[0] for entry in entries]
    b = [None if entry is None else entry[1] for entry in entries]
    scales = [1.0 if entry is None else entry[2] for entry in entries]
    ps = [0.0 if entry is None else entry[3] for entry in entries]
    seeds = [seed if p > 0.0 else None for seed, p in zip(batch.seeds, ps, strict=True)]
    return a, b, scales, ps, seeds


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_in_place(sample):
    batch = SAMPLES[sample]
    arguments = ([batch.y.clone()], batch.x, [batch.table.descriptor], batch.index, batch.segments)
    torch.library.opcheck(RAW._multi_lora_.default, arguments)


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_forward(sample):
    batch = SAMPLES[sample]
    arguments = ([batch.y], batch.x, *lists(batch), batch.index, batch.segments)
    torch.library.opcheck(RAW._multi_lora_forward.default, arguments)


@pytest.mark.parametrize("bits", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_backward(sample, bits):
    batch = SAMPLES[sample]
    rest = (*lists(batch), batch.index, batch.segments)
    s = RAW._multi_lora_forward([batch.y], batch.x, *rest)[1]
    arguments = ([batch.grad], batch.x, *rest, s, [bits] * len(batch.adapters))
    torch.library.opcheck(RAW._multi_lora_backward.default, arguments)


@pytest.mark.parametrize("sample", SAMPLES)
def test_compiled_training_is_the_eager_one(sample):
    batch = SAMPLES[sample]

    def op(y, x, adapters, index, segments, training, seeds):
        return multi_lora(y, x, LoraTable(adapters), index, segments, training, seeds)

    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    got, expected = evaluate(compiled, batch), evaluate(op, batch)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_place(backend):
    batch, table = SAMPLES["rows"], SAMPLES["rows"].table
    table.descriptor  # noqa: B018  made outside of the graph

    def call(y, x, index):
        y = y * 2.0
        multi_lora_(y, x, table, index)
        return y + 1.0

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(call, fullgraph=True, backend=backend)(batch.y, batch.x, batch.index)
        assert torch.equal(got, call(batch.y, batch.x, batch.index))
