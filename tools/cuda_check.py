"""All that can be proved of the CUDA kernels without a GPU: make cuda-check

* They compile for sm_80 and sm_90a with warnings as errors, spilled registers among them, those
  from CUTLASS too, and link, once against the CUDA build of torch 2.11.0, which then loads them, and once against this
  Python's torch.
* They compute what the CPU ops compute: their own source, run on the CPU by tests/emulation on the tests of the ops.
* A program without Python runs them under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Needs nvcc, and a package index for torch 2.11.0 (4.5 GB, kept in build/cuda-check/env) and nvidia-cutlass (40 MB).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "cuda-check"
TORCH = "2.11.0"  # the oldest that pyfused runs with
CUTLASS = "4.2.0.0"  # of PyPI's nvidia-cutlass
FREE_BYTES = 8 << 30
EMULATION = ROOT / "tests" / "emulation"
# What LoRA's forced updates can change at all: a base product with its update, in every size and type.
UPDATES = "linear_matches_reference or leading_dimensions or empty_features or gradients_asked_for"
# The bottleneck's fused path with fewer rows than it takes by itself.
FUSED = "(test_matches_reference and not 129x and not 300x and not 517x) or gradients_asked"
# Files of tests/ops whose ops have CUDA kernels; fake tensors have none, and a GPU's own tests skip here.
OPS = ("lora", "multi_lora", "ia3", "bottleneck", "dropout")
CPU_ONLY = "lora_embedding"
NOT_EMULATED = {*ROOT.glob("tests/ops/test_*_cuda_*.py"), *ROOT.glob(f"tests/ops/test_{CPU_ONLY}*.py")}
EMULATED = sorted({path for op in OPS for path in ROOT.glob(f"tests/ops/test_{op}*.py")} - NOT_EMULATED)
PROGRAMS = (
    "platform_test",
    "faults_test",
    "partial_sums_test",
    "lora_test",
    "lora_shared_test",
    "multi_lora_test",
    "ia3_test",
    "bottleneck_test",
    "dropout_test",
)
SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "cmake", "csrc", "pyfused", "pyproject.toml", "setup.py", "tests")

IMPORT = f"""
import re, torch, pyfused
from pyfused import _library
assert torch.version.cuda and not torch.cuda.is_available(), "a torch with CUDA on a machine without"
assert _library.has_kernel("cuda"), "_ops_cuda is not loaded"
PREFIXES = tuple(f"pyfused::_{{op}}" for op in {OPS})
CPU_ONLY = re.compile("pyfused::_{CPU_ONLY}_|.*_with_masks?$")  # a GPU makes masks again
names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(PREFIXES) and not CPU_ONLY.match(n)]
without = [n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(n, "CUDA")]
assert pyfused.build_info()["cutlass"], "built without the kernels from CUTLASS"
assert len(names) >= 15 and not without, without
print(pyfused.build_info())
"""


def stop(sentence: str) -> None:
    raise SystemExit(f"cuda-check: {sentence}")


class Job:
    """A name and its commands; what they print is kept, and shown where one fails."""

    def __init__(self, name: str) -> None:
        self.log = WORK / f"{name}.log"
        self.log.write_text("")

    def run(self, *command: object, hint: str = "", fails_with: str | None = None, **environment: str) -> None:
        """Run a command, which must succeed, or fail with a text in its output."""
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            result = subprocess.run(
                list(map(str, command)),
                cwd=ROOT,
                # each job works on one core: threads of torch that spin on the other's would take it away
                env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        text = self.log.read_text(errors="replace")
        if fails_with is not None:
            good = result.returncode != 0 and fails_with in text
        else:
            good = result.returncode == 0
        if not good:
            print(text[-12000:])
            stop(f"{' '.join(map(str, command))}: exit status {result.returncode}. {hint}")


def build_emulation(job: Job, name: str, targets: list[str], *options: str) -> Path:
    folder = WORK / name
    settings = ["-DCMAKE_COMPILE_WARNING_AS_ERROR=ON", *options]
    job.run("cmake", "-S", EMULATION, "-B", folder, "-G", "Ninja", *settings)
    job.run("cmake", "--build", folder, "--parallel", "1", "--target", *targets)
    return folder


def emulation() -> None:
    job = Job("emulation")
    torch_dir = f"-DPYFUSED_TORCH_DIR={Path(torch.__file__).parent}"
    folder = build_emulation(job, "emulation", ["programs", "emulated_ops"], torch_dir)
    for program in PROGRAMS:
        job.run(folder / program)
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *EMULATED]
    emulated = {"PYFUSED_TEST_EMULATION": str(folder / "emulated_ops.so")}
    job.run(*tests, **emulated)
    updates = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_lora.py", "-k"]
    job.run(*updates, f"({UPDATES}) and not delta", PYFUSED_LORA_UPDATE="before", **emulated)
    in_16_bit = "linear_matches_reference and (bf16 or fp16) and not fp32 and not fp64"
    job.run(*updates, in_16_bit, PYFUSED_LORA_UPDATE="concat", **emulated)
    ia3 = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_ia3.py", "-k", "output and not eager_bits"]
    job.run(*ia3, PYFUSED_IA3="product", **emulated)
    fused = [sys.executable, "-m", "pytest", "-q", "tests/ops/test_bottleneck.py", "-k", FUSED]
    job.run(*fused, PYFUSED_BOTTLENECK="fused", **emulated)


def address_sanitizer() -> None:
    job = Job("address-sanitizer")
    folder = build_emulation(job, "address", ["programs"], "-DPYFUSED_SANITIZE=address,undefined")
    for program in PROGRAMS:
        job.run(folder / program)
    job.run(folder / "faults_test", "bounds", fails_with="heap-buffer-overflow")


def thread_sanitizer() -> None:
    job = Job("thread-sanitizer")
    folder = build_emulation(job, "thread", ["programs"], "-DPYFUSED_SANITIZE=thread")
    for program in sorted(set(PROGRAMS) - {"faults_test"}):
        job.run(folder / program)
    job.run(folder / "faults_test", "race", fails_with="data race")


def compile_and_load() -> None:
    job = Job("compile")
    source = WORK / "source"
    for name in SOURCES:  # times are kept, so what is compiled stays
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.rmtree(source / name, ignore_errors=True)
            shutil.copytree(ROOT / name, source / name, ignore=ignore)
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    # Without the PTX for later GPUs, which comes from the same source and is assembled on them; with CPU kernels of one
    # level, as this torch sees no difference between levels.
    options = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON '-DCMAKE_CUDA_ARCHITECTURES=80-real;90a-real'"
    options += f" -DPYFUSED_CUTLASS_DIR={cutlass_headers(job)} -DPYFUSED_HIGHEST_CPU_CAPABILITY=DEFAULT"
    strict = {"CMAKE_ARGS": options, "PYFUSED_CUDA": "AUTO", "PYFUSED_CUTLASS": "ON", "MAX_JOBS": "1"}
    python = cuda_environment(job)
    job.run("env", "-C", source, python, "setup.py", "-q", "build_ext", "--inplace", **strict)
    if "wgmma.mma_async instructions are serialized" in job.log.read_text(errors="replace"):  # ptxas calls that a fact
        stop(f"products of a kernel from CUTLASS do not overlap; {job.log.relative_to(ROOT)} says why.")
    path = {"PYTHONPATH": str(source)}
    job.run("env", "-C", source, python, "-c", IMPORT, **path)
    job.run("env", "-C", source, python, "-m", "pytest", "-q", "-x", "tests/ops/test_lora.py", **path)
    # What a torch without CUDA builds on request beside its other libraries; the kernels are compiled already.
    cmake, build = python.with_name("cmake"), source / "build" / f"cmake-{sys.implementation.cache_tag}"
    this_torch = (f"-DPYFUSED_TORCH_DIR={Path(torch.__file__).parent}", "-DPYFUSED_TORCH_CUDA=", "-DPYFUSED_CUDA=ON")
    job.run(cmake, "-S", source, "-B", build, *this_torch)
    job.run(cmake, "--build", build, "--parallel", "1", "--target", "_ops_cuda")


def cutlass_headers(job: Job) -> Path:
    """CUTLASS's headers, from its package without what that depends on."""
    folder = WORK / f"cutlass-{CUTLASS}"
    if not folder.exists():
        install = ("-m", "pip", "install", "--no-deps", "--no-compile", "--no-cache-dir", "--target", f"{folder}.new")
        hint = f"It needs a package index that has nvidia-cutlass {CUTLASS} (PyPI's)."
        job.run(sys.executable, *install, f"nvidia-cutlass=={CUTLASS}", hint=hint)
        Path(f"{folder}.new").rename(folder)
    return folder / "cutlass_library" / "source" / "include"


def cuda_environment(job: Job) -> Path:
    """A Python with the CUDA build of torch and what the build and the ops' tests need."""
    python = WORK / "env" / "bin" / "python"
    check = f"import torch; assert torch.__version__.startswith('{TORCH}+cu')"
    if python.exists() and subprocess.call([python, "-c", check], stderr=subprocess.DEVNULL) == 0:
        return python
    if shutil.disk_usage(WORK).free < FREE_BYTES:
        stop(f"the CUDA build of torch {TORCH} needs {FREE_BYTES >> 30} GB of free disk under {WORK}.")
    shutil.rmtree(WORK / "env", ignore_errors=True)
    job.run(sys.executable, "-m", "venv", WORK / "env")
    packages = ["numpy", "safetensors", "setuptools>=77,<82", "wheel", "cmake", "ninja", "pybind11"]
    packages += ["pytest", "pytest-timeout", "hypothesis"]
    hint = f"It needs a package index that has the CUDA build of torch {TORCH} (PyPI's, 4.5 GB installed)."
    job.run(python, "-m", "pip", "install", "--no-compile", "--no-cache-dir", f"torch=={TORCH}", *packages, hint=hint)
    job.run(python, "-W", "ignore", "-c", check, hint=hint)
    return python


def timed(job: Callable[[], None]) -> None:
    begin = time.monotonic()
    job()
    print(f"cuda-check: {job.__name__.replace('_', ' ')}: {time.monotonic() - begin:.0f} s", flush=True)


def main() -> None:
    if shutil.which(os.environ.get("CUDACXX", "nvcc")) is None:
        stop("it needs nvcc: install the CUDA toolkit (12 or later) and put nvcc on PATH, or name it in CUDACXX.")
    WORK.mkdir(parents=True, exist_ok=True)
    jobs = [compile_and_load, emulation, address_sanitizer, thread_sanitizer]
    # Each job works on one core, so that the logs stay in order; as many at a time as there are cores.
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        futures = [pool.submit(timed, job) for job in jobs]
        errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


if __name__ == "__main__":
    main()
