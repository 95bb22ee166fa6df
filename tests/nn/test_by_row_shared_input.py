"""Layers that share their input, each sample with its adapter: one op for all, with the bits of one for each."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from helpers import cpu_only, run_in_threads
from shared_input_cases import layers, make
from torch import nn

import pyfused
from pyfused import LoraConfig, ops

pytestmark = cpu_only

NAMES = ["other", "__base__", "default", "some", "other"]


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many layers each call of ``multi_lora_`` is for."""
    sizes: list[int] = []
    original = ops.multi_lora_

    def spy(y, *arguments):
        sizes.append(1 if isinstance(y, torch.Tensor) else len(y))
        return original(y, *arguments)

    monkeypatch.setattr(ops, "multi_lora_", spy)
    return sizes


def by_row(share: bool = True, train: bool = False, **options) -> nn.Module:
    """Adapters of other ranks and scales, one of them on two of the layers only."""
    model = make(share=share, **options)
    for name, rank, targets in (("other", 3, ["q", "k", "v", "o"]), ("some", 1, ["k", "o"])):
        config = LoraConfig(r=rank, lora_alpha=5, lora_dropout=0.2, target_modules=targets, init_lora_weights=False)
        model.add_adapter(name, config)
    return model.train(train)


def attention(model: nn.Module, place: int = 0) -> nn.Module:
    return model.get_base_model()[place]


def texts(rows: int = len(NAMES), length: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, length, 24, generator=torch.Generator().manual_seed(rows)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 7])
@torch.no_grad()
def test_query_key_and_value_are_one_call(calls, dtype, length):
    x = texts(length=length, dtype=dtype)
    expected = by_row(share=False, dtype=dtype)(x, adapter_names=NAMES)
    assert calls == [1] * 8
    model = by_row(dtype=dtype)
    for _ in range(2):
        calls.clear()
        assert torch.equal(model(x, adapter_names=NAMES), expected)
        assert calls == [3, 1] * 2


@torch.no_grad()
def test_layers_without_an_adapter_of_the_call_are_left_out(calls):
    x, names = texts(2), ["some", "__base__"]
    expected = by_row(share=False)(x, adapter_names=names)
    calls.clear()
    assert torch.equal(by_row()(x, adapter_names=names), expected)
    assert calls == [1] * 4  # key and o


@torch.no_grad()
def test_adalora_beside_lora(calls):
    def build(share: bool) -> nn.Module:
        model = make(share=share)
        config = pyfused.AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, target_modules=["q", "k"], orth_reg_weight=0.0, init_lora_weights=False
        )
        model.add_adapter("adaptive", config)
        return model.eval()

    x, names = texts(3), ["adaptive", "default", "__base__"]
    expected = build(False)(x, adapter_names=names)
    assert torch.equal(build(True)(x, adapter_names=names), expected)


def test_where_gradients_are_recorded_each_is_alone(calls):
    """Forward and backward as without groups, masks of dropout among them."""
    x, results = texts(), []
    for share in (True, False):
        model = by_row(share, train=True)
        model.set_requires_grad(["default", "other", "some"])
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = model(leaf, adapter_names=NAMES)
        y.square().sum().backward()
        grads = [leaf.grad, *(tensor.grad for tensor in model.parameters() if tensor.grad is not None)]
        results.append([y.detach(), *grads, torch.get_rng_state()])
    assert len(results[0]) > 20 and not calls
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@torch.no_grad()
def test_dropout_without_gradients(calls):
    x, results = texts(), []
    for share in (True, False):
        torch.manual_seed(3)
        results.append(by_row(share, train=True)(x, adapter_names=NAMES))
    assert torch.equal(*results) and not calls


def fail(layer: nn.Module, x: torch.Tensor) -> None:
    with pytest.raises(RuntimeError):
        layer(x)


CHANGES = {
    "x in place": lambda layer, x: x.mul_(2.0),
    "called before": lambda layer, x: layer.k(x),
    "called with another": lambda layer, x: layer.v(x + 1.0),
    "an error": lambda layer, x: fail(layer.k, x[..., :3]),
    "autocast": lambda layer, x: torch.set_autocast_enabled("cpu", True),
    "no more autocast": lambda layer, x: torch.set_autocast_enabled("cpu", False),
    "gradients": lambda layer, x: torch.set_grad_enabled(True),
    "training": lambda layer, x: layer.k.train(),
    "disabled": lambda layer, x: layer.k.enable_adapters(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_model_does_between_two_calls(change):
    results = []
    for share in (True, False):
        model, x = by_row(share, depth=1), texts()
        attention(model).between = lambda x, model=model: CHANGES[change](attention(model), x)
        torch.manual_seed(3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=change == "no more autocast"):
            try:
                y = model(x, adapter_names=NAMES)
            finally:
                torch.set_autocast_enabled("cpu", False)
        results.append((y.detach(), torch.get_rng_state(), y.requires_grad))
    (got, state, graph), (expected, other_state, other_graph) = results
    assert torch.equal(got, expected) and torch.equal(state, other_state) and graph == other_graph


@torch.no_grad()
def test_layers_with_hooks_are_alone(calls):
    x = texts()
    for layer_of in (lambda one: one.k, lambda one: one.k.base_layer):
        results = []
        for share in (True, False):
            model = by_row(share, depth=1)
            layer_of(attention(model)).register_forward_hook(lambda module, args, y: y * 2.0)
            calls.clear()
            results.append(model(x, adapter_names=NAMES))
            assert max(calls) == (2 if share else 1)
        assert torch.equal(*results)
    model = by_row(depth=1)
    attention(model).q.register_forward_hook(lambda module, args, y: y * 2.0)
    calls.clear()
    model(x, adapter_names=NAMES)
    assert calls == [1, 2, 1]


@torch.no_grad()
def test_key_and_value_of_another_input(calls):
    """Cross-attention: what does not share x is not computed ahead for long, what does still is."""
    model, plain = by_row(depth=1), by_row(share=False, depth=1)
    x, other = texts(length=7), texts(length=7) + 1.0

    def run(model: nn.Module) -> torch.Tensor:
        with model.base_model.adapters_by_row(NAMES):
            return attention(model)(x, other)

    expected = run(plain)
    calls.clear()
    for _ in range(4):
        assert torch.equal(run(model), expected)
    # query computes for two others in vain twice, key for value (and query, of which it learns as late)
    assert calls == [3, 3, 1] + [3, 3, 1] + [1, 2, 1] * 2


@torch.no_grad()
def test_results_that_nobody_takes(calls):
    """A decoder that has the keys and values of its encoder already calls neither of the two layers."""
    model = by_row(depth=1)
    with pytest.raises(KeyError):
        attention(model).between = lambda x: {}["left"]
        model(texts(), adapter_names=NAMES)
    with pytest.raises(KeyError):
        model(texts(), adapter_names=NAMES)
    assert calls == [3, 3]
    with pytest.raises(KeyError):
        model(texts(), adapter_names=NAMES)
    assert calls == [3, 3, 1]


@torch.no_grad()
def test_nothing_outlives_a_call(monkeypatch):
    model, made = by_row(depth=1), []
    original = ops.multi_lora_

    def spy(y, *arguments):
        made.extend(map(weakref.ref, [y] if isinstance(y, torch.Tensor) else y))
        return original(y, *arguments)

    def left(x):
        raise KeyError("left")

    monkeypatch.setattr(ops, "multi_lora_", spy)
    gc.collect()
    gc.disable()
    try:
        for between in (None, left):
            attention(model).between = between
            del made[:]
            x = texts()
            try:
                model(x, adapter_names=NAMES)
            except KeyError:
                assert between is left
            reference = weakref.ref(x)
            del x
            assert len(made) >= 3 and reference() is None
            assert all(one() is None for one in made)
    finally:
        gc.enable()


@torch.no_grad()
def test_another_layers_error_comes_in_its_own_call(calls):
    model = by_row(depth=1)
    one, x = attention(model), texts()
    one.v.base_layer.weight = nn.Parameter(torch.empty(16, 20), requires_grad=False)
    with model.base_model.adapters_by_row(NAMES):
        got = one.q(x), one.k(x)
        with pytest.raises(RuntimeError):
            one.v(x)
    model = by_row(share=False, depth=1)
    plain = attention(model)
    with model.base_model.adapters_by_row(NAMES):
        assert torch.equal(got[0], plain.q(x)) and torch.equal(got[1], plain.k(x))


def test_inference_mode(calls):
    """There tensors have no version, so a change in place could not be seen."""
    with torch.inference_mode():
        x = texts()
        assert torch.equal(by_row()(x, adapter_names=NAMES), by_row(share=False)(x, adapter_names=NAMES))
    assert set(calls) == {1}


@torch.no_grad()
def test_threads(calls):
    """Threads that use one model at once do not see one another."""
    model, plain, failures = by_row(), by_row(share=False), []

    def work(number: int) -> None:
        names, x = NAMES[number:] + NAMES[:number], texts()
        with torch.no_grad():
            expected = plain(x, adapter_names=names)
            failures.extend(number for _ in range(30) if not torch.equal(model(x, adapter_names=names), expected))

    run_in_threads(work, ((number,) for number in range(4)))
    assert not failures and 3 in calls


@torch.no_grad()
def test_wrong_names_and_inputs():
    model = by_row()
    with pytest.raises(ValueError, match="one name for each of the 5 samples, got 2"):
        model(texts(), adapter_names=["other", "default"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(5, 7, 20), adapter_names=NAMES)


@torch.no_grad()
def test_switched_off(calls, monkeypatch):
    monkeypatch.setenv("PYFUSED_SHARED_INPUT", "0")
    model = by_row()
    assert all(layer._shared_input is None for layer in layers(model))
    model(texts(), adapter_names=NAMES)
    assert calls == [1] * 8
