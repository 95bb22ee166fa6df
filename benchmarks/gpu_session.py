"""Everything that a machine with a GPU is to run, one step after another; what each prints goes to a file of its own.

python benchmarks/gpu_session.py            # build, tests, compute-sanitizer, the whole benchmark (an hour or so)
python benchmarks/gpu_session.py --quick    # the benchmark's subset (some minutes)
python benchmarks/gpu_session.py --first    # for a machine that is lent for ten minutes: what says most comes first
python benchmarks/gpu_session.py --only goals --only tests-cuda
python benchmarks/gpu_session.py --first --list     # the steps, with the seconds that each is expected to take

Needs this checkout, a Python with a CUDA build of torch, pytest, cmake and ninja, nvcc, and no network; where Python
has nvidia-cutlass (pip install --no-deps), the kernels from CUTLASS are built and measured, too. A step that fails does
not stop the others, but for the build; the exit code is 1 if any did. Results are written to benchmarks/results/.
--archive FILE.tar.gz has what the steps printed and wrote so far, made anew after each step.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-session"
RESULTS = ROOT / "benchmarks" / "results"
# Tests of kernels that no emulation runs either: they might hang, and nothing else waits for them for long.
NEVER_RUN = "test_the_update_in_one_product or test_the_factors_in_the_product"
PROGRAMS = (
    "platform_test",
    "partial_sums_test",
    "lora_test",
    "lora_shared_test",
    "multi_lora_test",
    "ia3_test",
    "bottleneck_test",
    "dropout_test",
)
# Each in a process of its own: after an error within a kernel a process has no GPU any more.
CUDA_TESTS = sorted([*ROOT.glob("tests/ops/test_*_cuda_gpu.py"), *ROOT.glob("tests/nn/test_*_cuda_gpu.py")])
SANITIZED = PROGRAMS[2:]  # platform_test asks for a launch that CUDA refuses, partial_sums_test is the host's
FIRST_SECONDS = 570.0


@dataclass(frozen=True)
class Step:
    """``seconds`` is an estimate, on 16 cores and an H200; nothing is measured. ``most``: it is killed then.

    ``vital``: where it fails, the steps after it are left out.
    """

    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program
    seconds: float = 60.0
    most: float | None = None
    vital: bool = False


def sanitized(tool: str, *command: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command]


def benchmark(script: str, *arguments: str) -> list[str]:
    return [sys.executable, f"benchmarks/{script}", *arguments]


def built() -> list[Step]:
    folder = WORK / "programs"
    settings = "-G Ninja -DPYFUSED_ON_GPU=ON -DCMAKE_BUILD_TYPE=Release"
    compile_programs = (
        f"cmake -S tests/emulation -B {folder} {settings} && cmake --build {folder} --target programs -- -k 0"
    )
    facts = f"nvidia-smi && nvcc --version && {sys.executable} -m pyfused"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return [
        Step("build", build, {"PYFUSED_CUDA": "ON"}, "nvcc", seconds=90, vital=True),
        Step("facts", ["sh", "-c", facts], needs="nvidia-smi", seconds=10),
        Step("programs", ["sh", "-c", compile_programs], needs="nvcc", seconds=50),
    ]


def on_programs() -> list[Step]:
    """The programs, then each under the tools, memcheck of all first."""
    found = [Step(program, [f"{WORK}/programs/{program}"], seconds=2, most=120) for program in PROGRAMS]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for program in SANITIZED:
            command = sanitized(tool, f"{WORK}/programs/{program}")
            found.append(Step(f"{tool}-{program}", command, needs="compute-sanitizer", seconds=15, most=900))
    return found


def goals() -> list[Step]:
    """The cells that have a goal, each in a CSV of its own that grows by a cell at a time."""
    others = ("multi_lora", "bottleneck", "ia3")
    return [
        Step("goals", benchmark("bench_lora_cuda.py", "--goals"), seconds=90),
        *(Step(f"goals-{op}", benchmark(f"bench_{op}.py", "--device", "cuda", "--goals"), seconds=40) for op in others),
        Step("adapter-pool", benchmark("bench_adapter_pool.py", "--quick", "--device", "cuda"), seconds=45),
    ]


def tests() -> dict[str, Step]:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    never_run = [*pytest, "tests/ops", "-k", NEVER_RUN]
    on_gpu = [*pytest, "tests/ops", "tests/nn", "-k", f"not ({NEVER_RUN})"]
    found = [
        *(
            Step(
                f"tests-cuda-{path.stem.removeprefix('test_').removesuffix('_cuda_gpu')}",
                [*pytest, "--maxfail=10", "--tb=short", str(path.relative_to(ROOT)), "-k", f"not ({NEVER_RUN})"],
                seconds=15,
            )
            for path in CUDA_TESTS
        ),
        Step("tests-cuda-pool", [*pytest, "-m", "cuda", "tests/model/pool"], seconds=30),
        Step("tests-ops", on_gpu, {"PYFUSED_TEST_DEVICE": "cuda"}, seconds=600),
        Step("tests-never-run", never_run, seconds=60, most=300),
        # CUTLASS's kernels are in no program. Without torch's cache of memory a tensor's end is an allocation's.
        *(
            Step(
                f"{tool}-never-run",
                sanitized(tool, *never_run),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                "compute-sanitizer",
                seconds=600,
                most=1200,
            )
            for tool in ("memcheck", "racecheck")
        ),
        Step("tests-cpu", [*pytest, "tests", "-m", "not cuda"], seconds=900),
    ]
    return {step.name: step for step in found}


def profile() -> Step:
    """What limits each kernel of LoRA's cells with a goal: rates of memory and arithmetic, registers, occupancy."""
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy")
    options = ["--clock-control", "none", *(word for name in sections for word in ("--section", name))]
    once = benchmark("bench_lora_cuda.py", "--goals", "--once", "--providers", "pyfused,pyfused-shared")
    return Step("ncu", ["ncu", *options, *once], needs="ncu", seconds=120, most=900)


def steps(quick: bool) -> list[Step]:
    measured = ("bench_ia3.py", "bench_bottleneck.py", "bench_multi_lora.py")
    return [
        *built(),
        *on_programs(),
        *tests().values(),
        *goals(),
        profile(),
        Step("benchmark", benchmark("bench_lora_cuda.py", *(["--quick"] if quick else [])), seconds=600),
        *(Step(script[:-3], benchmark(script, "--device", "cuda"), seconds=180) for script in measured),
    ]


def first_steps() -> list[Step]:
    """What fits in ten minutes: the goals' figures, the kernels' tests, memcheck; none takes long beyond its estimate.

    Only the GPU's own architecture is compiled, and the CPU's kernels of one level.
    """
    build, facts, programs = built()
    arguments = os.environ.get("CMAKE_ARGS", "")
    arguments += " -DCMAKE_CUDA_ARCHITECTURES=90a-real -DPYFUSED_HIGHEST_CPU_CAPABILITY=DEFAULT"
    build = replace(build, environment=build.environment | {"CMAKE_ARGS": arguments.strip()})
    on_gpu = [step for name, step in tests().items() if name.startswith("tests-cuda-") and name != "tests-cuda-pool"]
    lora, *others = goals()
    pool = others.pop()
    left_out = "memcheck-dropout_test"  # the simplest of the kernels: there is no time for it
    checks = [step for step in on_programs() if step.name.startswith("memcheck-") and step.name != left_out]
    order = [build, facts, lora, *others, *on_gpu, pool, programs, *checks]
    # Products that never ran are tried by their tests before they are timed, up to 60 s within a step of goals. A build
    # that were killed would leave nothing.
    return [step if step.vital else replace(step, most=max(2 * step.seconds, 120.0)) for step in order]


def search_path() -> str:
    """Where programs are: beside this Python, where the shell says, and where CUDA's toolkit is by default."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])


def run(step: Step, left: float = float("inf")) -> tuple[str, float]:
    """How a step ended, "ok" where all is well, and its seconds; it is killed, with all it started, when time is up."""
    if step.needs is not None and shutil.which(step.needs, path=search_path()) is None:
        return f"no {step.needs} on PATH", 0.0
    begin = time.monotonic()
    most = min(step.most or float("inf"), left)
    # Packages that were brought along stay on Python's path.
    packages = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PATH": search_path(), "PYTHONPATH": packages}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with (WORK / f"{step.name}.log").open("w") as log:
        started = subprocess.Popen(
            step.command,
            cwd=ROOT,
            env=environment | step.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = started.wait(None if most == float("inf") else most)
            outcome = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {most:.0f} s"
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
    return outcome, time.monotonic() - begin


def said(step: Step, outcome: str) -> list[str]:
    """The lines of a step's output about goals, how many tests passed or were skipped, and the last lines where it
    failed, to be read where no log is kept."""
    lines = (WORK / f"{step.name}.log").read_text(errors="replace").splitlines()
    told = [
        line for line in lines if re.match(r"goal |without |wrong|\d+ (passed|failed|skipped|deselected|error)", line)
    ]
    return told + ([] if outcome == "ok" else [f"| {line}" for line in lines[-12:]])


def pack(archive: Path, since: float) -> None:
    """The logs and the results written since then, in one file that is whole at any time."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    fresh = archive.with_name(f"{archive.name}.new")
    with tarfile.open(fresh, "w:gz") as tar:
        for path in sorted([*WORK.glob("*.log"), *RESULTS.iterdir()]):
            if path.stat().st_mtime >= since:
                tar.add(path, f"{path.parent.name}/{path.name}")
    fresh.replace(archive)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the benchmark's subset")
    parser.add_argument("--first", action="store_true", help=f"what says most within {FIRST_SECONDS:.0f} seconds")
    parser.add_argument("--limit", type=float, metavar="S", help="no step begins that is not expected to end in time")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step (may be given again)")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    parser.add_argument("--archive", type=Path, metavar="FILE.tar.gz", help="logs and results in one file")
    options = parser.parse_args(arguments)
    if options.quick and options.first:
        parser.error("--quick, --first: give one of them")
    chosen = first_steps() if options.first else steps(options.quick)
    unknown = sorted(set(options.only or ()) - {step.name for step in chosen})
    if unknown:
        parser.error(f"--only: no step {', '.join(unknown)}; there are {', '.join(step.name for step in chosen)}")
    chosen = [step for step in chosen if not options.only or step.name in options.only]
    if options.list:
        print("\n".join(f"{step.name:<28}{step.seconds:5.0f} s  {' '.join(step.command)}" for step in chosen))
        print(f"{'expected in all':<28}{sum(step.seconds for step in chosen):5.0f} s")
        return 0
    limit = options.limit or (FIRST_SECONDS if options.first else float("inf"))
    begin, since, failed = time.monotonic(), time.time(), 0
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"what each step prints: {WORK.relative_to(ROOT)}/<step>.log")
    for step in chosen:
        left = limit - (time.monotonic() - begin)
        if step.seconds > left:
            print(f"{step.name:<28}left out: {left:.0f} s left", flush=True)
            failed += 1
            continue
        outcome, seconds = run(step, left)
        failed += outcome != "ok"
        print(f"{step.name:<28}{outcome:<20}{seconds:8.0f} s", flush=True)
        if seconds:
            for line in said(step, outcome):
                print(f"  {line}", flush=True)
        if options.archive:
            pack(options.archive, since)
        if step.vital and outcome != "ok":
            print(f"without {step.name} there is nothing to run", flush=True)
            break
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
