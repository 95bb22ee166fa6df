"""The examples are scripts beside each other, found as `python examples/demo.py` finds them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "examples"))
