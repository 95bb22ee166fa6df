"""IA3's ops under autocast, without gradients, on devices without a kernel, with any number of threads, and their
memory: what is saved, and that nothing outside the arguments is touched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPE_PAIRS, cpu_only, readable_id
from ia3_cases import SIDES, evaluate, make_case

import pyfused
from pyfused import _library
from pyfused.ops import ia3_linear, ia3_scale
from pyfused.reference import ia3 as reference


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=readable_id)
def test_autocast(side, dtype):
    case = make_case((2, 5), 6, 7, side=side)
    x, scale = case.x.requires_grad_(), case.scale.requires_grad_()
    with torch.autocast(DEVICE.type, dtype):
        y = ia3_linear(x, case.weight, case.bias, scale, side)
    assert y.dtype == dtype
    expected = evaluate(ia3_linear, case.replace(scale=scale.detach()).to(dtype).replace(scale=scale.detach()))
    assert torch.equal(y, expected["y"])
    y.backward(case.grad_y.to(dtype))
    assert x.grad.dtype == scale.grad.dtype == torch.float32
    torch.testing.assert_close(scale.grad, expected["grad_scale"])
    with torch.autocast(DEVICE.type, dtype):
        assert ia3_linear(case.x.double(), case.weight.double(), None, case.scale, side).dtype == torch.float64


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(side, mode):
    case = make_case((2, 5), 6, 7, side=side)
    with mode():
        y = ia3_linear(case.x, case.weight, case.bias, case.scale.requires_grad_(), side)
    assert not y.requires_grad
    assert torch.equal(y, evaluate(ia3_linear, case)["y"])


@pytest.mark.parametrize("side", SIDES)
def test_saved_for_backward(side):
    """What is scaled, and never another copy of the activations."""
    case = make_case(9, 6, 7, torch.bfloat16, torch.float32, side=side)
    x, scale = case.x.requires_grad_(), case.scale.requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ia3_linear(x, case.weight, case.bias, scale, side)
    own = [tensor for tensor in saved if tensor.data_ptr() not in (case.weight.data_ptr(), scale.data_ptr())]
    own = [tensor for tensor in own if tensor.data_ptr() != case.bias.data_ptr()]
    if side == "input":
        assert [tensor.data_ptr() for tensor in own] == [x.data_ptr()]
    else:
        assert [(tuple(tensor.shape), tensor.dtype) for tensor in own] == [((9, 6), torch.bfloat16)]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ia3_linear(x, case.weight, case.bias, scale.detach(), side)
    assert {tensor.data_ptr() for tensor in saved} == {case.weight.data_ptr(), scale.data_ptr()}


def test_the_reference_serves_devices_without_a_kernel(monkeypatch):
    case = make_case((2, 5), 6, 7)
    expected = evaluate(reference.ia3_linear, case)
    monkeypatch.setattr(_library, "_kernels", set())
    monkeypatch.setattr(_library, "autograd", None)
    got = evaluate(ia3_linear, case)
    for name, value in expected.items():
        assert torch.equal(got[name], value)
    assert torch.equal(ia3_scale(case.x, torch.ones(7)), case.x)
    meta = ia3_linear(case.x.to("meta"), case.weight.to("meta"), None, case.scale.to("meta"))
    assert meta.shape == (2, 5, 6)


def test_forward_mode():
    case = make_case(3, 4, 5, torch.float64)
    tangent = torch.randn(3, 5, dtype=torch.float64)
    _, got = torch.func.jvp(lambda x: ia3_linear(x, case.weight, case.bias, case.scale), (case.x,), (tangent,))
    torch.testing.assert_close(got, F.linear(tangent, case.weight) * case.scale)


def raw(case, side):
    """Every output of our own kernels; no vendor GEMM is in it."""
    ops = torch.ops.pyfused
    scale = case.scale if side == "columns" else case.scale[: case.x.shape[0]].contiguous()
    dim = 1 if side == "columns" else 0
    return ops._ia3_scale_forward(case.grad_y, scale, dim), *ops._ia3_scale_backward(
        case.grad_y, case.grad_y.flip(0), scale, dim, 3
    )


@cpu_only
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_same_bits_with_any_number_of_threads(dtypes, side):
    case = make_case(700, 1300, 1, *dtypes)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = raw(case, side)
        for count in (2, 3, 1):
            torch.set_num_threads(count)
            assert all(map(torch.equal, raw(case, side), expected))
    finally:
        torch.set_num_threads(before)


def fenced_calls() -> None:
    from test_lora_memory import _keep, fenced

    ops = torch.ops.pyfused
    for at_end in (True, False):
        for dtypes in DTYPE_PAIRS:
            for shape in [(1, 1, 1), (3, 5, 7), (7, 33, 65), (9, 130, 257), (70, 64, 128), (5, 3, 31)]:
                for side in SIDES:
                    case = make_case(*shape, *dtypes, side=side)
                    names = ("x", "weight", "bias", "scale", "grad_y")
                    x, weight, bias, scale, grad_y = (fenced(getattr(case, name), at_end) for name in names)
                    for keep in (True, False):
                        ops._ia3_linear_forward(x, weight, bias, scale, side == "input", keep)
                    saved = x if side == "input" else fenced(torch.ones_like(grad_y), at_end)
                    for needs in (1, 2, 3):
                        ops._ia3_linear_backward(grad_y, saved, weight, bias, scale, side == "input", needs)
                    scaled = grad_y if side == "output" else x
                    rows = fenced(torch.ones(scaled.shape[0], dtype=scale.dtype), at_end)
                    for vector, dim in ((scale, 1), (rows, 0)):
                        ops._ia3_scale_forward(scaled, vector, dim)
                        ops._ia3_scale_backward(scaled, scaled, vector, dim, 3)
                    _keep.clear()


@cpu_only
def test_nothing_is_touched_outside_the_arguments():
    folders = [Path(helpers.__file__).parent, Path(__file__).parent, Path(pyfused.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


if __name__ == "__main__":
    fenced_calls()
