"""Adapters on bases quantised by bitsandbytes (8 and 4 bits) and torchao (int8), as far as these run on a CPU."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from quantised_cases import KINDS, Block, outputs_and_gradients, some_rows
from torch import Tensor, nn

import pyfused


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def make(kind) -> Callable[..., nn.Module]:
    def make(library, **options) -> nn.Module:
        base = Block(kind)
        torch.manual_seed(1)
        fields = {"r": 5, "lora_alpha": 13, "target_modules": ["up", "down"], "init_lora_weights": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchao: peft cannot quantise again after merging
            return library.get_peft_model(base, library.LoraConfig(**fields | options))

    return make


@pytest.fixture
def x() -> Tensor:
    return some_rows()


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0.02 * scale, msg=name)


def test_base_plus_adapter_as_hf_peft(make, x):
    _assert_close(outputs_and_gradients(make(pyfused), x), outputs_and_gradients(make(peft), x))


def test_under_fuse(make, kind, x, monkeypatch):
    model = make(peft)
    expected = outputs_and_gradients(model, x)
    kinds = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    report = pyfused.fuse(model)
    assert len(report.fused) == 2 and not report.skipped
    model.zero_grad()
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "forward", None)  # what torchao's layer would run
    _assert_close(outputs_and_gradients(model, x), expected)
    assert list(model.state_dict()) == keys
    pyfused.unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_fused_layers_are_copied_and_switched_off(make, x):
    model = make(peft)
    expected = model(x)
    pyfused.fuse(model)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0.05)
    with model.disable_adapter():
        off = model(x)
    pyfused.unfuse(model)
    with model.disable_adapter():
        assert torch.equal(off, model(x))


def test_training_lowers_the_loss(make, x):
    model = make(pyfused, lora_dropout=0.1).train()
    target = torch.tanh(x)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = (model(x).float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_files_move_both_ways(make, x, tmp_path):
    theirs, ours = make(peft).eval(), make(pyfused).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        into_theirs = make(peft, init_lora_weights=True)
        into_theirs.load_adapter(tmp_path / "ours", "other")
        into_theirs.set_adapter("other")
    into_ours = make(pyfused, init_lora_weights=True)
    into_ours.load_adapter(tmp_path / "theirs", "other")
    into_ours.set_adapter("other")
    assert torch.equal(into_ours(x), ours(x)) and torch.equal(into_theirs(x), theirs(x))


def test_merging_is_refused(make, kind, x):
    model = make(pyfused)
    before = model(x)
    with pytest.raises(NotImplementedError, match=r"merge: .*plain floating-point tensor.*quantised"):
        model.merge_adapter()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("feedforward", [[], ["down"]])
def test_ia3(kind, x, feedforward):
    model = pyfused.get_peft_model(
        Block(kind), pyfused.IA3Config(target_modules=["up", "down"], feedforward_modules=feedforward)
    )
    for name, parameter in model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(3))
    block = Block(kind)
    layers = model.base_model.layers.of("default")
    up, down = (layers[name].ia3_l["default"].detach().view(-1).to(torch.bfloat16) for name in ("up", "down"))
    hidden = torch.tanh(block.up(x) * up)
    expected = block.down(hidden * down) if feedforward else block.down(hidden) * down
    y = model(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
