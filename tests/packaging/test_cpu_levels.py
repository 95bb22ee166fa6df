"""Which CPU kernels a build has: up to PYFUSED_HIGHEST_CPU_CAPABILITY, above AVX2 for AVX2 with PYFUSED_EMULATE_CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from shutil import which

import pybind11
import pytest
import torch

from pyfused import _C

ROOT = Path(__file__).resolve().parents[2]
LEVELS = _C.build_info()["cpu_capabilities"]


def configure(build: Path, level: str, emulate: str = "OFF") -> subprocess.CompletedProcess[str]:
    cmake = which("cmake", path=sysconfig.get_path("scripts")) or which("cmake")
    settings = {
        "PYFUSED_HIGHEST_CPU_CAPABILITY": level,
        "PYFUSED_EMULATE_CPU": emulate,
        "PYFUSED_CUDA": "OFF",
        "PYFUSED_TORCH_DIR": Path(torch.__file__).parent,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    command = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{key}={value}" for key, value in settings.items())]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("level", LEVELS[:2])
def test_levels_up_to_the_highest_are_compiled(level: str, tmp_path: Path) -> None:
    result = configure(tmp_path, level)
    assert result.returncode == 0, result.stderr
    expected = set(LEVELS[: LEVELS.index(level) + 1])
    compiled, defined = set(), set()
    for command in json.loads((tmp_path / "compile_commands.json").read_text()):
        words = command["command"].split()
        compiled |= {word.removeprefix("-DPYFUSED_ISA=") for word in words if word.startswith("-DPYFUSED_ISA=")}
        if command["file"].endswith("cpu/isa.cpp"):
            defined |= {word.removeprefix("-DPYFUSED_HAVE_") for word in words if word.startswith("-DPYFUSED_HAVE_")}
    assert compiled == defined == expected


def test_an_unknown_level_is_an_error_that_lists_the_levels(tmp_path: Path) -> None:
    result = configure(tmp_path, "AVX9")
    assert result.returncode != 0
    message = " ".join(result.stderr.split())
    assert f"PYFUSED_HIGHEST_CPU_CAPABILITY must be empty or one of {';'.join(LEVELS)}, got 'AVX9'" in message


@pytest.mark.skipif("AMX" not in LEVELS, reason="no levels above AVX2")
def test_emulated_kernels_need_no_more_than_avx2(tmp_path: Path) -> None:
    result = configure(tmp_path, "", emulate="ON")
    assert result.returncode == 0, result.stderr
    commands = [command["command"] for command in json.loads((tmp_path / "compile_commands.json").read_text())]
    kernels = [command for command in commands if "CMakeFiles/pyfused_cpu_" in command]
    assert all(any(f"-DPYFUSED_ISA={level} " in command for command in kernels) for level in LEVELS)
    assert not any("-mavx512" in command or "-mamx" in command for command in kernels)
