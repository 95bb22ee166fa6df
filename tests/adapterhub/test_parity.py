"""Bottleneck adapters against AdapterHub ``adapters`` 1.3: results, gradients, configurations, files both ways.

That library needs transformers 4.57, so ``make test`` gives it an environment of its own, .venv-adapterhub, and the
comparison (parity.py) runs there as a program, with pyfused on its path.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import pyfused

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PYFUSED_ADAPTERHUB_PYTHON", ROOT / ".venv-adapterhub" / "bin" / "python"))

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no environment with AdapterHub: make .venv-adapterhub")

PRESETS = ["houlsby", "pfeiffer", "parallel", "ln", "learned", "channel", "plus"]
MIXED = ["residual", "gated", "parallel-ln", "parallel-gated", "parallel-plain"]
ALONE = ["alone", "alone-before", "parallel-alone"]
POST_NORM = ["bert", "bert-bare", "roberta"]


def run(*cases: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(pyfused.__file__).parents[1])}
    command = [str(PYTHON), str(Path(__file__).with_name("parity.py")), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("model", [*POST_NORM, "gpt2", "llama", "t5"])
def test_parity(model):
    """One process a model: importing both libraries takes longer than all comparisons."""
    presets = [*PRESETS, "post-add"] if model in POST_NORM else PRESETS
    presets = presets if model in ("bert-bare", "roberta") else presets + MIXED + ALONE
    done = run(*(f"{model}/{preset}" for preset in presets))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-3000:]}"
    assert done.stdout.count(" ok") == len(presets)


def test_the_comparison_can_fail():
    """A flag with which AdapterHub's forward fails in a pre-norm model, and which pyfused refuses."""
    done = run("llama/post-add")
    assert done.returncode != 0 and "post-norm model" in done.stderr
