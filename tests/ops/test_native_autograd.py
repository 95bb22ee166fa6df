"""Gradients in C++ against the Functions in Python, which torch.compile and any other torch use."""

from __future__ import annotations

import itertools

import ia3_cases
import pytest
import torch
from helpers import native_autograd, readable_id
from native_calls import CALLS, DTYPES
from torch import Tensor

from pyfused import _library
from pyfused.ops import bottleneck, ia3_layer, lora_linear
from pyfused.ops.common import draw_seed, is_plain_call

pytestmark = native_autograd


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
            assert needs or not shapes
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


def test_a_graph_of_one_tensor_is_used_once(call):
    """What it has saved may be nothing."""
    for name, tensor in call.tensors.items():
        y = [one for one in call([name]) if one.requires_grad]
        grads = [torch.ones_like(one) for one in y]
        torch.autograd.grad(y, tensor, grads, allow_unused=True)
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(y, tensor, grads, allow_unused=True)


def test_saved_tensors_must_not_change(in_python, call):
    refused = []
    for _ in range(2):
        for name, tensor in call.tensors.items():
            y = call(call.tensors)
            with torch.no_grad():
                tensor.mul_(1)
            try:
                torch.autograd.grad(y, list(call.tensors.values()), call.grads, allow_unused=True)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                refused.append(name)
        in_python()
    half = len(refused) // 2
    assert refused[:half] == refused[half:]


class WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def test_a_result_without_a_gradient_has_one_of_zeros(in_python, call):
    leaves = list(call.tensors.values())
    results = []
    for _ in range(2):
        y = [WithoutGradient.apply(one) for one in call(call.tensors)]
        results.append(torch.autograd.grad(y, leaves, call.grads, allow_unused=True))
        in_python()
    for got, want in zip(*results, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_anomalies_are_traced_to_the_call(call):
    with torch.autograd.set_detect_anomaly(True):
        y = call(call.tensors)
        with pytest.warns(UserWarning, match="Traceback of forward call"), pytest.raises(RuntimeError, match="nan"):
            torch.autograd.grad(y, call.tensors["x"], [grad * torch.nan for grad in call.grads])
    node = y[0].grad_fn
    assert node.name().removesuffix("Backward").lower() == call.op.replace("_", "")
    assert any("native_calls" in line for line in node.metadata["traceback_"])


def test_hooks_of_the_node_are_called(call):
    y = call(call.tensors)
    seen = []
    y[0].grad_fn.register_prehook(lambda grads: seen.append([grad is not None for grad in grads]))
    y[0].grad_fn.register_hook(lambda inputs, outputs: seen.append([grad is not None for grad in inputs]))
    torch.autograd.grad(y, list(call.tensors.values()), call.grads)
    before, after = seen
    assert before == [True] * len(y) and sum(after) == len(call.tensors)


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


@pytest.mark.parametrize("seed", [0, 3])
def test_seeds_are_those_that_python_draws(in_python, seed):
    x, own = torch.ones(70, 40), torch.Generator()
    weight, a, b = torch.randn(40, 40), torch.randn(3, 40), torch.randn(40, 3)

    def run() -> list[Tensor]:
        torch.manual_seed(seed)
        own.manual_seed(seed + 1)
        draws = [draw_seed(x), draw_seed(x), draw_seed(x, own), draw_seed(x, own)]
        assert len({draw.item() for draw in draws}) == 4 and draws[0].dtype == torch.int64
        y = lora_linear(x, weight, None, a, b, 1.0, 0.5, True)
        z = bottleneck(x, x, a, None, b, None, dropout_p=0.5, training=True)
        return [*draws, y, z, torch.get_rng_state(), own.get_state()]

    found = run()
    in_python()
    for one, other in zip(found, run(), strict=True):
        assert torch.equal(one, other)


def test_seeds_under_vmap_are_torchs_to_refuse():
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda t: t + draw_seed(t))(torch.ones(2, 3))
