"""The same bits in every run and with every number of threads; Python threads run side by side."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from helpers import EMULATED, cpu_kernels_only, delta_op, evaluate, make_case, readable_id, run_in_threads

from pyfused.ops import lora_linear

DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def raw(case, weight=None):
    """Every output of our own kernels; without weight no vendor GEMM is in it."""
    ops, p = torch.ops.pyfused, case.dropout_p
    out, s = ops._lora_delta_forward(case.grad_y, case.x, case.a, case.b, case.scale, 0.5, p, case.seed)
    grads = ops._lora_backward(case.grad_y, case.x, weight, case.a, case.b, s, case.scale, 0.5, p, case.seed, 31)
    return dict(
        zip(("out", "s", "grad_x", "grad_a", "grad_b", "grad_scale", "grad_bias"), (out, s, *grads), strict=True)
    )


def assert_same_bits(got, expected):
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@cpu_kernels_only
@pytest.mark.parametrize("shape", [(700, 600, 1100, 8), (1030, 70, 520, 33), (3, 3000, 2100, 16)], ids=readable_id)
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_same_bits_with_any_number_of_threads(dtypes, shape, threads):
    case = make_case(*shape, *dtypes, vector=True, dropout_p=0.1)
    threads(1)
    expected = raw(case)
    for count in (2, 3, 1):
        threads(count)
        assert_same_bits(raw(case), expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_same_bits_in_every_run(dtypes, monkeypatch):
    m, n = (200, 150) if EMULATED else (700, 300)
    case = make_case(m, n, 400, 8, *dtypes, vector=True, dropout_p=0.1)
    expected = {op: evaluate(op, case) for op in (lora_linear, delta_op)}
    for order in range(2 if EMULATED else 5):
        monkeypatch.setenv("PYFUSED_EMULATION_SEED", str(order + 2))  # another order of blocks and threads
        for op, results in expected.items():
            assert_same_bits(evaluate(op, case), results)


def test_python_threads_at_once():
    """Calls from several Python threads do not disturb one another."""
    cases = [make_case(65, 70, 150, 8, *dtypes, vector=True, dropout_p=0.2, seed=i) for i, dtypes in enumerate(DTYPES)]
    expected = [raw(case, case.weight) for case in cases]
    failures = []

    def work(case, results):
        try:
            for _ in range(4 if EMULATED else 40):
                assert_same_bits(raw(case, case.weight), results)
        except BaseException as error:
            failures.append(error)

    run_in_threads(work, zip(cases, expected, strict=True))
    assert not failures, failures[0]


@cpu_kernels_only
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_interpreter_lock_is_released(part, threads):
    """While one long call runs, another Python thread goes on: it is never kept waiting for the whole call."""
    threads(1)
    case = make_case(12000, 2000, 2000, 64, dropout_p=0.1)
    ops, rest = torch.ops.pyfused, (0.1, case.seed)

    def forward():
        return ops._lora_delta_forward(case.grad_y, case.x, case.a, case.b, None, 1.0, *rest)

    s = forward()[1]

    def backward():
        return ops._lora_backward(case.grad_y, case.x, None, case.a, case.b, s, None, 1.0, *rest, 31)

    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=tick)
    watcher.start()
    begin = time.perf_counter()
    (forward if part == "forward" else backward)()
    end = time.perf_counter()
    stop.set()
    watcher.join()
    during = [begin, *(moment for moment in ticks if begin < moment < end), end]
    longest = max(later - earlier for earlier, later in itertools.pairwise(during))
    assert end - begin > 0.02, "too short to tell"
    assert longest < 0.7 * (end - begin)
