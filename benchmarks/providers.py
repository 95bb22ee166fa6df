"""What providers of several benchmarks share: an environment variable that forces a path, who can be measured here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import Workload
from torch import nn


class Forced(nn.Module):
    """Calls a module with an environment variable set; the backward that follows sees the same."""

    def __init__(self, module: nn.Module, variable: str, value: str) -> None:
        super().__init__()
        self.module, self.variable, self.value = module, variable, value

    def forward(self, *inputs):
        if os.environ.get(self.variable) != self.value:
            os.environ[self.variable] = self.value
        return self.module(*inputs)


@contextmanager
def kept_environment() -> Iterator[None]:
    """Environment variables are afterwards what they were before."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def missing(provider: str, device: torch.device) -> str | None:
    """Why a provider cannot be measured here at all; None where it can."""
    if provider == "peft" and importlib.util.find_spec("peft") is None:
        return "peft is not installed"
    if provider == "compile" and device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton, which is not installed"
    return None


def working(
    label: str, names: Sequence[str], attempt: Callable[[str], Workload], say: Callable[[str], object]
) -> dict[str, Workload]:
    """What ``attempt`` makes of each provider of a case; one that fails is left out with a line, because a GPU is lent
    for minutes.

    Raises:
        RuntimeError: it is what ratios refer to, eager or pyfused: no figure of the case would mean anything.
    """
    found = {}
    for name in names:
        try:
            found[name] = attempt(name)
        except Exception as error:
            if name in (names[0], "eager", "pyfused"):
                raise RuntimeError(told(label, name, error)) from error
            traceback.print_exc()
            say(f"wrong: {told(label, name, error)}")
    return found


def told(label: str, who: str, error: Exception) -> str:
    """A line that says whose error it is and in which case, where it does not say so itself."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if text.startswith(f"{label}: ") else f"{label}: {who}: {type(error).__name__}: {text}"


def failing_tests(file: str, name: str, seconds: float) -> str | None:
    """What tests of the GPU say where they fail, in a process of their own: a new kernel may also never end.

    Args:
        file: in tests/ops.
        name: as pytest's -k takes it.
    """
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/ops/{file}", "-k", name]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"{name} does not end within {seconds:g} s"
    return None if done.returncode == 0 else f"{name}: {(done.stdout.strip().splitlines() or ['nothing'])[-1]}"
