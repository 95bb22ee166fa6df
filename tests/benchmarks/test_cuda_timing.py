"""What a benchmark does with a GPU, with stand-ins for torch's streams and graphs."""

from __future__ import annotations

import gc
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cuda_timing
from harness import Workload


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, **options: nullcontext())
    return cuda_timing.Gpu()


def test_what_a_graph_reads_lives_as_long_as_the_graph(gpu, monkeypatch):
    """A graph knows addresses: memory that is freed would be somebody else's when it is replayed."""
    monkeypatch.setattr(cuda_timing.harness, "relative_error", lambda got, expected: 0.0)

    def layer():
        x, weight = torch.randn(2, 3), torch.randn(4, 3)
        read.extend((weakref.ref(x), weakref.ref(weight)))
        return {"base": Workload(lambda: torch.nn.functional.linear(x, weight))}

    read = []
    graphs = cuda_timing.in_graphs("a case", [layer() for _ in range(3)], 0.1, gpu)
    gc.collect()
    assert len(read) == 6 and all(reference() is not None for reference in read)
    graphs["base"].call()
    torch.cuda.CUDAGraph.return_value.replay.assert_called()
    del graphs
    torch.cuda.CUDAGraph.reset_mock()
    gc.collect()
    assert all(reference() is None for reference in read)


def test_whether_it_answers(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert gpu.answers()

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert not gpu.answers()
