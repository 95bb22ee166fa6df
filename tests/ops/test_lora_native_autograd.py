"""lora_linear's gradient in C++ against the Function in Python in all its forms; test_native_autograd.py and
test_native_dispatch.py have what is to hold of every op."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import make_case, native_autograd, readable_id

from pyfused import _library
from pyfused.ops import lora_linear

DTYPES = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]
NAMES = ("x", "bias", "a", "b", "scale")

pytestmark = native_autograd


@pytest.fixture
def in_python(monkeypatch):
    return lambda: monkeypatch.setattr(_library, "autograd", None)


def forward(case):
    return lora_linear(case.x, case.weight, case.bias, case.a, case.b, case.scale, **case.options)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(("vector", "bias"), list(itertools.product((False, True), repeat=2)))
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_gradients_of_any_subset_are_the_functions(in_python, dtypes, vector, bias, p):
    case = make_case(37, 40, 50, 4, *dtypes, vector=vector, dropout_p=p)
    case = case if bias else case.replace(bias=None)
    tensors = {name: getattr(case, name) for name in NAMES if isinstance(getattr(case, name), torch.Tensor)}
    subsets = [subset for n in (1, 2, len(tensors)) for subset in itertools.combinations(tensors, n)]
    results = []
    for _ in range(2):
        for subset in subsets:
            for name, tensor in tensors.items():
                tensor.requires_grad_(name in subset)
            y = forward(case)
            results.append((y.detach(), *torch.autograd.grad(y, [tensors[name] for name in subset], case.grad_y)))
        in_python()
    for native, function in zip(results[: len(subsets)], results[len(subsets) :], strict=True):
        for got, want in zip(native, function, strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_another_torch_does_without(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert _library._load_autograd() is None
