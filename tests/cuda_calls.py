"""What every op with CUDA kernels must keep on a GPU: the caller's stream, CUDA graphs, and never wait for the GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from helpers import CUDA_DEVICE
from torch import Tensor


def assert_on_current_stream(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """On a stream that waits for x to be written, and read on it: with any other stream this reads what was there."""
    expected = call(x)
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream(CUDA_DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = call(late)
    stream.synchronize()
    assert torch.equal(got, expected)


def captured(step: Callable[[], Sequence[Tensor]]) -> tuple[torch.cuda.CUDAGraph, Sequence[Tensor]]:
    """One CUDA graph of a step, and the tensors that it writes to."""
    stream = torch.cuda.Stream(CUDA_DEVICE)
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_graph_sees_new_numbers(step: Callable[[], Sequence[Tensor]], x: Tensor) -> None:
    """A step without randomness, captured once: a replay computes what a call computes from what is in x then."""
    graph, results = captured(step)
    with torch.no_grad():
        x.copy_(x.flip(-1))
    graph.replay()
    for got, expected in zip(results, step(), strict=True):
        assert torch.equal(got, expected)


def assert_nothing_waits(step: Callable[[], object]) -> None:
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
