"""lora_linear's gradient in C++ against the Function in Python, which torch.compile and any other torch use."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from helpers import cpu_kernels_only, make_case, readable_id
from torch._dynamo import compiled_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from pyfused import _library
from pyfused.ops import lora_linear

DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]
NAMES = ("x", "bias", "a", "b", "scale")

pytestmark = pytest.mark.skipif(_library.autograd is None, reason="pyfused was built with another torch")


@pytest.fixture
def in_python(monkeypatch):
    return lambda: monkeypatch.setattr(_library, "autograd", None)


def forward(case):
    return lora_linear(case.x, case.weight, case.bias, case.a, case.b, case.scale, **case.options)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("vector", "bias"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_gradients_of_any_subset_are_the_functions(in_python, dtypes, vector, bias, p):
    case = make_case(37, 40, 50, 4, *dtypes, vector=vector, dropout_p=p)
    case = case if bias else case.replace(bias=None)
    tensors = {name: getattr(case, name) for name in NAMES if isinstance(getattr(case, name), torch.Tensor)}
    subsets = [subset for n in (1, 2, len(tensors)) for subset in itertools.combinations(tensors, n)]
    results = []
    for _ in range(2):
        for subset in subsets:
            for name, tensor in tensors.items():
                tensor.requires_grad_(name in subset)
            y = forward(case)
            results.append((y.detach(), *torch.autograd.grad(y, [tensors[name] for name in subset], case.grad_y)))
        in_python()
    for native, function in zip(results[: len(subsets)], results[len(subsets) :], strict=True):
        for got, want in zip(native, function, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_asks_for_no_gradient_but_those_of_this_backward():
    """As ``ctx.needs_input_grad`` has it: what requires a gradient, and is on a path to what is asked for."""
    case = make_case(37, 40, 50, 4, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (case.x, case.a, case.b)]
    y = forward(case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(y, leaves[2], case.grad_y)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert case.b.numel() * 4 in sizes
    assert case.x.numel() * 4 not in sizes


def test_saves_what_the_function_saves(in_python):
    case = make_case(37, 40, 50, 4, torch.float32, vector=True, dropout_p=0.3)
    case.a.requires_grad_()
    saved = []
    for _ in range(2):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, shapes=shapes: shapes.append(tensor.shape) or tensor, lambda tensor: tensor
        ):
            forward(case)
        saved.append(shapes)
        in_python()
    assert saved[0] == saved[1]
    assert case.weight.shape not in saved[0]  # x needs no gradient


@pytest.mark.parametrize("python", [False, True])
def test_refuses_double_backward_in_the_same_words(in_python, python):
    if python:
        in_python()
    case = make_case(37, 40, 50, 4, torch.float32)
    y = forward(case.replace(x=case.x.requires_grad_()))
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(y, case.x, case.grad_y, create_graph=True)
    assert str(error.value) == (
        "lora_linear: backward with create_graph=True is not supported (the op has no second derivative); "
        "pyfused.reference.lora.lora_linear has one"
    )


def test_a_graph_is_used_once():
    case = make_case(37, 40, 50, 4, torch.float32)
    y = forward(case.replace(x=case.x.requires_grad_()))
    torch.autograd.grad(y, case.x, case.grad_y)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, case.x, case.grad_y)


class Tagged(torch.Tensor):
    """A subclass that only names itself: torch's functions return it again."""


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["x", "a"])
def test_subclasses_are_seen_by_python(name, grad):
    case = make_case(37, 40, 50, 4, torch.float32)
    expected = forward(case)
    tagged = getattr(case, name).as_subclass(Tagged).requires_grad_(grad)
    y = forward(case.replace(**{name: tagged}))
    assert type(y) is Tagged and y.requires_grad == grad
    torch.testing.assert_close(y.as_subclass(torch.Tensor), expected, rtol=0, atol=0)


def test_function_modes_see_the_call():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    case = make_case(37, 40, 50, 4, torch.float32)
    with Mode():
        forward(case)
    assert "pyfused._lora_linear_forward.default" in seen


def gradients(case):
    leaves = [tensor.detach().requires_grad_() for tensor in (case.x, case.a, case.b)]
    y = forward(case.replace(x=leaves[0], a=leaves[1], b=leaves[2]))
    return y, *torch.autograd.grad(y, leaves, case.grad_y)


RAW = ["pyfused::_lora_linear_forward", "pyfused::_lora_backward"]


@pytest.fixture
def dispatched():
    """Raw ops whose kernels for the CPU the dispatcher has called since; it calls others in their place."""
    seen = []
    with torch.library._scoped_library("pyfused", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in RAW:
            op = torch._C._dispatch_get_computed_kernel_for_dispatch_key(name, "CPU")

            def kernel(keys, *args, name=name, op=op, **kwargs):
                seen.append(name)
                return op.call_boxed(keys, *args, **kwargs)

            library.impl(name.removeprefix("pyfused::"), kernel, "CPU", with_keyset=True, allow_override=True)
        yield seen


@cpu_kernels_only
def test_calls_kernels_by_address_where_nobody_sees_it(dispatched):
    case = make_case(37, 40, 50, 4, torch.float32, dropout_p=0.3)
    by_address = gradients(case)
    assert dispatched == []
    _library.autograd.call_cpu_kernels(False)
    try:
        by_dispatcher = gradients(case)
    finally:
        _library.autograd.call_cpu_kernels(True)
    assert dispatched == RAW
    for got, want in zip(by_address, by_dispatcher, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@cpu_kernels_only
def test_whoever_watches_calls_goes_through_the_dispatcher(dispatched):
    case = make_case(37, 40, 50, 4, torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gradients(case)
    assert dispatched == RAW
    assert set(RAW) <= {event.name for event in profile.events()}

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Mode():
        gradients(case)
    assert dispatched == RAW * 2
    assert [name for name in seen if name.startswith("pyfused")] == [
        f"{name.replace('::', '.')}.default" for name in RAW
    ]


def test_negative_views_are_resolved_before_a_kernel_sees_them():
    case = make_case(37, 40, 50, 4, torch.float32)
    negative = torch._neg_view(-case.a)
    assert negative.is_neg()
    torch.testing.assert_close(forward(case.replace(a=negative)), forward(case), rtol=0, atol=0)


def test_compiled_autograd_traces_the_gradient():
    case = make_case(37, 40, 50, 4, torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (case.x, case.a, case.b)]
    for wanted in (leaves, leaves[1:]):
        expected = torch.autograd.grad(forward(case).sin().sum(), wanted)
        for tensor in leaves:
            tensor.grad = None
        y = forward(case).sin().sum()
        with compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            y.backward(inputs=wanted)
        for tensor, want in zip(wanted, expected, strict=True):
            torch.testing.assert_close(tensor.grad, want, rtol=0, atol=0)


def test_another_torch_does_without(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert _library._load_autograd() is None
