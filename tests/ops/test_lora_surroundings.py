"""What surrounds a call must not change what it computes: autocast, forward-mode AD, devices, what is saved."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, EMULATED, make_case
from torch.autograd import forward_ad

from pyfused.ops import lora_delta, lora_linear
from pyfused.reference import lora as reference


def gradients(case, *, inside, outside, dtype=torch.bfloat16):
    """Gradients with the forward and the backward inside or outside of autocast."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (case.x, case.a, case.b)]
    x, a, b = leaves
    with torch.autocast(DEVICE.type, dtype, enabled=inside):
        y = lora_linear(x, case.weight, case.bias, a, b, 1.7)
    with torch.autocast(DEVICE.type, dtype, enabled=outside):
        return torch.autograd.grad(y, leaves, torch.ones_like(y))


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_inside_autocast_is_the_backward_outside(dtype, autocast):
    """Autocast around a backward would make its GEMM return another dtype than the buffer that it is written to."""
    case = make_case(37, 96, 64, 5, dtype)
    expected = gradients(case, inside=False, outside=False)
    for got, want in zip(gradients(case, inside=False, outside=True, dtype=autocast), expected, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_backward_outside_of_autocast_of_a_forward_inside():
    case = make_case(37, 96, 64, 5)
    for got in gradients(case, inside=True, outside=False):
        assert got.dtype == torch.float32 and got.isfinite().all()


def test_raw_forward_ignores_autocast_and_makes_no_partial_graph():
    case = make_case(8, 12, 16, 3)
    arguments = (case.x, case.weight, None, case.a, case.b, None, 1.5, 0.0, None)
    plain = torch.ops.pyfused._lora_linear_forward(*arguments)[0]
    with torch.autocast(DEVICE.type, torch.bfloat16):
        torch.testing.assert_close(torch.ops.pyfused._lora_linear_forward(*arguments)[0], plain, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["linear", "delta"])
def test_forward_mode(op):
    """Dual numbers do not require gradients: the native op would drop the adapter's tangent without a word."""
    case = make_case(5, 6, 7, 3, torch.float64)
    tangent = torch.randn_like(case.x)
    y = F.linear(case.x, case.weight)

    def fused(x):
        return lora_linear(x, case.weight, None, case.a, case.b, 0.7) if op == "linear" else call(lora_delta, x)

    def plain(x):
        return (
            reference.lora_linear(x, case.weight, None, case.a, case.b, 0.7)
            if op == "linear"
            else call(reference.lora_delta, x)
        )

    def call(delta, x):
        return delta(y, x, case.a, case.b, 0.7)

    expected = torch.func.jvp(plain, (case.x,), (tangent,))
    for got, want in zip(torch.func.jvp(fused, (case.x,), (tangent,)), expected, strict=True):
        torch.testing.assert_close(got, want)
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(fused(forward_ad.make_dual(case.x, tangent))).tangent
    torch.testing.assert_close(got, expected[1])


@pytest.mark.parametrize("name", ["weight", "bias", "a", "b", "scale"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_an_argument_left_on_meta_is_refused(name, training):
    """One meta tensor sends the call to the fake, which would return memory that nobody wrote."""
    case = make_case(5, 6, 7, 3, vector=True)
    arguments = {"x": case.x, "weight": case.weight, "bias": case.bias, "a": case.a, "b": case.b, "scale": case.scale}
    arguments["x"] = case.x.detach().clone().requires_grad_(training)
    with pytest.raises(TypeError, match=f"lora_linear: {name} must be on x's device {DEVICE}, got meta"):
        lora_linear(**(arguments | {name: arguments[name].detach().to("meta")}))


def test_an_error_of_the_surroundings_stays_what_it_is():
    case = make_case(5, 6, 7, 3)
    weight, bias = case.weight.bfloat16(), case.bias.bfloat16()

    def refuse(tensor):
        raise RuntimeError("not this one")

    with torch.autocast(DEVICE.type, torch.bfloat16), pytest.raises(RuntimeError, match="not this one"):
        with torch.autograd.graph.saved_tensors_hooks(refuse, lambda tensor: tensor):
            lora_linear(case.x.requires_grad_(), weight, bias, case.a, case.b, 1.0)


def test_a_frozen_adapter_saves_no_activation():
    case = make_case(64, 48, 32, 4)
    x = case.x.detach().clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = lora_linear(x * 1, case.weight, None, case.a.detach(), case.b.detach(), 1.0)
    assert x.shape not in saved and (64, 4) not in saved
    want = torch.autograd.grad(F.linear(x, case.weight + case.b @ case.a).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], want)


@pytest.mark.parametrize("scale", ["2.0", None, [1.0]], ids=repr)
def test_a_scale_that_is_no_number_is_refused(scale):
    case = make_case(5, 6, 7, 3)
    with pytest.raises(TypeError, match="lora_linear: scale must be a float or a tensor"):
        lora_linear(case.x, case.weight, None, case.a, case.b, scale)


def test_sums_over_many_rows_keep_fp32_accuracy():
    """One value all over is the worst case for a running sum: its rounding errors do not cancel."""
    rows = 16384 if EMULATED else 65536
    x, weight = torch.ones(rows, 4), torch.zeros(32, 4)
    a, b = torch.ones(2, 4, requires_grad=True), torch.zeros(32, 2, requires_grad=True)
    bias = torch.zeros(32, requires_grad=True)
    y = lora_linear(x, weight, bias, a, b, 1.0)
    grad_bias, grad_b = torch.autograd.grad(y, (bias, b), torch.full_like(y, 0.1))
    exact = rows * float(torch.tensor(0.1))
    torch.testing.assert_close(grad_bias, torch.full_like(grad_bias, exact), rtol=1.3e-6, atol=0)
    torch.testing.assert_close(grad_b, torch.full_like(grad_b, 4 * exact), rtol=5e-6, atol=0)


def test_delta_on_its_own_input_compiles():
    case = make_case(5, 7, 7, 3)
    compiled = torch.compile(lambda x: lora_delta(x, x, case.a, case.b, 1.0), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(case.x), lora_delta(case.x, case.x, case.a, case.b, 1.0))
