"""A stand-in for cuda_timing.Gpu on the CPU, with a host clock."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import harness
import records


class HostGpu:
    """What a benchmark asks of a GPU, from the CPU; a "graph" runs its calls again."""

    device = torch.device("cpu")

    def clock(self):
        clock = harness._HostClock()
        clock.late, clock.samples = 0, 1
        return clock

    def l2_bytes(self):
        return 1

    def graphed(self, calls):
        results = [y for call in calls for y in call()]

        def replay():
            fresh = [y for call in calls for y in call()]
            for result, value in zip(results, fresh, strict=True):
                result.copy_(value)

        return replay, results

    def peak_bytes(self, work):
        return 1

    def host_us(self, work):
        return {mode: 1.0 for mode in ("forward", "backward", "full")}

    def environment(self):
        return records.environment() | {"device": "a GPU"}

    def ceilings(self):
        return {"copy_tb_s": "1"}

    def answers(self):
        return True

    def clocks(self):
        return "unknown"
