"""PYFUSED_CPU_CAPABILITY: every level that the machine has can be chosen, anything else is refused at import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pyfused import _C

AVAILABLE = _C.available_cpu_capabilities()
COMPILED = _C.build_info()["cpu_capabilities"]
EMULATED = _C.build_info()["cpu_capabilities_emulated"]


def import_with(capability: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import pyfused; print(pyfused.build_info()['cpu_capability'])"],
        env={**os.environ, "PYFUSED_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )


def test_levels_are_listed_lowest_first() -> None:
    assert AVAILABLE[0] == "DEFAULT"
    assert AVAILABLE == [level for level in ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16", "AMX") if level in AVAILABLE]
    assert set(AVAILABLE) <= set(COMPILED)


@pytest.mark.parametrize("level", AVAILABLE)
def test_an_available_level_is_used(level: str) -> None:
    assert import_with(level).stdout.strip() == level


def test_an_empty_value_means_the_best_level_that_is_not_emulated() -> None:
    assert import_with("").stdout.strip() == [level for level in AVAILABLE if level not in EMULATED][-1]


@pytest.mark.parametrize("level", ["AVX1024", "avx2", *(level for level in COMPILED if level not in AVAILABLE)])
def test_another_value_is_an_error_that_lists_the_levels(level: str) -> None:
    result = import_with(level)
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: PYFUSED_CPU_CAPABILITY must be one of")
    assert f"({', '.join(AVAILABLE)})" in message
    assert repr(level) in message
