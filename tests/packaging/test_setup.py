"""What ends a build does so in one sentence that says what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
GOOD_TORCH = "class version: cuda = None\n__version__ = '2.11.0'"


class Machine:
    """A source tree and a Python with the packages of this one, but none of its programs."""

    def __init__(self, folder: Path) -> None:
        self.source, self.programs, self.packages = folder / "source", folder / "bin", folder / "packages"
        for path in (self.source, self.programs, self.packages):
            path.mkdir()
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt"):
            shutil.copy(ROOT / name, self.source)
        venv.create(folder / "env", symlinks=True)  # without pip
        site = next((folder / "env").glob("lib/python*/site-packages"))
        (site / "packages.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
        self.python = folder / "env" / "bin" / "python"
        self.environment = {"PATH": str(self.programs), "PYTHONPATH": str(self.packages), "HOME": str(folder)}

    def add_programs(self, *names: str) -> None:
        for name in names:
            (self.programs / name).write_text("#!/bin/sh\nexit 1\n")
            (self.programs / name).chmod(0o755)

    def add_module(self, name: str, code: str) -> None:
        (self.packages / f"{name}.py").write_text(code)

    def build(self, **environment: str) -> str:
        """The sentence that the build ends with."""
        result = subprocess.run(
            [self.python, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=self.source,
            env=self.environment | environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
        sentences = [line for line in result.stderr.splitlines() if line.startswith("pyfused: ")]
        assert len(sentences) == 1, result.stderr
        return sentences[0]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.add_module("torch", GOOD_TORCH)
    return machine


def test_no_compiler(machine: Machine) -> None:
    assert "install g++" in machine.build()


def test_a_compiler_named_in_cxx_that_is_not_there(machine: Machine) -> None:
    machine.add_programs("g++")
    assert "g++-99 is not there" in machine.build(CXX="g++-99 -v")


def test_no_cmake(machine: Machine) -> None:
    machine.add_programs("g++")
    assert "pip install cmake" in machine.build()


def test_no_ninja(machine: Machine) -> None:
    machine.add_programs("g++", "cmake")
    assert "pip install ninja" in machine.build()


def test_no_pybind11(machine: Machine) -> None:
    machine.add_programs("g++", "cmake", "ninja")
    machine.add_module("pybind11", "raise ImportError('none')")
    assert "pip install pybind11" in machine.build()


def test_no_torch(machine: Machine) -> None:
    machine.add_programs("g++")
    machine.add_module("torch", "raise ImportError('No module named torch')")
    sentence = machine.build()
    assert "pip install 'torch>=2.11'" in sentence
    assert "--no-build-isolation" in sentence


def test_a_setuptools_that_is_too_old(machine: Machine) -> None:
    setup = machine.source / "setup.py"
    setup.write_text("import setuptools; setuptools.__version__ = '65.5.0'\n" + setup.read_text())
    assert "setuptools 77 or later, got 65.5.0" in machine.build()


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.0"])
def test_a_torch_that_is_too_old(machine: Machine, version: str) -> None:
    machine.add_programs("g++")
    machine.add_module("torch", f"__version__ = '{version}'")
    assert f"needs torch 2.11 or later, got {version}" in machine.build()


def test_cuda_wanted_without_nvcc(machine: Machine) -> None:
    machine.add_programs("g++", "cmake", "ninja")
    assert "PYFUSED_CUDA=ON needs nvcc" in machine.build(PYFUSED_CUDA="ON")


def test_a_processor_that_is_not_supported(machine: Machine) -> None:
    machine.add_module("sitecustomize", "import platform\nplatform.machine = lambda: 'riscv64'")
    sentence = machine.build()
    assert "only Linux on x86-64 and on aarch64 is supported" in sentence
    assert "linux on riscv64" in sentence


def test_what_cmake_refuses_is_told_by_cmake(machine: Machine) -> None:
    machine.add_module("pybind11", f"get_cmake_dir = lambda: {pybind11.get_cmake_dir()!r}")
    sentence = machine.build(PYFUSED_CUDA="PERHAPS", PATH=os.environ["PATH"])
    assert "the native build failed" in sentence
