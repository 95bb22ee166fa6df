"""What surrounds a call of bottleneck: saved tensors, repeated and double backward, checkpoints, autocast, devices."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from bottleneck_cases import TENSORS, evaluate, make_case
from helpers import DEVICE, EMULATED, NAMES, readable_id, seed_tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from pyfused import _library
from pyfused.ops import bottleneck
from pyfused.reference import bottleneck as reference

DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float16,) * 2]


def call(op, case, **changes):
    return op(**({name: getattr(case, name) for name in TENSORS} | changes), **case.options)


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_saves_x_and_the_pre_activation_alone(dtypes):
    case = make_case((3, 17), 40, 12, *dtypes, residual="other", scale="channels", dropout_p=0.1)
    leaves = {name: getattr(case, name).requires_grad_() for name in TENSORS}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        call(bottleneck, case, **leaves)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*leaves.values(), case.seed)}
    new = [tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in storages]
    product = torch.float32 if dtypes[0] != dtypes[1] else dtypes[0]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in new] == [((51, 12), product)]


def test_a_frozen_adapter_does_not_save_x():
    case = make_case(64, 48, 12)
    x = case.x.detach().clone().requires_grad_() * 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.shape) or tensor, lambda t: t):
        y = call(bottleneck, case, x=x, residual=x)
    assert x.shape not in saved
    assert y.requires_grad


def test_retain_graph_and_twice_the_same_x():
    case = make_case(33, 40, 12, torch.float64, residual="other", dropout_p=0.3)

    def block(op, x, w_down):
        one = call(op, case, x=x, residual=x, w_down=w_down)
        return one * call(op, case, x=one, residual=x, w_down=w_down) + x

    results = []
    for op in (bottleneck, reference.bottleneck):
        x, w_down = case.x.clone().requires_grad_(), case.w_down.clone().requires_grad_()
        y = block(op, x, w_down)
        y.backward(case.grad_y, retain_graph=True)
        y.backward(case.grad_y)
        results.append((y.detach(), x.grad, w_down.grad))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_result_may_be_changed_in_place():
    case = make_case(33, 40, 12, torch.float64, dropout_p=0.3)
    x = case.x.requires_grad_()
    (got,) = torch.autograd.grad(call(bottleneck, case).mul_(2.0).relu_(), x, case.grad_y)
    (expected,) = torch.autograd.grad((call(bottleneck, case) * 2.0).relu(), x, case.grad_y)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpoint_recomputes_the_same_mask(use_reentrant):
    case = make_case(33, 40, 12, dropout_p=0.3).replace(seed=None)

    def run(wrap):
        leaves = {name: getattr(case, name).clone().requires_grad_() for name in ("x", "w_down", "w_up")}
        torch.manual_seed(9)
        y = wrap(lambda x, w_down, w_up: call(bottleneck, case, x=x, w_down=w_down, w_up=w_up), *leaves.values())
        torch.rand(3)  # moves the generator on between forward and recomputation
        y.backward(case.grad_y)
        return [y.detach(), *(leaf.grad for leaf in leaves.values())]

    expected = run(lambda function, *rest: function(*rest))
    for one, other in zip(run(functools.partial(checkpoint, use_reentrant=use_reentrant)), expected, strict=True):
        assert torch.equal(one, other)


def test_double_backward_is_an_error():
    case = make_case(5, 8, 3)
    x = case.x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"bottleneck: backward with create_graph=True is not supported"):
        torch.autograd.grad(call(bottleneck, case).sum(), x, create_graph=True)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("rows", [5, 33])
def test_without_gradients(rows, context):
    case = make_case(rows, 40, 12, dropout_p=0.3)
    expected = call(bottleneck, case, w_up=case.w_up.detach().requires_grad_())
    assert expected.requires_grad
    with context():
        got = call(bottleneck, case, w_up=case.w_up.detach().requires_grad_())
    assert not got.requires_grad and torch.equal(got, expected)


def test_same_residual_or_a_copy_of_it():
    """The shared path gives the values of the general one."""
    case = make_case(33, 40, 12, torch.float64, dropout_p=0.3)
    shared = evaluate(bottleneck, case)
    apart = evaluate(bottleneck, case.replace(residual=case.x.clone()))
    torch.testing.assert_close(shared["y"], apart["y"], rtol=0, atol=0)
    torch.testing.assert_close(shared["grad_x"], apart["grad_x"] + apart["grad_residual"])


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=readable_id)
@pytest.mark.parametrize("residual", ["x", "other", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: f"x={NAMES[dtype]}")
def test_autocast(dtype, residual, autocast_dtype):
    """The dtype of the plain computation under autocast, and the values of the cast arguments."""
    case = make_case(33, 40, 12, dtype, residual=residual, dropout_p=0.3)
    parameters = {name: getattr(case, name).clone().requires_grad_() for name in ("w_down", "b_down", "w_up", "b_up")}
    with torch.autocast(DEVICE.type, autocast_dtype):
        h = F.gelu(F.linear(case.x, case.w_down, case.b_down))
        plain = F.linear(h, case.w_up, case.b_up) * 1.5
        plain = plain if residual is None else case.residual + plain
        got = call(bottleneck, case, **parameters)
    assert got.dtype == plain.dtype
    product = dtype if dtype == torch.float64 else autocast_dtype
    cast = {name: value.detach().to(product) for name, value in parameters.items()}
    delta = call(bottleneck, case, x=case.x.to(product), residual=None, **cast)
    expected = delta if residual is None else case.residual + delta
    torch.testing.assert_close(got, expected, rtol=0, atol=4 * torch.finfo(got.dtype).eps * expected.abs().max().item())
    for grad, parameter in zip(
        torch.autograd.grad(got.sum(), list(parameters.values())), parameters.values(), strict=True
    ):
        assert grad.dtype == parameter.dtype and grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_backward_inside_autocast_is_the_backward_outside(dtype):
    case = make_case(37, 40, 12, dtype)
    results = []
    for inside in (False, True):
        leaves = [getattr(case, name).detach().clone().requires_grad_() for name in ("x", "w_down", "w_up")]
        y = call(bottleneck, case, **dict(zip(("x", "w_down", "w_up"), leaves, strict=True)))
        with torch.autocast(DEVICE.type, torch.float16, enabled=inside):
            results.append(torch.autograd.grad(y, leaves, case.grad_y))
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_device_without_kernel_is_served_by_the_reference(monkeypatch):
    case = make_case(33, 40, 12, residual="other", scale="channels", dropout_p=0.3)
    expected = evaluate(bottleneck, case)
    monkeypatch.setattr(_library, "has_kernel", lambda device_type: False)
    monkeypatch.setattr(_library, "autograd", None)
    for name, value in evaluate(bottleneck, case).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_meta_device():
    case = make_case((2, 3), 7, 2, torch.bfloat16, torch.float32, dropout_p=0.3).map(lambda tensor: tensor.to("meta"))
    x = case.x.requires_grad_()
    y = call(bottleneck, case, residual=x)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 7), torch.bfloat16, "meta")
    assert torch.autograd.grad(y, x, case.grad_y)[0].shape == x.shape


def test_forward_mode():
    """Dual numbers do not require gradients: the native op would drop the tangent without a word."""
    case = make_case(5, 7, 3, torch.float64)
    tangent = torch.randn_like(case.x)
    expected = torch.func.jvp(lambda x: call(reference.bottleneck, case, x=x, residual=x), (case.x,), (tangent,))[1]
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.x, tangent)
        got = forward_ad.unpack_dual(call(bottleneck, case, x=x, residual=x)).tangent
    torch.testing.assert_close(got, expected)


def test_seed_from_torchs_generator():
    """manual_seed reproduces a run; without it every call draws a new mask; p = 0 and eval draw nothing."""
    case = make_case(30, 40, 4)
    arguments = {name: getattr(case, name) for name in TENSORS}

    def run(**options):
        return bottleneck(**arguments, **options)

    torch.manual_seed(5)
    first, second = run(dropout_p=0.5, training=True), run(dropout_p=0.5, training=True)
    torch.manual_seed(5)
    assert torch.equal(run(dropout_p=0.5, training=True), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    expected = run()
    assert torch.equal(run(dropout_p=0.5, training=False), expected)
    assert torch.equal(run(dropout_p=0.0, training=True), expected)
    run(dropout_p=0.5, training=True, seed=seed_tensor(1))
    assert torch.equal(torch.get_rng_state(), state)


def test_sums_over_many_rows_keep_fp32_accuracy():
    """One value all over is the worst case for a running sum: its rounding errors do not cancel."""
    rows = 16384 if EMULATED else 65536
    x, b_down, b_up = torch.ones(rows, 4), torch.zeros(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    y = bottleneck(x, None, torch.ones(2, 4), b_down, torch.ones(4, 2), b_up, "linear")
    grads = torch.autograd.grad(y, (b_down, b_up), torch.full_like(y, 0.1))
    exact = rows * float(torch.tensor(0.1))
    torch.testing.assert_close(grads[1], torch.full_like(grads[1], exact), rtol=1.3e-6, atol=0)
    torch.testing.assert_close(grads[0], torch.full_like(grads[0], 4 * exact), rtol=1.3e-6, atol=0)
