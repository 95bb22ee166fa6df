"""AdaLoRA's layers that read the same x: as ``test_shared_input.py`` has it for LoRA's, with a scale for each rank."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import cpu_only
from torch import nn

import pyfused
from pyfused.nn import shared_input

pytestmark = [cpu_only, pytest.mark.filterwarnings("ignore:orth_reg_weight")]

OPTIONS = {
    "init_r": 5,
    "target_r": 2,
    "lora_alpha": 13,
    "tinit": 1,
    "tfinal": 2,
    "deltaT": 1,
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x):
        q = self.q(x)
        return self.o(q[..., :16] * F.silu(self.k(x)) + self.v(x)) + x


@pytest.fixture(autouse=True)
def calls(monkeypatch, group_sizes) -> list[int]:
    """Sizes of the groups that are computed at once, however small x is."""
    monkeypatch.setattr(shared_input, "_MIN_ELEMENTS", 0)
    return group_sizes


@pytest.fixture(params=["pyfused", "fused peft"])
def make(request):
    def built(dropout: float = 0.2, init: bool = False) -> nn.Module:
        torch.manual_seed(0)
        library = pyfused if request.param == "pyfused" else peft
        config = library.AdaLoraConfig(
            **OPTIONS, init_lora_weights=init, lora_dropout=dropout, total_step=9, target_modules=["q", "k", "v", "o"]
        )
        model = library.get_peft_model(nn.Sequential(Attention(), Attention()), config)
        if library is peft:
            pyfused.fuse(model)
        return model.train()

    return built


def alone(model: nn.Module) -> nn.Module:
    """A copy whose layers compute alone."""
    model = copy.deepcopy(model)
    for module in model.modules():
        vars(module).pop("_shared_input", None)
    return model


def step(model: nn.Module, x: torch.Tensor) -> tuple:
    """Result, gradients, and where it leaves torch's generator."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return y.detach(), {"x": x.grad, **grads}, torch.get_rng_state()


def assert_same_step(got: tuple, expected: tuple) -> None:
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[2], expected[2])
    assert got[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=1e-6 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_three_layers_of_one_x_are_one_op(make, calls, dropout):
    x, model = torch.randn(2, 5, 24), make(dropout)
    expected = step(alone(model), x)
    assert not calls
    for _ in range(3):
        assert_same_step(step(model, x), expected)
    assert calls == [3, 3] * 3


def test_ranks_that_are_pruned(make, calls):
    """In evaluation they are left out; in training they are there, until the last allocation."""
    x, model = torch.randn(2, 5, 24), make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter[1:3] = 0.0
    assert_same_step(step(model, x), step(alone(model), x))
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), alone(model)(x))
    assert calls == [3, 3] * 4


def test_a_whole_schedule(make, calls):
    """Ranks are chosen and left out between the steps; with groups and without the weights are the same."""
    models, x = [make(0.0, init=True)], torch.randn(2, 5, 24)
    models.append(alone(models[0]))
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for index in range(9):
            model(x).square().mean().backward()
            optimizer.step()
            model.base_model.update_and_allocate(index)
            optimizer.zero_grad()
    assert calls == [3, 3] * 9
    first, second = (model.state_dict() for model in models)
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_E", "ranknum", "scaling"])
def test_a_change_in_between_is_seen(make, part):
    """What the first layer computed for the others is not taken where their own parameters have changed since."""
    x, model = torch.randn(2, 5, 24), make(0.0)
    attention = next(module for module in model.modules() if isinstance(module, Attention))

    layer = attention.v
    with torch.no_grad():
        attention.q(x)
        if part == "scaling":
            layer.scaling["default"] *= 2
        else:
            getattr(layer, part)["default"].mul_(2)
        got = layer(x)
        assert torch.equal(got, layer(x.clone()))


def test_copies_have_groups_of_their_own(make, calls):
    x, model = torch.randn(2, 5, 24), make()
    other = copy.deepcopy(model)
    expected = step(model, x)
    assert_same_step(step(other, x), expected)
    assert calls == [3, 3] * 2
