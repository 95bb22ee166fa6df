"""The CPU kernels of AVX512, AVX512_BF16 and AMX on a machine with AVX2 alone: make cpu-emulation

    tools/cpu_emulation.py [--level LEVEL]... [--missing] [--build] [arguments of pytest]

Compiles them with their instructions replaced by those of tests/emulation/cpu, beside the package and not into it,
tests these against plain formulas, and runs pytest on each level, by default tests/ops and tests/nn.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree, which

import pybind11
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this tree's pyfused, whichever is installed
WORK = ROOT / "build" / "cpu-emulation"
PACKAGE = WORK / "package"
LEVELS = ("AVX512", "AVX512_BF16", "AMX")
BUILT = ("_ops.so", "_ops_cuda.so", "_C.")  # in the package's place; autograd has no part in the levels


def run(*command: object, cwd: Path = ROOT, **environment: str) -> None:
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=os.environ | environment)
    if result.returncode != 0:
        raise SystemExit(f"cpu-emulation: {shlex.join(map(str, command))}: exit status {result.returncode}")


def build() -> None:
    from pyfused import _C, __version__

    scripts = sysconfig.get_path("scripts")
    cmake, ninja = (which(name, path=scripts) or which(name) for name in ("cmake", "ninja"))
    settings = {
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": WORK / "lib",
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_RUNTIME_OUTPUT_DIRECTORY": WORK / "bin",
        "PYFUSED_CUDA": "OFF",
        "PYFUSED_EMULATE_CPU": "ON",
        "PYFUSED_TORCH_DIR": Path(torch.__file__).parent,
        "PYFUSED_TORCH_VERSION": torch.__version__,
        "PYFUSED_VERSION": __version__,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    options = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    options += [f"-D{name}={value}" for name, value in settings.items()]
    programs = ["intrinsics_test"]
    if "AMX" in _C.available_cpu_capabilities():
        programs.append("real_intrinsics_test")
    run(cmake, "-S", ROOT, "-B", WORK / "cmake", "-G", "Ninja", *options)
    run(cmake, "--build", WORK / "cmake", "--target", "_ops", "_C", *programs)
    for program in programs:
        run(WORK / "bin" / program)


def lay_out() -> None:
    """The package with these libraries: links to its files, so that a change of them needs no other step."""
    rmtree(PACKAGE, ignore_errors=True)
    folder = PACKAGE / "pyfused"
    folder.mkdir(parents=True)
    for path in (ROOT / "pyfused").iterdir():
        if path.name != "__pycache__" and not path.name.startswith(BUILT):
            (folder / path.name).symlink_to(path)
    for path in (WORK / "lib").glob("*.so"):
        (folder / path.name).symlink_to(path)


def missing(levels: Sequence[str]) -> list[str]:
    from pyfused import _C

    return [level for level in levels if level not in _C.available_cpu_capabilities()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--level", action="append", choices=LEVELS, help="one of the levels (default: all of them)")
    parser.add_argument("--missing", action="store_true", help="only levels that this machine does not have")
    parser.add_argument("--build", action="store_true", help="nothing but the build")
    arguments, tests = parser.parse_known_args()
    levels = arguments.level or LEVELS
    if arguments.missing:
        levels = missing(levels)
        if not levels:
            return
    begin = time.monotonic()
    build()
    lay_out()
    print(f"cpu-emulation: build: {time.monotonic() - begin:.0f} s", flush=True)
    if arguments.build:
        return
    # pytest runs in the package's folder, which Python looks into first
    tests = [os.path.abspath(word) if os.path.exists(word.split("::")[0]) else word for word in tests]
    if not any(word.startswith("/") for word in tests):
        tests += [ROOT / "tests" / "ops", ROOT / "tests" / "nn"]
    pytest = (sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-q", *tests)
    for level in levels:
        begin = time.monotonic()
        print(f"== CPU level {level}, emulated", flush=True)
        run(*pytest, cwd=PACKAGE, PYTHONPATH=str(PACKAGE), PYFUSED_CPU_CAPABILITY=level)
        print(f"cpu-emulation: {level}: {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
