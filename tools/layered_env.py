"""A virtual environment on top of this one, for what needs packages of its own beside those that are here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path


def make(path: Path, name: str, installs: Sequence[Sequence[str]]) -> None:
    """Make the environment anew, or leave none behind.

    Args:
        path: where.
        name: of what it is for, in messages.
        installs: the arguments of one ``pip install`` after the other. What they do not bring along is this
            environment's.
    """
    print(f"{path}: new environment for {name}, on top of {sys.prefix}", flush=True)
    venv.create(path, clear=True, symlinks=True)
    site = next(path.glob("lib/python*/site-packages"))
    # Behind the environment's own packages on sys.path, so that its versions are the ones that are found.
    places = [place for place in sys.path if os.path.basename(place) in ("site-packages", "dist-packages")]
    (site / "_underneath.pth").write_text("\n".join(places) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(path / "bin" / "python"), "--disable-pip-version-check"]
    for arguments in installs:
        if subprocess.call([*pip, "install", "-q", *arguments]) != 0:
            shutil.rmtree(path)
            raise SystemExit(f"pip could not install {name}; its message is above.")
