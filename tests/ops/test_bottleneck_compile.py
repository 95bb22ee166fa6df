"""torch.library.opcheck on the bottleneck's raw ops, fake tensors, and torch.compile of the public op."""

from __future__ import annotations

import pytest
import torch
from bottleneck_cases import TENSORS, evaluate, make_case
from helpers import DEVICE, readable_id, seed_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pyfused.ops import bottleneck

RAW = torch.ops.pyfused
SAMPLES = {
    "plain": make_case(20, 6, 3, residual=None, biases=False),
    "everything": make_case((2, 10), 6, 3, residual="other", scale="channels", dropout_p=0.5),
    "learned-scale": make_case((2, 10), 6, 3, residual="other", scale="learned"),
    "one-dimensional": make_case((), 6, 3, residual="other", scale="learned"),
    "no-rows": make_case((2, 0), 6, 3, dropout_p=0.5),
    "mixed": make_case((2, 10), 6, 3, torch.bfloat16, torch.float32, scale="channels", dropout_p=0.5),
    "bf16": make_case((2, 10), 6, 3, torch.bfloat16, dropout_p=0.5),
    "fp64": make_case(5, 6, 3, torch.float64, dropout_p=0.5),
}
_strided = make_case((4, 10), 6, 3, residual="other", dropout_p=0.5)
SAMPLES["strided"] = _strided.replace(
    x=_strided.x.transpose(0, 1).contiguous().transpose(0, 1),
    w_down=_strided.w_down.t().contiguous().t(),
    w_up=_strided.w_up.t().contiguous().t(),
    grad_y=torch.ones(()).expand(4, 10, 6),
)


def arguments(case):
    """Those of the raw forward, and what follows the tensors in the raw backward."""
    vector = case.scale if isinstance(case.scale, torch.Tensor) else None
    residual = case.residual.clone() if case.residual is case.x else case.residual
    tensors = (case.x, residual, case.w_down, case.b_down, case.w_up, case.b_up)
    return (*tensors, vector), (5, 1.5, case.dropout_p, case.seed if case.dropout_p > 0.0 else None)


def backward_arguments(case, needs):
    (x, _, w_down, b_down, w_up, b_up, vector), rest = arguments(case)
    z = RAW._bottleneck_forward(x, None, w_down, b_down, w_up, b_up, vector, *rest)[1]
    return case.grad_y, x, w_down, w_up, b_down, b_up, z, vector, *rest, needs


@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_forward(sample):
    tensors, rest = arguments(SAMPLES[sample])
    torch.library.opcheck(RAW._bottleneck_forward.default, (*tensors, *rest))


@pytest.mark.parametrize("needs", [0, 1, 2, 4, 8, 16, 32, 65, 127])
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_backward(sample, needs):
    # The dynamic-shape check costs a second: once is enough for a sample.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    if needs == 127:
        utils += ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(
        RAW._bottleneck_backward.default, backward_arguments(SAMPLES[sample], needs), test_utils=utils
    )


@pytest.mark.parametrize("sample", SAMPLES)
def test_fake_strides_are_the_real_ones(sample):
    """Fake kernels promise the strides that the real ones deliver: inductor lays out its buffers by them."""
    case = SAMPLES[sample]
    tensors, rest = arguments(case)
    forward, backward = (*tensors, *rest), backward_arguments(case, 127)
    real = (*RAW._bottleneck_forward(*forward), *RAW._bottleneck_backward(*backward))
    with FakeTensorMode() as mode:

        def fake(values):
            return [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in values]

        promised = (*RAW._bottleneck_forward(*fake(forward)), *RAW._bottleneck_backward(*fake(backward)))
    for one, other in zip(real, promised, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=readable_id)
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_compile(residual, dtypes, backend):
    if backend == "inductor" and (residual != "x" or dtypes[0] != dtypes[1]):
        pytest.skip("once is enough: compilation takes seconds")
    case = make_case((2, 10), 12, 4, *dtypes, residual=residual, scale="channels", dropout_p=0.3)

    def eager(x, residual, w_down, b_down, w_up, b_up, scale, **options):
        return bottleneck(x, residual, w_down, b_down, w_up, b_up, scale=scale, **options) * 2.0

    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    expected = evaluate(eager, case)
    for name, value in evaluate(compiled, case).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_compiled_dropout_draws_its_seed_inside():
    """Each call draws a new mask, its backward uses the same: linear in x, so <grad_y, y> = <grad_x, x>."""
    case = make_case(64, 12, 4, torch.float64, residual=None, biases=False)
    x = case.x.requires_grad_()
    compiled = torch.compile(
        lambda x: bottleneck(x, None, case.w_down, None, case.w_up, None, "linear", 1.0, 0.5, True),
        fullgraph=True,
        backend="aot_eager",
    )
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    for y in (first, second):
        (grad_x,) = torch.autograd.grad(y, x, case.grad_y)
        torch.testing.assert_close((grad_x * x).sum(), (case.grad_y * y).sum())


def test_compile_under_autocast():
    case = make_case((2, 10), 12, 4)
    fixed = {name: getattr(case, name) for name in TENSORS if name not in ("x", "residual")}

    def forward(x):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return bottleneck(x, x, **fixed, dropout_p=0.3, training=True, seed=seed_tensor(3))

    x = case.x.requires_grad_()
    expected, got = forward(x), torch.compile(forward, fullgraph=True, backend="aot_eager")(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


def test_export():
    case = make_case((2, 10), 12, 4)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return bottleneck(x, x, case.w_down, case.b_down, case.w_up, case.b_up)

    exported = torch.export.export(Layer(), (case.x,))
    assert torch.equal(exported.module()(case.x), Layer()(case.x))
