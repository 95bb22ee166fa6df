"""What this copy of pyfused is, and what it runs on."""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ._library import _C, autograd, has_kernel

# Not needed by pyfused, but a bug report is read differently with them.
_PACKAGES = ("numpy", "safetensors", "transformers", "peft")


def build_info() -> dict[str, Any]:
    """Facts of the build and of this process, as a bug report needs them.

    Returns:
        A flat dict of strings, numbers, lists of strings and None: versions (``pyfused``, ``python``, ``torch``,
        ``torch_cuda``, and of a few packages, None where one is not installed), the machine (``platform``, ``cpu``,
        ``cpu_capability`` in use, ``cpu_capabilities`` compiled, ``cpu_capabilities_emulated`` of these, for tests
        alone, ``threads``, ``gpu``), ``kernels`` (the device types that have native kernels), ``autograd`` ("C++", or
        "Python" with another torch than that of the build) and the build (``compiler``, ``cxx_standard``,
        ``build_type``, ``built_with_torch``, ``cuda_toolkit``, ``cuda_architectures``, ``cutlass``).
    """
    build = _C.build_info()
    return {
        "pyfused": build["version"],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "platform": f"{platform.platform()} {sys.implementation.name}",
        "cpu": _cpu_model(),
        "cpu_capability": _C.cpu_capability(),
        "cpu_capabilities": build["cpu_capabilities"],
        "cpu_capabilities_emulated": build["cpu_capabilities_emulated"],
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "kernels": [device for device in ("cpu", "cuda") if has_kernel(device)],
        "autograd": "Python" if autograd is None else "C++",
        "compiler": build["compiler"],
        "cxx_standard": build["cxx_standard"],
        "build_type": build["build_type"],
        "built_with_torch": build["torch"],
        "cuda_toolkit": build["cuda_toolkit"],
        "cuda_architectures": build["cuda_architectures"],
        "cutlass": build.get("cutlass"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()  # aarch64 names no model there
