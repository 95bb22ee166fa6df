"""Any strides, any number of threads, and nothing outside the arguments is touched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest
import torch
from bottleneck_cases import assert_matches_reference, evaluate, make_case
from helpers import DTYPE_PAIRS, cpu_kernels_only, cpu_only, readable_id
from torch import Tensor

import pyfused
from pyfused.ops import bottleneck

GAP = 1e4  # between the elements of a view; see test_lora_layouts.py
DTYPES = [DTYPE_PAIRS[index] for index in (0, 1, 2, 4)]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def row_slice(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 5), GAP)
    wide[..., 3:-2] = tensor
    return wide[..., 3:-2]


def every_second_row(tensor: Tensor) -> Tensor:
    tall = tensor.new_full((*tensor.shape[:-2], 2 * tensor.shape[-2], tensor.shape[-1]), GAP)
    tall[..., ::2, :] = tensor
    return tall[..., ::2, :]


def every_second_element(tensor: Tensor) -> Tensor:
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), GAP)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def offset(tensor: Tensor) -> Tensor:
    return torch.cat([tensor.new_full((1,), GAP), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS = [transposed, row_slice, every_second_row, every_second_element, offset]


@pytest.mark.parametrize("rows", [(3, 3), (3, 11)], ids=readable_id)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("name", ["x", "residual", "grad_y", "w_down", "w_up"])
def test_layouts(name, dtypes, layout, rows):
    case = make_case(rows, 37, 5, *dtypes, residual="other", dropout_p=0.2)
    assert_matches_reference(bottleneck, case.replace(**{name: layout(getattr(case, name))}))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", ["x", "residual", "grad_y", "w_down", "w_up"])
def test_layouts_of_what_fits_into_tiles(name, layout):
    """Rows, width and bottleneck that the AMX level computes in tiles."""
    case = make_case((2, 35), 64, 16, torch.bfloat16, residual="other", scale="channels", dropout_p=0.2)
    assert_matches_reference(bottleneck, case.replace(**{name: layout(getattr(case, name))}))


@pytest.mark.parametrize("name", ["b_down", "b_up", "scale"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
def test_vectors(dtypes, name):
    case = make_case(33, 37, 5, *dtypes, scale="channels", dropout_p=0.2)
    strided = getattr(case, name).repeat_interleave(3)[::3]
    assert_matches_reference(bottleneck, case.replace(**{name: strided}))


@pytest.mark.parametrize("dtypes", DTYPES, ids=readable_id)
@pytest.mark.parametrize("shape", [(1, 37), (33, 1), (1, 1)], ids=readable_id)
def test_expanded(dtypes, shape):
    """Stride 0: x and the residual expanded along rows, columns or both, and the gradient of a sum."""
    case = make_case(33, 37, 5, *dtypes, residual="other", dropout_p=0.2)
    x = torch.randn(shape).to(dtypes[0]).expand(33, 37)
    grad_y = torch.ones((), dtype=dtypes[0]).expand(33, 37)
    assert_matches_reference(bottleneck, case.replace(x=x, residual=x.flip(0), grad_y=grad_y))


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@cpu_kernels_only
@pytest.mark.parametrize("shape", [(700, 300, 48), (1500, 70, 33), (16, 3000, 64)], ids=readable_id)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:5], ids=readable_id)
def test_same_result_with_any_number_of_threads(dtypes, shape, threads):
    """Two runs with one number of threads are the same bits; another number may change the vendor's products."""
    case = make_case(*shape, *dtypes, residual="other", scale="channels", dropout_p=0.1)
    for count in (2, 3, 1):
        threads(count)
        expected = evaluate(bottleneck, case)
        for name, value in evaluate(bottleneck, case).items():
            assert torch.equal(value, expected[name]), name
        assert_matches_reference(bottleneck, case)


@cpu_kernels_only
@pytest.mark.parametrize("shape", [(1, 2112, 64), (2, 2100, 70), (4, 1050, 64), (11, 600, 48)], ids=readable_id)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS[:5], ids=readable_id)
def test_same_bits_of_few_rows_with_any_number_of_threads(dtypes, shape, threads):
    """No vendor's product takes part."""
    if dtypes[0] == torch.float64 and shape[0] > 4:
        pytest.skip("few rows are up to 4 in fp64")
    for dropout_p in (0.0, 0.1):
        case = make_case(*shape, *dtypes, residual="other", scale="channels", dropout_p=dropout_p)
        threads(1)
        expected = evaluate(bottleneck, case, [])["y"]
        for count in (2, 3):
            threads(count)
            assert torch.equal(evaluate(bottleneck, case, [])["y"], expected)


@cpu_kernels_only
def test_same_bits_in_tiles_with_any_number_of_threads(threads):
    """At the AMX level no vendor's product takes part."""
    case = make_case(700, 320, 48, torch.bfloat16, residual="other", scale="learned", dropout_p=0.1)
    threads(1)
    expected = evaluate(bottleneck, case)
    for count in (2, 3):
        threads(count)
        for name, value in evaluate(bottleneck, case).items():
            if pyfused.build_info()["cpu_capability"] == "AMX":
                assert torch.equal(value, expected[name]), name
            else:
                torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=2e-2, msg=name)


@cpu_kernels_only
@pytest.mark.skipif(pyfused.build_info()["cpu_capability"] != "AVX2", reason="the vendor's products take part")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=readable_id)
def test_same_bits_on_vectors_with_any_number_of_threads(dtype, threads):
    case = make_case(700, 801, 48, dtype, residual="x", dropout_p=0.1)
    threads(1)
    expected = evaluate(bottleneck, case)
    for count in (2, 3):
        threads(count)
        for name, value in evaluate(bottleneck, case).items():
            assert torch.equal(value, expected[name]), name


def touch_everything() -> None:
    from test_lora_memory import _keep, fenced

    ops = torch.ops.pyfused
    for at_end in (True, False):
        for dtypes in DTYPE_PAIRS:
            shapes = [(1, 1, 1), (3, 7, 2), (20, 65, 5), (17, 257, 8), (5, 128, 16), (20, 33, 33), (70, 64, 16)]
            for m, d, h in [*shapes, (2, 9, 70), (16, 259, 7), (150, 137, 9)]:
                case = make_case(m, d, h, *dtypes, residual="other", scale="channels", dropout_p=0.3)
                case = case.map(lambda tensor, at_end=at_end: fenced(tensor, at_end))
                down, up = (case.w_down, case.b_down), (case.w_up, case.b_up)
                rest = (case.scale, 5, 1.0, 0.3, case.seed)
                _, z = ops._bottleneck_forward(case.x, case.residual, *down, *up, *rest)
                z = fenced(z, at_end)
                weights = (down[0], up[0], down[1], up[1])
                for needs in (127, 1, 2, 8, 32):
                    ops._bottleneck_backward(case.grad_y, case.x, *weights, z, *rest, needs)
                ops._bottleneck_backward(case.grad_y, case.x, *weights, z, None, *rest[1:], 95)
                _keep.clear()


@cpu_only
def test_nothing_is_touched_outside_the_arguments():
    """Each argument lies between two pages that may not be touched, see test_lora_memory.py."""
    folders = [Path(helpers.__file__).parent, Path(__file__).parent, Path(pyfused.__file__).parents[1]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"


if __name__ == "__main__":
    touch_everything()
