"""Memory of a training step: what it saves for backward, and the peak of the process.

The peak needs a process of its own, since an allocator that has once grown tells nothing about the next model:
:func:`measure` starts one, which prints what :func:`main` finds as JSON.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .classifier import Batch
from .docstrings import CLASSES
from .training import Contender, Settings, loss_of
from .ways import WAYS, build


@dataclass(frozen=True)
class Memory:
    """In bytes: ``saved`` for backward by one forward; ``peak`` of a step above the loaded model with its optimizer."""

    saved: int
    peak: int


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters and buffers left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps it alive, so that no two of them have one address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch)
    assert loss.requires_grad
    return sum(storages.values())


def measure(names: Iterable[str], batch_size: int, length: int) -> dict[str, Memory]:
    """Memory of ways by name on batches ``[batch_size, length]``, each in a fresh process."""
    # Blocks from 64 KiB on come from the system and go back to it, so the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the pyfused of this process
    command = [sys.executable, "-m", __name__, str(batch_size), str(length), *names]
    done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return {name: Memory(**memory) for name, memory in json.loads(done.stdout.splitlines()[-1]).items()}


def main(batch_size: int, length: int, names: Sequence[str]) -> dict[str, Memory]:
    """What :func:`measure` asks of its process, which imports everything once and is forked for each way."""
    context = multiprocessing.get_context("fork")  # before anything has run in threads
    results = context.SimpleQueue()

    def child(name: str) -> None:
        results.put((name, measure_here(name, batch_size, length)))

    for start in range(0, len(names), 2):  # two at a time: bytes are measured, not time
        children = [context.Process(target=child, args=(name,)) for name in names[start : start + 2]]
        for process in children:
            process.start()
        for process in children:
            process.join()
            if process.exitcode:
                raise SystemExit(f"measuring memory ended with {process.exitcode}")
    found = dict(results.get() for _ in names)
    return {name: found[name] for name in names}


def measure_here(name: str, batch_size: int, length: int) -> Memory:
    """Memory of the way ``name``, in this process."""
    contender = Contender(build(WAYS[name], seed=0, steps=100), Settings(), WAYS[name])
    ids = torch.randint(1000, 30000, (batch_size, length))
    batch = Batch(ids, torch.ones_like(ids), torch.randint(CLASSES, (batch_size,)))
    saved = saved_bytes(contender.model, batch)
    contender.step(0, batch, 0.0)  # loads what is loaded at the first use, and makes the optimizer's state
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    for number in (1, 2):
        contender.step(number, batch, 0.0)
    return Memory(saved, _status("VmHWM") - before)


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


if __name__ == "__main__":
    measured = main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    print(json.dumps({name: asdict(memory) for name, memory in measured.items()}))
