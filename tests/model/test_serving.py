"""``export_for_serving``: the same outputs, in files that leave an engine nothing to guess."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from lora_models import randomise

import pyfused

peft = pytest.importorskip("peft")


_PATTERNS = {"rank_pattern": {"v_proj": 5}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}
# Model, options of its adapter, and last names of the layers in the file.
_CASES = {
    "llama": (
        {"target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], **_PATTERNS},
        {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"},
    ),
    "llama some layers": (
        {"target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"o_proj"},
    ),
    "bert": ({"target_modules": r".*attention\.self\.query"}, {"query", "key", "value"}),
    "gpt2": ({"target_modules": ["c_attn"], "fan_in_fan_out": True}, {"c_attn"}),
}


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("rank", [None, 16])
def test_the_same_outputs(wrap, build, batch, tmp_path, case, rank):
    name = case.split()[0]
    options, leaves = _CASES[case]
    model = randomise(wrap(pyfused, name, **options))
    model.export_for_serving(tmp_path, rank=rank)
    expected = model(**batch(name))[0]
    for library in (pyfused, peft):
        loaded = library.PeftModel.from_pretrained(build(name), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch(name))[0], expected, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(leaves)
    largest = rank or 6
    assert config["r"] == config["lora_alpha"] == largest
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"] or config["use_dora"])
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        assert tensor.shape[0 if ".lora_A." in key else 1] == largest
    wanted = {path for path, _ in build(name).named_modules() if path.rpartition(".")[2] in leaves}
    assert {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors} == wanted


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_adalora_is_folded(build, batch, tmp_path, name):
    """Pruned ranks are gone, and the file is plain LoRA, for HF PEFT as well."""
    targets = ["c_attn"] if name == "gpt2" else ["v_proj", "up_proj"]
    config = pyfused.AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=targets, orth_reg_weight=0.0)
    model = randomise(pyfused.get_peft_model(build(name), config)).eval()
    with torch.no_grad():
        for layer in model.base_model.layers:
            layer.lora_E["default"][[0, 4]] = 0.0
    model.export_for_serving(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 4)
    expected = model(**batch(name))[0]
    for library in (pyfused, peft):
        loaded = library.PeftModel.from_pretrained(build(name), tmp_path).eval()
        torch.testing.assert_close(loaded(**batch(name))[0], expected, rtol=1e-4, atol=1e-5)


def test_adalora_without_a_rank_left(build, batch, tmp_path):
    config = pyfused.AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=["v_proj"])
    model = randomise(pyfused.get_peft_model(build("llama"), config)).eval()
    with torch.no_grad():
        for layer in model.base_model.layers:
            layer.lora_E["default"].zero_()
    model.export_for_serving(tmp_path)
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(loaded(**batch("llama"))[0], build("llama").eval()(**batch("llama"))[0])


def test_one_of_several_adapters(wrap, build, batch, tmp_path):
    model = randomise(wrap(pyfused, "llama", target_modules=["q_proj"]))
    model.add_adapter("other", pyfused.LoraConfig(r=3, target_modules=["o_proj"]))
    randomise(model)
    model.export_for_serving(tmp_path, "other")
    assert model.active_adapters == ["default"]
    model.set_adapter("other")
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path)
    torch.testing.assert_close(loaded(**batch("llama"))[0], model(**batch("llama"))[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "config", "error", "message"),
    [
        ("llama", {"use_dora": True}, NotImplementedError, "lora_magnitude_vector.*DoRA"),
        ("llama", {"lora_bias": True}, NotImplementedError, "lora_B.bias"),
        ("llama", {"init_lora_weights": "pissa"}, NotImplementedError, "'pissa': it took a part of the base weight"),
        ("llama", {"init_lora_weights": "olora"}, NotImplementedError, "'olora': it took a part of the base weight"),
        ("llama", {"bias": "all"}, ValueError, "no biases, and bias is 'all'"),
        ("llama", {"modules_to_save": ["lm_head"]}, ValueError, "no modules_to_save .lm_head"),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, ValueError, "embed_tokens is no linear layer"),
    ],
)
def test_what_engines_cannot_serve(wrap, tmp_path, name, config, error, message):
    model = wrap(pyfused, name, **{"target_modules": ["q_proj"]} | config)
    with pytest.raises(error, match=message):
        model.export_for_serving(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(wrap, build, tmp_path):
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    with pytest.raises(ValueError, match="rank must be at least 6"):
        model.export_for_serving(tmp_path, rank=4)
    with pytest.raises(ValueError, match="'x' not found"):
        model.export_for_serving(tmp_path, "x")
    model.add_adapter("other", pyfused.LoraConfig(target_modules=["q_proj"]))
    model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="not exactly one"):
        model.export_for_serving(tmp_path)
    other = pyfused.get_peft_model(build("llama"), pyfused.IA3Config())
    with pytest.raises(NotImplementedError, match="is IA3"):
        other.export_for_serving(tmp_path)
    assert not any(tmp_path.iterdir())
