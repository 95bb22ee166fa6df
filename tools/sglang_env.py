"""Makes the environment of tests/engines/test_sglang.py on top of this one: .venv/bin/python tools/sglang_env.py PATH

SGLang's LoRA code imports without a GPU, with the few packages below and not with the 70 or so that its server asks
for; torch and transformers are this environment's. It holds nothing of pyfused, which the tests put on its path.
"""

from __future__ import annotations

import sys
from pathlib import Path

import layered_env

# Without what they depend on; triton and tvm-ffi are imported for kernels that do not run here.
ALONE = ["sglang==0.5.23", "triton", "apache-tvm-ffi==0.1.11", "compressed-tensors"]
PACKAGES = [
    *("aiohttp", "cachetools", "cloudpickle", "dill", "einops", "fastapi", "gguf", "ipython", "loguru", "msgspec"),
    *("openai", "orjson", "partial_json_parser", "prometheus_client", "psutil", "py-cpuinfo", "pybase64", "pydantic"),
    *("pyzmq", "requests", "sentencepiece", "setproctitle", "tiktoken", "uvloop", "xxhash"),
]


def main() -> None:
    layered_env.make(Path(sys.argv[1]).absolute(), "SGLang", [["--no-deps", *ALONE], PACKAGES])


if __name__ == "__main__":
    main()
