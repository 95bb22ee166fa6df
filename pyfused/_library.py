"""Loads the native libraries; importing this module is what makes ``torch.ops.pyfused`` exist."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).parent
_HOW_TO_BUILD = (
    "Build it with `pip install --no-build-isolation -e .` in pyfused's source tree, in the environment of the torch "
    "that it shall run with."
)
# Device types whose kernels are loaded.
_kernels: set[str] = set()


def has_kernel(device_type: str) -> bool:
    """Whether ops have a native kernel on ``device_type`` ("cpu", "cuda"); other devices use the reference."""
    return device_type in _kernels


def _load_library(name: str) -> None:
    try:
        torch.ops.load_library(_FOLDER / name)
    except OSError as error:
        raise ImportError(
            f"pyfused's native library {name} does not load with torch {torch.__version__}: {error}. {_HOW_TO_BUILD}"
        ) from error


def _load() -> ModuleType:
    if not (_FOLDER / "_ops.so").exists():
        raise ImportError(f"pyfused's native library _ops.so is not built. {_HOW_TO_BUILD}")
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"pyfused's native module _C cannot be imported: {error}. {_HOW_TO_BUILD}") from error
    try:
        _C.cpu_capability()
    except RuntimeError as error:
        # A wrong PYFUSED_CPU_CAPABILITY is an error of the user's, to be told before the first op runs.
        raise ValueError(str(error)) from None
    _load_library("_ops.so")
    _kernels.add("cpu")
    if torch.version.cuda is not None and (_FOLDER / "_ops_cuda.so").exists():
        _load_library("_ops_cuda.so")
        _kernels.add("cuda")
    return _C


# The rest of the package takes _C from here, where its absence has a message.
_C = _load()


def _load_autograd() -> ModuleType | None:
    """Ops with their gradients in C++, which do what the autograd.Functions do, faster.

    None where torch is another one than that of the build, the only one that they fit, and where they are not built.
    """
    if _C.build_info()["torch"] != torch.__version__ or not any(_FOLDER.glob("_autograd.*")):
        return None
    try:
        from . import _autograd

        _autograd.call_cpu_kernels(True)
    except (ImportError, AttributeError) as error:  # AttributeError: it is older than this file
        raise ImportError(f"pyfused's native module _autograd cannot be imported: {error}. {_HOW_TO_BUILD}") from error
    return _autograd


autograd = _load_autograd()
