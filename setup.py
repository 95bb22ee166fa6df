"""Builds the native libraries with CMake and ninja; the metadata is in pyproject.toml.

Environment: MAX_JOBS (compiler processes at a time), PYFUSED_CUDA and PYFUSED_CUTLASS (AUTO, ON or OFF),
CMAKE_BUILD_TYPE, and CMAKE_ARGS for what else CMake takes, such as -DCMAKE_CUDA_ARCHITECTURES=90a-real.
"""

import filecmp
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def stop(sentence: str) -> NoReturn:
    raise SystemExit(f"pyfused: {sentence}")


def find_torch():
    # Imported here and not above: the metadata must be had without torch.
    try:
        import torch
    except ImportError as error:
        stop(
            f"the build needs torch, and importing it gave '{error}': pip install 'torch>=2.11', then build with "
            "pip install --no-build-isolation."
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        stop(f"the build needs torch 2.11 or later, got {torch.__version__}: pip install --upgrade torch.")
    return torch


def find_pybind11() -> str:
    try:
        import pybind11
    except ImportError:
        stop("the build needs pybind11: pip install pybind11.")
    return pybind11.get_cmake_dir()


def find_cutlass() -> str:
    """CUTLASS's headers in PyPI's nvidia-cutlass, which is not imported; empty where it is not installed."""
    package = importlib.util.find_spec("cutlass_library")
    return "" if package is None else os.path.join(package.submodule_search_locations[0], "source", "include")


def find_tool(name: str) -> str:
    """Path of cmake or ninja: among this Python's scripts, where the PyPI packages put them, or on PATH."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return path or stop(f"the build needs {name}: pip install {name}.")


def check_machine() -> None:
    """What CMake would also find out, but would not say in one sentence."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        stop(f"only Linux on x86-64 and on aarch64 is supported, this is {sys.platform} on {platform.machine()}.")
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, compilers)):
        stop(f"the build needs a C++ compiler, and {' or '.join(compilers)} is not there: install g++ (12 or later).")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if os.environ.get("PYFUSED_CUDA") == "ON" and not nvcc:
        stop("PYFUSED_CUDA=ON needs nvcc: install the CUDA toolkit and put nvcc on PATH, or name it in CUDACXX.")


class CMakeBuild(build_ext):
    """Builds in build/cmake-<python>, which is kept for the next time, and copies the libraries to their package."""

    def run(self) -> None:
        check_machine()
        torch = find_torch()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        settings = {
            "CMAKE_BUILD_TYPE": os.environ.get("CMAKE_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "lib",
            "PYFUSED_CUDA": os.environ.get("PYFUSED_CUDA", "AUTO"),
            "PYFUSED_CUTLASS": os.environ.get("PYFUSED_CUTLASS", "AUTO"),
            "PYFUSED_CUTLASS_DIR": find_cutlass(),
            "PYFUSED_TORCH_CUDA": torch.version.cuda or "",
            "PYFUSED_TORCH_DIR": Path(torch.__file__).parent,
            "PYFUSED_TORCH_VERSION": torch.__version__,
            "PYFUSED_VERSION": self.distribution.get_version(),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": find_pybind11(),
        }
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        compile = [cmake, "--build", build]
        if "MAX_JOBS" in os.environ:
            compile += ["--parallel", os.environ["MAX_JOBS"]]
        # Linking is fast; without this, the _ops_cuda.so of an earlier build with CUDA would stay.
        shutil.rmtree(build / "lib", ignore_errors=True)
        if subprocess.call(configure) != 0 or subprocess.call(compile) != 0:
            stop("the native build failed; what CMake or the compiler said is above (pip shows it with -v).")
        self.copy_libraries(build / "lib", (ROOT if self.inplace else Path(self.build_lib)) / "pyfused")

    def copy_libraries(self, source: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for library in source.glob("*.so"):
            place = target / library.name
            if not place.exists() or not filecmp.cmp(library, place):
                # Moved into place, never written there: a running process may have the old one mapped.
                shutil.copy2(library, target / f"{library.name}.new")
                os.replace(target / f"{library.name}.new", place)
        if not (source / "_ops_cuda.so").exists():
            (target / "_ops_cuda.so").unlink(missing_ok=True)


# Before setup() reads pyproject.toml, which an older one does not understand.
if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"the build needs setuptools 77 or later, got {setuptools.__version__}: pip install --upgrade setuptools.")

# The one extension stands for all the libraries: it makes the wheel one of this platform and this Python, as _C is.
setup(ext_modules=[Extension("pyfused._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
