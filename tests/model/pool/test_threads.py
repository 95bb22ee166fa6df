"""``AdapterPool`` in many threads and over a long time."""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import math
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROWS_CHANGE_BITS
from pool_cases import WEIGHTS, run, save, use
from torch import Tensor

import pyfused
from pyfused import AdapterPool
from pyfused.nn import base


class Memory(bytearray):
    """What an adapter's tensor lies in: all NaN once the tensor is freed, and never used for another."""

    graves: list[Memory]

    def __del__(self) -> None:
        self[:] = b"\xff" * len(self)
        Memory.graves.append(self)


@pytest.fixture
def poisoned(monkeypatch) -> list[Memory]:
    """Who reads an adapter's memory after it was freed finds NaN there. Gives the freed ones."""

    def empty(*shape, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        like = torch.empty(*shape, dtype=dtype, device=device)
        return torch.frombuffer(Memory(like.nbytes), dtype=dtype).view(like.shape) if like.numel() else like

    Memory.graves = []
    monkeypatch.setattr(base, "empty", empty)
    return Memory.graves


def test_freed_memory_is_seen(poisoned):
    tensor = base.frozen_copy(torch.ones(4), "cpu", torch.float32).detach()
    window = (ctypes.c_float * 4).from_address(tensor.data_ptr())
    assert list(window) == [1.0] * 4 and not poisoned
    del tensor
    assert len(poisoned) == 1 and all(math.isnan(value) for value in window)


@pytest.mark.parametrize("on_host", [0, 6])
@pytest.mark.parametrize(("kind", "seed"), [("lora", 0), ("lora", 1), ("mixed", 0), ("mixed", 1)])
def test_threads_do_not_disturb_each_other(wrap, request, inputs, poisoned, kind, seed, on_host):
    """More adapters than room, requested, prefetched and refreshed at once; each row is its adapter's: LoRA to the bit,
    and among other methods, whose prompts move the text of all, by the error of another order of sums.
    """
    folder = request.getfixturevalue("folder" if kind == "lora" else "mixed")
    model = wrap(pyfused, "llama", target_modules=["q_proj"]).eval()
    names, length = sorted(os.listdir(folder)), inputs["input_ids"].shape[1]
    with AdapterPool(model, folder) as pool:
        with pool.use(names) as given:
            alone = {name: run(model, inputs, [one] * 2)[:, -length:] for name, one in zip(names, given, strict=True)}
    alone["__base__"] = run(model, inputs, ["__base__"] * 2)
    own = sum(parameter.numel() for parameter in model.parameters())
    errors, stop = [], time.monotonic() + 1.5

    def client(number: int) -> None:
        rng = random.Random(100 * seed + number)
        while time.monotonic() < stop and not errors:
            asked = [rng.choice([*names, "__base__"]) for _ in range(2)]
            try:
                with pool.use(asked) as given:
                    rows = run(model, inputs, given)[:, -length:]
                for row, name in enumerate(asked):
                    if kind == "lora":
                        assert torch.equal(rows[row], alone[name][row])
                    else:
                        torch.testing.assert_close(rows[row], alone[name][row], rtol=1e-4, atol=1e-5)
                if rng.random() < 0.2:
                    assert sum(parameter.numel() for parameter in model.parameters()) >= own
                if rng.random() < 0.3:
                    pool.prefetch(rng.choice(names))
                if rng.random() < 0.2:
                    os.utime(folder / rng.choice(names) / WEIGHTS)
                    pool.refresh()
            except BaseException as error:
                errors.append(error)

    with AdapterPool(model, folder, max_adapters=4, workers=2, max_host_adapters=on_host) as pool:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with pool._lock:  # adapters may still be on their way in
            stats = pool.stats()
            assert stats.adapters == len(pool.resident) <= 4 and stats.evictions > 0
            assert stats.host_adapters == len(pool.resident_on_host) <= on_host
            assert stats.host_bytes == sum(files.memory.nbytes for files in pool._host.by_name.values())
            assert (stats.host_hits > 0) == (on_host > 0)
    assert errors or poisoned
    if errors:
        raise errors[0]
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("on_host", [0, 6])
def test_files_replaced_while_they_are_read(wrap, writer, folder, tmp_path, inputs, poisoned, on_host):
    """A request has one version of an adapter as a whole, in every layer; after ``refresh``, the newest."""
    model = wrap(pyfused, "llama", target_modules=["q_proj"]).eval()
    versions, expected, errors, stop = [], [], [], time.monotonic() + 1.5
    for seed in (50, 51):
        save(writer, tmp_path / "versions", f"v{seed}", seed)
        versions.append((tmp_path / "versions" / f"v{seed}" / WEIGHTS).read_bytes())
    with AdapterPool(model, tmp_path / "versions") as pool, pool.use(["v50", "v51"]) as given:
        expected = [run(model, inputs, [name])[0] for name in given]
    seen = set()

    def version_of(row: Tensor) -> int:
        same = functools.partial(torch.allclose, atol=1e-5) if ROWS_CHANGE_BITS else torch.equal
        matching = [place for place, logits in enumerate(expected) if same(row, logits)]
        assert len(matching) == 1, "of no version, or of two"
        return matching[0]

    def replace(number: int) -> None:
        for turn in itertools.count(number):
            new = folder / "a0" / "new"
            new.write_bytes(versions[turn % 2])
            new.replace(folder / "a0" / WEIGHTS)
            pool.refresh()
            with pool.use(["a0"]) as given:
                assert version_of(run(model, inputs, given)[0]) == turn % 2
            if time.monotonic() > stop or errors:
                return

    def read(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < stop and not errors:
            with pool.use(["a0", f"a{rng.randrange(1, 8)}"]) as given:
                seen.add(version_of(run(model, inputs, given)[0]))

    def guarded(work, number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    (folder / "a0" / WEIGHTS).write_bytes(versions[1])
    with AdapterPool(model, folder, max_adapters=4, max_host_adapters=on_host) as pool:
        threads = [
            threading.Thread(target=guarded, args=each) for each in ((replace, 0), (read, 1), (read, 2), (read, 3))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    assert seen == {0, 1} and poisoned


def test_generate_while_others_come_and_go(pool, model, inputs):
    names = ["a0", "__base__"]
    ids = inputs["input_ids"].repeat(2, 1)

    def generate() -> Tensor:
        with pool.use(names) as given:
            return model.generate(ids, adapter_names=given, max_new_tokens=12, do_sample=False, pad_token_id=0)

    expected = generate()
    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(generate) for _ in range(6)]
        while not all(result.done() for result in results):
            use(pool, f"a{1 + pool.stats().misses % 7}")
    assert all(torch.equal(result.result(), expected) for result in results)
    assert pool.stats().evictions > 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["folder", "mixed"])
@pytest.mark.parametrize(("swaps", "on_host"), [(300, 0), (300, 5), pytest.param(10_000, 0, marks=pytest.mark.slow)])
def test_memory_stays_flat(request, model, inputs, kind, swaps, on_host):
    pool = AdapterPool(model, request.getfixturevalue(kind), max_adapters=3, max_host_adapters=on_host)
    names = pool.available()

    def counts() -> tuple[int, int]:
        gc.collect()
        tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
        return tensors, len(list(model.modules()))

    def swap(count: int) -> None:
        for place in range(count):
            with pool.use([names[place % len(names)], names[(place + 1) % len(names)]]) as given:
                if place % 20 == 0:
                    run(model, inputs, given)

    swap(5 * len(names))
    run(model, inputs, ["__base__"])
    before, memory = counts(), _resident_bytes()
    swap(swaps // len(names) * len(names))
    run(model, inputs, ["__base__"])
    assert counts() == before
    assert _resident_bytes() - memory < 30e6
    assert pool.stats().evictions > swaps * 0.9
    pool.close()
