"""IA3 in a model, next to HF PEFT's: names, initial weights, outputs, gradients, training, files, merging."""

from __future__ import annotations

import copy
import json
import warnings
from collections import Counter

import peft
import pytest
import torch
from torch import nn

import pyfused
from pyfused.nn import IA3Layer, IA3Linear

FP32, BF16 = torch.float32, torch.bfloat16
MODELS = ("llama", "bert_cls", "t5", "gpt2")


class Convolutions(nn.Module):
    """All kinds of layers that IA3 adapts and transformers' models here do not have; one with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, bias=False)
        self.volume = nn.Conv3d(1, 4, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.grouped(self.first(x).tanh())
        return self.head(self.volume(y.unsqueeze(1)).mean((2, 3, 4)))


CONVOLUTIONS = {
    "target_modules": ["first", "grouped", "volume", "head"],
    "feedforward_modules": ["grouped", "head"],
}


def wrap(library, base: nn.Module, **options) -> nn.Module:
    """Adapted by ``library`` with vectors that are no ones; seeds are the same for both libraries."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base, library.IA3Config(**({"init_ia3_weights": False} | options)))
    return model.eval()  # GPT-2 has dropout of its own


@pytest.fixture
def pair(build):
    """The same model twice: wrapped by HF PEFT, and by pyfused."""

    def make(name: str, dtype: torch.dtype = FP32, **options):
        return tuple(wrap(library, build(name, dtype), **options) for library in (peft, pyfused))

    return make


@pytest.fixture
def convolutions():
    def make(**options):
        models = []
        for library in (peft, pyfused):
            torch.manual_seed(0)
            models.append(wrap(library, Convolutions(), **(CONVOLUTIONS | options)))
        return models

    return make


@pytest.fixture
def fused(monkeypatch) -> Counter:
    """How often the modules reach each op."""
    from pyfused.nn import ia3

    counts: Counter = Counter()

    class Counting:
        def __getattr__(self, name: str):
            counts[name] += 1
            return getattr(pyfused.ops, name)

    monkeypatch.setattr(ia3, "ops", Counting())
    return counts


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).logits


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    flags = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}


def assert_close(got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    error, their_error = ((tensor - exact).abs().max().item() for tensor in (got, theirs))
    room = 1e-5 * exact.abs().max().item()
    assert error <= max(2 * their_error, room), f"{what}: error {error}, HF PEFT's is {their_error}, room {room}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("init", [True, False], ids=["ones", "random"])
def test_names_and_initial_weights(pair, name, dtype, init):
    theirs, ours = pair(name, dtype, init_ia3_weights=init)
    assert_same_state(ours, theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    config, expected = ours.peft_config["default"].to_dict(), theirs.peft_config["default"].to_dict()
    assert config == {key: expected[key] for key in config}
    kinds = {type(layer) for layer in ours.base_model.layers}
    assert kinds == ({IA3Layer} if name == "gpt2" else {IA3Linear})


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(pair, batch, fused, name):
    theirs, ours = pair(name)
    exact, inputs = copy.deepcopy(theirs).double(), batch(name)
    results = [output(model, inputs) for model in (ours, theirs, exact)]
    assert fused == {"ia3_scale" if name == "gpt2" else "ia3_layer": len(ours.base_model.layers)}
    assert_close(*results, "output")
    for result in results:
        result.square().mean().backward()
    parameters = zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True)
    for (parameter_name, got), expected, truth in parameters:
        assert (got.grad is None) == (expected.grad is None), parameter_name
        if got.grad is not None:
            assert_close(got.grad, expected.grad, truth.grad, f"gradient of {parameter_name}")


@pytest.mark.parametrize("name", MODELS)
def test_fp32_vectors_on_a_bf16_base(pair, batch, name):
    theirs, ours = pair(name, BF16)
    assert {parameter.dtype for parameter in ours.parameters() if parameter.requires_grad} == {FP32}
    got, expected = (output(model, batch(name)) for model in (ours, theirs))
    exact = output(copy.deepcopy(theirs).double(), batch(name))
    errors = [(result.double() - exact).abs().max() for result in (got, expected)]
    assert got.dtype == BF16
    assert errors[0] <= 2 * errors[1] + torch.finfo(BF16).eps * exact.abs().max()
    for result in (got, expected):
        result.float().square().sum().backward()
    grads = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        if parameter.requires_grad and grads[parameter_name].grad is not None:
            grad = grads[parameter_name].grad
            assert (parameter.grad - grad).norm() <= 0.02 * grad.norm(), parameter_name


@pytest.mark.parametrize("name", MODELS)
def test_three_training_steps(pair, batch, name):
    models = pair(name)
    losses = []
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            loss = output(model, batch(name)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    theirs, ours = (dict(model.named_parameters()) for model in models)
    for parameter_name, parameter in theirs.items():
        torch.testing.assert_close(ours[parameter_name], parameter, rtol=1e-3, atol=1e-4, msg=parameter_name)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_files_both_ways(pair, build, batch, tmp_path, name, dtype):
    theirs, ours = pair(name, dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = {who: (tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")}
    assert files["ours"] == files["theirs"]
    ours_config, their_config = (
        json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
    )
    for config in (ours_config, their_config):
        for field in ("target_modules", "feedforward_modules"):
            config[field] = sorted(config[field])
    assert ours_config == their_config
    loaded = pyfused.PeftModel.from_pretrained(build(name, dtype), tmp_path / "theirs")
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, ours.state_dict()[key]), key
    with torch.no_grad():
        assert torch.equal(output(loaded, batch(name)), output(ours.eval(), batch(name)))
        back = peft.PeftModel.from_pretrained(build(name, dtype), tmp_path / "ours")
        assert torch.equal(output(back, batch(name)), output(theirs.eval(), batch(name)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_merging(pair, build, batch, name, safe_merge, dtype):
    theirs, ours = pair(name, dtype)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    expected = output(ours, batch(name))
    ours.merge_adapter(safe_merge=safe_merge)
    theirs.merge_adapter(safe_merge=safe_merge)
    assert_same_state(ours, theirs)
    if dtype is FP32:
        torch.testing.assert_close(output(ours, batch(name)), expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours.unmerge_adapter()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=2 * torch.finfo(dtype).eps, atol=0, msg=key)
    merged = wrap(pyfused, build(name, dtype)).merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(module, IA3Layer) for module in merged.modules())
    reference = theirs.merge_and_unload()
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in merged.state_dict().items())


def test_unmerging_says_what_zeros_cost(build, batch):
    model = wrap(pyfused, build("llama"))
    layer = next(iter(model.base_model.layers))
    before = layer.weight.clone()
    with torch.no_grad():
        layer.ia3_l["default"][1] = 0.0
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"Unmerge result can be inaccurate for \(IA\)\^3: 1 elements"):
        model.unmerge_adapter()
    assert torch.equal(layer.weight[1], torch.zeros_like(before[1]))
    torch.testing.assert_close(layer.weight[2:], before[2:], rtol=1e-6, atol=0)


def test_convolutions(convolutions, fused, tmp_path):
    theirs, ours = convolutions()
    assert_same_state(ours, theirs)
    exact, x = copy.deepcopy(theirs).double(), torch.randn(2, 3, 7, 6)
    results = [model(x.to(next(model.parameters()).dtype)) for model in (ours, theirs, exact)]
    assert fused == {"ia3_scale": 3, "ia3_layer": 1}
    assert_close(*results, "output")
    for result in results:
        result.square().mean().backward()
    for (name, got), expected, truth in zip(
        ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True
    ):
        if truth.grad is not None:
            assert_close(got.grad, expected.grad, truth.grad, f"gradient of {name}")
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert files[0] == files[1]
    loaded = pyfused.PeftModel.from_pretrained(Convolutions(), tmp_path / "theirs")
    assert loaded.base_model.layers.names == ours.base_model.layers.names
    before = results[0].detach()
    for model in (ours, theirs):
        model.merge_adapter()
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    torch.testing.assert_close(ours(x), before, rtol=1e-4, atol=1e-5)


def test_several_active_adapters_are_multiplied(pair, batch):
    models = pair("llama")
    for library, model in zip((peft, pyfused), models, strict=True):
        torch.manual_seed(4)
        config = library.IA3Config(
            target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
        )
        model.add_adapter("other", config)
        model.base_model.set_adapter(["other", "default"])
    theirs, ours = models
    exact = copy.deepcopy(theirs).double()
    assert_close(*(output(model, batch("llama")) for model in (ours, theirs, exact)), "output")
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(output(ours, batch("llama")), output(theirs, batch("llama")))
    ours.delete_adapter("default")
    assert ours.active_adapters == ["other"]
    assert [name for name in ours.state_dict() if "default" in name] == []


def test_modules_to_save_and_task_heads(pair, batch, tmp_path, build):
    theirs, ours = pair("bert_cls", task_type="SEQ_CLS")
    assert_same_state(ours, theirs)
    output(ours, batch("bert_cls")).sum().backward()
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("bert_cls"), tmp_path)
    torch.testing.assert_close(output(loaded, batch("bert_cls")), output(ours.eval(), batch("bert_cls")))


def test_all_linear_keeps_full_names(build):
    options = {"target_modules": "all-linear", "feedforward_modules": ["down_proj"]}
    theirs, ours = (wrap(library, build("llama_deep"), **options) for library in (peft, pyfused))
    assert ours.peft_config["default"].target_modules == theirs.peft_config["default"].target_modules
    assert_same_state(ours, theirs)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_modules": ["up"]},
            ValueError,
            "Please specify feedforward_modules, .*no default for model type None",
        ),
        ({"feedforward_modules": []}, ValueError, "Please specify target_modules"),
        ({"target_modules": ["nowhere"], "feedforward_modules": []}, ValueError, "Target modules .* not found"),
        ({"target_modules": ["act"], "feedforward_modules": []}, ValueError, "'act' is not supported: .*got Tanh"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_does_not_fit_the_model(build, unchanged, options, error, message):
    model = build("plain")
    with unchanged(model), pytest.raises(error, match=message):
        pyfused.get_peft_model(model, pyfused.IA3Config(**options))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target_modules": ["up"], "feedforward_modules": ["down"]}, ValueError, "subset of target_modules.*'down'"),
        ({"feedforward_modules": "("}, ValueError, "feedforward_modules: .* no valid regular expression"),
        ({"feedforward_modules": [1]}, TypeError, "feedforward_modules must be a list of strings"),
        ({"init_ia3_weights": "ones"}, TypeError, "init_ia3_weights must be True or False, got 'ones'"),
        ({"peft_type": "LORA"}, ValueError, "peft_type must be 'IA3' in IA3Config, got 'LORA'"),
    ],
)
def test_config_errors(options, error, message):
    with pytest.raises(error, match=message):
        pyfused.IA3Config(**options)


def test_another_adapter_must_agree(build, unchanged):
    model = wrap(pyfused, build("llama"))
    config = pyfused.IA3Config(target_modules=["down_proj"], feedforward_modules=[])
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"feedforward_modules: 'model.layers.0.mlp.down_proj' is in"),
    ):
        model.add_adapter("other", config)


def test_a_file_of_another_method_or_shape(build, tmp_path, unchanged):
    wrap(pyfused, build("llama")).save_pretrained(tmp_path)
    model = pyfused.get_peft_model(build("llama"), pyfused.LoraConfig())
    with unchanged(model), pytest.raises(ValueError, match="peft_type"):
        model.load_adapter(tmp_path, "default")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["feedforward_modules"] = []
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base = build("llama")
    with unchanged(base), pytest.raises(ValueError, match=r"down_proj.ia3_l must have shape \[32, 1\], got \[1, 48\]"):
        pyfused.PeftModel.from_pretrained(base, tmp_path)


def test_conv1d_flag_is_corrected(build):
    with pytest.warns(UserWarning, match="fan_in_fan_out is False but the layers to adapt are Conv1D"):
        model = pyfused.get_peft_model(build("gpt2"), pyfused.IA3Config())
    assert model.peft_config["default"].fan_in_fan_out is True
    with pytest.warns(UserWarning, match=r"fan_in_fan_out is True but the layers to adapt are nn.Linear"):
        model = pyfused.get_peft_model(build("llama"), pyfused.IA3Config(fan_in_fan_out=True))
    assert model.peft_config["default"].fan_in_fan_out is False
