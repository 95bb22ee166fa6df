"""Gradients in C++ against the Functions in Python, which torch.compile and any other torch use; for lora_linear see
test_lora_native_autograd.py."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import bottleneck_cases
import ia3_cases
import pytest
import torch
from helpers import readable_id
from projections import GROUPS, make_group
from torch import Tensor

from pyfused import _library
from pyfused.ops import bottleneck, ia3_layer, ia3_linear, ia3_scale, lora_linear_shared
from pyfused.ops.common import is_plain_call

DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]

pytestmark = pytest.mark.skipif(_library.autograd is None, reason="pyfused was built with another torch")


@dataclasses.dataclass
class Call:
    """One call of an op as a function of the tensors that may get a gradient."""

    op: str
    tensors: dict[str, Tensor]
    forward: Callable[[dict[str, Tensor]], tuple[Tensor, ...]]
    grads: tuple[Tensor, ...]
    reference: str

    def __call__(self, needs=()) -> tuple[Tensor, ...]:
        for name, tensor in self.tensors.items():
            tensor.requires_grad_(name in needs)
        return self.forward(self.tensors)


def ia3_call(dtypes, side, bias):
    case = ia3_cases.make_case((5, 7), 24, 20, *dtypes, side=side, bias=bias)
    return Call(
        "ia3_linear",
        {"x": case.x, "scale": case.scale},
        lambda t: (ia3_linear(t["x"], case.weight, case.bias, t["scale"], side),),
        (case.grad_y,),
        "pyfused.reference.ia3.ia3_linear",
    )


def scale_call(dtypes, dim):
    case = ia3_cases.make_case((3, 20, 5), 20, 20, *dtypes)
    x = case.x[..., :5].contiguous()
    scale = case.scale[: x.shape[dim]].clone()
    return Call(
        "ia3_scale",
        {"x": x, "scale": scale},
        lambda t: (ia3_scale(t["x"], t["scale"], dim),),
        (torch.ones_like(x),),
        "pyfused.reference.ia3.ia3_scale",
    )


def bottleneck_call(dtypes, residual, scale, biases, p):
    case = bottleneck_cases.make_case(
        37, 24, 8, *dtypes, residual=residual, scale=scale, biases=biases, dropout_p=p, activation="silu"
    )
    fields = {name: getattr(case, name) for name in bottleneck_cases.TENSORS}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    if residual == "x":
        del tensors["residual"]

    def forward(t):
        arguments = fields | t
        if residual == "x":
            arguments["residual"] = arguments["x"]
        return (bottleneck(**arguments, **case.options),)

    return Call("bottleneck", tensors, forward, (case.grad_y,), "pyfused.reference.bottleneck.bottleneck")


def shared_call(dtypes, group, p):
    x, projections, grads = make_group(GROUPS[group], 37, 24, *dtypes, dropout_p=p)
    tensors = {"x": x}
    for i, projection in enumerate(projections):
        for name in ("bias", "a", "b", "scale"):
            if isinstance(getattr(projection, name), Tensor):
                tensors[f"{i}.{name}"] = getattr(projection, name)

    def forward(t):
        given = [
            p._replace(**{key.split(".")[1]: value for key, value in t.items() if key.startswith(f"{i}.")})
            for i, p in enumerate(projections)
        ]
        return lora_linear_shared(t["x"], given)

    return Call("lora_linear_shared", tensors, forward, tuple(grads), "pyfused.reference.lora.lora_linear")


CALLS = {
    "ia3-output": lambda dtypes: ia3_call(dtypes, "output", True),
    "ia3-output-no-bias": lambda dtypes: ia3_call(dtypes, "output", False),
    "ia3-input": lambda dtypes: ia3_call(dtypes, "input", True),
    "ia3-scale": lambda dtypes: scale_call(dtypes, -1),
    "ia3-scale-rows": lambda dtypes: scale_call(dtypes, 1),
    "bottleneck": lambda dtypes: bottleneck_call(dtypes, "x", "float", True, 0.0),
    "bottleneck-parallel": lambda dtypes: bottleneck_call(dtypes, "other", "learned", True, 0.3),
    "bottleneck-bare": lambda dtypes: bottleneck_call(dtypes, None, "channels", False, 0.0),
    "shared": lambda dtypes: shared_call(dtypes, "qkv", 0.0),
    "shared-some": lambda dtypes: shared_call(dtypes, "some", 0.3),
    "shared-one": lambda dtypes: shared_call(dtypes, "one", 0.3),
}


@pytest.fixture
def in_python(monkeypatch):
    return lambda: monkeypatch.setattr(_library, "autograd", None)


@pytest.fixture(params=list(CALLS))
def call(request):
    return CALLS[request.param](DTYPES[0])


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("name", list(CALLS))
def test_gradients_of_any_subset_are_the_functions(in_python, name, dtypes):
    call = CALLS[name](dtypes)
    names = list(call.tensors)
    subsets = [subset for n in (1, 2, len(names)) for subset in itertools.combinations(names, n)]
    results = []
    for _ in range(2):
        for subset in subsets:
            y = call(subset)
            leaves = [call.tensors[name] for name in subset]
            results.append((*(t.detach() for t in y), *torch.autograd.grad(y, leaves, call.grads, allow_unused=True)))
        in_python()
    for native, function in zip(results[: len(subsets)], results[len(subsets) :], strict=True):
        for got, want in zip(native, function, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["shared", "shared-some"])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 2)])
def test_results_that_nothing_is_computed_from(in_python, name, used):
    call = CALLS[name](DTYPES[0])
    leaves = list(call.tensors.values())
    results = []
    for _ in range(2):
        y = call(call.tensors)
        grads = [call.grads[i] for i in used]
        results.append(torch.autograd.grad([y[i] for i in used], leaves, grads, allow_unused=True))
        in_python()
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_without_gradients_nothing_is_recorded(in_python, call):
    results = []
    for _ in range(2):
        assert not any(t.requires_grad for t in call())
        with torch.no_grad():
            y = call(call.tensors)
        assert not any(t.requires_grad for t in y)
        results.append(y)
        in_python()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "ia3-input"])  # whose dl is a sum over all of dx
def test_asks_for_no_gradient_but_those_of_this_backward(name):
    """As ``ctx.needs_input_grad`` has it: what requires a gradient, and is on a path to what is asked for."""
    call = CALLS[name](DTYPES[0])
    y = call(call.tensors)
    *_, last = [t for t in call.tensors.values() if t.numel() not in (1, call.tensors["x"].numel())]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(y, last, call.grads)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert last.numel() * 4 in sizes
    assert call.tensors["x"].numel() * 4 not in sizes


def test_saves_what_the_function_saves(in_python, call):
    subsets = [[], *([name] for name in call.tensors), list(call.tensors)]
    saved = []
    for _ in range(2):
        for needs in subsets:
            shapes = []
            with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, shapes=shapes: shapes.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
            ):
                call(needs)
            assert bool(shapes) == bool(needs)
            saved.append(sorted(shapes))
        in_python()
    assert saved[: len(subsets)] == saved[len(subsets) :]


@pytest.mark.parametrize("python", [False, True])
def test_refuses_double_backward_in_the_same_words(in_python, call, python):
    if python:
        in_python()
    y = call(["x"])
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(y, call.tensors["x"], call.grads, create_graph=True)
    assert str(error.value) == (
        f"{call.op}: backward with create_graph=True is not supported (the op has no second derivative); "
        f"{call.reference} has one"
    )


def test_a_graph_is_used_once(call):
    y = call(["x"])
    torch.autograd.grad(y, call.tensors["x"], call.grads)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, call.tensors["x"], call.grads)


def test_a_graph_that_is_retained_is_used_twice(call):
    y = call(call.tensors)
    leaves = list(call.tensors.values())
    first = torch.autograd.grad(y, leaves, call.grads, retain_graph=True)
    for got, want in zip(torch.autograd.grad(y, leaves, call.grads), first, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


class Tagged(torch.Tensor):
    """A subclass that only names itself: torch's functions return it again."""


@pytest.mark.parametrize("grad", [False, True])
def test_subclasses_are_seen_by_python(call, grad):
    expected = call()
    for name, tensor in list(call.tensors.items()):
        call.tensors[name] = tensor.detach().as_subclass(Tagged)
        for got, want in zip(call([name] if grad else []), expected, strict=True):
            assert got.requires_grad == grad
            if call.op != "lora_linear_shared":  # torch gives a list of results as it is
                assert type(got) is Tagged
            torch.testing.assert_close(got.detach().as_subclass(Tensor), want, rtol=0, atol=0)
        call.tensors[name] = tensor


def test_function_modes_see_the_call(call):
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        call()
    assert any(name.startswith("pyfused._") for name in seen)


@pytest.mark.parametrize("side", ia3_cases.SIDES)
@pytest.mark.parametrize("needs", [(), ("x",), ("scale",), ("x", "scale"), ("x", "weight", "scale")], ids="-".join)
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_a_layers_vector_keeps_its_shape(in_python, dtypes, needs, side):
    """As nn.IA3Linear has it, [N, 1] or [1, K]: the bits of the public op on a view of it."""
    case = ia3_cases.make_case((5, 7), 24, 20, *dtypes, side=side)
    vector = case.scale[:, None] if side == "output" else case.scale[None]
    leaves = {"x": case.x, "weight": case.weight, "scale": vector.clone()}
    for name, tensor in leaves.items():
        tensor.requires_grad_(name in needs)
    results = []
    for _ in range(2):
        y = ia3_layer(leaves["x"], leaves["weight"], case.bias, leaves["scale"], side == "input")
        assert y.requires_grad == bool(needs)
        results.append((y, *torch.autograd.grad(y, [leaves[name] for name in needs], case.grad_y)) if needs else (y,))
        in_python()
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_layers_vector_of_a_wrong_size():
    with pytest.raises(ValueError, match=r"ia3_linear: scale must have shape \[3\] on the output side, got \[4\]"):
        ia3_layer(torch.ones(2, 5), torch.ones(3, 5), None, torch.ones(4, 1), False)


def test_what_python_has_to_see():
    class Subclass(torch.Tensor):
        pass

    x, seen = torch.ones(3), {}
    assert is_plain_call(x, None, torch.nn.Parameter(x))
    assert not is_plain_call(x.as_subclass(Subclass))
    assert not is_plain_call(x, x.as_subclass(Subclass))
    assert not is_plain_call(x.to("meta"))
    assert not is_plain_call(None, x)
    assert not is_plain_call(x, 1.0)
    for context in (torch.autocast("cpu"), torch.device("cpu"), torch.autograd.forward_ad.dual_level()):
        with context:
            assert not is_plain_call(x)
    transforms = {"vmap": torch.func.vmap, "grad": torch.func.grad, "functionalize": torch.func.functionalize}
    for name, transform in transforms.items():

        def record(t, name=name):
            seen[name] = is_plain_call(torch.ones(2))
            return t.sum()

        transform(record)(x)
    torch.func.jvp(lambda t: seen.setdefault("jvp", is_plain_call(torch.ones(2))) or t, (x,), (x,))
    assert seen == dict.fromkeys((*transforms, "jvp"), False)
    assert is_plain_call(x)
