"""Layers that share their input, and what happens between their calls: changes, errors, a forward that was left."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import cpu_only
from shared_input_cases import make
from torch import nn

from pyfused import ops

pytestmark = cpu_only


@pytest.fixture
def calls(group_sizes):
    return group_sizes


CHANGES = {
    "x with a gradient": lambda attention, x: x.requires_grad_(),
    "x with other data": lambda attention, x: setattr(x, "data", torch.ones(5, 24)),
    "weight with other data": lambda attention, x: setattr(attention.k.base_layer.weight, "data", torch.ones(16, 24)),
    "x in place": lambda attention, x: x.mul_(2.0),
    "weight in place": lambda attention, x: attention.k.base_layer.weight.mul_(2.0),
    "adapter in place": lambda attention, x: attention.v.lora_B["default"].weight.mul_(2.0),
    "another adapter weight": lambda attention, x: setattr(
        attention.k.lora_A["default"], "weight", nn.Parameter(torch.ones(4, 24))
    ),
    "scaling": lambda attention, x: attention.k.scaling.update(default=7.0),
    "evaluation": lambda attention, x: attention.k.eval(),
    "dropout": lambda attention, x: setattr(attention.v.lora_dropout["default"], "p", 0.5),
    "disabled": lambda attention, x: attention.k.enable_adapters(False),
    "merged": lambda attention, x: attention.v.merge(),
    "hook": lambda attention, x: attention.k.base_layer.register_forward_hook(lambda *args: args[-1] * 2.0) and None,
    "hook on the adapter": lambda attention, x: (
        attention.k.lora_A["default"].register_forward_hook(lambda *args: args[-1] * 2.0) and None
    ),
    "draws": lambda attention, x: torch.rand(3),
    "reseeded": lambda attention, x: torch.manual_seed(77),
    "autocast": lambda attention, x: torch.set_autocast_enabled("cpu", True),
    "no gradients": lambda attention, x: torch.set_grad_enabled(False),
    "called before": lambda attention, x: attention.k(x),
    "called with another": lambda attention, x: attention.v(x + 1.0),
    "an error": lambda attention, x: attention.k(x[..., :3]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_calls(change):
    """Whatever happens between the call of the first layer and the others, they compute what they compute alone."""
    x = torch.randn(5, 24)
    results = []
    for share in (True, False):
        attention = make(depth=1, share=share).get_base_model()[0]

        def between(x, attention=attention):
            with torch.no_grad() if "gradients" not in change else torch.enable_grad():
                try:
                    CHANGES[change](attention, x)
                except ValueError:
                    assert change == "an error"
            if change == "no gradients":
                torch.set_grad_enabled(False)

        attention.between = between
        torch.manual_seed(3)
        leaf = x.clone()
        try:
            y = attention(leaf)
        finally:
            torch.set_grad_enabled(True)
            torch.set_autocast_enabled("cpu", False)
        attention.between = None
        grad_x = torch.autograd.grad(y.sum(), leaf)[0] if leaf.requires_grad else torch.zeros(())
        results.append((y, torch.get_rng_state(), y.requires_grad, grad_x))
    (got, rng, graph, grad_x), (expected, other_rng, other_graph, other_grad_x) = results
    assert torch.equal(got, expected) and torch.equal(rng, other_rng) and graph == other_graph
    torch.testing.assert_close(grad_x, other_grad_x)


def test_an_inference_tensor_among_the_parameters(calls):
    model, x = make(depth=1), torch.randn(5, 24)
    with torch.inference_mode():
        bias = torch.zeros(16)
    model.get_base_model()[0].k.base_layer.bias = nn.Parameter(bias, requires_grad=False)
    model(x)
    assert calls == [2]


def test_called_twice_draws_two_masks():
    results = []
    for share in (True, False):
        attention = make(depth=1, share=share).get_base_model()[0]
        x = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        results.append([layer(x) for layer in (attention.q, attention.k, attention.k, attention.v, attention.q)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(results[0][1], results[0][2])


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_nothing_is_kept_of_a_forward_that_was_left(grad, monkeypatch):
    """An error after the first layer: once its result and x are gone, so is all that was computed ahead."""
    attention = make(depth=1, dropout=0.0).get_base_model()[0]
    made = []

    def spy(x, projections):
        results = original(x, projections)
        made.extend(map(weakref.ref, results))
        return results

    original = ops.lora_linear_shared
    monkeypatch.setattr(ops, "lora_linear_shared", spy)

    def left(x):
        raise KeyError("left")

    gc.collect()
    gc.disable()
    try:
        with torch.set_grad_enabled(grad):
            x = torch.randn(5, 24)
            attention(x)
            assert len(made) == 3
            del made[:]
            attention.between = left
            with pytest.raises(KeyError):
                attention(x)
            del x
        assert len(made) == 3 and all(reference() is None for reference in made)
        # and of a whole one: nothing but what the result's graph keeps
        attention.between = None
        del made[:]
        x = torch.randn(5, 24)
        y = attention(x)
        assert len(made) == 3
        del y
        assert all(reference() is None for reference in made)
        reference = weakref.ref(x)
        del x
        assert reference() is None
    finally:
        gc.enable()


def test_one_that_fails_is_computed_alone(calls):
    """Another layer's parameters may be no good until it is called: its error comes in its own call."""
    attention = make(depth=1, dropout=0.3).get_base_model()[0]
    x = torch.randn(5, 24)
    weight = attention.v.base_layer.weight
    attention.v.base_layer.weight = nn.Parameter(torch.empty(0, 24), requires_grad=False)
    torch.manual_seed(3)
    got = attention.q(x), attention.k(x)
    with pytest.raises(ValueError, match="weight must have shape"):
        attention.v(x)
    attention.v.base_layer.weight = weight
    torch.manual_seed(3)
    for layer, y in zip((attention.q, attention.k), got, strict=True):
        layer._shared_input = None
        assert torch.equal(layer(x), y)
