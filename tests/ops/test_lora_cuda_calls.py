"""What a call on CUDA tensors hands to the raw ops, seen with fake tensors: no GPU, no CUDA library is needed."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused import _library
from pyfused.ops import Projection, lora_delta, lora_linear, lora_linear_shared
from pyfused.ops.lora import _backward


class RawCalls(TorchDispatchMode):
    """Notes the name and the last argument, allow_tf32, of each raw op."""

    def __init__(self) -> None:
        super().__init__()
        self.allow_tf32 = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pyfused":
            # Off is the schema's default, and a trailing default is not passed on.
            count = len(function._schema.arguments)
            self.allow_tf32.append((function.__name__.split(".")[0], len(args) == count and args[-1]))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def switch(monkeypatch):
    monkeypatch.setattr(_library, "_kernels", {"cpu", "cuda"})
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "ieee")
    torch.backends.cuda.matmul.fp32_precision = before


def raw_calls(dtype, adapter_dtype, device):
    # Without autograd, which a torch for the CPU does not have for CUDA tensors, real or fake.
    with FakeTensorMode(), torch.no_grad(), RawCalls() as calls:
        x, weight = torch.empty(8, 16, device=device, dtype=dtype), torch.empty(32, 16, device=device, dtype=dtype)
        a = torch.empty(4, 16, device=device, dtype=adapter_dtype)
        b = torch.empty(32, 4, device=device, dtype=adapter_dtype)
        y = lora_linear(x, weight, None, a, b, 2.0)
        lora_delta(y, x, a, b, 2.0)
        _backward(y, x, weight, a, b, None, None, 2.0, 0.0, None, True, True, False, False, False)
    return calls.allow_tf32


NAMES = ["_lora_linear_forward", "_lora_delta_forward", "_lora_backward"]


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "is_fp32"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.bfloat16, False),
        (torch.float64, torch.float64, False),
    ],
)
def test_tf32_follows_torchs_switch(switch, on, dtype, adapter_dtype, is_fp32):
    switch(on)
    assert raw_calls(dtype, adapter_dtype, "cuda") == [(name, on and is_fp32) for name in NAMES]


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize(
    ("adapter_dtypes", "is_fp32"),
    [((torch.bfloat16, torch.float32), True), ((torch.bfloat16, torch.bfloat16), False), ((None, None), False)],
)
def test_projections_of_one_x_are_one_call(switch, on, adapter_dtypes, is_fp32):
    switch(on)
    with FakeTensorMode(), torch.no_grad(), RawCalls() as calls:
        x, weight = (torch.empty(n, 16, device="cuda", dtype=torch.bfloat16) for n in (8, 32))
        projections = []
        for dtype in adapter_dtypes:
            shapes = [] if dtype is None else [(4, 16), (32, 4)]
            adapter = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
            projections.append(Projection(weight, None, *adapter))
        lora_linear_shared(x, projections)
    assert calls.allow_tf32 == [("_lora_linear_shared_forward", on and is_fp32)]


@pytest.mark.parametrize("runs", [True, False])
def test_a_gpu_that_nothing_is_compiled_for_has_the_reference(switch, monkeypatch, runs):
    monkeypatch.setattr(_library, "_gpus", {0: runs})
    with FakeTensorMode(), torch.no_grad(), RawCalls() as calls:
        x, weight = torch.empty(8, 16, device="cuda:0"), torch.empty(32, 16, device="cuda:0")
        a, b = torch.empty(4, 16, device="cuda:0"), torch.empty(32, 4, device="cuda:0")
        y = lora_linear(x, weight, None, a, b, 2.0)
    assert y.shape == (8, 32)
    assert len(calls.allow_tf32) == runs


def test_the_cpu_has_no_tf32(switch):
    switch(True)
    assert raw_calls(torch.float32, torch.float32, "cpu") == [(name, False) for name in NAMES]


def test_the_switch_is_read_while_compiling(switch):
    """And no graph break for it."""
    seen = []

    def backend(graph, inputs):
        seen.extend(node.args[-1] for node in graph.graph.nodes if "_lora_" in str(node.target))
        return graph.forward

    switch(True)
    with FakeTensorMode():
        x, weight = torch.empty(8, 16, device="cuda"), torch.empty(32, 16, device="cuda")
        a, b = torch.empty(4, 16, device="cuda"), torch.empty(32, 4, device="cuda")
        torch.compile(lambda: lora_linear(x, weight, None, a, b, 2.0), fullgraph=True, backend=backend)()
    assert seen == [True]
