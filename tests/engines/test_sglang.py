"""pyfused's LoRA backend for SGLang against SGLang's own code, as far as that runs without a GPU.

SGLang has an environment of its own, .venv-sglang, which ``make test-all`` makes; check_sglang.py runs there.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PYFUSED_SGLANG_PYTHON", ROOT / ".venv-sglang" / "bin" / "python"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: make .venv-sglang/.packages"),
]


def test_checks():
    """In one process: importing SGLang takes longer than all checks."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    checks = str(Path(__file__).with_name("check_sglang.py"))
    command = [str(PYTHON), "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", checks]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    summary = done.stdout.strip().splitlines()[-1]
    assert re.search(r"\b\d+ passed", summary) and "skipped" not in summary, summary
