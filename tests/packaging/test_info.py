"""``pyfused.build_info()`` and ``python -m pyfused``, which prints it."""

from __future__ import annotations

import platform
import subprocess
import sys

import torch

import pyfused
from pyfused import _C


def test_build_info_has_what_a_bug_report_needs() -> None:
    info = pyfused.build_info()
    assert info["pyfused"] == pyfused.__version__
    assert info["torch"] == torch.__version__
    assert info["torch_cuda"] == torch.version.cuda
    assert info["python"] == platform.python_version()
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu_capability"] == _C.cpu_capability()
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert set(info["cpu_capabilities_emulated"]) <= set(info["cpu_capabilities"])
    assert info["cxx_standard"] == 20
    assert info["cuda_architectures"] == _C.cuda_architectures()
    assert (info["cuda_toolkit"] is None) == (not info["cuda_architectures"])
    assert info["cutlass"] is None or info["cuda_toolkit"] is not None
    assert {"platform", "cpu", "gpu", "kernels", "compiler", "build_type", "built_with_torch"} <= info.keys()
    assert info["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")


def test_main_prints_every_fact_on_its_own_line() -> None:
    result = subprocess.run([sys.executable, "-m", "pyfused"], check=True, capture_output=True, text=True)
    printed = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    assert list(printed) == [name.replace("_", " ") for name in pyfused.build_info()]
    assert printed["torch"].strip() == torch.__version__
    assert printed["gpu"].strip() == (torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    assert printed["cpu capabilities"].strip() == ", ".join(_C.build_info()["cpu_capabilities"])
