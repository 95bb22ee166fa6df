"""The native libraries as files: what they need, what they show, and what ``import pyfused`` says when one is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfused
from pyfused import _library

PACKAGE = Path(pyfused.__file__).parent
BUILD = PACKAGE.parent / "build" / f"cmake-{sys.implementation.cache_tag}"
LIBRARIES = sorted(path.name for path in PACKAGE.glob("_ops*.so"))


def symbols(file: Path, which: str) -> list[str]:
    return subprocess.run(["nm", "-DC", which, file], check=True, capture_output=True, text=True).stdout.splitlines()


@pytest.mark.parametrize("library", LIBRARIES)
def test_needs_only_the_stable_abi(library: str) -> None:
    undefined = symbols(PACKAGE / library, "--undefined-only")
    assert any("aoti_torch_library_init" in line for line in undefined), "nm shows no use of torch at all"
    unstable = [line for line in undefined if re.search(r"\b(c10|at|torch|caffe2|Py\w*)(::|_)", line)]
    unstable = [line for line in unstable if not re.search(r" (aoti_torch|torch)_\w+$", line)]
    assert not unstable


@pytest.mark.parametrize("library", LIBRARIES)
def test_exports_nothing_of_its_own(library: str) -> None:
    assert not [line for line in symbols(PACKAGE / library, "--defined-only") if "pyfused" in line]


def test_kernel_files_share_no_symbol_across_levels() -> None:
    """A weak symbol of an AVX-512 file could be the one that the linker keeps for all: a crash on an older machine."""
    objects = sorted(BUILD.glob("CMakeFiles/pyfused_cpu_*.dir/**/*.o"))
    if not objects:
        pytest.skip("this pyfused was not built in this source tree")
    for file in objects:
        level = re.search(r"pyfused_cpu_(\w+)\.dir", str(file))[1]
        defined = subprocess.run(
            ["nm", "-C", "--defined-only", file], check=True, capture_output=True, text=True
        ).stdout
        # Upper case is what other files can see; weak and unique symbols are merged with theirs.
        shared = [line for line in defined.splitlines() if re.search(r"^\w+ [A-Zu] ", line)]
        assert shared, f"{file.name} defines nothing"
        assert not [line for line in shared if f"pyfused::{level}::" not in line]


def test_kernels_are_loaded_for_the_cpu() -> None:
    assert _library.has_kernel("cpu")
    assert not _library.has_kernel("meta")


@pytest.mark.parametrize(
    "architectures, runs_on, not_on",
    [
        # what is built by default: an RTX 4090, a GB200 and whatever comes, but no T4
        (["80-real", "90a-real", "90-virtual"], [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], [(7, 0), (7, 5)]),
        (["89-real"], [(8, 9)], [(8, 0), (8, 6), (9, 0)]),
        (["90a"], [(9, 0)], [(8, 9), (10, 0)]),
        (["100f"], [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        (["86"], [(8, 6), (8, 9), (9, 0), (10, 0)], [(8, 0)]),
        (["native"], [(8, 0), (9, 0)], []),
        ([], [], [(8, 0)]),
    ],
)
def test_the_gpus_that_cuda_kernels_run_on(architectures, runs_on, not_on, monkeypatch) -> None:
    monkeypatch.setattr(_library._C, "cuda_architectures", lambda: architectures)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, runs in [*((one, True) for one in runs_on), *((one, False) for one in not_on)]:
        monkeypatch.setattr(_library, "_gpus", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number, found=capability: found)
        assert _library.runs_on_gpu(0) == runs, capability


def test_autograd_in_cpp_is_built_for_this_torch() -> None:
    assert list(PACKAGE.glob("_autograd.*.so"))
    assert (_library.autograd is not None) == (_library._C.build_info()["torch"] == torch.__version__)


def copy_of_the_package(folder: Path, *, without: str) -> Path:
    return Path(
        shutil.copytree(PACKAGE, folder / "pyfused", ignore=shutil.ignore_patterns("__pycache__", without))
    ).parent


def import_in(folder: Path) -> str:
    """The last line that ``import pyfused`` prints with the copy in ``folder``, which must fail."""
    # -S: an editable install adds an importer that would find the missing parts in the source tree.
    packages = os.pathsep.join(entry for entry in sys.path if entry.endswith("-packages"))
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import pyfused"],
        cwd=folder,
        env={"PYTHONPATH": packages},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("without", "named"), [("_ops.so", "_ops.so is not built"), ("_C.*", "_C cannot be imported")])
def test_a_missing_library_says_how_to_build_it(tmp_path: Path, without: str, named: str) -> None:
    message = import_in(copy_of_the_package(tmp_path, without=without))
    assert message.startswith("ImportError: ")
    assert named in message
    assert "pip install --no-build-isolation" in message


def test_a_library_that_does_not_load_names_itself_and_torch(tmp_path: Path) -> None:
    folder = copy_of_the_package(tmp_path, without="_ops.so")
    (folder / "pyfused" / "_ops.so").write_bytes(b"not a library")
    message = import_in(folder)
    assert message.startswith("ImportError: ")
    assert "_ops.so does not load with torch" in message
