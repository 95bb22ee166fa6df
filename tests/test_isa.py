"""Every CPU level that the machine has: results by the error rule against fp64, one dropout mask on all of them.

`make test` runs the op tests on each level by itself; here the levels are compared with one another in one run. The
level is fixed when the library loads, so each computes in a process of its own (this file, run as a program).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DTYPE_PAIRS, Case, assert_error_rule, eager_linear, evaluate, make_case

import pyfused
from pyfused import _C
from pyfused.ops import lora_linear
from pyfused.reference import lora as reference
from pyfused.reference.dropout import keep_mask

LEVELS = _C.available_cpu_capabilities()
SHAPES = [(1, 130, 257, 1), (37, 65, 300, 5), (130, 129, 96, 8), (19, 200, 131, 16), (12, 96, 64, 33)]
MASKED = (61, 389, 0.3)  # rows, columns, rate


def cases() -> dict[str, Case]:
    return {
        f"{dtypes}-{shape}": make_case(*shape, *dtypes, vector=index % 2 == 0, dropout_p=0.1)
        for dtypes in DTYPE_PAIRS
        for index, shape in enumerate(SHAPES)
    }


def mask(dtype: torch.dtype, seed: torch.Tensor) -> torch.Tensor:
    """What the forward kernel keeps of ones, read from s = drop(x) I."""
    rows, cols, p = MASKED
    x, y = torch.ones(rows, cols, dtype=dtype), torch.zeros(rows, 1, dtype=dtype)
    a, b = torch.eye(cols, dtype=dtype), torch.zeros(1, cols, dtype=dtype)
    return torch.ops.pyfused._lora_delta_forward(y, x, a, b, None, 1.0, p, seed)[1] != 0


def main(path: str) -> None:
    seed = make_case(1, 1, 1, 1).seed
    masks = [mask(dtype, seed) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
    results = {name: evaluate(lora_linear, case) for name, case in cases().items()}
    torch.save({"level": pyfused.build_info()["cpu_capability"], "masks": masks, "results": results}, path)


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[dict, dict]]:
    return {
        name: (evaluate(eager_linear, case), evaluate(reference.lora_linear, case.to(torch.float64)))
        for name, case in cases().items()
    }


@pytest.mark.parametrize("level", LEVELS)
def test_level(level, expected, tmp_path):
    path = tmp_path / "results.pt"
    environment = os.environ | {
        "PYFUSED_CPU_CAPABILITY": level,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(pyfused.__file__).parents[1])]),
    }
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True)
    got = torch.load(path)
    assert got["level"] == level
    rows, cols, p = MASKED
    keep = keep_mask(make_case(1, 1, 1, 1).seed, rows, cols, p)
    for masked in got["masks"]:
        assert torch.equal(masked, keep)
    for name, (eager, exact) in expected.items():
        for key, value in got["results"][name].items():
            assert_error_rule(f"{name} {key}", value, eager[key], exact[key])


if __name__ == "__main__":
    main(sys.argv[1])
