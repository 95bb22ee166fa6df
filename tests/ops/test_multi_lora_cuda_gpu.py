"""Many adapters in one batch on a GPU, see test_lora_cuda_gpu.py; everything else is the op's own tests with
PYFUSED_TEST_DEVICE=cuda."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_calls import assert_graph_sees_new_numbers, assert_nothing_waits, assert_on_current_stream, captured
from helpers import CUDA_DEVICE, DTYPE_PAIRS, assert_error_rule, needs_gpu, readable_id
from multi_lora_cases import Batch, eager, evaluate, make_batch

import pyfused
from pyfused.ops import LoraTable, multi_lora, multi_lora_
from pyfused.reference import multi_lora as reference

pytestmark = pytest.mark.cuda

# rows, N, K: a token for each, several tiles of an adapter, nothing that divides
SHAPES = [(1, 4096, 512), (32, 1024, 4096), (1500, 768, 130), (301, 1134, 257)]
RANKS = (8, 64, 0, 16, 3)


def on_gpu(*arguments, **options) -> Batch:
    batch = make_batch(*arguments, **options)

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(CUDA_DEVICE)
        return tuple(map(move, value)) if isinstance(value, tuple) else value

    return Batch(*(move(getattr(batch, field)) for field in Batch.__dataclass_fields__))


def op(y, x, adapters, index, segments, training, seeds):
    return multi_lora(y, x, LoraTable(adapters), index, segments, training, seeds)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_matches_the_reference(shape, dtypes, dropout_p):
    batch = on_gpu(*shape, RANKS, *dtypes, dropout_p=dropout_p)
    exact, plain = evaluate(reference.multi_lora, batch.to(torch.float64)), evaluate(eager, batch)
    for name, value in evaluate(op, batch).items():
        assert_error_rule(name, value, plain[name], exact[name])


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_every_row_has_the_bits_of_its_adapter_alone(dtypes):
    batch = on_gpu(400, 300, 1100, RANKS, *dtypes)
    out = multi_lora_(batch.y.clone(), batch.x, batch.table, batch.index)
    for place, entry in enumerate(batch.adapters):
        for row in (batch.of_row == place).nonzero().flatten().tolist()[:5]:
            alone = multi_lora_(
                batch.y[row : row + 1].clone(), batch.x[row : row + 1], LoraTable([entry]), batch.of_row[:1] * 0
            )
            assert torch.equal(out[row], alone[0])
    base = batch.of_row < 0
    assert torch.equal(out[base], batch.y[base])


@needs_gpu
def test_streams_graphs_and_no_waiting():
    batch = on_gpu(300, 512, 768, RANKS, torch.bfloat16, torch.float32)
    y, table = torch.empty_like(batch.y), batch.table

    def add(x):
        y.copy_(batch.y)
        return multi_lora_(y, x, table, batch.index).clone()

    assert_on_current_stream(add, batch.x)
    x, a = batch.x.clone().requires_grad_(), batch.adapters[0][0].clone().requires_grad_()
    trained = LoraTable([(a, *batch.adapters[0][1:]), *batch.adapters[1:]])

    def step():
        out = multi_lora(batch.y, x, trained, batch.index)
        return (out, *torch.autograd.grad(out, (x, a), batch.grad))

    assert_nothing_waits(step)
    assert_graph_sees_new_numbers(step, x)


BEYOND_THE_TABLE = """
import sys, torch
from pyfused.ops import LoraTable, multi_lora_

rows, device = int(sys.argv[1]), sys.argv[2]
y, x = torch.zeros(rows, 32, device=device), torch.zeros(rows, 64, device=device)
table = LoraTable([(torch.zeros(2, 64, device=device), torch.zeros(32, 2, device=device))])
multi_lora_(y, x, table, torch.ones(rows, dtype=torch.int64, device=device))
torch.cuda.synchronize()
"""


@needs_gpu
@pytest.mark.parametrize("rows", [3, 300])
def test_an_index_beyond_the_table_is_an_assertion(rows):
    """In a process of its own: nothing runs on a GPU after one."""
    environment = os.environ | {"PYTHONPATH": str(Path(pyfused.__file__).parents[1])}
    command = [sys.executable, "-c", BEYOND_THE_TABLE, str(rows), str(CUDA_DEVICE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "device-side assert" in done.stderr, done.stderr


@needs_gpu
def test_a_graph_sees_a_new_index():
    """Who has which rows is found on the GPU, in a replay anew."""
    batch = on_gpu(40, 512, 768, RANKS, torch.bfloat16)
    index, table = batch.index.clone(), batch.table

    def step():
        return (multi_lora(batch.y, batch.x, table, index),)

    with torch.no_grad():
        graph, (got,) = captured(step)
        for shift in (1, 7):
            index.copy_(batch.index.roll(shift))
            graph.replay()
            assert torch.equal(got, step()[0])
