"""lora_linear_shared: opcheck, torch.compile, threads, bad arguments, memory fences, devices without a kernel."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE, EMULATED, cpu_kernels_only, cpu_only, run_in_threads
from projections import GROUPS, make_group, run, separately
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from pyfused import _library
from pyfused.ops import Projection, lora_linear, lora_linear_shared

RAW = torch.ops.pyfused


def raw_arguments(group, lead=(5,), k=7, **options):
    x, projections, grad_y = make_group(GROUPS[group], lead, k, **options)
    columns = [list(column) for column in zip(*projections, strict=True)]
    weights, biases, a, b, scales, ps, _, seeds = columns
    vectors = [scale if isinstance(scale, Tensor) else None for scale in scales]
    factors = [1.0 if isinstance(scale, Tensor) else scale for scale in scales]
    tail = (vectors, factors, ps, seeds)
    return x, weights, biases, a, b, tail, grad_y


def both(x, weights, biases, a, b, tail, grad_y, needs):
    y, s = RAW._lora_linear_shared_forward(x, weights, biases, a, b, *tail)
    s = [one if down is not None else None for one, down in zip(s, a, strict=True)]
    grad_x, grads = RAW._lora_linear_shared_backward(grad_y, x, weights, a, b, s, *tail, needs)
    return [*y, *(one for one in s if one is not None), grad_x, *grads]


@cpu_only
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 0)])
def test_opcheck(group, lead):
    x, weights, biases, a, b, tail, grad_y = raw_arguments(group, lead, dtype=torch.bfloat16)
    torch.library.opcheck(RAW._lora_linear_shared_forward.default, (x, weights, biases, a, b, *tail))
    s = RAW._lora_linear_shared_forward(x, weights, biases, a, b, *tail)[1]
    s = [one if down is not None else None for one, down in zip(s, a, strict=True)]
    for needs in (0, 1, 2, 4, 8, 16, 31) if lead == (2, 3) else (31,):
        arguments = (grad_y, x, weights, a, b, s, *tail, [needs] * len(a))
        utils = ("test_schema", "test_autograd_registration", "test_faketensor")
        utils += ("test_aot_dispatch_dynamic",) if needs == 31 else ()
        torch.library.opcheck(RAW._lora_linear_shared_backward.default, arguments, test_utils=utils)


@cpu_only
@pytest.mark.parametrize("group", GROUPS)
def test_fake_strides_are_the_real_ones(group):
    arguments = raw_arguments(group, (4, 3))
    needs = [31] * len(GROUPS[group])
    real = both(*arguments, needs)
    with FakeTensorMode() as mode:

        def fake(value):
            if isinstance(value, Tensor):
                return mode.from_tensor(value)
            return type(value)(map(fake, value)) if isinstance(value, (list, tuple)) else value

        fakes = both(*map(fake, arguments), needs)
    for one, other in zip(real, fakes, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    x, projections, grad_y = make_group(GROUPS["some"], (2, 5), 12)

    def double(x, projections):
        return tuple(y * 2.0 for y in lora_linear_shared(x, projections))

    got = run(torch.compile(double, fullgraph=True, backend=backend), x, projections, grad_y)
    expected = run(double, x, projections, grad_y)
    for one, other in zip([*got[0], got[1], *got[2]], [*expected[0], expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(one, other)


def test_export():
    x, projections, _ = make_group(GROUPS["qkv"], (2, 5), 12, dropout_p=0.0)
    projections = [p._replace(training=False, seed=None) for p in projections]

    class Layer(torch.nn.Module):
        def forward(self, x):
            return lora_linear_shared(x, projections)

    for one, other in zip(torch.export.export(Layer(), (x,)).module()(x), Layer()(x), strict=True):
        assert torch.equal(one, other)


@cpu_kernels_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_with_any_number_of_threads(dtype):
    """Without the base products, which are the vendor's: weights of zero."""
    before = torch.get_num_threads()
    x, projections, grad_y = make_group([(600, 8), (130, 33), (64, 16)], (700,), 520, dtype)
    projections = [p._replace(weight=torch.zeros_like(p.weight)) for p in projections]
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            got = run(lora_linear_shared, x, projections, grad_y)
            results.append([*got[0], got[1], *got[2]])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_python_threads_at_once():
    groups = [
        make_group(GROUPS[name], (65,), 70, dtype) for name in GROUPS for dtype in (torch.float32, torch.bfloat16)
    ]
    expected = [run(lora_linear_shared, *group) for group in groups]
    failures = []

    def work(group, results):
        for _ in range(2 if EMULATED else 10):
            got = run(lora_linear_shared, *group)
            for one, other in zip([*got[0], got[1]], [*results[0], results[1]], strict=True):
                if not torch.equal(one, other):
                    failures.append(group)

    run_in_threads(work, zip(groups, expected, strict=True))
    assert not failures


@pytest.mark.parametrize("op", [separately, None], ids=["expected", "shared"])
def test_forward_mode(op):
    x, projections, _ = make_group(GROUPS["some"], (5,), 7, torch.float64, dropout_p=0.0)
    tangent = torch.randn_like(x)
    call = (lambda x: separately(lora_linear, x, projections)) if op else (lambda x: lora_linear_shared(x, projections))
    with forward_ad.dual_level():
        for p, y in zip(projections, call(forward_ad.make_dual(x, tangent)), strict=True):
            got = forward_ad.unpack_dual(y).tangent
            delta = 0.0 if p.a is None else ((tangent @ p.a.t()) * p.scale) @ p.b.t()
            torch.testing.assert_close(got, tangent @ p.weight.t() + delta)


def test_device_without_kernel_is_served_by_the_reference(monkeypatch):
    group = make_group(GROUPS["some"], (33,), 50)
    expected = run(lora_linear_shared, *group)
    monkeypatch.setattr(_library, "has_kernel", lambda device_type: False)
    got = run(lora_linear_shared, *group)
    for one, other in zip([*got[0], got[1], *got[2]], [*expected[0], expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_meta_device():
    x, projections, _ = make_group(GROUPS["some"], (2, 3), 7, torch.bfloat16)
    projections = [Projection(*(t.to("meta") if isinstance(t, Tensor) else t for t in p)) for p in projections]
    for p, y in zip(projections, lora_linear_shared(x.to("meta"), projections), strict=True):
        assert (y.shape, y.dtype, y.device.type) == ((2, 3, p.weight.shape[0]), torch.bfloat16, "meta")


CASE = make_group(GROUPS["some"], (4,), 7)
BAD = [
    (0, {"a": torch.ones(8, 6)}, ValueError, r"projections\[0\]: a must have shape \[R, 7\]"),
    (2, {"b": torch.ones(30, 4)}, ValueError, r"projections\[2\]: b must have shape \[N, 5\]"),
    (2, {"b": None}, TypeError, r"projections\[2\]: b must be a tensor, got NoneType"),
    (0, {"a": None}, TypeError, r"projections\[0\]: a must be a tensor, got NoneType"),
    (1, {"weight": torch.ones(24, 6)}, ValueError, r"projections\[1\]: weight must have shape \[N, 7\]"),
    (1, {"weight": torch.ones(24, 7).double()}, TypeError, r"projections\[1\]: weight must have x's dtype"),
    (1, {"bias": torch.ones(23)}, ValueError, r"projections\[1\]: bias must have shape \[24\]"),
    (1, {"weight": None}, TypeError, r"projections\[1\]: weight must be a tensor, got NoneType"),
    (0, {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (0, {"scale": "1"}, TypeError, r"projections\[0\]: scale must be a float or a tensor"),
    (0, {"seed": 3}, TypeError, r"projections\[0\]: seed must be an int64 tensor"),
    (0, {"a": torch.empty(8, 7, device="meta")}, TypeError, rf"a must be on x's device {DEVICE}, got meta"),
    (1, {"weight": torch.empty(24, 7, device="meta")}, TypeError, rf"weight must be on x's device {DEVICE}, got meta"),
]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("index, changes, error, message", BAD, ids=lambda value: None)
def test_bad_projections(index, changes, error, message, training):
    x, projections, _ = CASE
    projections = list(projections)
    projections[index] = projections[index]._replace(**changes)
    with pytest.raises(error, match=f"lora_linear_shared: .*{message}"):
        lora_linear_shared(x.clone().requires_grad_(training), projections)


@pytest.mark.parametrize(
    "x, projections, error, message",
    [
        (CASE[0], [], ValueError, "projections must have at least one entry"),
        (CASE[0], CASE[0], TypeError, "projections must be a sequence of tuples, got Tensor"),
        (CASE[0], None, TypeError, "projections must be a sequence of tuples, got NoneType"),
        (CASE[0], [()], TypeError, r"projections\[0\] must be a tuple of lora_linear's arguments.*got 0 entries"),
        (CASE[0], [CASE[0]], TypeError, r"projections\[0\] must be a tuple .*got Tensor"),
        (None, CASE[1], TypeError, "x must be a tensor, got NoneType"),
        (torch.tensor(1.0), CASE[1], ValueError, r"x must have shape \[..., K\], got a scalar"),
        (torch.ones(4, 7, dtype=torch.int64), CASE[1], TypeError, "x must be float32, .*got torch.int64"),
    ],
)
def test_bad_calls(x, projections, error, message):
    with pytest.raises(error, match=f"lora_linear_shared: .*{message}"):
        lora_linear_shared(x, projections)


@cpu_only
def test_raw_ops_refuse():
    """Whatever would be unsafe in memory, as a raw op called by hand would have it."""
    x, weights, biases, a, b, tail, grad_y = raw_arguments("qkv")
    s = RAW._lora_linear_shared_forward(x, weights, biases, a, b, *tail)[1]
    vectors, factors, ps, seeds = tail
    forward, backward = RAW._lora_linear_shared_forward, RAW._lora_linear_shared_backward
    for arguments in (
        (x, weights[:2], biases, a, b, *tail),
        (x, weights, biases[:1], a, b, *tail),
        (x, weights, biases, a, [None, *b[1:]], *tail),
        (x, weights, biases, a, b, vectors, factors[:1], ps, seeds),
        (x, weights, biases, a, b, vectors, factors, ps, [None, *seeds[1:]]),
        (x, [], [], [], [], [], [], [], []),
        (torch.ones(()), weights, biases, a, b, *tail),
        (x, [weights[0][:, :3], *weights[1:]], biases, [None, *a[1:]], [None, *b[1:]], *tail),
    ):
        with pytest.raises(RuntimeError, match=r"lora_linear_shared: .* must "):
            forward(*arguments)
    needs = [31] * 3
    for arguments in (
        (grad_y, None, weights, a, b, s, *tail, needs),
        (grad_y, x[:3], weights, a, b, s, *tail, needs),
        ([grad_y[0][:2], *grad_y[1:]], x, weights, a, b, s, *tail, needs),
        ([grad_y[0].double(), *grad_y[1:]], x, weights, a, b, s, *tail, needs),
        (grad_y, x, weights, a, b, [None, *s[1:]], *tail, needs),
        (grad_y, x, weights, a, b, [s[0][:2], *s[1:]], *tail, needs),
        (grad_y, x, [None, *weights[1:]], a, b, s, *tail, needs),
        (grad_y, x, [*weights[:2], weights[2][:, :3]], a, b, s, *tail, needs),
        (grad_y, x, weights, a, b, s, *tail, needs[:1]),
        (grad_y, x, weights, a, b, s, *tail, [31, 30, 31]),
        ([], x, [], [], [], [], [], [], [], [], []),
    ):
        with pytest.raises(RuntimeError, match=r"lora_linear_shared_backward: .* must "):
            backward(*arguments)
