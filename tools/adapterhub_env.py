"""Makes the environment of tests/adapterhub on top of this one: .venv/bin/python tools/adapterhub_env.py PATH

AdapterHub's ``adapters`` needs transformers 4.57 while everything else here uses transformers 5, so it gets a virtual
environment of its own. What it does not bring along, torch among it, is this environment's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

PACKAGES = ["adapters==1.3.0"]


def main() -> None:
    path = Path(sys.argv[1]).absolute()
    print(f"{path}: new environment for AdapterHub, on top of {sys.prefix}", flush=True)
    venv.create(path, clear=True, symlinks=True)
    site = next(path.glob("lib/python*/site-packages"))
    # Behind the environment's own packages on sys.path, so that its transformers is the one that is found.
    places = [place for place in sys.path if os.path.basename(place) in ("site-packages", "dist-packages")]
    (site / "_underneath.pth").write_text("\n".join(places) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(path / "bin" / "python")]
    # Pinned, so that no other torch is installed into it.
    pinned = f"torch=={metadata.version('torch')}"
    if subprocess.call([*pip, "install", "-q", "--disable-pip-version-check", pinned, *PACKAGES]) != 0:
        shutil.rmtree(path)
        raise SystemExit("pip could not install AdapterHub's adapters; its message is above.")


if __name__ == "__main__":
    main()
