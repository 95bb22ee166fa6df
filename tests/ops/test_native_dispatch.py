"""Ops with their gradient in C++ call their kernels for the CPU by address where nobody sees it, and go through the
dispatcher where somebody does; compiled autograd traces their gradients."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from helpers import cpu_kernels_only, native_autograd
from native_calls import CALLS, DTYPES, MASKED
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused import _library
from pyfused.ops import bottleneck, lora_linear

pytestmark = native_autograd


class Seen(TorchDispatchMode):
    """Notes each op."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=list(CALLS | MASKED))
def call(request):
    return (CALLS | MASKED)[request.param](DTYPES[0])


def without_mask(names):
    return [re.sub("_with_masks?$", "", name) for name in names]


def gradients(call):
    y = call(call.tensors)
    return *y, *torch.autograd.grad(y, list(call.tensors.values()), call.grads)


@pytest.fixture
def dispatched(call):
    """Raw ops whose kernels for the CPU the dispatcher has called since; it calls others in their place."""
    seen = []
    with torch.library._scoped_library("pyfused", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in {*call.raw, *without_mask(call.raw)}:
            op = torch._C._dispatch_get_computed_kernel_for_dispatch_key(name, "CPU")

            def kernel(keys, *args, name=name, op=op, **kwargs):
                seen.append(name)
                return op.call_boxed(keys, *args, **kwargs)

            library.impl(name.removeprefix("pyfused::"), kernel, "CPU", with_keyset=True, allow_override=True)
        yield seen


@cpu_kernels_only
def test_calls_kernels_by_address_where_nobody_sees_it(call, dispatched):
    by_address = gradients(call)
    assert dispatched == []
    _library.autograd.call_cpu_kernels(False)
    try:
        by_dispatcher = gradients(call)
    finally:
        _library.autograd.call_cpu_kernels(True)
    assert dispatched == without_mask(call.raw)
    for got, want in zip(by_address, by_dispatcher, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@cpu_kernels_only
def test_whoever_watches_calls_goes_through_the_dispatcher(call, dispatched):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(call)
    assert dispatched == list(call.raw)
    assert set(call.raw) <= {event.name for event in profile.events()}

    with Seen() as seen:
        gradients(call)
    assert dispatched == list(call.raw) * 2
    assert [name for name in seen.names if name.startswith("pyfused")] == [
        f"{name.replace('::', '.')}.default" for name in call.raw
    ]


def test_whoever_watches_sees_seeds_drawn():
    x, a, b = torch.ones(4, 6), torch.ones(2, 6), torch.ones(6, 2)
    weight = torch.ones(6, 6)
    calls = [
        lambda x: lora_linear(x, weight, None, a, b, 1.0, 0.5, True),
        lambda x: bottleneck(x, None, a, None, b, None, dropout_p=0.5, training=True),
    ]
    for call in calls:
        with Seen() as seen:
            call(x)
        assert [name for name in seen.names if name.startswith("aten.randint")]
        with torch.profiler.profile() as profile:
            call(x)
        assert "aten::randint" in {event.name for event in profile.events()}
        traced = torch.jit.trace(call, (x,), check_trace=False)
        assert not torch.equal(traced(x), traced(x))
        state = torch.get_rng_state()
        with FakeTensorMode(allow_non_fake_inputs=True):
            call(x)
        assert torch.equal(torch.get_rng_state(), state)


def test_negative_views_are_resolved_before_a_kernel_sees_them(call):
    expected = call()
    for name, tensor in list(call.tensors.items()):
        call.tensors[name] = torch._neg_view(-tensor.detach())
        assert call.tensors[name].is_neg()
        for got, want in zip(call(), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        call.tensors[name] = tensor


def test_compiled_autograd_traces_the_gradient(call):
    leaves = list(call.tensors.values())
    used = 1 if len(call.grads) == 1 else len(call.grads) - 1  # of several results one gets no gradient
    for wanted in (leaves, leaves[1:]):

        def loss():
            return sum(y.sin().sum() for y in call(call.tensors)[:used])

        expected = torch.autograd.grad(loss(), wanted, allow_unused=True)
        for tensor in leaves:
            tensor.grad = None
        result = loss()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            result.backward(inputs=wanted)
        for tensor, want in zip(wanted, expected, strict=True):
            assert (tensor.grad is None) == (want is None)
            if want is not None:
                torch.testing.assert_close(tensor.grad, want, rtol=0, atol=0)
