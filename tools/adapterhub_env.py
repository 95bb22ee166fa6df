"""Makes the environment of tests/adapterhub on top of this one: .venv/bin/python tools/adapterhub_env.py PATH

AdapterHub's ``adapters`` needs transformers 4.57 while everything else here uses transformers 5, so it gets a virtual
environment of its own. What it does not bring along, torch among it, is this environment's.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import layered_env

PACKAGES = ["adapters==1.3.0"]


def main() -> None:
    # Pinned, so that no other torch is installed into it.
    pinned = f"torch=={metadata.version('torch')}"
    layered_env.make(Path(sys.argv[1]).absolute(), "AdapterHub's adapters", [[pinned, *PACKAGES]])


if __name__ == "__main__":
    main()
