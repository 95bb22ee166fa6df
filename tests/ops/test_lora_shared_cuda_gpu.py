"""lora_linear_shared on a GPU: separate calls' bits, and streams, graphs, devices, waiting and launches.

Everything else is test_lora_shared.py with PYFUSED_TEST_DEVICE=cuda. PYFUSED_CUDA_TESTS_ON=cpu tries these tests
themselves on the CPU, as far as they make sense there.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cuda_calls import assert_graph_sees_new_numbers, assert_nothing_waits, assert_on_current_stream, captured
from helpers import CUDA_DEVICE, DTYPE_PAIRS, assert_error_rule, eager_linear, needs_gpu, readable_id
from projections import make_group, map_tensors, run, separately

from pyfused.ops import lora_linear, lora_linear_shared
from pyfused.reference import lora as reference

pytestmark = pytest.mark.cuda

# name -> (N, R) of each projection, M, K: attention with grouped queries, gate and up; sums over x in parts; decoding;
# ranks that do not go together.
SHAPES = {
    "qkv": ([(1024, 16), (256, 16), (256, 16)], 2048, 1024),
    "gate-up": ([(1400, 8), (1400, 8)], 700, 512),
    "few-rows": ([(300, 16), (128, 16), (128, 16)], 100, 4096),
    "decode": ([(300, 16), (128, 16), (128, 16)], 3, 512),
    "ranks": ([(130, 3), (257, 70), (64, 256), (64, None), (40, 16)], 300, 1134),
}


def on_gpu(group, m, k, *dtypes, device=CUDA_DEVICE, **options):
    x, projections, grad_y = make_group(group, (m,), k, *dtypes, **options)
    return x.to(device), map_tensors(lambda t: t.to(device), projections), [g.to(device) for g in grad_y]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", SHAPES)
def test_has_the_bits_of_separate_calls(shape, dtypes, dropout_p):
    case = on_gpu(*SHAPES[shape], *dtypes, dropout_p=dropout_p)
    got = run(lora_linear_shared, *case)
    single = run(functools.partial(separately, lora_linear), *case)
    for one, other in zip(got[0] + list(got[2]), single[0] + list(single[2]), strict=True):
        assert torch.equal(one, other)
    exact = run(functools.partial(separately, reference.lora_linear), *case, torch.float64)
    eager = run(functools.partial(separately, eager_linear), *case)
    assert_error_rule("grad_x", got[1], eager[1], exact[1])


@pytest.mark.parametrize("update", ["after", "before"])
def test_both_ways_of_the_update(update, monkeypatch):
    monkeypatch.setenv("PYFUSED_LORA_UPDATE", update)
    case = on_gpu([(260, 16), (64, 8), (64, 40)], 300, 300, torch.bfloat16)
    got = run(lora_linear_shared, *case)
    exact = run(functools.partial(separately, reference.lora_linear), *case, torch.float64)
    eager = run(functools.partial(separately, eager_linear), *case)
    for name, one, rough, wanted in zip("qkv", got[0], eager[0], exact[0], strict=True):
        assert_error_rule(name, one, rough, wanted)
    assert_error_rule("grad_x", got[1], eager[1], exact[1])


def test_twice_the_same_bits():
    case = on_gpu(*SHAPES["qkv"], torch.bfloat16)
    first, second = run(lora_linear_shared, *case), run(lora_linear_shared, *case)
    for one, other in zip([*first[0], first[1], *first[2]], [*second[0], second[1], *second[2]], strict=True):
        assert torch.equal(one, other)


@needs_gpu
def test_the_current_stream():
    x, projections, _ = on_gpu(*SHAPES["qkv"], torch.bfloat16)
    assert_on_current_stream(lambda x: torch.cat(lora_linear_shared(x, projections), 1), x)


@needs_gpu
@pytest.mark.parametrize("rows", [1, 300])
def test_cuda_graph(rows):
    """Forward and backward captured once: replays see new numbers, and draw new masks each."""
    x, projections, grad_y = on_gpu([(300, 16), (100, 16), (100, 16)], rows, 200, torch.bfloat16)
    x.requires_grad_()
    projections = [p._replace(a=p.a.requires_grad_(), b=p.b.requires_grad_(), seed=None) for p in projections]
    trained = [t for p in projections for t in (p.a, p.b)]

    def step(p):
        y = lora_linear_shared(x, [one._replace(dropout_p=p) for one in projections])
        return (*y, *torch.autograd.grad(y, (x, *trained), grad_y))

    assert_graph_sees_new_numbers(lambda: step(0.0), x)
    dropping, dropped = captured(lambda: step(0.5))
    seen = []
    for _ in range(2):
        dropping.replay()
        seen.append([t.clone() for t in dropped[:3]])
    assert not any(torch.equal(*pair) for pair in zip(*seen, strict=True))


@needs_gpu
def test_nothing_waits_for_the_gpu():
    case = on_gpu(*SHAPES["qkv"], torch.bfloat16)
    assert_nothing_waits(lambda: run(lora_linear_shared, *case))


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    results = []
    for index in (0, 1):
        got = run(lora_linear_shared, *on_gpu(*SHAPES["ranks"], torch.bfloat16, device=f"cuda:{index}"))
        results.append([*got[0], got[1], *got[2]])
        assert torch.cuda.current_device() == 0
    for one, other in zip(*results, strict=True):
        assert other.device == torch.device("cuda:1") and torch.equal(one.cpu(), other.cpu())


@needs_gpu
def test_one_pass_over_x_for_all():
    """Kernels of a step: what reads x and what writes dX run once for three adapters."""
    case = on_gpu(*SHAPES["qkv"], torch.bfloat16)
    run(lora_linear_shared, *case)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(lora_linear_shared, *case)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "lora_" in event.name]
    # s of all; three y and one dX; dY three times and x once
    for kernel, count in (("lora_shrink_kernel", 1), ("lora_expand_kernel", 4), ("lora_reduce_kernel", 4)):
        assert sum(kernel in name for name in names) == count, names
