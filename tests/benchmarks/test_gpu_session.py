"""What a machine with a GPU is to run: the order, the limits, the file to take away; with steps that need no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_session
from gpu_session import Step


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "WORK", gpu_session.ROOT / "build" / "gpu-session-test")
    monkeypatch.setattr(gpu_session, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()


def test_it_goes_on_after_a_failure(monkeypatch, capsys):
    fake = [
        Step("good", ["true"]),
        Step("bad", ["sh", "-c", "exit 3"]),
        Step("absent", ["true"], needs="no-such-program"),
        Step("last", [sys.executable, "-c", "import pyfused"]),
    ]
    monkeypatch.setattr(gpu_session, "steps", lambda quick: fake)
    assert gpu_session.main([]) == 1
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["good", "ok"], ["bad", "exit"], ["absent", "no"], ["last", "ok"]]


def test_every_step(capsys):
    assert gpu_session.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert {
        "build",
        "memcheck-lora_test",
        "racecheck-ia3_test",
        "initcheck-lora_test",
        "tests-cuda-lora",
        "tests-ops",
        "tests-never-run",
        "goals",
        "ncu",
        "benchmark",
    } <= set(names)
    assert len(set(names)) == len(names)


def test_the_first_ten_minutes(monkeypatch):
    monkeypatch.setenv("CMAKE_ARGS", "-DPYFUSED_CUTLASS_DIR=there")
    steps = gpu_session.first_steps()
    names = [step.name for step in steps]
    assert sum(step.seconds for step in steps) <= gpu_session.FIRST_SECONDS < 600
    assert names[:6] == ["build", "facts", "goals", "goals-multi_lora", "goals-bottleneck", "goals-ia3"]
    assert {
        "tests-cuda-lora",
        "tests-cuda-shared_input",
        "adapter-pool",
        "memcheck-multi_lora_test",
        "memcheck-bottleneck_test",
    } <= set(names)
    assert "memcheck-dropout_test" not in names
    assert names.index("programs") < names.index("memcheck-lora_test")
    assert steps[0].vital and steps[0].most is None
    assert all(step.most >= step.seconds for step in steps[1:])
    arguments = steps[0].environment["CMAKE_ARGS"].split()
    assert "-DPYFUSED_CUTLASS_DIR=there" in arguments and "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in arguments


def test_all_tests_of_a_gpu_have_a_step():
    words = {word for step in gpu_session.steps(False) for word in step.command}
    with_mark = re.compile(r"^pytestmark = pytest\.mark\.cuda", re.M)
    for path in gpu_session.ROOT.glob("tests/*/test_*.py"):
        if with_mark.search(path.read_text()):
            assert str(path.relative_to(gpu_session.ROOT)) in words


def test_without_a_build_nothing_else_is_run(monkeypatch, capsys):
    fake = [Step("build", ["sh", "-c", "echo no such header; exit 2"], vital=True), Step("last", ["true"])]
    monkeypatch.setattr(gpu_session, "steps", lambda quick: fake)
    assert gpu_session.main([]) == 1
    out = capsys.readouterr().out
    assert "| no such header" in out and "without build there is nothing to run" in out and "last" not in out


def test_packages_and_programs_that_were_brought_along(tmp_path, monkeypatch):
    (tmp_path / "brought.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", "/nowhere")
    gpu_session.WORK.mkdir(parents=True, exist_ok=True)
    python = Path(sys.executable).name
    assert gpu_session.run(Step("import", [python, "-c", "import brought, pyfused"], needs=python))[0] == "ok"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_programs_can_be_configured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "WORK", tmp_path)
    programs = next(step for step in gpu_session.built() if step.name == "programs")
    configure, _ = programs.command[-1].split(" && ")
    environment = gpu_session.os.environ | {"PATH": gpu_session.search_path()}
    done = subprocess.run(
        ["sh", "-c", configure], cwd=gpu_session.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_scripts_and_their_arguments_are_there():
    for step in [*gpu_session.first_steps(), *gpu_session.steps(True)]:
        for word in step.command:
            if word.startswith(("benchmarks/", "tests/")) and " " not in word:
                assert (gpu_session.ROOT / word).exists(), word


@pytest.mark.parametrize("limits", [{"most": 2.0}, {"left": 2.0}], ids=["step", "session"])
def test_what_does_not_end_is_killed_with_all_it_started(tmp_path, limits):
    gpu_session.WORK.mkdir(parents=True, exist_ok=True)
    started = tmp_path / "started"
    step = Step("endless", ["sh", "-c", f"sleep 600 & echo $! > {started}; wait"], most=limits.get("most"))
    outcome, seconds = gpu_session.run(step, left=limits.get("left", 600.0))
    assert outcome.startswith("killed after") and seconds < 600
    child = Path("/proc") / started.read_text().strip() / "stat"

    def is_alive() -> bool:
        try:  # dead, it may wait for whoever inherits it to look
            return child.read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    end = time.monotonic() + 120.0
    while is_alive() and time.monotonic() < end:  # a signal takes as long as the machine is busy
        time.sleep(0.02)
    assert not is_alive()


def test_no_step_begins_that_would_not_end_in_time(monkeypatch, capsys):
    fake = [Step("short", ["true"], seconds=5), Step("long", ["false"], seconds=50), Step("last", ["true"], seconds=1)]
    monkeypatch.setattr(gpu_session, "first_steps", lambda: fake)
    assert gpu_session.main(["--first", "--limit", "20"]) == 1
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["short", "ok"], ["long", "left"], ["last", "ok"]]


def test_the_archive_has_what_was_printed_and_written(tmp_path, monkeypatch, capsys):
    results = gpu_session.RESULTS
    (results / "old.csv").write_text("before")
    old = 1_000_000_000
    gpu_session.os.utime(results / "old.csv", (old, old))
    script = f"echo goal met: a cell; echo chatter; echo 3 skipped in 1.2s; echo 1 > {results}/new.csv"
    monkeypatch.setattr(gpu_session, "steps", lambda quick: [Step("one", ["sh", "-c", script])])
    archive = tmp_path / "out" / "all.tar.gz"
    assert gpu_session.main(["--archive", str(archive)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  goal met: a cell" in lines and "  3 skipped in 1.2s" in lines and "  chatter" not in lines
    with tarfile.open(archive) as tar:
        assert {"gpu-session-test/one.log", "results/new.csv"} <= set(tar.getnames())
        assert "results/old.csv" not in tar.getnames()


def test_arguments(capsys):
    for arguments, message in ((["--quick", "--first"], "give one of them"), (["--only", "none"], "no step none")):
        with pytest.raises(SystemExit):
            gpu_session.main(arguments)
        assert message in capsys.readouterr().err
