"""A pool in a process that forks: servers load a model once and start workers from it, DataLoaders fork as well."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable

import pytest
import torch
from pool_cases import run

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def run_in_fork(call: Callable[[], None]) -> None:
    """``call`` in a forked process, which is to raise nothing."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # OpenMP's threads are not there, either
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_fork_reads_with_threads_of_its_own(pool, model, inputs, folder, by_hand):
    expected = {name: by_hand(folder, name) for name in ("a0", "a1", "a2")}
    with pool.use(["a0"]):
        pass

    def child() -> None:
        for name in ("a0", "a1", "a2"):
            with pool.use([name], timeout=30) as names:
                torch.testing.assert_close(run(model, inputs, names), expected[name])
        assert pool.stats().loads == 3
        pool.close()
        assert list(model.peft_config) == ["default"]

    run_in_fork(child)
    assert pool.resident == ["a0"]
    with pool.use(["a1"]) as names:
        assert torch.equal(run(model, inputs, names), expected["a1"])


def test_a_fork_waits_for_nothing_that_only_its_parent_does(pool, monkeypatch):
    go, began, read = threading.Event(), threading.Event(), pool._detacher.make

    def make(*args):
        began.set()
        assert go.wait(60)
        return read(*args)

    monkeypatch.setattr(pool._detacher, "make", make)
    pool.prefetch("a1")
    assert began.wait(60)

    def child() -> None:
        pool._detacher.make = read
        with pool.use(["a1"], timeout=30):
            assert pool.resident == ["a1"]

    try:
        run_in_fork(child)
    finally:
        go.set()
    with pool.use(["a1"]):
        pass


def test_a_fork_while_another_thread_changes_the_pool(pool):
    """It gets the pool as it was between two changes, not locked for ever."""
    held, done = threading.Event(), threading.Event()

    def change() -> None:
        with pool._lock:
            held.set()
            done.wait(0.5)

    thread = threading.Thread(target=change)
    thread.start()
    assert held.wait(60)

    def child() -> None:
        assert pool._lock.acquire(timeout=5)
        pool._lock.release()
        with pool.use(["a0"], timeout=30):
            pass

    run_in_fork(child)
    thread.join()
