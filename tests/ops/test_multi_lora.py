"""Many adapters in one batch: against the reference, to the bit against each row alone, rows without an adapter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import DEVICE, DTYPE_PAIRS, EMULATED, assert_error_rule, cpu_kernels_only, readable_id
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multi_lora_cases import Batch, eager, evaluate, make_batch

from pyfused.ops import LoraTable, lora_linear, multi_lora, multi_lora_
from pyfused.ops.multi_lora import LORA_DECODE_ROWS
from pyfused.reference import multi_lora as reference

RANKS = (1, 3, 0, 8, 16, 33, 129)


def op(y, x, adapters, index, segments, training, seeds):
    return multi_lora(y, x, LoraTable(adapters), index, segments, training, seeds)


def infer(batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return multi_lora_(batch.y.clone(), batch.x, batch.table, batch.index, batch.segments)


def assert_matches_reference(batch: Batch) -> None:
    got = evaluate(op, batch)
    exact = evaluate(reference.multi_lora, batch.to(torch.float64))
    plain = evaluate(eager, batch)
    for name, value in got.items():
        assert_error_rule(name, value, plain[name], exact[name])
    if not any(entry is not None and entry[3] > 0.0 for entry in batch.adapters):
        assert torch.equal(infer(batch), got["out"])


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (40, 129, 1134), (130, 770, 66)], ids=readable_id)
def test_matches_the_reference(shape, dtypes):
    assert_matches_reference(make_batch(*shape, RANKS, *dtypes))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_matches_the_reference_with_dropout_in_ragged_segments(dtypes):
    lengths = (1, 40, 0, 3, 129, 8, 5, 64)
    batch = make_batch(sum(lengths), 130, 257, RANKS, *dtypes, segments=lengths, dropout_p=0.3)
    assert_matches_reference(batch)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (6,), (3, 5), (2, 3, 4)], ids=str)
def test_leading_dimensions(lead):
    assert_matches_reference(make_batch(lead, 6, 7, RANKS, dropout_p=0.5))


@pytest.mark.parametrize(("n", "k"), [(0, 7), (6, 0), (0, 0)])
def test_layers_without_inputs_or_outputs(n, k):
    batch = make_batch(5, n, k, RANKS, index=[0, -1, 1, 2, 0], dropout_p=0.5)
    assert_matches_reference(batch)
    table, y = LoraTable([entry and entry[:3] for entry in batch.adapters]), batch.y.clone()
    assert torch.equal(multi_lora_(y, batch.x, table, batch.index), batch.y)


def test_an_index_is_for_all_rows_of_its_sequence():
    batch = make_batch((4, 3), 6, 7, (2, 5), index=[1, -1, 0, 1])
    each = dataclasses.replace(batch, index=batch.index.unsqueeze(1).expand(4, 3))
    parts = dataclasses.replace(batch, segments=torch.arange(0, 13, 3))
    assert torch.equal(infer(batch), infer(each))
    assert torch.equal(infer(batch), infer(parts))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_index_and_segments(dtype):
    batch = make_batch(9, 6, 7, (2, 5), segments=(4, 0, 5), index=[1, 0, 0])
    converted = dataclasses.replace(batch, index=batch.index.to(dtype), segments=batch.segments.to(dtype))
    assert torch.equal(infer(batch), infer(converted))


@st.composite
def batches(draw, dropout: bool = False) -> Batch:
    ranks = draw(st.lists(st.one_of(st.integers(0, 9), st.integers(1, 256)), min_size=1, max_size=6))
    rows = draw(st.integers(1, 70))
    segments = None
    if draw(st.booleans()):
        segments = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 90)), min_size=1, max_size=6))
        rows = sum(segments)
    return make_batch(
        rows,
        draw(st.one_of(st.integers(1, 20), st.integers(1, 300))),
        draw(st.one_of(st.integers(1, 20), st.integers(1, 1100))),
        ranks,
        *draw(st.sampled_from(DTYPE_PAIRS)),
        segments=segments,
        dropout_p=draw(st.sampled_from([0.1, 0.5])) if dropout else 0.0,
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=15 if EMULATED else 60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=batches())
def test_every_row_has_the_bits_of_its_adapter_alone(batch):
    out, of_row = infer(batch), batch.of_row
    for row in range(out.shape[0]):
        place = int(of_row[row])
        if place < 0:
            assert torch.equal(out[row], batch.y[row])
            continue
        alone = multi_lora(
            batch.y[row : row + 1], batch.x[row : row + 1], LoraTable([batch.adapters[place]]), of_row[:1] * 0
        )
        assert torch.equal(out[row], alone[0])


@pytest.mark.parametrize("ranks", [(3, 16, 0, 8), (20, 1, 32), (64, 33)], ids=readable_id)
@pytest.mark.parametrize(("n", "k"), [(67, 530), (300, 1100), (5, 4200)])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_few_rows_have_the_bits_of_many(dtypes, n, k, ranks):
    """A batch of few rows may take another way, and a row of it must not show that."""
    many = make_batch(100, n, k, ranks, *dtypes)
    expected = multi_lora_(many.y.clone(), many.x, many.table, many.index)
    for rows in (1, 7, 64):
        few = many.y[:rows].clone()
        multi_lora_(few, many.x[:rows], many.table, many.index[:rows])
        assert torch.equal(few, expected[:rows]), rows


def assert_training_apart_has_the_same_bits(batch: Batch) -> None:
    together, of_row = evaluate(op, batch), batch.of_row
    for place, entry in enumerate(batch.adapters):
        chosen = (of_row == place).nonzero().squeeze(1)
        if entry is None:
            assert torch.equal(together["out"][chosen], batch.y[chosen])
            continue
        alone = Batch(
            batch.y[chosen],
            batch.x[chosen],
            (entry,),
            chosen * 0,
            None,
            batch.seeds[place : place + 1],
            batch.grad[chosen],
        )
        apart = evaluate(op, alone)
        assert torch.equal(together["out"][chosen], apart["out"])
        assert torch.equal(together["grad_x"][chosen], apart["grad_x"])
        assert torch.equal(together[f"grad_a{place}"], apart["grad_a0"])
        assert torch.equal(together[f"grad_b{place}"], apart["grad_b0"])
    base = (of_row < 0).nonzero().squeeze(1)
    assert torch.equal(together["out"][base], batch.y[base])
    assert not together["grad_x"][base].any()


@settings(max_examples=15 if EMULATED else 60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=batches(dropout=True))
def test_training_together_has_the_bits_of_training_apart(batch):
    assert_training_apart_has_the_same_bits(batch)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_an_adapter_of_very_many_rows(dtypes):
    """Whose gradients are summed in parts: of 1024 rows on CUDA."""
    lengths, index = (30, 1030, 70, 1024, 40, 3), [0, 1, -1, 3, 1, 0]
    batch = make_batch(sum(lengths), 9, 70, (2, 17, 5, 3), *dtypes, segments=lengths, index=index, dropout_p=0.3)
    assert_training_apart_has_the_same_bits(batch)
    assert_matches_reference(batch)


@settings(max_examples=10 if EMULATED else 40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(batch=batches(dropout=True))
def test_any_batch_matches_the_reference(batch):
    assert_matches_reference(batch)


def test_rows_without_an_adapter_are_not_touched():
    """Not even read: a row of NaN stays, and poisons no other."""
    batch = make_batch(20, 70, 130, (8,), index=[0, -1] * 10)
    clean = infer(batch)
    batch.y[1::2], batch.x[1::2] = float("nan"), float("inf")
    y = batch.y.clone()
    bits = y[1::2].view(torch.int32).clone()
    multi_lora_(y, batch.x, batch.table, batch.index)
    assert torch.equal(y[1::2].view(torch.int32), bits)
    assert torch.equal(y[::2], clean[::2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_where_no_row_has_an_adapter_y_stays_and_errors_are_told(dtype):
    batch = make_batch((4, 3), 6, 7, (2, 5), index=[-1] * 4)
    index = batch.index.to(dtype)
    y = batch.y.clone()
    assert multi_lora_(y, batch.x, batch.table, index) is y
    assert torch.equal(y, batch.y)
    with pytest.raises(ValueError, match="y must have shape"):
        multi_lora_(y[:3], batch.x, batch.table, index)
    with pytest.raises(TypeError, match="y must have x's dtype"):
        multi_lora_(y.double(), batch.x, batch.table, index)
    with pytest.raises(ValueError, match="index must have the shape"):
        multi_lora_(y, batch.x, batch.table, index[:3])


def test_several_slices_share_x():
    q = make_batch(12, 64, 96, (4, 8, 0))
    k, v = (make_batch(12, n, 96, ranks, seed=seed) for n, ranks, seed in ((32, (8, 0, 3), 1), (33, (1, 16, 2), 2)))
    ys, tables = [q.y.clone(), k.y.clone(), v.y.clone()], [q.table, k.table, v.table]
    expected = [multi_lora(y, q.x, table, q.index) for y, table in zip(ys, tables, strict=True)]
    together = multi_lora(ys, q.x, tables, q.index)
    assert isinstance(together, tuple)
    for got, one in zip(together, expected, strict=True):
        assert torch.equal(got, one)
    assert multi_lora_(ys, q.x, tables, q.index)[1] is ys[1]
    for got, one in zip(ys, expected, strict=True):
        assert torch.equal(got, one)


def test_in_place_in_any_layout():
    batch = make_batch((5, 6), 40, 50, (4, 8))
    expected = infer(batch)
    packed = torch.zeros(5, 6, 120).copy_(torch.cat([batch.y] * 3, -1))
    views = {
        "slice of a packed result": packed[..., 40:80],
        "transposed": batch.y.transpose(0, 1).contiguous().transpose(0, 1),
        "no matrix": batch.y.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    }
    x = batch.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for name, y in views.items():
        assert multi_lora_(y, x, batch.table, batch.index) is y
        assert torch.equal(y, expected), name
    assert torch.equal(packed[..., :40], batch.y) and torch.equal(packed[..., 80:], batch.y)


def test_expanded_arguments():
    batch = make_batch(6, 40, 50, (4, 8), index=[1])
    expanded = dataclasses.replace(
        batch,
        y=batch.y[:1].expand(6, -1),
        x=batch.x[:1].expand(6, -1),
        index=batch.index.expand(6),
        grad=torch.ones(()).expand(6, 40),
    )
    dense = dataclasses.replace(
        expanded, y=expanded.y.contiguous(), x=expanded.x.contiguous(), grad=expanded.grad.contiguous()
    )
    got, expected = evaluate(op, expanded), evaluate(op, dense)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_a_table_copies_nothing():
    batch = make_batch(6, 40, 50, (4, 8), index=[0, 1] * 3)
    table = batch.table
    before = multi_lora(batch.y, batch.x, table, batch.index)
    batch.adapters[1][1].zero_()
    after = multi_lora(batch.y, batch.x, table, batch.index)
    assert torch.equal(after[::2], before[::2])
    assert torch.equal(after[1::2], batch.y[1::2])
    assert table.is_current()


def test_a_table_knows_when_its_matrices_have_moved():
    linear = torch.nn.Linear(5, 3, bias=False)
    b = torch.nn.Linear(3, 4, bias=False)
    table = LoraTable([(linear.weight, b.weight), None])
    assert len(table) == 2 and table.is_current()
    b.double()
    assert not table.is_current()


def test_a_table_knows_when_its_matrices_were_cut():
    """A part of a matrix that begins where the whole did: at the same address."""
    a, b = torch.nn.Parameter(torch.ones(4, 5)), torch.nn.Parameter(torch.ones(3, 4))
    table = LoraTable([(a, b)])
    a.data, b.data = a.data[:2], b.data[:, :2]
    assert not table.is_current()
    assert LoraTable([(a, b)]).is_current()


@cpu_kernels_only
@pytest.mark.parametrize("dtypes", [DTYPE_PAIRS[1], DTYPE_PAIRS[2], DTYPE_PAIRS[4]], ids=readable_id)
def test_same_bits_with_any_number_of_threads(dtypes):
    lengths = (1, 200, 3, 77)
    batch = make_batch(sum(lengths), 600, 1100, (8, 33, 1), *dtypes, segments=lengths, dropout_p=0.1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = evaluate(op, batch)
        for count in (2, 3, 1):
            torch.set_num_threads(count)
            for name, value in evaluate(op, batch).items():
                assert torch.equal(value, expected[name]), name
    finally:
        torch.set_num_threads(before)


def test_a_mask_is_drawn_from_torchs_generator():
    batch = make_batch(30, 40, 50, (4, 8), dropout_p=0.5)
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(multi_lora(batch.y, batch.x, batch.table, batch.index, training=True))
    assert torch.equal(*results)
    assert not torch.equal(results[0], multi_lora(batch.y, batch.x, batch.table, batch.index, training=True))


def test_under_autocast_x_has_ys_dtype():
    batch = make_batch(6, 40, 50, (4, 8), index=[0, 1] * 3)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        got = multi_lora(batch.y.bfloat16(), batch.x, batch.table, batch.index)
    assert torch.equal(got, multi_lora(batch.y.bfloat16(), batch.x.bfloat16(), batch.table, batch.index))


@cpu_kernels_only
@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize(("n", "k", "r"), [(7, 5, 1), (96, 130, 6), (300, 1100, 16), (40, 64, 70)])
def test_few_rows_have_the_bits_of_the_op_for_one_adapter(dtype, adapter_dtype, n, k, r):
    """What lets a model call ``lora_linear`` in place of two ops where a batch has one adapter (nn/by_row.py)."""
    generator = torch.Generator().manual_seed(n)
    weight, bias = torch.randn(n, k, generator=generator).to(dtype), torch.randn(n, generator=generator).to(dtype)
    a, b = torch.randn(r, k, generator=generator), torch.randn(n, r, generator=generator)
    a, b = a.to(adapter_dtype), b.to(adapter_dtype)
    for rows in range(1, LORA_DECODE_ROWS + 1):
        x = torch.randn(rows, 1, k, generator=generator).to(dtype)
        for base_bias in (bias, None):
            y = torch.nn.functional.linear(x, weight, base_bias)
            mixed = multi_lora_(y, x, LoraTable([(a, b, 0.3)]), torch.zeros(rows, dtype=torch.int64))
            assert torch.equal(lora_linear(x, weight, base_bias, a, b, 0.3), mixed), rows
