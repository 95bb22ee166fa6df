"""torch.library.opcheck on IA3's raw ops, fake tensors, and torch.compile of the public ops."""

from __future__ import annotations

import pytest
import torch
from ia3_cases import SIDES, evaluate, make_case
from torch._subclasses.fake_tensor import FakeTensorMode

from pyfused.ops import ia3_linear, ia3_scale

RAW = torch.ops.pyfused
SHAPES = {"plain": (5, 6, 7), "lead": ((2, 3), 6, 7), "one-dimensional": ((), 6, 7), "no-rows": ((2, 0), 6, 7)}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.bfloat16, torch.float32),
    "fp64": (torch.float64, torch.float64),
}


def sample(shape: str, dtypes: str, side: str):
    case = make_case(*SHAPES[shape], *DTYPES[dtypes], side=side, bias=shape != "plain")
    if shape == "lead":
        case = case.replace(weight=case.weight.t().contiguous().t(), grad_y=case.grad_y[..., :1].expand(2, 3, 6))
    return case


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def utils(everything: bool) -> tuple[str, ...]:
    """Tracing takes most of opcheck's time: once for every case, with all results asked for."""
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    return (*checks, "test_aot_dispatch_dynamic") if everything else checks


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_opcheck_linear(shape, dtypes, side):
    case, input_side = sample(shape, dtypes, side), side == "input"
    for keep in (False, True):
        arguments = (case.x, case.weight, case.bias, case.scale, input_side, keep)
        torch.library.opcheck(RAW._ia3_linear_forward.default, arguments, test_utils=utils(keep))
    saved = case.x if input_side else RAW._ia3_linear_forward(*arguments)[1]
    for needs in (0, 1, 2, 3):
        arguments = (case.grad_y, saved, case.weight, case.bias, case.scale, input_side, needs)
        torch.library.opcheck(RAW._ia3_linear_backward.default, arguments, test_utils=utils(needs == 3))


@pytest.mark.parametrize(("shape", "dim"), [((2, 3, 4), 1), ((5, 6), 1), ((3,), 0), ((2, 0, 3), 0)])
def test_opcheck_scale(shape, dim):
    x, scale = torch.randn(shape), torch.randn(shape[dim])
    torch.library.opcheck(RAW._ia3_scale_forward.default, (x, scale, dim))
    for needs in (0, 1, 2, 3):
        torch.library.opcheck(RAW._ia3_scale_backward.default, (torch.randn(shape), x, scale, dim, needs))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fake_strides_are_the_real_ones(shape, side):
    case, input_side = sample(shape, "fp32", side), side == "input"
    tensors = [case.x, case.weight, case.scale, case.grad_y]

    def outputs(x, weight, scale, grad_y):
        y, base = RAW._ia3_linear_forward(x, weight, None, scale, input_side, True)
        saved = x if input_side else base
        return y, base, *RAW._ia3_linear_backward(grad_y, saved, weight, None, scale, input_side, 3)

    real = outputs(*tensors)
    with FakeTensorMode() as mode:
        fake = outputs(*map(mode.from_tensor, tensors))
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_compiled_is_eager(side, dynamic, dtypes):
    def function(x, weight, bias, scale, side):
        return ia3_scale(ia3_linear(x, weight, bias, scale, side) * 2.0, scale.new_full((6,), 0.5), -1)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ("plain", "lead"):
        case = sample(shape, dtypes, side)
        got = evaluate(compiled, case)
        for name, value in evaluate(function, case).items():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_by_inductor():
    case = make_case((4, 5), 6, 7)
    got = evaluate(torch.compile(ia3_linear, fullgraph=True), case)
    for name, value in evaluate(ia3_linear, case).items():
        torch.testing.assert_close(got[name], value)


@pytest.mark.parametrize("dim", [1, -1])
def test_compiled_scale(dim):
    compiled = torch.compile(ia3_scale, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(2, 6, 5, 6), torch.randn(2, 6, 5, 6).to(memory_format=torch.channels_last)):
        scale = torch.randn(6)
        torch.testing.assert_close(compiled(x, scale, dim), ia3_scale(x, scale, dim))
