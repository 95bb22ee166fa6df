"""A source distribution, a wheel made from it, and that wheel in another environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CMakeLists.txt")
FOLDERS = ("cmake", "csrc", "pyfused")

USE = """
import torch, pyfused
x, w, a, b = torch.randn(3, 8), torch.randn(5, 8), torch.randn(2, 8), torch.randn(5, 2)
y = pyfused.ops.lora_linear(x, w, None, a, b, 0.5)
torch.testing.assert_close(y, x @ w.T + 0.5 * x @ a.T @ b.T)
print(pyfused.__version__, pyfused.__file__)
"""


def run(*command: str | Path, cwd: Path) -> str:
    # With PYTHONPATH the source tree could stand in for what is installed.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_from_the_source_distribution_works_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    (sdist,) = (source / "dist").glob("pyfused-*.tar.gz")

    pip = [sys.executable, "-m", "pip"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "wheel", *offline, "-w", tmp_path, sdist, cwd=tmp_path)
    (wheel,) = tmp_path.glob("pyfused-*.whl")
    assert f"-cp3{sys.version_info.minor}-" in wheel.name and "linux" in wheel.name
    files = {name.split("/", 1)[1]: name for name in zipfile.ZipFile(wheel).namelist()}
    assert {"_ops.so", "py.typed", "ops/lora.py"} <= files.keys()
    assert any(name.startswith("_C.") for name in files)
    assert any(name.endswith("LICENSE") for name in files)
    assert all(name.startswith("pyfused") for name in files.values()), "something besides the package is in the wheel"

    venv.create(tmp_path / "other", symlinks=True)
    python = tmp_path / "other" / "bin" / "python"
    site = next((tmp_path / "other").glob("lib/python*/site-packages"))
    run(*pip, "--python", python, "install", *offline, wheel, cwd=tmp_path)
    (site / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    version, file = run(python, "-c", USE, cwd=tmp_path).split(maxsplit=1)
    assert wheel.name.startswith(f"pyfused-{version}-")
    assert Path(file.strip()).is_relative_to(site)
