"""torch.library.opcheck on every raw op, fake tensors, and torch.compile of the public ops."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, evaluate, make_case, readable_id, seed_tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pyfused.ops import lora_delta, lora_linear

OPS = [pytest.param(lora_linear, id="linear"), pytest.param(lora_delta, id="delta")]
RAW = torch.ops.pyfused

# What torch.compile must not get wrong: ranks of x, layouts, optional arguments present and absent, mixed dtypes.
SAMPLES = {
    "plain": make_case(5, 6, 7, 2, bias=False),
    "everything": make_case((2, 3), 6, 7, 3, vector=True, dropout_p=0.5),
    "one-dimensional": make_case((), 6, 7, 2, vector=True),
    "no-rows": make_case((2, 0), 6, 7, 2, dropout_p=0.5),
    "mixed": make_case((2, 3), 6, 7, 2, torch.bfloat16, torch.float32, vector=True, dropout_p=0.5),
    "fp64": make_case(5, 6, 7, 2, torch.float64, dropout_p=0.5),
    "large": make_case(150, 140, 270, 16, torch.bfloat16, dropout_p=0.1),
}
_strided = make_case((4, 3), 6, 7, 2, vector=True, dropout_p=0.5)
SAMPLES["strided"] = _strided.replace(
    x=_strided.x.transpose(0, 1).contiguous().transpose(0, 1),
    weight=_strided.weight.t().contiguous().t(),
    a=_strided.a.t().contiguous().t(),
    b=_strided.b.t().contiguous().t(),
    grad_y=torch.ones(()).expand(4, 3, 6),
)


def options(case):
    """The last arguments of every raw op: scale_vector, scale, dropout_p, seed."""
    vector = case.scale if isinstance(case.scale, torch.Tensor) else None
    return vector, 1.5, case.dropout_p, case.seed if case.dropout_p > 0.0 else None


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_linear_forward(sample):
    case = SAMPLES[sample]
    arguments = (case.x, case.weight, case.bias, case.a, case.b, *options(case))
    torch.library.opcheck(RAW._lora_linear_forward.default, arguments)


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_delta_forward(sample):
    case = SAMPLES[sample]
    torch.library.opcheck(RAW._lora_delta_forward.default, (case.grad_y, case.x, case.a, case.b, *options(case)))


@pytest.mark.parametrize("needs", [0, 1, 2, 4, 8, 16, 31])
@pytest.mark.parametrize("with_weight", [True, False], ids=["linear", "delta"])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_backward(sample, with_weight, needs):
    case = SAMPLES[sample]
    s = RAW._lora_delta_forward(case.grad_y, case.x, case.a, case.b, *options(case))[1]
    weight = case.weight if with_weight else None
    arguments = (case.grad_y, case.x, weight, case.a, case.b, s, *options(case), needs)
    # The dynamic-shape check costs a second: once is enough for a sample.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    if needs == 31:
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(RAW._lora_backward.default, arguments, test_utils=utils)


@pytest.mark.parametrize("sample", SAMPLES)
def test_fake_strides_are_the_real_ones(sample):
    """Fake kernels promise the strides that the real ones deliver: inductor lays out its buffers by them."""
    case = SAMPLES[sample]
    arguments = (case.grad_y, case.x, case.weight, case.a, case.b)
    s = RAW._lora_delta_forward(case.grad_y, case.x, case.a, case.b, *options(case))[1]

    def outputs(grad_y, x, weight, a, b, s, rest):
        return (
            *RAW._lora_linear_forward(x, weight, None, a, b, *rest),
            *RAW._lora_delta_forward(grad_y, x, a, b, *rest),
            *RAW._lora_backward(grad_y, x, weight, a, b, s, *rest, 31),
        )

    real = outputs(*arguments, s, options(case))
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (*arguments, s)]
        rest = [mode.from_tensor(item) if isinstance(item, torch.Tensor) else item for item in options(case)]
        fake = outputs(*fakes, rest)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype, one.device) == (
            other.shape,
            other.stride(),
            other.dtype,
            other.device,
        )


def test_fake_tensors_draw_seeds():
    case = make_case((2, 3), 6, 7, 2)
    with FakeTensorMode() as mode:
        x, weight, a, b = (mode.from_tensor(getattr(case, name)) for name in ("x", "weight", "a", "b"))
        y = lora_linear(x, weight, None, a, b, 1.0, dropout_p=0.5, training=True)
    assert y.shape == (2, 3, 6)


def assert_compiled_is_eager(op, dropout_p, *cases, **how):
    """Results and gradients of the compiled op, in a larger graph, are those of the op."""

    def eager(y, x, weight, bias, a, b, scale, seed):
        if op is lora_linear:
            return lora_linear(x, weight, bias, a, b, scale, dropout_p, True, seed) * 2.0
        return lora_delta(y, x, a, b, scale, dropout_p, True, seed) * 2.0

    compiled = torch.compile(eager, fullgraph=True, **how)
    needs = ("x", "a", "b", "scale", "bias") if op is lora_linear else ("x", "a", "b", "scale")
    for case in cases:

        def run(function, case=case):
            def call(x, weight, bias, a, b, scale, seed, **_):
                return function(case.grad_y, x, weight, bias, a, b, scale, seed)

            return evaluate(call, case, needs)

        got = run(compiled)
        for name, value in run(eager).items():
            torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=readable_id)
@pytest.mark.parametrize("vector", [False, True], ids=["float", "vector"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("op", OPS)
def test_compile(op, dropout_p, vector, dtypes):
    assert_compiled_is_eager(op, dropout_p, make_case((2, 5), 12, 20, 4, *dtypes, vector=vector), backend="aot_eager")


@pytest.mark.parametrize("op", OPS)
def test_compile_with_inductor(op):
    assert_compiled_is_eager(op, 0.3, make_case((2, 5), 12, 20, 4), backend="inductor")


@pytest.mark.parametrize("op", OPS)
def test_compile_once_for_every_batch_size(op):
    counter = CompileCounterWithBackend("aot_eager")
    cases = [make_case(lead, 12, 20, 4) for lead in ((2, 5), (3, 7), (4, 130))]
    assert_compiled_is_eager(op, 0.3, *cases, backend=counter, dynamic=True)
    # torch 2.13 also hands over an empty graph, from a first attempt that it starts again.
    assert sum(len(graph.graph.nodes) > 0 for graph in counter.graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_dropout_draws_its_seed_inside(backend):
    """Each call draws a new mask, its backward uses the same: linear in x, so <grad_y, y> = <grad_x, x>."""
    case = make_case(64, 12, 20, 4, torch.float64)
    weight = torch.zeros_like(case.weight)
    x = case.x.requires_grad_()
    compiled = torch.compile(
        lambda x: lora_linear(x, weight, None, case.a, case.b, 1.0, dropout_p=0.5, training=True),
        fullgraph=True,
        backend=backend,
    )
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    for y in (first, second):
        (grad_x,) = torch.autograd.grad(y, x, case.grad_y)
        torch.testing.assert_close((grad_x * x).sum(), (case.grad_y * y).sum())


def test_compile_under_autocast():
    case = make_case((2, 5), 12, 20, 4)

    def forward(x, a):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return lora_linear(x, case.weight, case.bias, a, case.b, 1.5, 0.3, True, seed_tensor(3))

    x, a = case.x.requires_grad_(), case.a.requires_grad_()
    expected, got = forward(x, a), torch.compile(forward, fullgraph=True, backend="aot_eager")(x, a)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected)
    for one, other in zip(
        torch.autograd.grad(got.sum(), [x, a]), torch.autograd.grad(expected.sum(), [x, a]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_export():
    case = make_case((2, 5), 12, 20, 4)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_linear(x, case.weight, case.bias, case.a, case.b, 1.5)

    exported = torch.export.export(Layer(), (case.x,))
    assert torch.equal(exported.module()(case.x), Layer()(case.x))
