"""The adapters that an :class:`pyfused.AdapterPool` has in its model: who is there, who goes for others to come."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from .detached import DetachedAdapter
from .host_cache import Signature
from .tuner import AdapterModel


@dataclass
class PoolStats:
    """What an :class:`AdapterPool` has done and holds.

    Attributes:
        hits, misses: names asked for by :meth:`AdapterPool.use` and :meth:`AdapterPool.pin` that were in the model,
            and that were not. "__base__" and the model's other adapters do not count.
        loads, failures: adapters read from disk, and those that could not be brought into memory.
        host_hits: adapters made of what was in host memory, without reading.
        evictions: adapters taken out of the model to make room.
        load_seconds: for reading and making tensors, summed over the threads.
        insert_seconds, evict_seconds: under the lock.
        adapters, bytes: in the model at the moment.
        host_adapters, host_bytes: in host memory beneath the model at the moment.
    """

    hits: int = 0
    misses: int = 0
    loads: int = 0
    failures: int = 0
    host_hits: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    insert_seconds: float = 0.0
    evict_seconds: float = 0.0
    adapters: int = 0
    bytes: int = 0
    host_adapters: int = 0
    host_bytes: int = 0


@dataclass(eq=False)
class Resident:
    """An adapter in the model, and how many requests use it."""

    name: str
    model_name: str
    size: int
    signature: Signature | None
    users: int = 0


class Residents:
    """At most so many adapters, of at most so many bytes together. Not thread-safe: the pool holds its lock.

    Attributes:
        by_name: the newest version of each adapter, the least recently used first.
        pinned: names of those that are not to be evicted, in memory or not.
        stats: counted here are evictions, what is there, and the times.
    """

    def __init__(self, tuner: AdapterModel, max_adapters: int, max_bytes: int | None) -> None:
        self.by_name: OrderedDict[str, Resident] = OrderedDict()
        self.pinned: set[str] = set()
        self.stats = PoolStats()
        self.max_adapters = max_adapters
        self._tuner = tuner
        self._max_bytes = max_bytes
        self._leaving: set[Resident] = set()  # taken out while in use
        self._serial = itertools.count(1)

    def admit(self, kept: list[str], new: dict[str, DetachedAdapter]) -> bool:
        """Put adapters in and evict others for them, none of ``kept``; False where there is no room now.

        Raises:
            ValueError: there never will be room.
        """
        victims = self._victims(kept, [adapter.size for adapter in new.values()])
        if victims is None:
            return False
        begin = time.perf_counter()
        for entry in victims:
            del self.by_name[entry.name]
            self._delete(entry)
        self.stats.evictions += len(victims)
        middle = time.perf_counter()
        for name, adapter in new.items():
            self._insert(name, adapter)
        self.stats.evict_seconds += middle - begin
        self.stats.insert_seconds += time.perf_counter() - middle
        return True

    def take_out(self, entries: Iterable[Resident]) -> None:
        """Not to make room; those in use go when they are released."""
        for entry in entries:
            del self.by_name[entry.name]
            if entry.users:
                self._leaving.add(entry)
            else:
                self._delete(entry)

    def release(self, entries: Iterable[Resident]) -> None:
        """One request less uses these."""
        for entry in entries:
            entry.users -= 1
            if entry.users == 0 and entry in self._leaving:
                self._leaving.remove(entry)
                self._delete(entry)

    def describe(self) -> str:
        used = sorted(entry.name for entry in (*self.by_name.values(), *self._leaving) if entry.users)
        room = f"{self.max_adapters} adapters" + ("" if self._max_bytes is None else f", {self._max_bytes} bytes")
        taken = f"{self.stats.adapters} and {self.stats.bytes} bytes"
        return f"of {room}, {taken} are taken, pinned: {sorted(self.pinned)}, in use: {used}"

    def _victims(self, kept: list[str], sizes: list[int]) -> list[Resident] | None:
        """Whom to evict so that adapters of these sizes fit in beside ``kept``; None where that is not possible."""
        limit = self._max_bytes
        needed = sum(sizes) + sum(self.by_name[name].size for name in kept if name in self.by_name)
        if limit is not None and needed > limit:
            raise ValueError(f"names: {needed} bytes of adapters at once, and max_bytes is {limit}")
        count = self.stats.adapters + len(sizes) - self.max_adapters
        size = 0 if limit is None else self.stats.bytes + sum(sizes) - limit
        victims = []
        for entry in self.by_name.values():
            if count <= 0 and size <= 0:
                break
            if not (entry.users or entry.name in self.pinned or entry.name in kept):
                victims.append(entry)
                count -= 1
                size -= entry.size
        return None if count > 0 or size > 0 else victims

    def _insert(self, name: str, adapter: DetachedAdapter) -> None:
        # Numbered, so that a file's next version can be in memory beside the one that is still in use; other pools of
        # the model number theirs. No dots: torch does not let modules have them in their names.
        names = (f"{name.replace('.', '_')}@{number}" for number in self._serial)
        model_name = next(one for one in names if one not in self._tuner.peft_config)
        self._tuner.attach(model_name, adapter)
        self.by_name[name] = Resident(name, model_name, adapter.size, adapter.signature)
        self.stats.adapters += 1
        self.stats.bytes += adapter.size

    def _delete(self, entry: Resident) -> None:
        if entry.model_name in self._tuner.peft_config:  # else it was deleted by hand, or the model unloaded
            self._tuner.delete_adapter(entry.model_name)
        self.stats.adapters -= 1
        self.stats.bytes -= entry.size
