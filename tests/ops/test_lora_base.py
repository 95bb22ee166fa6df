"""LoRA's base product in bf16 around the bounds of AMX tiles and of the rows for which it is in tiles of our own (16,
32 and 64 rows; 256, or 512 of a large weight; features in 32s). But for one they hold on every level.
"""

from __future__ import annotations

import pytest
import torch
from helpers import assert_matches_reference, cpu_kernels_only, make_case, readable_id

from pyfused import _library
from pyfused.ops import lora_linear, lora_linear_shared

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 130, 256, 257])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32, torch.float16], ids=readable_id)
def test_rows(rows, adapter_dtype):
    case = make_case(rows, 96, 160, 5, BF16, adapter_dtype, bias=rows % 2 == 0, vector=rows % 3 == 0, dropout_p=0.1)
    assert_matches_reference(lora_linear, case)


@pytest.mark.parametrize(
    "shape",
    [(64, 32, 32, 1), (70, 352, 64, 11), (100, 64, 416, 16), (90, 96, 96, 17), (66, 64, 64, 64), (66, 64, 64, 65)],
    ids=readable_id,
)
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=readable_id)
def test_features_and_ranks(shape, adapter_dtype):
    assert_matches_reference(lora_linear, make_case(*shape, BF16, adapter_dtype, dropout_p=0.2))


@pytest.mark.parametrize("rows", [5, 40, 90])
@pytest.mark.parametrize("n, k", [(48, 64), (64, 48), (33, 64), (64, 1)])
def test_features_beside_tiles(rows, n, k):
    assert_matches_reference(lora_linear, make_case(rows, n, k, 4, BF16))


@pytest.mark.parametrize("rows", [3, 24, 100])
def test_layouts(rows):
    """Rows further apart than they are long, a transposed weight, an expanded bias, b that is not contiguous."""
    case = make_case(rows, 64, 96, 4, BF16)

    def apart(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 40), torch.nan, dtype=tensor.dtype)
        wide[:, 8 : 8 + tensor.shape[1]] = tensor
        return wide[:, 8 : 8 + tensor.shape[1]]

    expected = lora_linear(case.x, case.weight, case.bias, case.a, case.b, 0.5)
    got = lora_linear(apart(case.x), apart(case.weight), case.bias, apart(case.a), apart(case.b), 0.5)
    assert torch.equal(got, expected)

    flat = case.replace(bias=torch.full((1,), 0.75, dtype=BF16).expand(64))
    assert_matches_reference(lora_linear, flat)
    assert_matches_reference(lora_linear, case.replace(weight=case.weight.t().contiguous().t()))
    assert_matches_reference(lora_linear, case.replace(b=case.b.t().contiguous().t()))


@cpu_kernels_only
@pytest.mark.parametrize("rows", [4, 30, 100])
def test_a_row_does_not_depend_on_the_others(rows):
    case = make_case(rows, 96, 128, 8, BF16, FP32)
    order = torch.randperm(rows)
    y = lora_linear(case.x, case.weight, case.bias, case.a, case.b, 2.0)
    assert torch.equal(lora_linear(case.x[order], case.weight, case.bias, case.a, case.b, 2.0), y[order])
    other = case.x.clone()
    other[0] = torch.nan
    changed = lora_linear(other, case.weight, case.bias, case.a, case.b, 2.0)
    assert changed[0].isnan().all() and torch.equal(changed[1:], y[1:])


@pytest.mark.parametrize("rows", [8, 40, 120])
def test_projections_of_one_x_have_the_bits_of_each_alone(rows):
    """One without an adapter has those of a base layer that is called alone."""
    cases = [make_case(rows, n, 96, r, BF16, dtype, seed=n) for n, r, dtype in [(96, 8, BF16), (64, 3, FP32)]]
    x = cases[0].x
    calls = [(case.weight, case.bias, case.a, case.b, 0.5) for case in cases]
    base = (cases[0].weight, cases[0].bias, None, None)
    *adapted, alone = lora_linear_shared(x, [*calls, base])
    for got, call in zip(adapted, calls, strict=True):
        assert torch.equal(got, lora_linear(x, *call))
    assert torch.equal(alone, torch.nn.functional.linear(x, *base[:2]))


@cpu_kernels_only
@pytest.mark.skipif(_library._C.cpu_capability() != "AMX", reason="the vendor's bits may depend on how many there are")
@pytest.mark.parametrize("rows", [1, 24, 64, 200])
def test_same_bits_with_any_number_of_threads(rows):
    case = make_case(rows, 512, 512, 8, BF16, dropout_p=0.1)
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(
                lora_linear(case.x, case.weight, case.bias, case.a, case.b, 1.5, 0.1, training=True, seed=case.seed)
            )
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("rows", [2, 20, 80])
def test_large_numbers(rows):
    """An infinity of x or the weight reaches what it should; the update's terms make none out of finite numbers."""
    case = make_case(rows, 64, 64, 4, BF16, FP32, bias=False)
    case.x[1, 3] = torch.inf
    y = lora_linear(case.x, case.weight, None, case.a, case.b, 1.0)
    assert y[0].isfinite().all() and not y[1].isfinite().any()
    huge = case.b * 1e38
    y = lora_linear(case.x[:1].expand(rows, -1), case.weight, None, case.a * 1e-30, huge, 1.0)
    exact = case.x[:1].double() @ (case.weight.double() + huge.double() @ (case.a.double() * 1e-30)).t()
    assert (y.double() - exact).abs().max() <= 0.02 * exact.abs().max()
