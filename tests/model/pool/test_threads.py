"""``AdapterPool`` in many threads and over a long time."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pool_cases import WEIGHTS, run, use
from torch import Tensor

import pyfused
from pyfused import AdapterPool


@pytest.mark.parametrize(("kind", "seed"), [("lora", 0), ("lora", 1), ("mixed", 0), ("mixed", 1)])
def test_threads_do_not_disturb_each_other(wrap, request, inputs, kind, seed):
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

    with AdapterPool(model, folder, max_adapters=4, workers=2) as pool:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.stats()
        assert stats.adapters == len(pool.resident) <= 4 and stats.evictions > 0
    if errors:
        raise errors[0]
    assert list(model.peft_config) == ["default"]


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
@pytest.mark.parametrize("swaps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(request, model, inputs, kind, swaps):
    pool = AdapterPool(model, request.getfixturevalue(kind), max_adapters=3)
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
