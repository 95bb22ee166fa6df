"""tools/setup_env.py: on top of the active environment where its torch fits, else from scratch."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
MAKE = "import sys, pathlib, setup_env; setup_env.make(pathlib.Path(sys.argv[1]))"


def active_environment(folder: Path, torch_version: str) -> Path:
    """A virtual environment with a torch of that version, in name only; its Python."""
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / f"torch-{torch_version}.dist-info").mkdir()
    (site / f"torch-{torch_version}.dist-info" / "METADATA").write_text(f"Name: torch\nVersion: {torch_version}\n")
    (site / "torch.py").write_text(f"__version__ = '{torch_version}'")
    return folder / "bin" / "python"


def torch_seen_by(python: Path) -> str | None:
    result = subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True)
    return result.stdout.strip() or None


@pytest.mark.parametrize(("version", "kept"), [("2.11.0+cu130", True), ("2.10.0", False)])
def test_lies_on_top_of_an_active_environment_whose_torch_fits(tmp_path: Path, version: str, kept: bool) -> None:
    python = active_environment(tmp_path / "active", version)
    subprocess.run([python, "-c", MAKE, tmp_path / "new"], env={"PYTHONPATH": str(TOOLS)}, check=True)
    new = tmp_path / "new" / "bin" / "python"
    assert torch_seen_by(new) == (version if kept else None)
    subprocess.run([new, "-m", "pip", "--version"], check=True, capture_output=True)


def test_requirements_are_those_of_the_project_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TOOLS)
    import setup_env

    names = setup_env.requirements()
    assert {"ninja", "safetensors", "pytest", "peft==0.21.2", "ruff==0.17.6", "matplotlib"} <= set(names)
    assert not [name for name in names if re.match(r"torch\b", name) and name != "torch>=2.11"]


def test_an_old_python_is_refused_in_one_sentence() -> None:
    code = "import sys, setup_env; sys.version_info = (3, 9, 2); setup_env.main()"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(TOOLS)}, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert result.stderr.startswith("pyfused needs Python 3.10 or later")
