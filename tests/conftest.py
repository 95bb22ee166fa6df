"""For every test: no network, and which device it runs on.

``PYFUSED_TEST_DEVICE=cuda pytest tests/ops tests/nn`` runs the ops' and the modules' own tests on the GPU: it makes
that torch's default device, under which gradients are in Python (``helpers.native_autograd``). What is marked ``cuda``
runs on a GPU in any case, with gradients in C++, and is skipped where there is none; ``PYFUSED_CUDA_TESTS_ON=cpu`` runs
what of it makes sense there on the CPU, to try the tests themselves.

``PYFUSED_TEST_EMULATION=<path of emulated_ops.so> pytest tests/ops`` takes the CUDA ops, compiled for the CPU by
tests/emulation/, in the place of the CPU ops: the kernels' own source on the same cases, without a GPU.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"

_device = os.environ.get("PYFUSED_TEST_DEVICE")
if _device is not None:
    torch.set_default_device(_device)


def pytest_configure() -> None:
    if _device is not None and _device.startswith("cuda") and not torch.cuda.is_available():
        raise pytest.UsageError(f"PYFUSED_TEST_DEVICE={_device}: torch finds no CUDA device")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or os.environ.get("PYFUSED_CUDA_TESTS_ON") == "cpu":
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):  # a folder of that name is among the keywords too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _groups_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one x are computed together in the small models of the tests, too."""
    from pyfused.nn import shared_input

    monkeypatch.setattr(shared_input, "_MIN_ELEMENTS", 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, which is put back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
