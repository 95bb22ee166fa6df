"""The native part of ``ops.lora_embedding``: raw ops, bits with any number of threads, memory, and who takes it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from embedding_cases import DTYPES, make, run
from helpers import cpu_only, readable_id

import pyfused
from pyfused.ops import lora_embedding
from pyfused.reference.lora_embedding import lora_embedding as reference

pytestmark = cpu_only
RAW = torch.ops.pyfused
PAIRS = [(dtype, adapter) for dtype in DTYPES for adapter in DTYPES if adapter != torch.float64 or dtype == adapter]
SHAPES = [((1,), 1, 1, 1), ((3, 5), 11, 7, 3), ((129,), 130, 257, 8), ((70,), 9, 64, 33), ((300,), 50, 128, 16)]


@pytest.mark.parametrize("dtypes", PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_an_eager_computation(shape, dtypes):
    """Against fp64, per tensor: twice the error of torch's own functions in these dtypes, and one rounding; for fp32 no
    less than ``assert_close`` lets be.
    """
    case = make(*shape, *dtypes)
    exact = run(reference, *(tensor.double() if tensor.is_floating_point() else tensor for tensor in case))
    for got, eager, want in zip(run(lora_embedding, *case), run(reference, *case), exact, strict=True):
        assert got.dtype == eager.dtype and got.shape == eager.shape
        room = torch.finfo(got.dtype).eps * want.abs().max() + 1e-12
        error, theirs = ((each.double() - want).abs().max() for each in (got, eager))
        least = 1.3e-6 * want.abs().max() if got.dtype == torch.float32 else 0.0
        assert error <= max(2 * theirs + room, least)


@pytest.mark.parametrize("needs", [0, 2, 4, 6])
def test_opcheck(needs):
    y, ids, a, b = make(dtype=torch.float32)
    vector = torch.rand(3)
    torch.library.opcheck(RAW._lora_embedding_forward.default, (y, ids, a, b, vector, 1.3))
    s = RAW._lora_embedding_forward(y, ids, a, b, vector, 1.3)[1]
    torch.library.opcheck(RAW._lora_embedding_backward.default, (y, ids, a, b, s, vector, 1.3, 10, needs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_same_bits_with_any_number_of_threads(dtype):
    case = make((1500,), 40, 300, 8, dtype, torch.float32)  # each token some forty times
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(lora_embedding, *case)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(lora_embedding, *case), expected))
    finally:
        torch.set_num_threads(before)


def test_only_what_is_asked_for():
    y, ids, a, b = make()
    for name, (need_a, need_b) in {"a": (True, False), "b": (False, True)}.items():
        tensors = a.clone().requires_grad_(need_a), b.clone().requires_grad_(need_b)
        lora_embedding(y, ids, *tensors, 1.3).sum().backward()
        full = run(lora_embedding, y, ids, a, b)
        assert [tensor.grad is not None for tensor in tensors] == [need_a, need_b], name
        assert len(full) == 4


def test_the_second_derivative_is_refused():
    y, ids, a, b = make()
    a.requires_grad_()
    with pytest.raises(RuntimeError, match=r"reference\.lora_embedding\.lora_embedding has one"):
        torch.autograd.grad(lora_embedding(y, ids, a, b, 1.3).square().sum(), a, create_graph=True)


@pytest.mark.parametrize("ids", [[0, 11], [-1, 2]], ids=str)
def test_tokens_that_there_are_not(ids):
    y, _, a, b = make((2,))
    ids = torch.tensor(ids)
    with pytest.raises(IndexError, match=r"lora_embedding: ids must be in \[0, 11\), got"):
        lora_embedding(y, ids, a, b, 1.3)
    s = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"lora_embedding_backward: ids must be in \[0, 11\)"):
        RAW._lora_embedding_backward(y, ids, a, b, s, None, 1.3, -1, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.ones(3, 5, 6)}, "y must have b's 7 rows as columns"),
        ({"ids": torch.zeros(14, dtype=torch.int64)}, "ids must be a contiguous int64 tensor of 15 elements"),
        ({"ids": torch.zeros(3, 5, dtype=torch.int32)}, "ids must be a contiguous int64 tensor"),
        ({"a": torch.ones(3)}, r"a must have shape \[R, K\]"),
        ({"b": torch.ones(7, 4)}, "b must have a's rank 3 as columns"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split()[0],
)
def test_raw_errors(changes, message):
    arguments = dict(zip(("y", "ids", "a", "b"), make(dtype=torch.float32), strict=True)) | changes
    with pytest.raises(RuntimeError, match=f"lora_embedding: {message}"):
        RAW._lora_embedding_forward(*arguments.values(), None, 1.3)


def test_compiled_whole():
    torch._dynamo.reset()
    case = make((64,), 40, 32, 8, torch.float32)
    compiled = torch.compile(lora_embedding, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, run(compiled, *case, padding_idx=3), run(lora_embedding, *case, padding_idx=3)))
    torch._dynamo.reset()


def test_nothing_outside_the_arguments_is_touched():
    """Each argument lies between two pages that may not be touched, see test_lora_memory.py."""
    folders = [Path(helpers.__file__).parent, Path(__file__).parent, Path(pyfused.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


def fenced_calls() -> None:
    from test_lora_memory import _keep, fenced

    for at_end in (True, False):
        for dtypes in PAIRS:
            for shape in SHAPES:
                y, ids, a, b = (fenced(tensor, at_end) for tensor in make(*shape, *dtypes))
                vector = fenced(torch.ones(a.shape[0], dtype=a.dtype), at_end)
                _, s = RAW._lora_embedding_forward(y, ids, a, b, vector, 1.3)
                RAW._lora_embedding_backward(y, ids, a, b, fenced(s, at_end), vector, 1.3, 0, 6)
                _keep.clear()


if __name__ == "__main__":
    fenced_calls()
