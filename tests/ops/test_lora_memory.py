"""The kernels read and write nothing outside their arguments: each one lies between two pages that may not be touched.

A stray read is a segmentation fault, so the calls run in a process of their own (this file, run as a program).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import CUDA_KERNELS, DTYPE_PAIRS, cpu_kernels_only, cpu_only, make_case
from torch import Tensor

import pyfused
from pyfused.ops import LoraTable

pytestmark = cpu_only

_libc = ctypes.CDLL(None, use_errno=True)
_PROT_NONE = 0
_keep = []


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that ends (or begins) where a forbidden page begins (or ends)."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
    _keep.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = mmap.PAGESIZE + (pages * mmap.PAGESIZE - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    copy.copy_(tensor)
    for page in (0, pages + 1):
        start = ctypes.c_void_p(address + page * mmap.PAGESIZE)
        if _libc.mprotect(start, ctypes.c_size_t(mmap.PAGESIZE), _PROT_NONE) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return copy


def main() -> None:
    ops = torch.ops.pyfused
    shapes = [(1, 1, 1, 1), (3, 5, 7, 2), (7, 33, 65, 5), (9, 130, 257, 8), (5, 64, 128, 16), (4, 17, 31, 33)]
    shapes += [(20, 32, 96, 3), (70, 64, 32, 8), (70, 67, 530, 40), (290, 64, 96, 3), (515, 67, 69, 3)]
    for at_end in (True, False):
        for dtypes in DTYPE_PAIRS:
            for shape in shapes:
                case = make_case(*shape, *dtypes, vector=True, dropout_p=0.3)
                y, x, a, b, scale, seed = (
                    fenced(tensor, at_end) for tensor in (case.grad_y, case.x, case.a, case.b, case.scale, case.seed)
                )
                _, s = ops._lora_delta_forward(y, x, a, b, scale, 1.0, 0.3, seed)
                weight, bias = fenced(case.weight, at_end), fenced(case.bias, at_end)
                mask = ops._lora_linear_forward_with_mask(x, weight, bias, a, b, scale, 1.0, 0.3, seed)[2]
                if mask.numel() == 0:  # any bits do
                    mask = torch.randint(-(2**31), 2**31, (x.shape[0], -(-x.shape[1] // 128) * 4), dtype=torch.int32)
                mask = fenced(mask, at_end)
                for needs in (31, 1, 2):
                    for base in (None, weight):
                        for either in (seed,) if CUDA_KERNELS else (seed, mask):  # the CPU's take either
                            ops._lora_backward(y, x, base, a, b, fenced(s, at_end), scale, 1.0, 0.3, either, needs)
                lists = ([tensor] * 2 for tensor in (weight, bias, a, b, scale, 1.0, 0.3, seed))
                weights, biases, *rest = lists
                _, both = ops._lora_linear_shared_forward(x, weights, biases, *rest)
                both = [fenced(one, at_end) for one in both]
                ops._lora_linear_shared_backward([y, y], x, weights, *rest[:2], both, *rest[2:], [31, 31])
                if not CUDA_KERNELS:
                    masks = [mask] * 2
                    ops._lora_linear_shared_backward([y, y], x, weights, *rest[:2], both, *rest[2:-1], masks, [31, 31])
                ops._dropout(x, 0.3, seed)
                for vector, input_side in ((bias, False), (x[0], True)):
                    arguments = (fenced(vector, at_end), input_side)
                    _, base = ops._ia3_linear_forward(x, weight, bias, *arguments, True)
                    saved = x if input_side else fenced(base, at_end)
                    ops._ia3_linear_backward(y, saved, weight, bias, *arguments, 3)
                rest = ([y], x, [None, a], [None, b], [1.0] * 2, [0.3] * 2, [None, seed])
                index = fenced(torch.arange(y.shape[0]) % 3 - 1, at_end)
                _, s = ops._multi_lora_forward(*rest, index, None)
                ops._multi_lora_backward(*rest, index, None, fenced(s, at_end), [7] * 2)
                descriptor = fenced(LoraTable([None, (a, b)]).descriptor, at_end)
                ops._multi_lora_([y], x, [descriptor], index, None)
                _keep.clear()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(helpers.__file__).parent), str(Path(pyfused.__file__).parents[1])])
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_nothing_is_touched_outside_the_arguments():
    done = run()
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


@cpu_kernels_only  # once: it is about no kernel
@pytest.mark.parametrize("side", ["before", "behind"])
def test_the_fence_holds(side):
    """The test above can fail: one element beside a fenced tensor ends the process."""
    assert run(side).returncode == -signal.SIGSEGV


def trespass(side: str) -> None:
    tensor = fenced(torch.ones(5), side == "behind")
    ctypes.memmove(bytes(4), tensor.data_ptr() + (20 if side == "behind" else -4), 4)


if __name__ == "__main__":
    trespass(sys.argv[1]) if len(sys.argv) > 1 else main()
