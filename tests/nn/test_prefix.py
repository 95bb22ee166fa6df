"""PrefixEncoder: keys and values of every layer, and how long they are kept."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

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
    weight = prefix.embedding.weight
    flat = weight if not options else prefix.transform[2](torch.tanh(prefix.transform[0](weight)))
    assert torch.equal(prefix.prompt(), flat) and flat.shape == (N, L * 2 * H * D)
    got = prefix(dtype)
    assert len(got) == 2 * L
    for i, tensor in enumerate(got):
        assert tensor.shape == (H, N, D) and tensor.dtype == dtype
        for head in range(H):
            start = i * H * D + head * D
            assert torch.equal(tensor[head], flat[:, start : start + D].to(dtype))
    sum(tensor.float().square().sum() for tensor in got).backward()
    expected = 2 * flat.detach().to(dtype).float() if not options else None
    if expected is not None:
        torch.testing.assert_close(weight.grad, expected, rtol=1e-2, atol=1e-2)
    assert all(parameter.grad.abs().sum() > 0 for parameter in prefix.parameters())


@pytest.mark.parametrize("options", [{}, {"prefix_projection": True}], ids=["", "projection"])
def test_zeros_to_start_with(options):
    assert encoder(zero=True, **options).prompt().eq(0).all()


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
        first = prefix(torch.bfloat16)
        assert prefix(torch.bfloat16) is first
    with torch.no_grad():
        CHANGES[change](prefix.transform[2].bias)
    with mode():
        second = prefix(torch.bfloat16)
        assert second is not first and not torch.equal(second[0], first[0])
        flat = prefix.prompt()
        assert torch.equal(second[0][0], flat[:, :D].bfloat16())


def test_when_nothing_is_kept():
    prefix = encoder()
    with torch.no_grad():
        assert prefix(torch.float32)[0].data_ptr() == prefix.embedding.weight.data_ptr()  # read as it is
        prefix.embedding.weight.data.add_(1)
        assert torch.equal(prefix(torch.float32)[0][0], prefix.embedding.weight[:, :D])
        kept = prefix(torch.bfloat16)
    trained = prefix(torch.bfloat16)
    assert trained is not kept and trained[0].requires_grad
    prefix.requires_grad_(False)
    assert prefix(torch.bfloat16) is kept
    assert prefix(torch.float16)[0].dtype == torch.float16


def test_what_inference_mode_kept_is_not_used_outside_of_it():
    prefix = encoder(prefix_projection=True).requires_grad_(False)
    with torch.inference_mode():
        kept = prefix(torch.float32)
    after = prefix(torch.float32)
    assert after is not kept
    (after[0] * torch.ones(1, requires_grad=True)).sum().backward()


def test_autocast_is_not_kept():
    prefix = encoder(prefix_projection=True)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            rounded = prefix(torch.float32)
        assert not torch.equal(prefix(torch.float32)[0], rounded[0])


def test_copies_and_pickles_leave_behind_what_is_kept():
    prefix = encoder(prefix_projection=True)
    with torch.no_grad():
        kept = prefix(torch.bfloat16)
        for other in (copy.deepcopy(prefix), pickle.loads(pickle.dumps(prefix))):
            assert other._kept is None
            assert all(map(torch.equal, other(torch.bfloat16), kept))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="token_dim must be a multiple of num_attention_heads = 3, got 4"):
        PrefixEncoder(1, 1, 4, 3)
