"""Gradients of multi_lora: gradcheck, graphs that are kept, what needs none, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import cpu_kernels_only
from multi_lora_cases import make_batch

from pyfused.ops import LoraTable, multi_lora, multi_lora_


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradcheck(p):
    lengths = (3, 2, 1, 4)
    batch = make_batch(10, 4, 5, (2, 0, 3), torch.float64, segments=lengths, index=[2, 0, -1, 2], dropout_p=p)
    (a0, b0, s0, _), _, (a2, b2, s2, _) = batch.adapters
    leaves = [tensor.requires_grad_() for tensor in (batch.y, batch.x, a0, b0, a2, b2)]

    def call(y, x, a0, b0, a2, b2):
        table = LoraTable([(a0, b0, s0, p), None, (a2, b2, s2, p)])
        return multi_lora(y, x, table, batch.index, batch.segments, True, batch.seeds)

    assert torch.autograd.gradcheck(call, leaves)


def test_gradcheck_of_slices_that_share_x():
    first = make_batch(6, 4, 5, (2, 3), torch.float64, index=[0, 1, 1, -1, 0, 1], dropout_p=0.3)
    second = make_batch(6, 3, 5, (1, 2), torch.float64, seed=1, dropout_p=0.3)
    flat = [matrix for batch in (first, second) for entry in batch.adapters for matrix in entry[:2]]
    leaves = [tensor.requires_grad_() for tensor in (first.x, first.y, second.y, *flat)]

    def call(x, y0, y1, *flat):
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        tables = [LoraTable([(a, b, 0.5, 0.3) for a, b in pairs[i : i + 2]]) for i in (0, 2)]
        return multi_lora([y0, y1], x, tables, first.index, training=True, seeds=[first.seeds, second.seeds])

    assert torch.autograd.gradcheck(call, leaves)


def test_a_kept_graph_gives_the_same_gradients_again():
    batch = make_batch(10, 40, 50, (4, 8), dropout_p=0.5)
    x = batch.x.requires_grad_()
    a = batch.adapters[0][0].requires_grad_()
    out = multi_lora(batch.y + x[:, :40], x, batch.table, batch.index, training=True, seeds=batch.seeds)
    first = torch.autograd.grad(out, (x, a), batch.grad, retain_graph=True)
    second = torch.autograd.grad(out, (x, a), batch.grad)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_x_may_be_y():
    batch = make_batch(10, 40, 40, (4, 8), torch.float64)
    x = batch.x.requires_grad_()
    out = multi_lora(x, x, batch.table, batch.index)
    (grad,) = torch.autograd.grad(out, x, batch.grad)
    y, apart = x.detach().clone().requires_grad_(), x.detach().clone().requires_grad_()
    expected = torch.autograd.grad(multi_lora(y, apart, batch.table, batch.index), (y, apart), batch.grad)
    torch.testing.assert_close(grad, sum(expected))


def test_an_adapter_without_a_row_has_a_gradient_of_zeros():
    batch = make_batch(4, 6, 7, (2, 3), index=[0, 0, -1, 0])
    a, b = (tensor.requires_grad_() for tensor in batch.adapters[1][:2])
    out = multi_lora(batch.y, batch.x, batch.table, batch.index)
    for leaf, grad in zip((a, b), torch.autograd.grad(out, (a, b), batch.grad), strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_no_graph_where_nothing_requires_one():
    batch = make_batch(4, 6, 7, (2, 3))
    assert not multi_lora(batch.y, batch.x, batch.table, batch.index).requires_grad
    batch.x.requires_grad_()
    with torch.no_grad():
        assert not multi_lora(batch.y, batch.x, batch.table, batch.index).requires_grad


def test_in_place_records_no_gradient():
    batch = make_batch(4, 6, 7, (2, 3))
    batch.adapters[0][0].requires_grad_()
    with pytest.raises(RuntimeError, match="multi_lora is differentiable"):
        multi_lora_(batch.y, batch.x, batch.table, batch.index)


@cpu_kernels_only
def test_in_place_changes_the_version():
    """A y that a backward needs and that has changed is an error, not a wrong gradient."""
    batch = make_batch(4, 6, 7, (2, 3))
    w = torch.ones(6, requires_grad=True)
    product = batch.y * w
    multi_lora_(batch.y, batch.x, batch.table, batch.index)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@cpu_kernels_only
def test_no_second_derivative():
    batch = make_batch(4, 6, 7, (2, 3))
    out = multi_lora(batch.y, batch.x.requires_grad_(), batch.table, batch.index)
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(out.sum(), batch.x, create_graph=True)
