"""Time, memory and facts on a GPU, for ``harness.measure`` and for a result's header.

Every sample is queued behind a kernel that spins, so that the host has enqueued all of it before the GPU begins: the
events then have the GPU's time, and not that of Python between two launches. The host's time is a figure of its own.
"""

from __future__ import annotations

import gc
import math
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence

import harness
import records
import torch
from harness import Workload
from torch import Tensor

import pyfused

# The host is given twice what it took lately, up to this; a sample that compiles something takes longer, once.
MAX_HEAD_US = 5000.0
_CYCLES_PER_US = 2000  # of the spinning kernel: an upper bound of today's clocks


class CudaClock:
    """Events on the current stream; before each sample the L2 cache is filled with other data.

    Attributes:
        samples: how many were taken.
        late: of how many the GPU began before the host had enqueued all; their times hold gaps.
    """

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        # Read, not written: lines that were written would go back to memory during the sample.
        self._other_data = torch.zeros(2 * max(l2, 1 << 25) // 4, dtype=torch.float32, device=device)
        self._sink = torch.zeros((), dtype=torch.float32, device=device)
        self._host_us = deque([300.0], maxlen=64)
        self._first: torch.cuda.Event | None = None
        self._began = 0
        self.samples = self.late = 0

    def prepare(self) -> None:
        torch.amax(self._other_data, 0, out=self._sink)
        torch.cuda._sleep(int(min(2 * max(self._host_us) + 100, MAX_HEAD_US) * _CYCLES_PER_US))
        self._first = None
        self._began = time.perf_counter_ns()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._first = self._first or event
        return event

    def wait(self) -> None:
        self._host_us.append((time.perf_counter_ns() - self._began) / 1e3)
        self.samples += 1
        self.late += self._first.query()
        torch.cuda.synchronize()

    def microseconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        return start.elapsed_time(stop) * 1e3


def layers_beyond_l2(bytes_of_one: int, gpu: Gpu) -> int:
    """How many layers of so many bytes are four times the L2 cache together, 2 to 24: what a layer reads has been
    driven out by the layers before it, as in a model."""
    return min(max(math.ceil(4 * gpu.l2_bytes() / bytes_of_one), 2), 24)


def in_graphs(label: str, layers: Sequence[dict[str, Workload]], tolerance: float, gpu: Gpu) -> dict[str, Workload]:
    """Each provider's forward of several layers in a row as one CUDA graph, as decoding a token runs them.

    Args:
        layers: workloads by provider for each layer, with the same numbers in different memory.
        tolerance: of the relative difference between a graph's results and those of the first layer's call.

    Raises:
        RuntimeError: a graph's results are not those of the calls that it was made of.
    """
    graphs = {}
    with torch.no_grad():
        for name in layers[0]:
            calls = [_as_tuple(layer[name].call) for layer in layers]
            expected = calls[0]()
            replay, results = gpu.graphed(calls)
            for result in results:
                result.fill_(math.nan)
            replay()
            for i, result in enumerate(results):
                if not harness.relative_error(result, expected[i % len(expected)]) <= tolerance:
                    raise RuntimeError(f"{label}: {name} computes something else in a CUDA graph")
            graphs[name] = Workload(replay, repeats=len(layers))
    return graphs


def _as_tuple(call: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    def called() -> tuple[Tensor, ...]:
        result = call()
        return result if isinstance(result, tuple) else (result,)

    return called


class Replay:
    """Runs a captured graph; keeps the calls that it was made of, since a graph has no more than addresses."""

    def __init__(self, graph: torch.cuda.CUDAGraph, calls: list[Callable[[], tuple[Tensor, ...]]]) -> None:
        self._graph, self._calls = graph, calls

    def __call__(self) -> None:
        self._graph.replay()


class Gpu:
    """The current CUDA device, as a benchmark uses it."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())

    def clock(self) -> CudaClock:
        return CudaClock(self.device)

    def l2_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size

    def graphed(self, calls: list[Callable[[], tuple[Tensor, ...]]]) -> tuple[Callable[[], object], list[Tensor]]:
        """One CUDA graph of all the calls in a row: a function that replays it, and the results it writes to.

        Each call is run three times before, on the stream of the capture: what compiles or allocates once has done so.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                for _ in range(3):
                    call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = [call() for call in calls]
        return Replay(graph, calls), [y for result in results for y in result]

    def answers(self) -> bool:
        """Whether the device still works in this process; an error within a kernel is every later call's, too."""
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return False
        return True

    def peak_bytes(self, work: Workload) -> int:
        """The most that one step allocates at a time on top of what is there before it, the results included."""
        work.train_step()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.train_step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def host_us(self, work: Workload, runs: int = 20) -> dict[str, float]:
        """Microseconds by mode that the host is busy with one call, the smallest of some runs on an idle GPU."""
        best: dict[str, float] = {}
        for _ in range(runs):
            torch.cuda.synchronize()
            marks = [time.perf_counter_ns()]
            y = work.call()
            marks.append(time.perf_counter_ns())
            if work.inputs:
                torch.autograd.grad(y, work.inputs, work.grad_output)
                marks.append(time.perf_counter_ns())
            took = {"forward": (marks[1] - marks[0]) / 1e3}
            if work.inputs:
                took |= {"backward": (marks[2] - marks[1]) / 1e3, "full": (marks[2] - marks[0]) / 1e3}
            best = {mode: min(us, best.get(mode, us)) for mode, us in took.items()}
        torch.cuda.synchronize()
        return best

    def environment(self) -> dict[str, str]:
        """``records.environment`` and what a GPU's result depends on besides."""
        build = pyfused.build_info()
        properties = torch.cuda.get_device_properties(self.device)
        return records.environment() | {
            "device": properties.name,
            "multiprocessors": str(properties.multi_processor_count),
            "l2_mb": f"{properties.L2_cache_size / 2**20:.0f}",
            "driver": self._nvidia_smi("driver_version"),
            "clocks_at_start": self.clocks(),
            "cuda_toolkit": str(build["cuda_toolkit"]),
            "cuda_architectures": " ".join(build["cuda_architectures"]),
            "cutlass": str(build["cutlass"]),
        }

    def clocks(self) -> str:
        """What nvidia-smi reads now; nothing is set."""
        query = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
        values = self._nvidia_smi(*query)
        if values == "unknown":
            return values
        return ", ".join(f"{name} {value}" for name, value in zip(query, values.split(", "), strict=False))

    def ceilings(self) -> dict[str, str]:
        """What this GPU reaches in practice: bytes read and written by a large copy, a large bf16 product."""
        source = torch.rand(2**28, device=self.device)
        target = torch.empty_like(source)
        left, right = (torch.randn(8192, 8192, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        copy_us = self._median_us(lambda: target.copy_(source))
        gemm_us = self._median_us(lambda: left @ right)
        return {
            "copy_tb_s": f"{2 * source.numel() * 4 / copy_us / 1e6:.2f}",
            "gemm_tflop_s": f"{2 * 8192**3 / gemm_us / 1e6:.0f}",
        }

    def _median_us(self, call: Callable[[], object], runs: int = 15) -> float:
        clock = self.clock()
        times = []
        for _ in range(runs + 3):
            clock.prepare()
            start = clock.mark()
            call()
            stop = clock.mark()
            clock.wait()
            times.append(clock.microseconds(start, stop))
        return sorted(times[3:])[runs // 2]

    def _nvidia_smi(self, *query: str) -> str:
        if shutil.which("nvidia-smi") is None:
            return "unknown"
        this = f"--id=GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", this]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else "unknown"
