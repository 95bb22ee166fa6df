"""DoRA, lora_bias, AdaLoRA and IA3 on quantised bases: HF PEFT's results, of pyfused's models and under ``fuse``."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings

import peft
import pytest
import torch
from lora_models import drop_as_pyfused
from quantised_cases import KINDS, Block, bitsandbytes_linear, exact_block, outputs_and_gradients, some_rows
from torch import Tensor, nn

import pyfused
from pyfused.nn import LoraLinear, lora_layer
from pyfused.nn.quantised import dense_weight

_LAYERS = {"target_modules": ["up", "down"]}
_LORA = {"r": 5, "lora_alpha": 13, "init_lora_weights": False}
_ADALORA = {"init_r": 5, "target_r": 2, "lora_alpha": 3, "tinit": 2, "tfinal": 4, "deltaT": 1, "total_step": 12}
METHODS = {
    "dora": ("LoraConfig", _LORA | {"use_dora": True}),
    "dora dropout": ("LoraConfig", _LORA | {"use_dora": True, "lora_dropout": 0.3}),
    "lora_bias": ("LoraConfig", _LORA | {"lora_bias": True}),
    "adalora": ("AdaLoraConfig", _ADALORA | {"init_lora_weights": False}),
    "ia3": ("IA3Config", {"init_ia3_weights": False, "feedforward_modules": ["down"]}),
}
CASES = [(kind, method) for kind in KINDS for method in METHODS if (kind, method) != ("torchao", "lora_bias")]
# What HF PEFT refuses is nothing to compare with.
cases = pytest.mark.parametrize(("kind", "method"), CASES)
dora = pytest.mark.parametrize("kind", KINDS)

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore:MatMul8bitLt")]


def wrap(library, base: nn.Module, method: str, **options) -> nn.Module:
    config, fields = METHODS[method]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.get_peft_model(base, getattr(library, config)(**_LAYERS | fields | options))


@pytest.fixture
def x() -> Tensor:
    return some_rows()


def _is_rounding(got: dict[str, Tensor], theirs: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """No further from the exact values than twice HF PEFT, and one rounding of the largest to bfloat16."""
    for name, value in exact.items():
        if "ranknum" in name:  # HF PEFT trains it on some bases and not on others
            continue
        errors = [(result[name].double() - value).abs().max().item() for result in (got, theirs)]
        room = torch.finfo(torch.bfloat16).eps * value.abs().max().item()
        assert errors[0] <= 2 * errors[1] + room, (name, errors, room)


@cases
def test_results_of_hf_peft(kind, method, x, monkeypatch):
    theirs, ours, fused = (wrap(library, Block(kind), method) for library in (peft, pyfused, peft))
    exact = wrap(peft, exact_block(kind), method).double()
    start = peft.get_peft_model_state_dict(theirs)
    got = pyfused.get_peft_model_state_dict(ours)
    assert got.keys() == start.keys()
    for name, value in start.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    peft.set_peft_model_state_dict(exact, {name: value.double() for name, value in start.items()})
    results = []
    for model in (ours, fused, theirs, exact):
        if model is fused:
            report = pyfused.fuse(fused)
            assert len(report.fused) == 2 and not report.skipped
        with monkeypatch.context() as patch:
            if model is fused:
                for layer in (fused.base_model.model.up, fused.base_model.model.down):
                    patch.setattr(type(layer).__bases__[-1], "forward", None)
            elif model is not ours:
                drop_as_pyfused(model)
            torch.manual_seed(5)
            results.append(outputs_and_gradients(model, x if model is not exact else x.double()))
    got, under_fuse, expected, truth = results
    _is_rounding(got, expected, truth)
    _is_rounding(under_fuse, expected, truth)
    assert got["y"].dtype == torch.bfloat16
    assert {name: value.dtype for name, value in under_fuse.items()} == {
        name: value.dtype for name, value in expected.items()
    }


@cases
def test_taken_back_and_switched_off(kind, method, x):
    model = wrap(peft, Block(kind), method).eval()
    kinds, state = {name: type(module) for name, module in model.named_modules()}, list(model.state_dict())
    shown = repr(model)
    pyfused.fuse(model)
    assert repr(model) == shown and list(model.state_dict()) == state
    assert all(isinstance(module, kinds[name]) for name, module in model.named_modules())
    with torch.no_grad(), model.disable_adapter():
        off = model(x)
    pyfused.unfuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    with torch.no_grad():
        assert torch.equal(off, Block(kind).eval()(x))


@cases
def test_files_both_ways(kind, method, x, tmp_path):
    theirs, ours = (wrap(library, Block(kind), method).eval() for library in (peft, pyfused))
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("theirs", "ours")]
    assert files[0] == files[1]
    loaded = pyfused.PeftModel.from_pretrained(Block(kind), tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(loaded(x), ours(x))
    back = peft.PeftModel.from_pretrained(Block(kind), tmp_path / "ours")
    for name, value in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(peft.get_peft_model_state_dict(back)[name], value), name


@cases
def test_training_lowers_the_loss(kind, method, x):
    model = wrap(pyfused, Block(kind), method, **({"lora_alpha": 13} if method == "adalora" else {})).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.1 if method == "ia3" else 0.01
    )
    losses = []
    for step in range(12):
        loss = (model(x).float() - torch.tanh(x)).square().mean()
        loss.backward()
        optimizer.step()
        if method == "adalora":
            model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    if method == "adalora":
        assert sum(map(sum, model.peft_config["default"].rank_pattern.values())) == 2 * 2


@cases
def test_merging_is_refused(kind, method, x):
    model = wrap(pyfused, Block(kind), method).eval()
    before = model(x)
    with pytest.raises(NotImplementedError, match=r"merge: .*plain floating-point tensor.*quantised"):
        model.merge_and_unload()
    assert torch.equal(model(x), before)


# DoRA's norm ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dequantised(monkeypatch) -> list[int]:
    """One entry each time that pyfused's own layers ask for the values of a weight."""
    seen: list[int] = []
    monkeypatch.setattr(lora_layer, "dense_weight", lambda layer: seen.append(1) or dense_weight(layer))
    return seen


@dora
def test_evaluation_dequantises_once(kind, x, dequantised):
    model = wrap(pyfused, Block(kind), "dora")
    expected = model(x)
    model.eval()
    dequantised.clear()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0.02 * expected.abs().max().item())
    assert len(dequantised) == 2, "one for each layer"


def another_base(layer: LoraLinear) -> None:
    """The layer of a block of other values."""
    kind = {"Linear8bitLt": "8bit", "Linear4bit": "4bit"}.get(type(layer.base_layer).__name__, "torchao")
    layer.base_layer = Block(kind, seed=7).up.train(layer.training)


CHANGES = {
    "b": lambda layer: layer.lora_B["default"].weight.mul_(3),
    "magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight.mul_(3),
    "scaling": lambda layer: layer.scaling.update(default=7.0),
    "another base": another_base,
    "another weight": lambda layer: setattr(layer.base_layer, "weight", Block("torchao", seed=7).up.weight),
}


@dora
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_never_stale(kind, change, train, x):
    if change is CHANGES["another weight"] and kind != "torchao":
        pytest.skip("bitsandbytes' weights belong to their layer's state")
    layer = LoraLinear(Block(kind).up, **_LORA, use_dora=True).train(train)
    layer(x)
    with torch.no_grad():
        change(layer)
    a, b = layer.matrices("default")
    adapted = dense_weight(layer.base_layer).double() + layer.scaling["default"] * (b.double() @ a.double())
    factor = layer.lora_magnitude_vector["default"].weight.double() / adapted.norm(dim=1)
    exact = nn.functional.linear(x.double(), factor[:, None] * adapted, layer.bias.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


@dora
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_compiles(kind, train, x):
    torch.compiler.reset()
    layer = LoraLinear(Block(kind).up, **_LORA, use_dora=True).train(train)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=kind == "torchao")  # bitsandbytes' break the graph
    expected = layer(x)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0.02 * expected.abs().max().item())


@dora
def test_copies_and_pickles(kind, x):
    layer = LoraLinear(Block(kind).up, **_LORA, use_dora=True).eval()
    expected = layer(x)
    # torchao's weights cannot be pickled, those of bitsandbytes become plain parameters
    copies = [copy.deepcopy(layer)] + ([] if kind == "torchao" else [pickle.loads(pickle.dumps(layer))])
    for other in copies:
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.lora_B["default"].weight.mul_(3)
        assert not torch.equal(other(x), expected) and torch.equal(layer(x), expected)


# The values of a weight -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True], ids=["one scale", "scales of scales"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_4_bit_weight_that_was_brought_into_another_order(nested, dtype):
    linear = nn.Linear(128, 96, dtype=dtype)
    layer = bitsandbytes_linear(linear, "4bit", compress_statistics=nested, quant_storage=torch.uint8)
    before = dense_weight(layer)
    torch.testing.assert_close(before.float(), linear.weight.detach().float(), rtol=0, atol=0.02)
    with torch.no_grad():
        layer.eval()(torch.randn(2, 128, dtype=torch.bfloat16))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("this CPU has no other order")
    after = dense_weight(layer)
    assert after.dtype == before.dtype and after.shape == before.shape
    torch.testing.assert_close(after, before, rtol=2**-8, atol=1e-6)  # the scales became bfloat16


def test_an_8_bit_weight_before_and_after_a_call():
    layer = Block("8bit").up
    before = dense_weight(layer)
    layer(torch.randn(2, 64, dtype=torch.bfloat16))
    assert torch.equal(dense_weight(layer), before) and before.dtype == torch.float32
    layer(torch.randn(2, 64, dtype=torch.bfloat16))  # it is as it was: HF PEFT's DoRA leaves it without its scales


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_a_weight_that_is_not_quantised_yet(kind):
    import bitsandbytes

    layer = {"8bit": functools.partial(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False)}.get(
        kind, bitsandbytes.nn.Linear4bit
    )(8, 4)
    assert torch.equal(dense_weight(layer), layer.weight.data)


def test_other_quantised_weights_are_refused():
    class Linear(nn.Linear):
        pass

    layer = Linear(8, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(NotImplementedError, match=r"use_dora: .* or of bitsandbytes or torchao .*torch\.int8 in"):
        LoraLinear(layer, use_dora=True)


def test_hf_peft_takes_these_bases():
    """What the tests above compare with is HF PEFT's own layer for such a base."""
    for kind, name in (("8bit", "Linear8bitLt"), ("4bit", "Linear4bit"), ("torchao", "TorchaoLoraLinear")):
        assert type(wrap(peft, Block(kind), "dora").base_model.model.up).__name__ == name
    assert inspect.getmodule(type(wrap(peft, Block("8bit"), "adalora").base_model.model.up)) is peft.tuners.adalora.bnb
