"""Layers that share their input: used where they do, never visible in a result, and nothing is kept."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref

import pytest
import torch
from helpers import cpu_only, run_in_threads
from shared_input_cases import Attention, assert_near, assert_same_step, layers, make, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyfused
from pyfused import LoraConfig
from pyfused.nn import LoraLinear, shared_input
from pyfused.nn.shared_input import SharedInput, share_inputs

pytestmark = cpu_only


@pytest.fixture
def calls(group_sizes):
    return group_sizes


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
