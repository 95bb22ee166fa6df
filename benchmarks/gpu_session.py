"""Everything that a machine with a GPU is to run, one step after another; what each prints goes to a file of its own.

python benchmarks/gpu_session.py            # build, tests, compute-sanitizer, the whole benchmark (an hour or so)
python benchmarks/gpu_session.py --quick    # the benchmark's subset (some minutes)
python benchmarks/gpu_session.py --only goals --only tests-cuda

Needs this checkout, a Python with a CUDA build of torch, pytest, cmake and ninja, nvcc, and no network; where Python
has nvidia-cutlass (pip install --no-deps), the kernels from CUTLASS are built and measured, too. A step that fails does
not stop the others; the exit code is 1 if any did. Results are written to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu-session"
# Tests of kernels that no emulation runs either: they might hang, and nothing else waits for them for long.
NEVER_RUN = "test_the_update_in_one_product"
PROGRAMS = ("platform_test", "lora_test", "lora_shared_test", "multi_lora_test", "ia3_test", "bottleneck_test")


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None  # a program


def sanitized(tool: str, *command: str) -> list[str]:
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *command]


def killed_after(seconds: int, *command: str) -> list[str]:
    return ["timeout", "-s", "KILL", str(seconds), *command]


def steps(quick: bool) -> list[Step]:
    python, programs = sys.executable, str(WORK / "programs")
    pytest = [python, "-m", "pytest", "-q"]
    settings = "-G Ninja -DPYFUSED_ON_GPU=ON -DCMAKE_BUILD_TYPE=Release"
    compile_programs = (
        f"cmake -S tests/emulation -B {programs} {settings} && cmake --build {programs} --target programs"
    )
    found = [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], {"PYFUSED_CUDA": "ON"}, "nvcc"),
        Step("facts", ["sh", "-c", f"nvidia-smi && nvcc --version && {python} -m pyfused"], needs="nvidia-smi"),
        Step("programs", ["sh", "-c", compile_programs], needs="nvcc"),
    ]
    found += [Step(program, [f"{programs}/{program}"]) for program in PROGRAMS]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        for program in PROGRAMS[1:]:  # platform_test asks for a launch that CUDA refuses
            found.append(Step(f"{tool}-{program}", sanitized(tool, f"{programs}/{program}"), needs="compute-sanitizer"))
    never_run = [*pytest, "tests/ops", "-k", NEVER_RUN]
    measured = ("bench_ia3.py", "bench_bottleneck.py", "bench_multi_lora.py")
    # What limits each kernel of the cells that have a goal: rates of memory and arithmetic, registers, occupancy.
    sections = ("SpeedOfLight", "LaunchStats", "Occupancy")
    profiled = ["benchmarks/bench_lora_cuda.py", "--goals", "--once", "--providers", "pyfused,pyfused-shared"]
    profile = ["ncu", *(word for section in sections for word in ("--section", section)), python, *profiled]
    found += [
        Step("tests-cuda", [*pytest, "-m", "cuda", "tests", "-k", f"not {NEVER_RUN}"]),
        Step(
            "tests-ops", [*pytest, "tests/ops", "tests/nn", "-k", f"not {NEVER_RUN}"], {"PYFUSED_TEST_DEVICE": "cuda"}
        ),
        Step("tests-never-run", killed_after(300, *never_run)),
        # CUTLASS's kernel is in no program above. Without torch's cache of memory a tensor's end is an allocation's.
        *(
            Step(
                f"{tool}-never-run",
                killed_after(1200, *sanitized(tool, *never_run)),
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                "compute-sanitizer",
            )
            for tool in ("memcheck", "racecheck")
        ),
        Step("tests-cpu", [*pytest, "tests", "-m", "not cuda"]),
        Step("goals", [python, "benchmarks/bench_lora_cuda.py", "--goals"]),
        Step("ncu", killed_after(900, *profile), needs="ncu"),
        Step("benchmark", [python, "benchmarks/bench_lora_cuda.py", *(["--quick"] if quick else [])]),
        *(Step(script[:-3], [python, f"benchmarks/{script}", "--device", "cuda"]) for script in measured),
    ]
    return found


def run(step: Step) -> tuple[str, float]:
    """How a step ended, "ok" where all is well, and its seconds."""
    if step.needs is not None and shutil.which(step.needs) is None:
        return f"no {step.needs} on PATH", 0.0
    begin = time.monotonic()
    with (WORK / f"{step.name}.log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | step.environment
        done = subprocess.run(step.command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    return "ok" if done.returncode == 0 else f"exit status {done.returncode}", time.monotonic() - begin


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the benchmark's subset")
    parser.add_argument("--only", action="append", metavar="STEP", help="this step (may be given again)")
    parser.add_argument("--list", action="store_true", help="print the steps and stop")
    options = parser.parse_args(arguments)
    chosen = steps(options.quick)
    unknown = sorted(set(options.only or ()) - {step.name for step in chosen})
    if unknown:
        parser.error(f"--only: no step {', '.join(unknown)}; there are {', '.join(step.name for step in chosen)}")
    chosen = [step for step in chosen if not options.only or step.name in options.only]
    if options.list:
        print("\n".join(f"{step.name:<28}{' '.join(step.command)}" for step in chosen))
        return 0
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"what each step prints: {WORK.relative_to(ROOT)}/<step>.log")
    failed = 0
    for step in chosen:
        outcome, seconds = run(step)
        failed += outcome != "ok"
        print(f"{step.name:<28}{outcome:<20}{seconds:8.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
