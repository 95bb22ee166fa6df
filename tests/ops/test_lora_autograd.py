"""What autograd sees: saved tensors, memory, repeated and double backward, checkpoints, autocast, devices."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, NAMES, cpu_only, delta_op, evaluate, make_case, readable_id
from torch.utils.checkpoint import checkpoint

from pyfused import _library
from pyfused.ops import lora_delta, lora_linear
from pyfused.reference import lora as reference

FROZEN_BASE = ("x", "bias", "a", "b", "scale")
OPS = [pytest.param(lora_linear, id="linear"), pytest.param(lora_delta, id="delta")]
DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def call(op, case, **changes):
    arguments = {name: getattr(case, name) for name in ("x", "a", "b", "scale")} | changes
    if op is lora_delta:
        return lora_delta(case.grad_y.detach(), **arguments, **case.options)
    return lora_linear(weight=case.weight, bias=case.bias, **arguments, **case.options)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("op", OPS)
def test_saves_x_and_s_alone(op, dtypes, layout):
    """Saved for backward: the arguments themselves, never a copy, and s [M, R]; no mask, no x in another dtype."""
    case = make_case((3, 17), 40, 50, 4, *dtypes, vector=True, dropout_p=0.1)
    if layout == "sliced":
        case = case.replace(x=F.pad(case.x, (3, 3))[..., 3:-3])
    leaves = {name: getattr(case, name).requires_grad_() for name in ("x", "a", "b", "scale")}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call(op, case, **leaves)
    known = [*leaves.values(), case.weight, case.seed]
    storages = {tensor.untyped_storage().data_ptr() for tensor in known}
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in storages]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in new] == [((51, 4), torch.float32)]


def allocations(function) -> list[int]:
    """Sizes in bytes of what ``function`` takes from torch's CPU allocator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


@cpu_only
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_no_temporary_of_xs_size(dtypes):
    """Neither pass makes a tensor as large as x, but for grad_x; 16-bit x is never cast as a whole.

    lora_delta, because the vendor's GEMM in lora_linear may want memory of its own.
    """
    case = make_case(512, 16, 1024, 8, *dtypes, dropout_p=0.1)
    leaves = {name: getattr(case, name).requires_grad_() for name in ("x", "a", "b")}
    bytes_of_x = case.x.numel() * case.x.element_size()
    y = []
    forward = allocations(lambda: y.append(call(lora_delta, case, **leaves)))
    assert forward and max(forward) < bytes_of_x / 4
    backward = allocations(lambda: torch.autograd.grad(y[0], list(leaves.values()), case.grad_y))
    assert sorted(size for size in backward if size >= bytes_of_x / 4) == [bytes_of_x]


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("op", OPS)
def test_retain_graph(op, dtypes):
    case = make_case(33, 40, 50, 4, *dtypes, vector=True, dropout_p=0.1)
    leaves = {name: getattr(case, name).requires_grad_() for name in ("x", "a", "b", "scale")}
    y = call(op, case, **leaves)
    first = torch.autograd.grad(y, list(leaves.values()), case.grad_y, retain_graph=True)
    second = torch.autograd.grad(y, list(leaves.values()), case.grad_y)
    for name, one, other in zip(leaves, first, second, strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, list(leaves.values()), case.grad_y)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op):
    """Also where the incoming gradient is a constant: a gradient penalty must not lose its share in silence."""
    case = make_case(5, 6, 7, 2, torch.float64)
    x = case.x.requires_grad_()
    y = call(op, case, a=case.a.requires_grad_())
    for loss in (y.sum(), y.square().sum()):
        with pytest.raises(RuntimeError, match=f"{op.__name__}.*create_graph=True is not supported"):
            torch.autograd.grad(loss, x, create_graph=True)


def test_x_used_more_than_once():
    """q and v projections and a residual share x, adapters may be shared as well: gradients add up."""
    query, value = make_case(9, 12, 12, 3, torch.float64, dropout_p=0.3), make_case(9, 12, 12, 3, torch.float64, seed=1)

    def block(linear, x, a):
        one = linear(x, query.weight, None, a, query.b, 1.5, **query.options)
        two = linear(x, value.weight, None, value.a, value.b, 0.5, **query.options)
        three = linear(one, value.weight, value.bias, a, query.b, 1.0, **query.options)
        return one * two + three + x

    results = []
    for linear in (lora_linear, reference.lora_linear):
        x, a = query.x.clone().requires_grad_(), query.a.clone().requires_grad_()
        y = block(linear, x, a)
        y.backward(query.grad_y)
        results.append((y.detach(), x.grad, a.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_result_may_be_changed_in_place():
    """mul_ and relu_ on the result must not disturb backward: y is not saved."""
    case = make_case(9, 12, 20, 3, torch.float64, dropout_p=0.3)
    x = case.x.requires_grad_()
    (got,) = torch.autograd.grad(call(lora_linear, case).mul_(2.0).relu_(), x, case.grad_y)
    (expected,) = torch.autograd.grad((call(lora_linear, case) * 2.0).relu(), x, case.grad_y)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("op", OPS)
def test_checkpoint_recomputes_the_same_mask(op, use_reentrant):
    case = make_case(33, 40, 50, 4, dropout_p=0.3).replace(seed=None)

    def run(wrap):
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("x", "a", "b")}
        torch.manual_seed(9)
        y = wrap(lambda x, a, b: call(op, case, x=x, a=a, b=b), *leaves.values())
        torch.rand(3)  # moves the generator on between forward and recomputation
        y.backward(case.grad_y)
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    expected = run(lambda function, *rest: function(*rest))
    got = run(functools.partial(checkpoint, use_reentrant=use_reentrant))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("op", OPS)
def test_without_gradients(op, context):
    case = make_case(33, 40, 50, 4, vector=True, dropout_p=0.3)
    expected = call(op, case, a=case.a.detach().requires_grad_())
    assert expected.requires_grad
    with context():
        got = call(op, case, x=case.x.clone(), a=case.a.detach().requires_grad_())
    assert not got.requires_grad and got.grad_fn is None
    assert torch.equal(got, expected)
    frozen = call(op, case)
    assert not frozen.requires_grad and torch.equal(frozen, expected)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=readable_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda dtype: f"x={NAMES[dtype]}")
def test_autocast(dtype, autocast_dtype):
    """Result and gradients have the dtypes of F.linear's under autocast, and the values of the cast arguments."""
    case = make_case(33, 40, 50, 4, dtype, dropout_p=0.3)
    with torch.autocast(DEVICE.type, autocast_dtype):
        expected_dtype = F.linear(case.x, case.weight, case.bias).dtype
    casts = {name: getattr(case, name).to(expected_dtype) for name in ("x", "weight", "bias")}
    expected = evaluate(
        lora_linear, case.replace(**casts, grad_y=case.grad_y.to(expected_dtype)), ("x", "bias", "a", "b")
    )
    leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("x", "bias", "a", "b")}
    with torch.autocast(DEVICE.type, autocast_dtype):
        y = lora_linear(weight=case.weight, scale=case.scale, **leaves, **case.options)
    assert y.dtype == expected_dtype
    assert torch.equal(y, expected["y"])
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y.to(expected_dtype))
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert torch.equal(grad, expected[f"grad_{name}"].to(leaf.dtype)), name


def test_autocast_trained_weight():
    case = make_case(33, 40, 50, 4)
    weight = case.weight.requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = lora_linear(case.x, weight, case.bias, case.a, case.b, 1.0)
        expected = F.linear(case.x, weight, case.bias)
    assert y.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(grad, torch.autograd.grad(expected.sum(), weight)[0])


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=readable_id)
def test_autocast_delta(autocast_dtype):
    """The base layer's output decides: x follows it, and its gradient comes back in x's own dtype."""
    case = make_case(33, 40, 50, 4, dropout_p=0.3)
    x = case.x.requires_grad_()
    with torch.autocast(DEVICE.type, autocast_dtype):
        y = F.linear(x, case.weight)
        got = lora_delta(y, x, case.a, case.b, 1.5, **case.options)
    expected = lora_delta(y, x.to(autocast_dtype), case.a, case.b, 1.5, **case.options)
    assert got.dtype == autocast_dtype and torch.equal(got, expected)
    assert torch.autograd.grad(got.sum(), x)[0].dtype == torch.float32


def test_device_without_kernel_is_served_by_the_reference(monkeypatch):
    case = make_case(33, 40, 50, 4, vector=True, dropout_p=0.3)
    expected = {op: evaluate(op, case, FROZEN_BASE) for op in (lora_linear, delta_op)}
    monkeypatch.setattr(_library, "has_kernel", lambda device_type: False)
    for name in ("_lora_linear_forward", "_lora_delta_forward", "_lora_backward"):
        monkeypatch.setattr(torch.ops.pyfused, name, None)
    for op, results in expected.items():
        got = evaluate(op, case, FROZEN_BASE)
        for name, value in results.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=f"{op.__name__}: {name}")


@pytest.mark.parametrize("op", OPS)
def test_meta_device(op):
    case = make_case((2, 3), 6, 7, 2, torch.bfloat16, torch.float32, dropout_p=0.3)
    fields = ("x", "weight", "bias", "a", "b", "grad_y", "seed")
    meta = case.replace(**{name: getattr(case, name).to("meta") for name in fields})
    x = meta.x.requires_grad_()
    y = call(op, meta.replace(x=x))
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 6), torch.bfloat16, "meta")
    (grad_x,) = torch.autograd.grad(y, x, meta.grad_y)
    assert (grad_x.shape, grad_x.dtype) == (x.shape, x.dtype)
    assert call(op, meta.replace(seed=None)).shape == (2, 3, 6)
