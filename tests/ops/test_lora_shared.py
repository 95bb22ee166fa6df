"""lora_linear_shared: the bits of the separate calls, one gradient of x by the error rule, every kind of projection."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPE_PAIRS, EMULATED, assert_error_rule, eager_linear, readable_id
from projections import GROUPS, make_group, map_tensors, run, separately
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pyfused.ops import lora_linear, lora_linear_shared
from pyfused.reference import lora as reference


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("lead", [(133,) if EMULATED else (517,), (2, 3), (1,)], ids=readable_id)
def test_has_the_bits_of_separate_calls(group, lead, dtypes):
    x, projections, grad_y = make_group(GROUPS[group], lead, 129, *dtypes)
    got = run(lora_linear_shared, x, projections, grad_y)
    single = run(functools.partial(separately, lora_linear), x, projections, grad_y)
    for one, other in zip(got[0] + list(got[2]), single[0] + list(single[2]), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    exact = run(functools.partial(separately, reference.lora_linear), x, projections, grad_y, torch.float64)
    eager = run(functools.partial(separately, eager_linear), x, projections, grad_y)
    assert_error_rule("grad_x", got[1], eager[1], exact[1])
    if group == "one":
        assert torch.equal(got[1], single[1])


@pytest.mark.parametrize("shape", [(1024, 1134), (64, 2048), (3, 3)], ids=readable_id)
def test_large_and_odd(shape):
    m, k = shape
    m = min(m, 200) if EMULATED else m
    x, projections, grad_y = make_group([(770, 8), (257, 12), (257, 12)], (m,), k, torch.bfloat16, torch.float32)
    got = run(lora_linear_shared, x, projections, grad_y)
    single = run(functools.partial(separately, lora_linear), x, projections, grad_y)
    for one, other in zip(got[0] + list(got[2]), single[0] + list(single[2]), strict=True):
        assert torch.equal(one, other)
    exact = run(functools.partial(separately, reference.lora_linear), x, projections, grad_y, torch.float64)
    eager = run(functools.partial(separately, eager_linear), x, projections, grad_y)
    assert_error_rule("grad_x", got[1], eager[1], exact[1])


@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=readable_id)
def test_a_few_rows_without_dropout(dtypes, rows):
    """Decoding: on CUDA all of these are updated by one launch, those with more than 16 ranks by another."""
    x, projections, _ = make_group([(40, 8), (300, 40), (24, 8), (70, 16)], (rows,), 129, *dtypes, dropout_p=0.0)
    for one, other in zip(lora_linear_shared(x, projections), separately(lora_linear, x, projections), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=readable_id)
def test_many_projections_of_all_kinds(dtype):
    """More than a pass takes; adapters in several dtypes, with ranks and dropout of their own, some without dropout."""
    group = [(40, 16), (24, 2), (24, 40), (33, None), (16, 16), (130, 9), (20, 256), (12, 16)]
    x, projections, grad_y = make_group(group, (150,), 300, dtype)
    for i, to in ((1, torch.float32), (2, torch.float16), (4, torch.float32), (6, torch.bfloat16)):
        p = projections[i]
        projections[i] = p._replace(a=p.a.to(to), b=p.b.to(to), dropout_p=0.0 if i % 4 == 2 else p.dropout_p)
    got = run(lora_linear_shared, x, projections, grad_y)
    single = run(functools.partial(separately, lora_linear), x, projections, grad_y)
    for one, other in zip(got[0] + list(got[2]), single[0] + list(single[2]), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)
    exact = run(functools.partial(separately, reference.lora_linear), x, projections, grad_y, torch.float64)
    eager = run(functools.partial(separately, eager_linear), x, projections, grad_y)
    assert_error_rule("grad_x", got[1], eager[1], exact[1])


@pytest.mark.parametrize("group", GROUPS)
def test_gradcheck(group):
    few_ranks = [(n, r and min(r, 17)) for n, r in GROUPS[group][:3]]  # every number is moved by itself
    x, projections, _ = make_group(few_ranks, (4,), 5, torch.float64, dropout_p=0.4)
    projections = [
        p._replace(weight=p.weight[:3], bias=p.bias[:3], b=None if p.b is None else p.b[:3]) for p in projections
    ]
    names = [(i, name) for i, p in enumerate(projections) for name in ("bias", "a", "b", "scale")]
    names = [(i, name) for i, name in names if isinstance(getattr(projections[i], name), Tensor)]

    def function(x, *leaves):
        replaced = list(projections)
        for (i, name), leaf in zip(names, leaves, strict=True):
            replaced[i] = replaced[i]._replace(**{name: leaf})
        return lora_linear_shared(x, replaced)

    leaves = [getattr(projections[i], name).detach().requires_grad_() for i, name in names]
    assert torch.autograd.gradcheck(function, [x.requires_grad_(), *leaves])


def test_only_what_is_used_and_asked_for():
    """An unused result has no share in dX and no gradients; frozen adapters get none; x may be without gradient."""
    x, projections, grad_y = make_group(GROUPS["qkv"], (33,), 50)
    a = [p.a.requires_grad_() for p in projections]
    x.requires_grad_()
    y = lora_linear_shared(x, projections)
    assert torch.autograd.grad(y[1], a[0], grad_y[1], allow_unused=True, retain_graph=True) == (None,)
    got = torch.autograd.grad(y[1], [x, a[1]], grad_y[1], retain_graph=True)
    expected = torch.autograd.grad(lora_linear(x, *projections[1]), [x, a[1]], grad_y[1])
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    (alone,) = torch.autograd.grad(y, a[2], grad_y)  # without x
    assert torch.equal(alone, torch.autograd.grad(lora_linear(x, *projections[2]), a[2], grad_y[2])[0])
    frozen = map_tensors(Tensor.detach, projections)
    (grad_x,) = torch.autograd.grad(lora_linear_shared(x, frozen), x, grad_y)
    exact = torch.autograd.grad(separately(reference.lora_linear, x, frozen), x, grad_y)[0]
    torch.testing.assert_close(grad_x, exact)
    assert not any(result.requires_grad for result in lora_linear_shared(x.detach(), frozen))


def test_saves_x_once_and_s_alone():
    x, projections, _ = make_group(GROUPS["qkv"], (3, 17), 50, torch.bfloat16, torch.float32)
    projections = map_tensors(lambda t: t.requires_grad_() if t.dim() == 2 and 8 in t.shape else t, projections)
    x = x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear_shared(x, projections)
    known = {t.untyped_storage().data_ptr() for p in projections for t in p if isinstance(t, Tensor)}
    new = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert [tuple(t.shape) for t in new] == [(3, 17, 50), (51, 8), (51, 8), (51, 8)] and len(y) == 3


def test_retain_graph_and_double_backward():
    x, projections, grad_y = make_group(GROUPS["ranks"], (9,), 12, torch.float64)
    x.requires_grad_()
    y = lora_linear_shared(x, projections)
    first = torch.autograd.grad(y, x, grad_y, retain_graph=True)[0]
    with pytest.raises(RuntimeError, match=r"lora_linear_shared.*create_graph=True is not supported"):
        torch.autograd.grad(sum(t.sum() for t in y), x, create_graph=True)
    assert torch.equal(torch.autograd.grad(y, x, grad_y)[0], first)


def test_x_used_twice_and_results_changed_in_place():
    x, projections, grad_y = make_group(GROUPS["qkv"], (9,), 24, torch.float64)
    results = []
    for op in (lora_linear_shared, functools.partial(separately, reference.lora_linear)):
        leaf = x.clone().requires_grad_()
        q, k, v = op(leaf, projections)
        again = op(k.relu_(), projections)
        loss = (q * 2.0).sum() + (v.mul_(3.0) * leaf).sum() + (again[1] * grad_y[1]).sum()
        results.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpoint_recomputes_the_same_masks(use_reentrant):
    x, projections, grad_y = make_group(GROUPS["qkv"], (33,), 50)
    projections = [p._replace(seed=None) for p in projections]

    def gradient(wrap):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(9)
        y = wrap(lambda x: lora_linear_shared(x, projections), leaf)
        torch.rand(3)
        return torch.autograd.grad(y, leaf, grad_y)[0] if not use_reentrant else backward(y, leaf)

    def backward(y, leaf):
        torch.autograd.backward(y, grad_y)
        return leaf.grad

    expected = gradient(lambda function, x: function(x))
    assert torch.equal(gradient(functools.partial(checkpoint, use_reentrant=use_reentrant)), expected)


def test_seeds_are_drawn_as_by_separate_calls():
    x, projections, _ = make_group(GROUPS["qkv"], (33,), 50)
    projections = [p._replace(seed=None) for p in projections]
    torch.manual_seed(3)
    shared = lora_linear_shared(x, projections)
    torch.manual_seed(3)
    for one, other in zip(shared, separately(lora_linear, x, projections), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=readable_id)
def test_autocast(autocast_dtype):
    x, projections, grad_y = make_group(GROUPS["some"], (33,), 50)
    results = []
    for op in (lora_linear_shared, functools.partial(separately, lora_linear)):
        leaf = x.clone().requires_grad_()
        with torch.autocast(DEVICE.type, autocast_dtype):
            y = op(leaf, projections)
        results.append((y, torch.autograd.grad(y, leaf, [g.to(autocast_dtype) for g in grad_y])[0]))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert one.dtype == autocast_dtype and torch.equal(one, other)
    assert results[0][1].dtype == torch.float32
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0.05, atol=0.05)


def test_trained_weight_and_strides():
    """A trained weight goes through F.linear; non-contiguous and stride-0 operands are as good as others."""
    x, projections, grad_y = make_group(GROUPS["qkv"], (6,), 8, torch.float64)
    wide = x.t().contiguous().t()
    strided = map_tensors(lambda t: t.t().contiguous().t() if t.dim() == 2 else t, projections)
    ones = [torch.ones((), dtype=torch.float64).expand(g.shape) for g in grad_y]
    expected = run(functools.partial(separately, reference.lora_linear), x, projections, ones)
    got = run(lora_linear_shared, wide, strided, ones)
    for one, other in zip([*got[0], got[1], *got[2]], [*expected[0], expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(one, other)
    expanded = x[:1].expand(6, -1)
    for one, other in zip(
        lora_linear_shared(expanded, projections), lora_linear_shared(expanded.contiguous(), projections), strict=True
    ):
        assert torch.equal(one, other)
    weight = projections[0].weight.requires_grad_()
    y = lora_linear_shared(x, projections)
    assert torch.equal(torch.autograd.grad(y[0], weight, grad_y[0])[0], grad_y[0].t() @ x)


@pytest.mark.parametrize("lead, n, k", [((0,), 6, 7), ((2, 0), 6, 7), ((3,), 6, 0), ((3,), 0, 7), ((), 6, 7)])
def test_empty_and_one_dimensional(lead, n, k):
    x, projections, grad_y = make_group([(n, 3), (n, None), (5, 2)], lead, k)
    got = run(lora_linear_shared, x, projections, grad_y)
    expected = run(functools.partial(separately, reference.lora_linear), x, projections, grad_y)
    for one, other in zip([*got[0], got[1], *got[2]], [*expected[0], expected[1], *expected[2]], strict=True):
        torch.testing.assert_close(one, other)


def test_zero_b_is_the_base_layer():
    x, projections, _ = make_group(GROUPS["qkv"], (19,), 40, torch.bfloat16)
    projections = [p._replace(b=torch.zeros_like(p.b)) for p in projections]
    for p, y in zip(projections, lora_linear_shared(x, projections), strict=True):
        assert torch.equal(y, F.linear(x, p.weight, p.bias))
