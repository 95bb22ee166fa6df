"""vLLM's worker on CPUs, for a compiled model with LoRA. Importing this file imports vLLM's worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


def _call(function: Callable, *args: Any) -> Any:
    return function(*args)


# CPython keeps the frames of calls in chunks of 16 KB and gives a chunk's memory back to the system as soon as the call
# that needed it returns. The function that inductor makes of a model with LoRA has hundreds of variables; where it all
# but fills a chunk, each attention layer that it calls has memory mapped, unmapped, and the other cores interrupted for
# it. A frame too large for a chunk gets one of twice its size, in which the model has room.
_call.__code__ = _call.__code__.replace(co_stacksize=20_000)


class Worker(CPUWorker):
    """Runs each step with room for the frames of a compiled model."""

    def execute_model(self, scheduler_output: Any) -> Any:
        return _call(super().execute_model, scheduler_output)
