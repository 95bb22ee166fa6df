"""The bottleneck on a GPU, see test_lora_cuda_gpu.py; the rest is the op's own tests with PYFUSED_TEST_DEVICE=cuda."""

from __future__ import annotations

import pytest
import torch
from bottleneck_cases import assert_matches_reference, eager, evaluate, make_case
from cuda_calls import assert_graph_sees_new_numbers, assert_nothing_waits, assert_on_current_stream, captured
from helpers import CUDA_DEVICE, DTYPE_PAIRS, assert_error_rule, needs_gpu, readable_id

from pyfused.nn import Bottleneck
from pyfused.ops import bottleneck
from pyfused.reference import bottleneck as reference

pytestmark = pytest.mark.cuda

# M, D, H: a token, several ranges of rows, nothing that divides, more hidden values than the fused kernel takes.
SHAPES = [(1, 768, 64), (5000, 384, 48), (301, 1134, 67), (200, 264, 200)]
PATHS = ("fused", "passes")


def on_gpu(*arguments, **options):
    return make_case(*arguments, **options).on(CUDA_DEVICE)


def step_of(case, dropout_p):
    """A training step on leaves of its own, and x among them."""
    x = case.x.clone().requires_grad_()
    parameters = [getattr(case, n).clone().requires_grad_() for n in ("w_down", "b_down", "w_up", "b_up", "scale")]

    def step():
        *weights, scale = parameters
        y = bottleneck(x, x, *weights, "gelu", scale, dropout_p, True)
        return (y, *torch.autograd.grad(y, (x, *parameters), case.grad_y))

    return step, x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_matches_the_reference(shape, dtypes, path, monkeypatch):
    monkeypatch.setenv("PYFUSED_BOTTLENECK", path)
    for scale, dropout_p in (("float", 0.0), ("channels", 0.1)):
        assert_matches_reference(bottleneck, on_gpu(*shape, *dtypes, scale=scale, dropout_p=dropout_p))
    # one sum over all elements: over many more, eager's error is a matter of luck
    assert_matches_reference(bottleneck, on_gpu(40, 130, 33, *dtypes, scale="learned", dropout_p=0.1))


@pytest.mark.parametrize("path", PATHS)
def test_the_same_mask_as_on_the_cpu(path, monkeypatch):
    monkeypatch.setenv("PYFUSED_BOTTLENECK", path)
    case = make_case((3, 50), 300, 20, torch.bfloat16, dropout_p=0.3).on("cpu")
    exact, plain = evaluate(reference.bottleneck, case.to(torch.float64)), evaluate(eager, case)
    for name, there in evaluate(bottleneck, case.on(CUDA_DEVICE)).items():
        assert_error_rule(name, there.cpu(), plain[name], exact[name], ulps=2)


@needs_gpu
@pytest.mark.parametrize("path", PATHS)
def test_streams_graphs_and_no_waiting(path, monkeypatch):
    monkeypatch.setenv("PYFUSED_BOTTLENECK", path)
    case = on_gpu(2048, 768, 64, torch.bfloat16, scale="learned")
    weights = (case.w_down, case.b_down, case.w_up, case.b_up)
    assert_on_current_stream(lambda x: bottleneck(x, x, *weights), case.x)
    step, x = step_of(case, 0.0)
    assert_nothing_waits(step)
    assert_graph_sees_new_numbers(step, x)
    graph, results = captured(step_of(case, 0.5)[0])
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(results[0].clone())
    assert not torch.equal(*seen)


@needs_gpu
@pytest.mark.parametrize("path", PATHS)
def test_the_same_bits_in_every_run(path, monkeypatch):
    monkeypatch.setenv("PYFUSED_BOTTLENECK", path)
    case = on_gpu(5000, 768, 64, torch.bfloat16, scale="learned", dropout_p=0.1)
    first = evaluate(bottleneck, case)
    for name, value in evaluate(bottleneck, case).items():
        assert torch.equal(value, first[name])


@needs_gpu
def test_tf32_where_torch_allows_it(monkeypatch):
    monkeypatch.setenv("PYFUSED_BOTTLENECK", "fused")
    case = on_gpu(300, 2048, 64)
    before = torch.backends.cuda.matmul.fp32_precision
    exact = evaluate(reference.bottleneck, case.to(torch.float64), ())["y"]
    errors = {}
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            errors[precision] = (evaluate(bottleneck, case, ())["y"].double() - exact).abs().max()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors["ieee"] < 1e-5 * exact.abs().max()
    assert errors["ieee"] < errors["tf32"] < 1e-2 * exact.abs().max()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    case = on_gpu(40, 30, 8, torch.bfloat16, dropout_p=0.2)
    compiled = torch.compile(bottleneck, fullgraph=True, backend=backend)
    for got, expected in zip(evaluate(compiled, case).values(), evaluate(bottleneck, case).values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast():
    case = on_gpu(40, 30, 8, residual="other")
    with torch.autocast(CUDA_DEVICE.type, torch.bfloat16):
        got = evaluate(bottleneck, case)
    assert got["y"].dtype == torch.float32  # the residual's, as PyTorch adds it
    assert got["grad_x"].dtype == got["grad_w_up"].dtype == torch.float32


def test_module_moved_to_the_gpu():
    layer = Bottleneck(48, 12).to(torch.bfloat16)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(5, 48, dtype=torch.bfloat16, device="cpu")
    here = layer.to("cpu")(x, x)
    there = layer.to(CUDA_DEVICE)(x.to(CUDA_DEVICE), x.to(CUDA_DEVICE))
    torch.testing.assert_close(there.cpu(), here, rtol=2e-2, atol=2e-2)
