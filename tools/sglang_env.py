"""Makes the environment of tests/engines/test_sglang.py on top of this one: .venv/bin/python tools/sglang_env.py PATH

SGLang's LoRA code imports without a GPU, with the few packages below and not with the 70 or so that its server asks
for; torch and transformers are this environment's. It holds nothing of pyfused, which the tests put on its path.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

# Without what they depend on; triton and tvm-ffi are imported for kernels that do not run here.
ALONE = ["sglang==0.5.23", "triton", "apache-tvm-ffi==0.1.11", "compressed-tensors"]
PACKAGES = [
    *("aiohttp", "cachetools", "cloudpickle", "dill", "einops", "fastapi", "gguf", "ipython", "loguru", "msgspec"),
    *("openai", "orjson", "partial_json_parser", "prometheus_client", "psutil", "py-cpuinfo", "pybase64", "pydantic"),
    *("pyzmq", "requests", "sentencepiece", "setproctitle", "tiktoken", "uvloop", "xxhash"),
]


def main() -> None:
    path = Path(sys.argv[1]).absolute()
    print(f"{path}: new environment for SGLang, on top of {sys.prefix}", flush=True)
    venv.create(path, clear=True, symlinks=True)
    site = next(path.glob("lib/python*/site-packages"))
    places = [place for place in sys.path if os.path.basename(place) in ("site-packages", "dist-packages")]
    (site / "_underneath.pth").write_text("\n".join(places) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(path / "bin" / "python"), "--disable-pip-version-check"]
    for packages in (["--no-deps", *ALONE], PACKAGES):
        if subprocess.call([*pip, "install", "-q", *packages]) != 0:
            shutil.rmtree(path)
            raise SystemExit("pip could not install SGLang; its message is above.")


if __name__ == "__main__":
    main()
