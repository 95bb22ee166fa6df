"""Adapters of several methods on the same layers: switched, together, merged, in files, in training."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pyfused

_TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
_CONFIGS = {
    "lora": lambda: pyfused.LoraConfig(r=4, lora_alpha=13, target_modules=_TARGETS),
    "dora": lambda: pyfused.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=["q_proj", "down_proj"]),
    "ada": lambda: pyfused.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=1,
        tfinal=1,
        total_step=4,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
    ),
    "ia3": lambda: pyfused.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    # around o_proj itself, and around the block that up_proj and down_proj are in
    "bottleneck": lambda: pyfused.BottleneckConfig(mh_adapter=True, output_adapter=True, reduction_factor=4),
}
_LAYER_METHODS = ("lora", "ada", "ia3")


def _randomise(model: nn.Module, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, tensor in pyfused.get_peft_model_state_dict(model, adapter_name=name).items():
            near = tensor if "ia3" in key or "magnitude" in key else 0  # others start at random numbers
            tensor.copy_(near + torch.randn(tensor.shape, generator=generator) / 5)


@pytest.fixture
def make(build):
    """A model with adapters of these names, added in this order, the first one active."""

    def with_adapters(*names: str) -> nn.Module:
        torch.manual_seed(3)
        model = pyfused.get_peft_model(build("llama"), _CONFIGS[names[0]](), names[0])
        for name in names[1:]:
            model.add_adapter(name, _CONFIGS[name]())
        for name in names:
            _randomise(model, name)
        return model.eval()

    return with_adapters


@pytest.fixture
def model(make) -> nn.Module:
    return make(*_CONFIGS)


@pytest.fixture
def logits(batch):
    return lambda model: model(**batch("llama")).logits.detach()


@pytest.mark.parametrize("name", _CONFIGS)
def test_the_active_one_is_that_adapter_alone(model, make, logits, name):
    alone = make(name)
    model.set_adapter(name)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(f".{name}" in key for key in trained)
    torch.testing.assert_close(logits(model), logits(alone))
    with model.disable_adapter(), alone.disable_adapter():
        assert torch.equal(logits(model), logits(alone))
    torch.testing.assert_close(logits(model), logits(alone))


@pytest.mark.parametrize("name", _CONFIGS)
def test_files_do_not_show_the_others(model, make, logits, tmp_path, build, name):
    model.save_pretrained(tmp_path / "together", selected_adapters=[name])
    alone = make(name)
    alone.save_pretrained(tmp_path / "alone", selected_adapters=[name])
    saved, expected = (
        safetensors.torch.load_file(tmp_path / folder / name / "adapter_model.safetensors")
        for folder in ("together", "alone")
    )
    assert list(saved) == list(expected) and all(torch.equal(saved[key], expected[key]) for key in expected)
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / "together" / name, name)
    assert torch.equal(logits(loaded), logits(alone))


def test_loaded_in_any_order(make, logits, tmp_path, build):
    names = ("lora", "ada", "ia3", "bottleneck")
    source = make(*names)
    source.save_pretrained(tmp_path)
    source.set_adapter(list(names))
    expected = logits(source)
    for order in (names, names[::-1], ("ia3", "lora", "bottleneck", "ada")):
        model = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / order[0], order[0])
        for name in order[1:]:
            model.load_adapter(tmp_path / name, name)
        model.set_adapter(list(names))
        assert torch.equal(logits(model), expected), order


def test_what_acts_on_what():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    weights = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in base]
    x = torch.randn(3, 6, dtype=torch.float64)
    model = pyfused.get_peft_model(base, pyfused.IA3Config(target_modules=["0", "1"], feedforward_modules=["1"]), "ia3")
    model.add_adapter("lora", pyfused.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"]))
    model.add_adapter("ada", pyfused.AdaLoraConfig(init_r=3, total_step=9, target_modules=["0"]))
    for name in _LAYER_METHODS:
        _randomise(model, name)
    model.set_adapter(["ia3", "ada", "lora"])

    def of(name: str) -> dict[str, Tensor]:
        tensors = pyfused.get_peft_model_state_dict(model, adapter_name=name)
        return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}

    lora, ada, ia3 = of("lora"), of("ada"), of("ia3")
    delta = [1.5 * lora[f"{index}.lora_B.weight"] @ lora[f"{index}.lora_A.weight"] for index in (0, 1)]
    delta[0] = delta[0] + ada["0.lora_B"] @ (ada["0.lora_E"] * ada["0.lora_A"]) * 8 / (3 + 1e-5)
    h = (x @ (weights[0][0] + delta[0]).T + weights[0][1]) * ia3["0.ia3_l"].view(-1)
    expected = (h * ia3["1.ia3_l"].view(-1)) @ (weights[1][0] + delta[1]).T + weights[1][1]
    torch.testing.assert_close(model(x), expected)


def test_merged_they_give_what_they_give_together(make, logits):
    model = make("ia3", "ada", "dora")
    model.set_adapter(["ia3", "ada", "dora"])
    expected = logits(model)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.endswith("base_layer.weight")}
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():  # taken out and put back
            for key, tensor in weights.items():
                torch.testing.assert_close(model.state_dict()[key], tensor)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, pyfused.nn.AdapterLayer) for module in merged.modules())


def test_the_inner_ones_can_be_merged_alone(make, logits, unchanged):
    model = make("ia3", "lora", "ada", "bottleneck")
    model.set_adapter(["ia3", "lora", "bottleneck"])
    expected = logits(model)
    with unchanged(model), pytest.raises(ValueError, match=r"'ia3' acts on what 'lora' gives at .*q_proj; merge that"):
        model.merge_adapter(["ia3"])
    model.merge_adapter(["lora"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["ia3"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.set_adapter(["ia3"])
    model.merge_adapter()
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"'ia3', which acts on what 'lora' gives at .*q_proj, is me"),
    ):
        model.merge_adapter(["lora"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("lora")
    model.merge_adapter(["lora"])


def test_safe_merge_sees_what_all_of_them_give(make, unchanged):
    model = make("ia3", "lora")
    model.set_adapter(["ia3", "lora"])
    layer = model.base_model.layers.get("model.layers.1.self_attn.q_proj", pyfused.nn.LoraLinear)
    with torch.no_grad():  # finite by itself, and too large when the vector comes to it
        layer.lora_B["lora"].weight.fill_(1e37)
        model.base_model.layers.get("model.layers.1.self_attn.q_proj", pyfused.nn.IA3Layer).ia3_l["ia3"].fill_(1e3)
    with unchanged(model), pytest.raises(ValueError, match="adapter 'ia3' is not finite"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("deleted", list(itertools.permutations(_LAYER_METHODS, 2)), ids="-".join)
def test_deleting_leaves_the_others(make, logits, deleted):
    model = make(*_LAYER_METHODS)
    (kept,) = set(_LAYER_METHODS) - set(deleted)
    model.set_adapter(kept)
    expected = logits(model)
    for name in deleted:
        model.delete_adapter(name)
        assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model.unload()), base)


def test_layers_that_do_nothing_leave_the_fused_path(make, fused_calls, logits):
    model = make("ada", "ia3", "lora")
    for name, layers in (("lora", 12), ("ada", 6)):
        model.set_adapter(name)
        fused_calls.clear()
        logits(model)
        assert fused_calls["lora_linear"] == layers and fused_calls["lora_delta"] == 0, name


def test_training_reaches_all_of_them_and_nothing_else(make, batch):
    model = make("ia3", "lora", "ada", "bottleneck").train()
    model.set_adapter(["ia3", "lora", "ada", "bottleneck"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inputs = batch("llama")
    losses = []
    for step in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    pattern = model.peft_config["ada"].rank_pattern
    assert set(pattern) == {
        f"model.layers.{index}.{name}.lora_E" for index in range(3) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_copies_and_state_dicts(model, make, logits):
    model.set_adapter(["lora", "ada", "ia3", "bottleneck"])
    expected = logits(model)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), expected)
    copied.set_adapter("lora")
    assert torch.equal(logits(model), expected) and not torch.equal(logits(copied), expected)
    other = make(*_CONFIGS)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    other.set_adapter(["lora", "ada", "ia3", "bottleneck"])
    assert torch.equal(logits(other), expected)


def test_compiled_whole(make, logits):
    model = make("ia3", "lora", "ada")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for active in ("lora", "ada", ["ia3", "lora"]):
        model.set_adapter(active)
        torch.testing.assert_close(logits(compiled), logits(model))


def test_convolutions_and_conv1d(build, batch):
    targets = {"gpt2": ["c_attn", "c_fc"], "conv": ["c1", "c2", "head"]}
    for name, modules in targets.items():
        model = pyfused.get_peft_model(
            build(name), pyfused.IA3Config(target_modules=modules, feedforward_modules=modules[1:]), "ia3"
        ).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out is set
            model.add_adapter("lora", pyfused.LoraConfig(target_modules=modules))
        for adapter in ("ia3", "lora"):
            _randomise(model, adapter)
        model.set_adapter(["ia3", "lora"])
        with torch.no_grad():
            result = model(**batch(name))
            model.merge_adapter()
            merged = model(**batch(name))
        pick = (lambda value: value) if isinstance(result, Tensor) else (lambda value: value.logits)
        torch.testing.assert_close(pick(merged), pick(result), rtol=1e-4, atol=1e-5)


def test_each_sample_has_its_adapter(make, batch, logits):
    names = ("lora", "ada", "ia3", "bottleneck")
    model, inputs = make(*names), batch("llama")
    alone = {}
    for name in names:
        model.set_adapter(name)
        alone[name] = logits(model)
    with model.disable_adapter():
        alone["__base__"] = logits(model)
    for one, other in zip((*names, "__base__"), ("__base__", *names), strict=True):
        got = model(**inputs, adapter_names=[one, other]).logits
        torch.testing.assert_close(got, torch.stack([alone[one][0], alone[other][1]]), rtol=1e-4, atol=1e-5)


def test_biases_of_one_adapter(build, tmp_path):
    """A file's keys are those of its adapter alone, also for what belongs to the base model."""
    options = {"target_modules": ["query"], "feedforward_modules": []}
    lora = pyfused.LoraConfig(target_modules=["query", "value"], bias="all")
    model = pyfused.get_peft_model(build("bert"), pyfused.IA3Config(**options), "ia3")
    model.add_adapter("bottleneck", pyfused.BottleneckConfig(mh_adapter=True, output_adapter=True))
    model.add_adapter("lora", lora)
    alone = pyfused.get_peft_model(build("bert"), lora, "lora")
    saved, expected = (pyfused.get_peft_model_state_dict(each, adapter_name="lora") for each in (model, alone))
    assert sorted(saved) == sorted(expected)
    changed = {key: tensor + 1 for key, tensor in expected.items()}
    pyfused.set_peft_model_state_dict(model, changed, "lora")
    saved = pyfused.get_peft_model_state_dict(model, adapter_name="lora")
    assert all(torch.equal(saved[key], tensor) for key, tensor in changed.items())


def test_modules_to_save_hold_no_adapters(make, unchanged):
    model = make("lora", "ada")
    for module, part in (("mlp", "mlp' has a part that is"), ("up_proj", "up_proj' is")):
        config = pyfused.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=[module])
        with unchanged(model), pytest.raises(ValueError, match=f"{part} adapted by LORA and ADALORA already"):
            model.add_adapter("ia3", config)


def test_room_for_swaps_is_made_in_lora_alone(make, logits):
    model = make("ia3", "lora")
    model.set_adapter(["ia3", "lora"])
    expected = logits(model)
    pyfused.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(logits(model), expected)
    assert model.peft_config["lora"].r == 8
