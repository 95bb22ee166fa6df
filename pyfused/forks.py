"""Pools in a process that forks, as servers do that load a model once and start workers from it."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING
from weakref import WeakSet

if TYPE_CHECKING:
    from .pool import AdapterPool

_pools: WeakSet[AdapterPool] = WeakSet()
_held: list[AdapterPool] = []  # of the fork under way
_forking = threading.Lock()


def follow_forks(pool: AdapterPool) -> None:
    """From now on a forked process has the pool as it was between two changes, with threads of its own."""
    _pools.add(pool)


def _before() -> None:
    _forking.acquire()
    _held.extend(_pools)
    for pool in _held:
        pool._lock.acquire()


def _after() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


def _after_in_child() -> None:
    for pool in _held:
        pool._start_threads()
    _after()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after_in_child)
