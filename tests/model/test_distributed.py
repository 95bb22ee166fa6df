"""DDP and FSDP2 on two processes (gloo): the losses and the adapter of one process; checkpoints in shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """A folder with what one process and two processes made of each mode and method."""
    folder = tmp_path_factory.mktemp("distributed")
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), str(processes), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, processes in ((0, 1), (0, 2), (1, 2))
    ]
    try:
        outputs = [worker.communicate(timeout=400)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return folder


@pytest.mark.parametrize("method", ["lora", "adalora", "ia3", "bottleneck", "prefix", "projected prefix", "prompt"])
@pytest.mark.parametrize("mode", ["ddp", "fsdp", "fsdp-leaves"])
def test_as_one_process(results, mode, method):
    expected = torch.load(results / f"alone-{method}.pt", weights_only=True)
    got = torch.load(results / f"{mode}-{method}.pt", weights_only=True)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["losses"][-1] < got["losses"][0]
    assert got["adapter"].keys() == expected["adapter"].keys()
    for name, tensor in got["adapter"].items():
        torch.testing.assert_close(tensor, expected["adapter"][name], rtol=1e-4, atol=1e-5, msg=name)
