"""Adapters in memory over a folder of many: :class:`AdapterPool`."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

from .config import CONFIG_NAME
from .detached import DetachedAdapter, Detacher
from .forks import follow_forks
from .host_cache import AdapterFiles, HostCache, signature
from .inject import warn_if_base_changed
from .model import PeftModel
from .nn.by_row import BASE
from .residents import PoolStats, Resident, Residents


@dataclass(eq=False)
class _Request:
    """Names to be in memory together, and those of them that were read for it."""

    names: list[str]
    loaded: dict[str, DetachedAdapter] = field(default_factory=dict)


class AdapterPool:
    """A bounded cache of adapters in a model over a folder of checkpoints, for ``adapter_names=``.

    ``with pool.use(["a", "b", "__base__"]) as names: model(**inputs, adapter_names=names)`` reads what is missing,
    takes the least recently used adapters out where there is no room, and lets go of none that a request uses. All
    methods may be called from any thread. Reading happens in background threads; the lock is held for entries in
    dictionaries only, and for a walk over the model at the first adapter of each configuration.

    With ``max_host_adapters``, what was read stays in host memory when an adapter leaves the model, and is read again
    only where its files have changed: for a model on a GPU, which has room for fewer adapters. In a model on the CPU a
    larger ``max_adapters`` does more.

    Args:
        model: where the adapters go. Its other adapters stay, are not counted, and may be named in :meth:`use`.
        folder: each sub-folder is an adapter in HF PEFT's layout, of any method that ``adapter_names=`` takes, with
            ``modules_to_save`` perhaps.
        max_adapters: how many are in the model at most.
        max_bytes: how large they are together at most; None: no limit. What is being read comes on top.
        workers: threads that read.
        autocast_adapter_dtype: see :func:`pyfused.get_peft_model`.
        max_host_adapters: of how many what was read is in host memory at most, those in the model included, so at
            least ``max_adapters``; page-locked where the model is on a GPU. 0: of none.
        max_host_bytes: how large that is together at most, one that is larger is not kept; None: no limit.

    Raises:
        TypeError: ``model`` is no :class:`pyfused.PeftModel`, or a limit no integer.
        ValueError: ``folder`` is no folder, a limit is below 1, ``max_host_adapters`` is neither 0 nor at least
            ``max_adapters``, or ``max_host_bytes`` is given without it.
    """

    def __init__(
        self,
        model: PeftModel,
        folder: str | os.PathLike,
        max_adapters: int = 64,
        max_bytes: int | None = None,
        workers: int = 2,
        autocast_adapter_dtype: bool = True,
        max_host_adapters: int = 0,
        max_host_bytes: int | None = None,
    ) -> None:
        if not isinstance(model, PeftModel):
            raise TypeError(f"model must be a pyfused.PeftModel, got {type(model).__name__}")
        self._folder = Path(folder)
        if not self._folder.is_dir():
            raise ValueError(f"folder must be a folder with an adapter in each sub-folder, got {self._folder}")
        limits = {"max_adapters": max_adapters, "workers": workers, "max_host_adapters": max_host_adapters}
        limits |= {} if max_bytes is None else {"max_bytes": max_bytes}
        limits |= {} if max_host_bytes is None else {"max_host_bytes": max_host_bytes}
        for name, limit in limits.items():
            if not isinstance(limit, Integral):
                raise TypeError(f"{name} must be an int, got {type(limit).__name__}")
            if limit < 1 and name != "max_host_adapters":
                raise ValueError(f"{name} must be at least 1, got {limit}")
        if max_host_adapters != 0 and max_host_adapters < max_adapters:
            raise ValueError(
                f"max_host_adapters must be 0, or at least max_adapters ({max_adapters}), got {max_host_adapters}"
            )
        if max_host_adapters == 0 and max_host_bytes is not None:
            raise ValueError(f"max_host_bytes must be None where max_host_adapters is 0, got {max_host_bytes}")
        warn_if_base_changed(model.peft_config.values())
        self._tuner = model.base_model
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._detacher = Detacher(self._tuner, self._lock, autocast_adapter_dtype)
        self._workers = workers
        self._residents = Residents(self._tuner, max_adapters, max_bytes)
        self._host = HostCache(max_host_adapters, max_host_bytes)
        self._stats = self._residents.stats
        self._closed = False
        self._start_threads()
        follow_forks(self)

    def _start_threads(self) -> None:
        """At the beginning, and in a forked process, which has none of the threads, and nobody who waits for them."""
        self._executor = ThreadPoolExecutor(self._workers, thread_name_prefix="pyfused-adapters")
        self._loading: dict[str, Future[DetachedAdapter]] = {}
        self._waiting: deque[_Request] = deque()  # for room, first come first served

    # Using adapters ---------------------------------------------------------------------------------------------------

    @contextmanager
    def use(self, names: Sequence[str], timeout: float = 60.0) -> Iterator[list[str]]:
        """In this context the adapters are in the model and stay there; gives their names for ``adapter_names=``.

        Args:
            names: of sub-folders, of other adapters of the model, or "__base__"; repeated ones are fine.
            timeout: seconds for reading and for waiting until others let go of adapters.

        Raises:
            TypeError, ValueError, NotImplementedError: no such adapter, its files are broken or do not fit the model
                (the file is named), or the names are more than the pool has room for. Model and pool are unchanged.
            TimeoutError: reading took longer, or all that is in memory is pinned or in use.
            RuntimeError: the pool is closed.
        """
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise TypeError(f"names must be a list of names, got {type(names).__name__}")
        names = list(names)
        entries = self._acquire([name for name in dict.fromkeys(names) if not self._is_models(name)], timeout)
        try:
            yield [entries[name].model_name if name in entries else name for name in names]
        finally:
            with self._changed:
                self._residents.release(entries.values())
                self._changed.notify_all()

    def prefetch(self, name: str) -> Future[None]:
        """Read an adapter in the background and put it in, if there is room without waiting.

        The future's exception is what :meth:`use` would have raised. That there is no room is none where what was read
        stays in host memory.
        """
        self._check_name(name)
        with self._lock:
            self._check_open()
            if name in self._residents.by_name:
                done: Future[None] = Future()
                done.set_result(None)
                return done
            loading = self._load(name)
        result: Future[None] = Future()
        result.set_running_or_notify_cancel()

        def insert(loaded: Future[DetachedAdapter]) -> None:
            try:
                request = _Request([name], {name: loaded.result()})
                with self._changed:
                    self._check_open()
                    if self._missing(request):
                        raise ValueError(f"{self._path(name)} was changed while it was read")
                    if self._admit(request) is None and name not in self._host.by_name:
                        raise TimeoutError(self._no_room(request, 0.0))
            except CancelledError:
                result.set_exception(RuntimeError("AdapterPool: the pool is closed"))
            except BaseException as error:
                result.set_exception(error)
            else:
                result.set_result(None)

        loading.add_done_callback(insert)
        return result

    def pin(self, name: str, timeout: float = 60.0) -> None:
        """Bring an adapter into the model and keep it there until :meth:`unpin`. Errors as :meth:`use`."""
        self._check_name(name)
        with self.use([name], timeout):
            with self._lock:
                self._residents.pinned.add(name)

    def unpin(self, name: str) -> None:
        """Let a pinned adapter be evicted again; nothing where it is not pinned."""
        with self._changed:
            self._residents.pinned.discard(name)
            self._changed.notify_all()

    def refresh(self) -> list[str]:
        """Take out adapters whose files were replaced or removed since they were read; gives their names.

        Requests that use one go on with what was read; the next request reads the new files. A pinned one stays pinned
        and is read when it is next asked for. What is in host memory of them goes too.
        """
        with self._changed:
            stale = [
                entry
                for entry in self._residents.by_name.values()
                if signature(self._path(entry.name)) != entry.signature
            ]
            self._residents.take_out(stale)
            on_host = [
                name for name, files in self._host.by_name.items() if signature(self._path(name)) != files.signature
            ]
            self._host.drop(on_host)
            self._changed.notify_all()
            return list(dict.fromkeys([*(entry.name for entry in stale), *on_host]))

    # What there is ----------------------------------------------------------------------------------------------------

    def __contains__(self, name: str) -> bool:
        """Whether the adapter is in the model."""
        return name in self._residents.by_name

    @property
    def resident(self) -> list[str]:
        """Names of the adapters in the model, the least recently used first."""
        with self._lock:
            return list(self._residents.by_name)

    @property
    def resident_on_host(self) -> list[str]:
        """Names of the adapters that are in host memory beneath the model, the least recently used first."""
        with self._lock:
            return list(self._host.by_name)

    def available(self) -> list[str]:
        """Names of the adapters on disk."""
        return sorted(entry.name for entry in os.scandir(self._folder) if Path(entry.path, CONFIG_NAME).is_file())

    def stats(self) -> PoolStats:
        """Counts and times so far, a copy."""
        with self._lock:
            host = {"host_adapters": len(self._host.by_name), "host_bytes": self._host.bytes}
            return PoolStats(**vars(self._stats) | host)

    def close(self) -> None:
        """End the threads and take the adapters out of the model and of host memory; those in use go from the model
        when they are let go of.
        """
        with self._changed:
            self._closed = True
            self._residents.pinned.clear()
            self._changed.notify_all()
        self._executor.shutdown(wait=True, cancel_futures=True)
        with self._changed:
            self._residents.take_out(list(self._residents.by_name.values()))
            self._host.drop(list(self._host.by_name))

    def __enter__(self) -> AdapterPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------------------

    def _is_models(self, name: str) -> bool:
        """The base, or an adapter of the model that is none of the pool's; a sub-folder goes first."""
        if name == BASE:
            return True
        self._check_name(name)
        return name in self._tuner.peft_config and not self._path(name).is_dir()

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str):
            raise TypeError(f"names must be strings, got {type(name).__name__}")
        is_path = name in ("", ".", "..", BASE) or any(sign in name for sign in "/\\\0")
        if is_path or len(name.encode(errors="surrogatepass")) > 255:  # bytes, more than a file system takes
            raise ValueError(f"names must be those of sub-folders of {self._folder}, got {name!r}")

    def _path(self, name: str) -> Path:
        return self._folder / name

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("AdapterPool: the pool is closed")

    def _acquire(self, names: list[str], timeout: float) -> dict[str, Resident]:
        """All of the names at once, or none: who holds some while waiting for others could wait for ever."""
        if len(names) > self._residents.max_adapters:
            raise ValueError(
                f"names: {len(names)} adapters at once, and max_adapters is {self._residents.max_adapters}"
            )
        deadline, request = time.monotonic() + timeout, _Request(names)
        with self._lock:
            hits = sum(name in self._residents.by_name for name in names)
            self._stats.hits += hits
            self._stats.misses += len(names) - hits
        try:
            while True:
                with self._changed:
                    self._check_open()
                    missing = self._missing(request)
                    if not missing:
                        entries = self._admit(request)
                        if entries is not None:
                            for entry in entries.values():
                                entry.users += 1
                            self._host.touch(names)
                            return entries
                        if request not in self._waiting:
                            self._waiting.append(request)
                        left = deadline - time.monotonic()
                        if left <= 0:
                            raise TimeoutError(self._no_room(request, timeout))
                        self._changed.wait(left)
                        continue
                    loading = {name: self._load(name) for name in missing}
                for name, future in loading.items():
                    request.loaded[name] = self._result(name, future, deadline, timeout)
        finally:
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)
                    self._changed.notify_all()

    # Reading, in the background ---------------------------------------------------------------------------------------

    def _load(self, name: str) -> Future[DetachedAdapter]:
        """The reading of an adapter that is under way, or a new one; the lock is held."""
        if name not in self._loading:
            self._loading[name] = self._executor.submit(self._read, name)
        return self._loading[name]

    def _read(self, name: str) -> DetachedAdapter:
        begin, failed, path = time.perf_counter(), True, self._path(name)
        try:
            files = kept = self._kept(name, path)
            if files is None:
                files = AdapterFiles.read(path)
                if self._host.is_on:
                    files = files.packed(pinned=self._detacher.gpu is not None)
            adapter = self._detacher.make(path, files)
            failed = False
            return adapter
        finally:
            with self._lock:
                del self._loading[name]
                if failed:
                    self._stats.failures += 1
                elif kept is not None:
                    self._stats.host_hits += 1
                else:
                    self._stats.loads += 1
                    if self._host.is_on:
                        self._host.put(name, files)
                self._stats.load_seconds += time.perf_counter() - begin

    def _kept(self, name: str, path: Path) -> AdapterFiles | None:
        """What is in host memory of an adapter, if that is what its files hold."""
        if not self._host.is_on:
            return None
        now = signature(path)  # without the lock
        with self._lock:
            return self._host.get(name, now)

    def _result(self, name: str, future: Future[DetachedAdapter], deadline: float, timeout: float) -> DetachedAdapter:
        try:
            return future.result(max(0.0, deadline - time.monotonic()))
        except CancelledError:
            raise RuntimeError("AdapterPool: the pool is closed") from None
        except FutureTimeoutError:
            raise TimeoutError(f"AdapterPool: {name!r} was not read within {timeout} s") from None

    # Into the model, with the lock held -------------------------------------------------------------------------------

    def _missing(self, request: _Request) -> list[str]:
        """What is to be read, for the first time or because its files were changed meanwhile."""
        absent = [name for name in request.names if name not in self._residents.by_name]
        return [
            name
            for name in absent
            if name not in request.loaded or request.loaded[name].signature != signature(self._path(name))
        ]

    def _admit(self, request: _Request) -> dict[str, Resident] | None:
        """Put in what is not in memory, and give all; None where there is no room now."""
        entries = self._residents.by_name
        new = {name: request.loaded[name] for name in request.names if name not in entries}
        if new:
            others_first = bool(self._waiting) and self._waiting[0] is not request
            if others_first or not self._residents.admit(request.names, new):
                return None
        for name in request.names:
            entries.move_to_end(name)
        return {name: entries[name] for name in request.names}

    def _no_room(self, request: _Request, timeout: float) -> str:
        new = [name for name in request.names if name not in self._residents.by_name]
        return f"AdapterPool: no room for {new} within {timeout} s; {self._residents.describe()}"
