"""IA3 on a GPU, see test_lora_cuda_gpu.py; everything else is the ops' own tests with PYFUSED_TEST_DEVICE=cuda."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cuda_calls import assert_graph_sees_new_numbers, assert_nothing_waits, assert_on_current_stream
from helpers import CUDA_DEVICE, CUDA_KERNELS, DTYPE_PAIRS, needs_gpu, readable_id
from ia3_cases import SIDES, assert_matches_reference, assert_scale_matches, evaluate, make_case
from torch import nn

from pyfused import fuse
from pyfused.nn import IA3Linear
from pyfused.ops import ia3_linear

pytestmark = pytest.mark.cuda

# M, N, K: a token, a base that is folded into (300, 64), several ranges of rows, nothing that divides.
SHAPES = [(1, 4096, 512), (300, 64, 256), (5000, 768, 130), (301, 1134, 257)]


def on_gpu(*arguments, **options):
    return make_case(*arguments, **options).on(CUDA_DEVICE)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES, ids=readable_id)
def test_matches_the_reference(shape, dtypes, side):
    assert_matches_reference(ia3_linear, on_gpu(*shape, *dtypes, side=side))


@pytest.mark.parametrize("vector_dtype", [None, torch.float32], ids=["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=readable_id)
@pytest.mark.parametrize("shape", [*SHAPES, (8192, 512, 1024)], ids=readable_id)
def test_the_factors_in_the_product(shape, dtype, vector_dtype, monkeypatch):
    monkeypatch.setenv("PYFUSED_IA3", "product")
    assert_matches_reference(ia3_linear, on_gpu(*shape, dtype, vector_dtype, side="output"))


def test_a_path_that_is_not_there(monkeypatch):
    if CUDA_DEVICE.type == "cpu" and not CUDA_KERNELS:
        pytest.skip("the CPU's ops know one way")
    monkeypatch.setenv("PYFUSED_IA3", "other")
    with pytest.raises(RuntimeError, match="must be auto, pass or product"):
        evaluate(ia3_linear, on_gpu(32, 30, 40, torch.bfloat16, side="output"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
@pytest.mark.parametrize(("shape", "dim"), [((8, 64, 56, 56), 1), ((2, 3, 9000), 1), ((4, 33, 49), 1), ((700, 130), 0)])
def test_scale_along_a_dimension(shape, dim, dtype):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator, device="cpu").to(CUDA_DEVICE, dtype) for _ in range(2))
    scale = torch.randn(shape[dim], generator=generator, device="cpu").to(CUDA_DEVICE)
    assert_scale_matches(x, scale, dim, grad)


@needs_gpu
@pytest.mark.parametrize("side", SIDES)
def test_streams_graphs_and_no_waiting(side):
    case = on_gpu(2048, 1024, 768, torch.bfloat16, torch.float32, side=side)
    assert_on_current_stream(lambda x: ia3_linear(x, case.weight, case.bias, case.scale, side), case.x)
    x, scale = case.x.clone().requires_grad_(), case.scale.clone().requires_grad_()

    def step():
        y = ia3_linear(x, case.weight, case.bias, scale, side)
        return (y, *torch.autograd.grad(y, (x, scale), case.grad_y))

    assert_nothing_waits(step)
    assert_graph_sees_new_numbers(step, x)


@needs_gpu
def test_the_same_bits_in_every_run():
    case = on_gpu(5000, 300, 768, torch.bfloat16, torch.float32)
    first = evaluate(ia3_linear, case)
    for name, value in evaluate(ia3_linear, case).items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("side", SIDES)
def test_compile(backend, side):
    case = on_gpu(40, 30, 50, torch.bfloat16, torch.float32, side=side)
    compiled = torch.compile(ia3_linear, fullgraph=True, backend=backend)
    for got, expected in zip(evaluate(compiled, case).values(), evaluate(ia3_linear, case).values(), strict=True):
        torch.testing.assert_close(got, expected)


def test_autocast():
    case = on_gpu(40, 30, 50)
    with torch.autocast(CUDA_DEVICE.type, torch.bfloat16):
        got = evaluate(ia3_linear, case.replace(grad_y=case.grad_y.bfloat16()))
    assert got["y"].dtype == torch.bfloat16
    assert got["grad_x"].dtype == got["grad_scale"].dtype == torch.float32


def test_module_moved_to_the_gpu():
    layer = IA3Linear(nn.Linear(48, 32, dtype=torch.bfloat16, device="cpu"), init_ia3_weights=False)
    x = torch.randn(5, 48, dtype=torch.bfloat16, device="cpu")
    there = copy.deepcopy(layer).to(CUDA_DEVICE)(x.to(CUDA_DEVICE))
    torch.testing.assert_close(there.cpu(), layer(x), rtol=2e-2, atol=2e-2)


def test_fused_peft_model():
    """A training step of fuse(model) is HF PEFT's."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(CUDA_DEVICE)
    config = peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False)
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
