"""Layers that share their input: used where they do, never visible in a result, and nothing is kept."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from helpers import cpu_only, run_in_threads
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import LoraConfig, get_peft_model, ops
from pyfused.nn import LoraLinear, shared_input
from pyfused.nn.shared_input import SharedInput, share_inputs

pytestmark = cpu_only


class Attention(nn.Module):
    """Query, key and value of one x (or key and value of another), then one more layer."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 24)
        self.between = None

    def forward(self, x, other=None):
        other = x if other is None else other
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        return self.o(q[..., :16] * F.silu(self.k(other)) + self.v(other)) + x


def make(depth=2, dropout=0.2, share=True, monkeypatch=None, dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = nn.Sequential(*(Attention() for _ in range(depth))).to(dtype)
    options = {"r": 4, "target_modules": ["q", "k", "v", "o"], "init_lora_weights": False} | options
    model = get_peft_model(base, LoraConfig(lora_dropout=dropout, **options)).train()
    if not share:
        for layer in layers(model):
            layer._shared_input = None
    return model


def layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


@pytest.fixture
def calls(group_sizes):
    return group_sizes


def step(model, x, seed=3):
    """Result, gradients, and where it leaves torch's generator."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return y.detach(), grads, torch.get_rng_state()


def assert_same_step(got, expected):
    """The same bits; but x's gradient is a sum in another order, and the backward of earlier layers begins with it."""
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    assert_near(got[1], expected[1])


def assert_near(got, expected):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * other.abs().max().item())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_three_layers_of_one_x_are_one_op(calls, dropout):
    """Results have the same bits, and torch's generator moves as without groups."""
    x = torch.randn(2, 5, 24)
    expected = step(make(dropout=dropout, share=False), x)
    model = make(dropout=dropout)
    assert not calls
    for _ in range(3):
        assert_same_step(step(model, x), expected)
    assert calls == [3, 3] * 3


def test_16_bit_models(calls):
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    plain, model = make(share=False, dtype=torch.bfloat16), make(dtype=torch.bfloat16)
    for _ in range(2):
        got, expected = step(model, x), step(plain, x)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])
    assert calls == [3, 3] * 2


def test_evaluation_and_no_grad(calls):
    x = torch.randn(2, 5, 24)
    model, plain = make().eval(), make(share=False).eval()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
        assert calls == [3, 3] * 3
    with torch.inference_mode():  # no versions there: a change in place could not be seen
        y = torch.randn(2, 5, 24)
        assert torch.equal(model(y), plain(y))
    assert calls == [3, 3] * 3


def test_key_and_value_of_another_input(calls):
    """Cross-attention: what does not share x is not computed ahead for long, what does still is."""
    model = make(depth=1).eval()
    attention, plain = model.get_base_model()[0], make(depth=1, share=False).eval().get_base_model()[0]
    x, other = torch.randn(5, 24), torch.randn(5, 24)
    for _ in range(6):
        assert torch.equal(attention(x, other), plain(x, other))
    assert calls == [3, 3] * 2 + [2] * 4  # of two of the first calls each, only one other result was of use
    assert torch.equal(attention(x), plain(x))


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


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "hooks"])
def test_checkpointing(use_reentrant, calls):
    """The recomputation draws the same masks and saves as many tensors, whether groups are known by then or not."""
    x = torch.randn(2, 5, 24)

    def run(model):
        wrapped = functools.partial(checkpoint, model, use_reentrant=use_reentrant)
        wrapped.parameters, wrapped.zero_grad = model.parameters, model.zero_grad
        return step(wrapped, x)

    expected = run(make(share=False))
    model = make()
    for _ in range(3):
        got = run(model)
        assert torch.equal(got[0], expected[0])
        assert_near(got[1], expected[1])
    assert bool(calls) == use_reentrant


def test_threads(calls):
    """Threads that use one model at once, on the same and on different x, do not see one another."""
    model, plain = make().eval(), make(share=False).eval()
    common = torch.randn(3, 24)
    failures = []

    def work(index):
        own = torch.randn(2, 24, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            expected = plain(own), plain(common)
            for _ in range(50):
                if not (torch.equal(model(own), expected[0]) and torch.equal(model(common), expected[1])):
                    failures.append(index)

    run_in_threads(work, ((index,) for index in range(4)))
    assert not failures and calls


def test_copies_pickles_and_state_dicts(calls):
    model, x = make(), torch.randn(2, 5, 24)
    expected = step(model, x)
    keys = list(model.state_dict())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        groups = [layer._shared_input for layer in layers(other)]
        assert groups[0] is groups[1] is groups[2] and groups[0] is not layers(model)[0]._shared_input
        assert list(other.state_dict()) == keys
        calls.clear()
        assert_same_step(step(other, x), expected)
        assert calls == [3, 3]
    assert not any("shared" in key for key in keys)
    reference = weakref.ref(model)
    gc.disable()
    try:
        del model  # groups make no cycles
        assert reference() is None
    finally:
        gc.enable()


def test_compile_has_no_graph_break(calls):
    torch._dynamo.reset()
    model, x = make(dropout=0.0), torch.randn(2, 5, 24)
    expected = step(make(dropout=0.0, share=False), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.parameters, compiled.zero_grad = model.parameters, model.zero_grad
    for _ in range(2):
        got = step(compiled, x)
        torch.testing.assert_close(got[0], expected[0])
        assert_near(got[1], expected[1])
    assert not calls


def test_several_adapters_and_trained_weights_stay_alone(calls):
    model, x = make(dropout=0.0), torch.randn(5, 24)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False))
    model.set_adapter(["default", "other"])
    model(x)
    assert not calls
    model.set_adapter("other")
    model(x)
    assert calls == [3, 3]
    for layer in layers(model):
        layer.base_layer.weight.requires_grad = True
    model(x)
    assert calls == [3, 3]


def test_small_inputs_stay_alone(calls, monkeypatch):
    """Below some size a group costs more than it saves: decoding, above all."""
    monkeypatch.setattr(shared_input, "_MIN_ELEMENTS", 2 * 5 * 24)
    model = make(depth=1)
    model(torch.randn(9, 24))
    assert not calls
    model(torch.randn(2, 5, 24))
    assert calls == [3]


def test_switched_off(monkeypatch):
    monkeypatch.setenv("PYFUSED_SHARED_INPUT", "0")
    assert all(layer._shared_input is None for layer in layers(make()))


def test_share_inputs_keeps_a_group():
    model = make(depth=1)
    group = layers(model)[0]._shared_input
    assert isinstance(group, SharedInput)
    share_inputs(model.modules(), (LoraLinear,))
    assert [layer._shared_input for layer in layers(model)] == [group, group, group, None]
    assert all(layer._shared_input is None for layer in layers(make(target_modules=["q"])))


def test_fuse_and_unfuse(calls):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(Attention(), Attention())
    config = peft.LoraConfig(r=4, target_modules=["q", "k", "v", "o"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    x = torch.randn(2, 5, 24)
    expected = model(x)
    before = [set(vars(module)) for module in model.modules()]
    pyfused.fuse(model)
    torch.testing.assert_close(model(x), expected)
    assert calls == [3, 3]
    with model.disable_adapter():
        model(x)
    torch.testing.assert_close(model(x), expected)
    pyfused.unfuse(model)
    assert [set(vars(module)) for module in model.modules()] == before
    assert torch.equal(model(x), expected)
