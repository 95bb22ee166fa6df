"""The frozen layer alone: F.linear's bits, whoever computes."""

from __future__ import annotations

import pytest
import torch
from helpers import EMULATED_LEVEL, cpu_only, readable_id, run_in_threads
from torch.nn.functional import linear

from pyfused.ops import frozen_linear

pytestmark = cpu_only

DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
raw = torch.ops.pyfused._linear


def operands(lead, n, k, dtype=torch.bfloat16, bias=True):
    generator = torch.Generator().manual_seed(n + k)
    x, weight, shift = (torch.randn(*s, generator=generator).to(dtype) for s in ((*lead, k), (n, k), (n,)))
    return x, (weight / k**0.5).to(dtype), shift if bias else None


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("n, k", [(32, 32), (96, 160), (768, 384), (64, 1024), (48, 64), (64, 40)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.skipif(EMULATED_LEVEL, reason="without tiles the vendor's sums have another order")
def test_bits(rows, n, k, bias):
    x, weight, shift = operands((rows,), n, k, bias=bias)
    assert torch.equal(raw(x, weight, shift), linear(x, weight, shift))
    assert torch.equal(frozen_linear(x, weight, shift), linear(x, weight, shift))


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (4, 1, 2), (0,), (2, 0)], ids=readable_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=readable_id)
def test_shapes_and_dtypes(lead, dtype):
    x, weight, bias = operands(lead, 64, 96, dtype)
    for op in (raw, frozen_linear):
        got, expected = op(x, weight, bias), linear(x, weight, bias)
        assert got.shape == expected.shape and got.dtype == dtype
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("n, k", [(0, 32), (32, 0)])
def test_no_features(n, k):
    x, weight, bias = operands((3,), n, max(k, 1))
    x, weight = x[:, :k], weight[:, :k]
    assert torch.equal(raw(x, weight, bias), linear(x, weight, bias))


def test_layouts():
    x, weight, bias = operands((12,), 64, 96)
    wide = torch.full((70, 130), torch.nan, dtype=torch.bfloat16)
    wide[3:67, 9:105] = weight
    expected = linear(x, weight, bias)
    assert torch.equal(raw(x, wide[3:67, 9:105], bias), expected)
    assert torch.equal(raw(x.t().contiguous().t(), weight.t().contiguous().t(), bias), expected)
    assert torch.equal(raw(x[:1].expand(12, -1), weight, bias), expected[:1].expand(12, -1))
    spread = torch.full((64, 2), torch.nan, dtype=torch.bfloat16)
    spread[:, 1] = bias
    assert torch.equal(raw(x, weight, spread[:, 1]), expected)


def test_autocast_is_f_linears():
    x, weight, bias = operands((4,), 32, 32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen_linear(x, weight, bias), linear(x, weight, bias))
        mixed = x.bfloat16()
        assert torch.equal(frozen_linear(mixed, weight, bias), linear(mixed, weight, bias))


def test_bad_arguments():
    x, weight, bias = operands((4,), 32, 64)
    for bad, message in [
        ((x[:, :32], weight, bias), "weight"),
        ((x, weight.float(), bias), "weight"),
        ((x, weight[0], bias), "weight"),
        ((x, weight, bias[:3]), "bias"),
        ((x, weight, bias.float()), "bias"),
        ((x.int(), weight, bias), "x"),
        ((x[0, 0], weight, bias), "x"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            raw(*bad)


def test_opcheck():
    torch.library.opcheck(raw.default, operands((4,), 32, 64), test_utils=("test_schema", "test_faketensor"))


def test_side_by_side():
    x, weight, bias = operands((8,), 512, 768)
    expected = (raw if EMULATED_LEVEL else linear)(x, weight, bias)

    def work(_):
        for _ in range(20):
            assert torch.equal(raw(x, weight, bias), expected)

    run_in_threads(work, [(i,) for i in range(4)])
