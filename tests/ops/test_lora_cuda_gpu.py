"""On a GPU: what it shares with the CPU (the mask), and what only it has: streams, graphs, several devices.

Everything else is the ops' own tests with PYFUSED_TEST_DEVICE=cuda. PYFUSED_CUDA_TESTS_ON=cpu tries these tests
themselves on the CPU, as far as they make sense there.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from cuda_calls import assert_graph_sees_new_numbers, assert_nothing_waits, assert_on_current_stream, captured
from helpers import (
    CUDA_DEVICE,
    CUDA_KERNELS,
    DTYPE_PAIRS,
    assert_error_rule,
    assert_matches_reference,
    eager_linear,
    evaluate,
    make_case,
    needs_gpu,
    readable_id,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyfused import _library, fuse
from pyfused.nn import LoraLinear
from pyfused.ops import lora_delta, lora_linear
from pyfused.reference import lora as reference

pytestmark = pytest.mark.cuda

# M, N, K, R: decode, one and several blocks of rows, sums in parts, more ranks than a block has.
SHAPES = [(1, 4096, 4096, 16), (64, 1024, 512, 8), (300, 257, 1134, 33), (2048, 768, 1024, 64), (70, 130, 140, 256)]
# Shapes that tensor maps can describe, and others; the last has more blocks of dX than an H200 has multiprocessors.
CONCAT_SHAPES = [
    *SHAPES[2:],
    (300, 512, 384, 8),
    (129, 136, 1000, 24),
    pytest.param((4096, 264, 2048, 16), marks=needs_gpu),
]


def on_gpu(*arguments, **options):
    return make_case(*arguments, **options).on(CUDA_DEVICE)


def test_the_native_kernels_are_loaded():
    assert _library.has_kernel(CUDA_DEVICE.type)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_matches_the_reference(shape, dtypes, dropout_p):
    case = on_gpu(*shape, *dtypes, vector=True, dropout_p=dropout_p)
    assert_matches_reference(lora_linear, case)


@pytest.mark.parametrize("update", ["after", "before", "concat"])
def test_every_way_of_the_update(update, monkeypatch):
    monkeypatch.setenv("PYFUSED_LORA_UPDATE", update)
    for rows in (32, 512):
        assert_matches_reference(lora_linear, on_gpu(rows, 300, 260, 16, torch.bfloat16, dropout_p=0.1))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=readable_id)
@pytest.mark.parametrize("shape", CONCAT_SHAPES, ids=readable_id)
def test_the_update_in_one_product(shape, dtype, dropout_p, monkeypatch):
    monkeypatch.setenv("PYFUSED_LORA_UPDATE", "concat")
    assert_matches_reference(lora_linear, on_gpu(*shape, dtype, vector=True, dropout_p=dropout_p))


def test_an_update_that_is_not_there(monkeypatch):
    if CUDA_DEVICE.type == "cpu" and not CUDA_KERNELS:
        pytest.skip("the CPU's ops know one way")
    for value, message in (("concat", "only for bf16 or fp16"), ("other", "must be auto, after, before or concat")):
        monkeypatch.setenv("PYFUSED_LORA_UPDATE", value)
        with pytest.raises(RuntimeError, match=message):
            evaluate(lora_linear, on_gpu(32, 30, 40, 16, torch.float32, dropout_p=0.1))


@pytest.mark.parametrize(
    "dtypes", [(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)], ids=readable_id
)
def test_the_same_mask_as_on_the_cpu(dtypes):
    case = make_case((3, 50), 60, 300, 8, *dtypes, dropout_p=0.3).on("cpu")
    for name, there in evaluate(lora_linear, case.on(CUDA_DEVICE)).items():
        exact = evaluate(reference.lora_linear, case.to(torch.float64))[name]
        assert_error_rule(name, there.cpu(), evaluate(eager_linear, case)[name], exact)


def test_seed_is_drawn_from_the_devices_generator():
    case = on_gpu(20, 30, 40, 4)
    args = (case.x, case.weight, case.bias, case.a, case.b, case.scale, 0.5, True)
    torch.manual_seed(3)
    first, second = lora_linear(*args), lora_linear(*args)
    torch.manual_seed(3)
    assert torch.equal(first, lora_linear(*args))
    assert not torch.equal(first, second)


@needs_gpu
def test_tf32_where_torch_allows_it():
    case = on_gpu(300, 256, 2048, 16)
    before = torch.backends.cuda.matmul.fp32_precision
    exact = reference.lora_delta(*(t.double() for t in (case.grad_y, case.x, case.a, case.b)), 1.5)
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (lora_delta(case.grad_y, case.x, case.a, case.b, 1.5).double() - exact).abs().max()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 * exact.abs().max()
    assert errors["ieee"] < errors["tf32"] < 1e-2 * exact.abs().max()


@needs_gpu
def test_the_current_stream():
    case = on_gpu(2048, 1024, 1024, 16, torch.bfloat16)
    assert_on_current_stream(lambda x: lora_linear(x, case.weight, None, case.a, case.b, 1.0), case.x)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 300])
def test_cuda_graph(rows):
    """Forward and backward captured once: replays see new numbers, and draw a new mask each."""
    case = on_gpu(rows, 200, 300, 16, torch.bfloat16)
    x = case.x.clone().requires_grad_()
    a, b = (p.clone().requires_grad_() for p in (case.a, case.b))

    def step(p):
        y = lora_linear(x, case.weight, case.bias, a, b, 1.5, p, True)
        return (y, *torch.autograd.grad(y, (x, a, b), case.grad_y))

    assert_graph_sees_new_numbers(lambda: step(0.0), x)
    dropping, dropped = captured(lambda: step(0.5))
    seen = []
    for _ in range(2):
        dropping.replay()
        seen.append(dropped[0].clone())
    assert not torch.equal(*seen)


@needs_gpu
def test_nothing_waits_for_the_gpu():
    case = on_gpu(512, 256, 256, 16, torch.bfloat16, vector=True, dropout_p=0.1)
    assert_nothing_waits(lambda: evaluate(lora_linear, case))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    case = make_case(300, 200, 300, 16, torch.bfloat16, dropout_p=0.2)
    first, second = (evaluate(lora_linear, case.on(f"cuda:{i}")) for i in (0, 1))
    assert torch.cuda.current_device() == 0
    for name, value in first.items():
        assert second[name].device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), second[name].cpu())


@needs_gpu
def test_arguments_on_two_devices_are_refused():
    case = on_gpu(4, 5, 6, 2)
    with pytest.raises(TypeError, match="a must be on x's device"):
        lora_linear(case.x, case.weight, None, case.a.cpu(), case.b, 1.0)
    rest = (case.weight, None, case.a, case.b.cpu(), None, 1.0, 0.0, None)
    with pytest.raises(RuntimeError, match="b must be on the first argument's GPU"):
        torch.ops.pyfused._lora_linear_forward(case.x, *rest)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    case = on_gpu(40, 30, 50, 8, torch.bfloat16, dropout_p=0.2)
    compiled = torch.compile(lora_linear, fullgraph=True, backend=backend)
    for got, expected in zip(evaluate(compiled, case).values(), evaluate(lora_linear, case).values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast():
    case = on_gpu(40, 30, 50, 8)
    with torch.autocast(CUDA_DEVICE.type, torch.bfloat16):
        got = evaluate(lora_linear, case)
    assert got["y"].dtype == torch.bfloat16
    assert {name: value.dtype for name, value in got.items() if name != "y"} == {
        name: torch.float32 for name in ("grad_x", "grad_a", "grad_b", "grad_bias")
    }
    widened = case.map(lambda t: t)
    with torch.autocast(CUDA_DEVICE.type, torch.bfloat16):
        bias = widened.bias.detach().requires_grad_()
        y = lora_linear(widened.x, widened.weight, bias, widened.a, widened.b, 1.0)
        (grad,) = torch.autograd.grad(y, bias, torch.ones_like(y))  # a backward within autocast
    assert grad.dtype == torch.float32 and torch.all(grad == 40)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(use_reentrant):
    case = on_gpu(30, 20, 40, 4)

    def run(wrap):
        torch.manual_seed(7)
        x, a, b = (t.clone().requires_grad_() for t in (case.x, case.a, case.b))
        y = wrap(lambda x: lora_linear(x, case.weight, None, a, b, 1.0, 0.5, True))(x)
        return (y, *torch.autograd.grad(y.sum(), (x, a, b))) if wrap is plain else (y, *_backward(y, (x, a, b)))

    def plain(function):
        return function

    got = run(lambda function: functools.partial(checkpoint, function, use_reentrant=use_reentrant))
    for one, other in zip(got, run(plain), strict=True):
        torch.testing.assert_close(one, other)


def _backward(y, leaves):
    y.sum().backward()  # reentrant checkpoints know no torch.autograd.grad
    return [leaf.grad for leaf in leaves]


def test_module_moved_to_the_gpu():
    layer = LoraLinear(nn.Linear(48, 32, dtype=torch.bfloat16, device="cpu"), r=8, init_lora_weights=False)
    x = torch.randn(5, 48, dtype=torch.bfloat16, device="cpu")
    there = copy.deepcopy(layer).to(CUDA_DEVICE)(x.to(CUDA_DEVICE))
    torch.testing.assert_close(there.cpu(), layer.to("cpu")(x), rtol=2e-2, atol=2e-2)


def test_fused_peft_model():
    """A training step of fuse(model) is HF PEFT's, without dropout, which draws another mask."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(CUDA_DEVICE)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    fused = copy.deepcopy(model)
    fuse(fused)
    x = torch.randn(7, 64, device=CUDA_DEVICE)
    for one in (model, fused):
        F.cross_entropy(one(x), torch.arange(7, device=CUDA_DEVICE)).backward()
    for (name, ours), (_, theirs) in zip(fused.named_parameters(), model.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
