"""Loads the native libraries; importing this module is what makes ``torch.ops.pyfused`` exist."""

from __future__ import annotations

import re
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


# Whether the CUDA kernels run on a GPU, by its number.
_gpus: dict[int, bool] = {}


@torch.compiler.assume_constant_result
def runs_on_gpu(number: int) -> bool:
    """Whether the CUDA kernels are compiled for this GPU: by default not for those before an A100's generation."""
    found = _gpus.get(number)
    if found is None:
        if not torch.cuda.is_available():
            return True  # a fake tensor's
        capability = torch.cuda.get_device_capability(number)
        found = _gpus[number] = any(_has_code(built, *capability) for built in _C.cuda_architectures())
    return found


def _has_code(built: str, major: int, minor: int) -> bool:
    """Whether what is compiled for an entry of CMAKE_CUDA_ARCHITECTURES runs on a GPU of this compute capability."""
    entry = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", built)
    if entry is None:
        return True  # "native", "all": chosen where it is built
    code = int(entry[1]), int(entry[2])
    if entry[3] == "a":
        return code == (major, minor)
    # machine code is for later GPUs of its generation, PTX for all later ones
    is_code = entry[3] == "f" or entry[4] == "-real"
    return code <= (major, minor) and (not is_code or code[0] == major)


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
