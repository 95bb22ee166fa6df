"""PrefixEncoder: keys and values of every layer, and how long they are kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import DEVICE

from pyfused.nn import PrefixEncoder

# n virtual tokens, layers, heads, width of a head
N, L, H, D = 3, 2, 4, 5


def encoder(**options) -> PrefixEncoder:
    torch.manual_seed(0)
    return PrefixEncoder(N, L, H * D, H, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"prefix_projection": True, "encoder_hidden_size": 7}], ids=["", "projection"])
def test_keys_and_values(dtype, options):
    prefix = encoder(**options)
    weight, rows = prefix.embedding.weight, 3
    flat = weight if not options else prefix.transform[2](torch.tanh(prefix.transform[0](weight)))
    assert torch.equal(prefix.prompt(), flat) and flat.shape == (N, L * 2 * H * D)
    got = prefix(dtype, rows)
    assert len(got) == 2 * L
    copies = flat.repeat(rows, 1, 1).to(dtype)  # as HF PEFT has it
    expected = copies.view(rows, N, 2 * L, H, D).permute(2, 0, 3, 1, 4)
    for tensor, value in zip(got, expected, strict=True):
        assert tensor.dtype == dtype and torch.equal(tensor, value) and tensor.stride(0) == 0
    grads = torch.randn(expected.shape).to(dtype)
    parameters = list(prefix.parameters())
    got_grads = torch.autograd.grad(got, parameters, list(grads))
    expected_grads = torch.autograd.grad(expected, parameters, grads)
    for grad, value in zip(got_grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, value)


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}], ids=["", "projection"])
def test_zeros_to_start_with(options):
    assert encoder(zero=True, **options).prompt().eq(0).all()


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether they are the same memory."""
    return all(a.data_ptr() == b.data_ptr() for a, b in zip(one, other, strict=True))


CHANGES = {
    "in place": lambda p: p.add_(1),
    "out=": lambda p: torch.add(p, 1, out=p),
    "copy_": lambda p: p.copy_(torch.randn_like(p)),
    "set_": lambda p: p.set_(torch.randn_like(p)),
    "data": lambda p: setattr(p, "data", torch.randn_like(p)),
    "optimizer": lambda p: (setattr(p, "grad", torch.ones_like(p)), torch.optim.SGD([p], 1.0).step()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_kept_is_never_stale(change, mode):
    prefix = encoder(prefix_projection=True)
    with mode():
        first = prefix(torch.bfloat16, 2)
        assert same(prefix(torch.bfloat16, 2), first)
    with torch.no_grad():
        CHANGES[change](prefix.transform[2].bias)
    with mode():
        second = prefix(torch.bfloat16, 2)
        assert not same(second, first) and not torch.equal(second[0], first[0])
        flat = prefix.prompt()
        assert torch.equal(second[0][1, 0], flat[:, :D].bfloat16())


def test_new_parameters_where_the_old_ones_were_in_memory():
    prefix = encoder().requires_grad_(False)
    for _ in range(5):
        values = (prefix.embedding.weight * 1.5).tolist()
        prefix.embedding.weight = None
        prefix.embedding.weight = torch.nn.Parameter(torch.tensor(values), requires_grad=False)
        got = prefix(torch.bfloat16, 2)
        assert torch.equal(got[0][1, 0], prefix.embedding.weight[:, :D].bfloat16())


def test_when_nothing_is_kept():
    prefix = encoder()
    with torch.no_grad():
        assert prefix(torch.float32, 2)[0].data_ptr() == prefix.embedding.weight.data_ptr()  # read as it is
        prefix.embedding.weight.data.add_(1)
        assert torch.equal(prefix(torch.float32, 2)[0][1, 0], prefix.embedding.weight[:, :D])
        kept = prefix(torch.bfloat16, 2)
    trained = prefix(torch.bfloat16, 2)
    assert not same(trained, kept) and trained[0].requires_grad
    prefix.requires_grad_(False)
    assert same(prefix(torch.bfloat16, 2), kept)
    assert prefix(torch.float16, 2)[0].dtype == torch.float16


def test_what_inference_mode_kept_is_not_used_outside_of_it():
    prefix = encoder(prefix_projection=True).requires_grad_(False)
    with torch.inference_mode():
        kept = prefix(torch.float32, 2)
    after = prefix(torch.float32, 2)
    assert not same(after, kept)
    (after[0] * torch.ones(1, requires_grad=True)).sum().backward()


def test_autocast_is_not_kept():
    prefix = encoder(prefix_projection=True)
    with torch.no_grad():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            rounded = prefix(torch.float32, 2)
        assert not torch.equal(prefix(torch.float32, 2)[0], rounded[0])


def test_copies_and_pickles_leave_behind_what_is_kept():
    prefix = encoder(prefix_projection=True)
    with torch.no_grad():
        kept = prefix(torch.bfloat16, 2)
        for other in (copy.deepcopy(prefix), pickle.loads(pickle.dumps(prefix))):
            assert other._kept is None
            assert all(map(torch.equal, other(torch.bfloat16, 2), kept))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="token_dim must be a multiple of num_attention_heads = 3, got 4"):
        PrefixEncoder(1, 1, 4, 3)
