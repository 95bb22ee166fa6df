"""Adapter files: what pyfused writes HF PEFT reads and the other way round, bit by bit; damaged ones are refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import safetensors
import safetensors.torch
import torch
from checkpoint_cases import assert_same_tensors, randomize
from torch import nn

import pyfused
from pyfused.checkpoint import write_adapter

LIBRARIES = {"peft": peft, "pyfused": pyfused}
CASES = {
    "llama": ("llama", {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}),
    "no_task": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_dropout": 0.1}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 3},
            "alpha_pattern": {"layers.1.mlp.up_proj": 5},
        },
    ),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*_proj"}),
    "layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 2], "layers_pattern": ["layers"]}),
    "all_linear": ("llama_deep", {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "lm_head_regex": ("llama", {"target_modules": r"lm_head|.*q_proj"}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "bert_cls": ("bert_cls", {"task_type": "SEQ_CLS"}),
    "bias_all": ("bert_cls", {"task_type": "SEQ_CLS", "bias": "all"}),
    "bias_lora_only": ("bert_cls", {"task_type": "SEQ_CLS", "target_modules": ["query", "dense"], "bias": "lora_only"}),
    "bias_all_parts": ("roberta_cls", {"task_type": "SEQ_CLS", "bias": "all"}),  # of a head that has parts
    "roberta": ("roberta_cls", {"task_type": "SEQ_CLS"}),
    "t5": ("t5", {"task_type": "SEQ_2_SEQ_LM"}),
    "plain": ("plain", {"target_modules": ["up", "head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}),
    "dora": ("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "embedding": ("bert_cls", {"target_modules": ["word_embeddings", "query"], "bias": "lora_only"}),
    "lora_bias": ("bert_cls", {"target_modules": ["query"], "lora_bias": True}),
    "conv": ("conv", {"target_modules": ["c1", "c2", "c3"], "use_dora": True}),
    "conv_bias": ("conv", {"target_modules": ["c1", "c4"], "lora_bias": True, "bias": "lora_only"}),
    "gpt2_bias": ("gpt2", {"bias": "lora_only", "fan_in_fan_out": True}),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer"),
]


def read(folder: Path) -> tuple[dict[str, torch.Tensor], dict]:
    with safetensors.safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    config = json.loads((folder / "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key] = sorted(set(config[key]))  # HF PEFT's sets have no order, and it lists heads anew at each load
    return tensors, config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_files_are_the_same(pair, tmp_path, dtype, name, options):
    theirs, ours = pair(name, dtype, **options)
    for model in (theirs, ours):
        randomize(model)
    theirs.save_pretrained(tmp_path / "peft")
    ours.save_pretrained(tmp_path / "pyfused")
    (expected, expected_config), (got, config) = read(tmp_path / "peft"), read(tmp_path / "pyfused")
    assert_same_tensors(got, expected)
    assert config == expected_config
    assert ours.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("writer", LIBRARIES)
@pytest.mark.parametrize("is_trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_both_read_both(wrap, build, tmp_path, writer, is_trainable, name, options):
    source = wrap(LIBRARIES[writer], name, **options)
    randomize(source)
    source.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # both tell of missing keys by a warning
        warnings.filterwarnings("ignore", message=".*(tie_word_embeddings|are tied)")
        theirs, ours = (
            library.PeftModel.from_pretrained(build(name), tmp_path, is_trainable=is_trainable)
            for library in (peft, pyfused)
        )
    got, expected = ours.state_dict(), theirs.state_dict()
    assert_same_tensors(got, expected)
    saved = source.state_dict()
    # HF PEFT keeps the biases of the original module apart; a file has one of the two.
    assert_same_tensors(
        {key: got[key] for key in got if "original_module" not in key},
        {key: saved[key] for key in saved if "original_module" not in key},
    )
    assert ours.training == theirs.training == is_trainable
    assert {n: p.requires_grad for n, p in ours.named_parameters()} == {
        n: p.requires_grad for n, p in theirs.named_parameters()
    }
    for library, model in (("peft", theirs), ("pyfused", ours)):
        model.save_pretrained(tmp_path / library)
    (got, config), (expected, expected_config) = read(tmp_path / "pyfused"), read(tmp_path / "peft")
    assert_same_tensors(got, expected)
    assert config == expected_config


@pytest.mark.parametrize("autocast", [True, False])
def test_loaded_dtypes(build, wrap, tmp_path, autocast):
    source = wrap(pyfused, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    randomize(source)
    source.save_pretrained(tmp_path)
    theirs, ours = (
        library.PeftModel.from_pretrained(build("llama", torch.bfloat16), tmp_path, autocast_adapter_dtype=autocast)
        for library in (peft, pyfused)
    )
    assert_same_tensors(ours.state_dict(), theirs.state_dict())


def test_named_adapters_have_their_own_folders(pair, build, tmp_path):
    models = dict(zip(LIBRARIES, pair("llama", target_modules=["q_proj"]), strict=True))
    for name, model in models.items():
        library = LIBRARIES[name]
        torch.manual_seed(3)
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / name / "one", selected_adapters=["other"])
    files = [sorted(p.relative_to(tmp_path / n).as_posix() for p in (tmp_path / n).rglob("adapter_*")) for n in models]
    assert files[0] == files[1] and "one/other/adapter_config.json" in files[0]
    for part in ("", "other"):
        assert_same_tensors(read(tmp_path / "pyfused" / part)[0], read(tmp_path / "peft" / part)[0])
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / "peft", adapter_name="first")
    result = loaded.load_adapter(tmp_path / "peft" / "other", "second")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert loaded.active_adapters == ["first"]
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(read(tmp_path / "again" / "second")[0], read(tmp_path / "peft" / "other")[0])


def test_load_adapter_into_one_that_is_there(wrap, tmp_path):
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    randomize(model)
    model.save_pretrained(tmp_path)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_tensors(model.state_dict(), saved)


def test_state_dict_functions(pair, tmp_path):
    theirs, ours = pair("bert_cls", task_type="SEQ_CLS")
    for model in (theirs, ours):
        randomize(model)
    state = peft.get_peft_model_state_dict(theirs)
    assert_same_tensors(pyfused.get_peft_model_state_dict(ours), state)
    assert_same_tensors(pyfused.get_peft_model_state_dict(ours, state_dict=ours.state_dict()), state)
    fresh = {key: torch.zeros_like(value) for key, value in state.items()}
    assert pyfused.set_peft_model_state_dict(ours, fresh).missing_keys == []
    assert all(not value.any() for value in pyfused.get_peft_model_state_dict(ours).values())
    with pytest.raises(ValueError, match="state_dict: keys of adapter 'default' are missing"):
        pyfused.get_peft_model_state_dict(ours, state_dict={})
    with pytest.raises(ValueError, match="'nope' not found"):
        pyfused.get_peft_model_state_dict(ours, adapter_name="nope")


@pytest.mark.parametrize("save", [True, False, "auto"])
def test_embeddings_can_be_saved(pair, tmp_path, save):
    theirs, ours = pair("llama", target_modules=["q_proj"])
    for name, model in (("peft", theirs), ("pyfused", ours)):
        model.save_pretrained(tmp_path / name, save_embedding_layers=save)
    got = read(tmp_path / "pyfused")[0]
    assert_same_tensors(got, read(tmp_path / "peft")[0])
    assert ("base_model.model.lm_head.weight" in got) == (save is True)


def test_resized_embeddings_are_saved(build, tmp_path):
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    states = []
    for name, library in LIBRARIES.items():
        base = type(base).from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        base.resize_token_embeddings(70)
        torch.manual_seed(1)
        model = library.get_peft_model(base, library.LoraConfig(target_modules=["q_proj"]))
        model.save_pretrained(tmp_path / name)
        states.append(read(tmp_path / name))
    (expected, expected_config), (got, config) = states
    assert_same_tensors(got, expected)
    assert config == expected_config
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert got["base_model.model.lm_head.weight"].shape == (70, 32)


def test_a_layer_that_was_replaced_by_hand_is_not_saved(wrap):
    saved = {}
    for library in (peft, pyfused):
        model = wrap(library, "llama", target_modules=["q_proj", "v_proj"])
        attention = model.get_submodule("base_model.model.model.layers.0.self_attn")
        attention.q_proj = attention.q_proj.base_layer
        saved[library] = library.get_peft_model_state_dict(model)
        model.merge_adapter()
    assert saved[pyfused].keys() == saved[peft].keys()
    assert not any("layers.0.self_attn.q_proj" in key for key in saved[pyfused])


def test_aliased_and_strided_tensors_are_written(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    write_adapter(tmp_path, {"a": weight, "b": weight, "c": weight.t(), "d": weight[:, 1]})
    got = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    assert_same_tensors(got, {"a": weight, "b": weight, "c": weight.t(), "d": weight[:, 1]})


def test_a_failed_write_leaves_the_old_file(wrap, tmp_path, monkeypatch):
    model = wrap(pyfused, "plain", target_modules=["up"])
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    randomize(model)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_where_it_cannot_be(wrap, tmp_path):
    model = wrap(pyfused, "plain", target_modules=["up"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory must be a folder"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"selected_adapters: no adapters \['b'\], there are \['default'\]"):
        model.save_pretrained(tmp_path / "new", selected_adapters=["default", "b"])
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_hooks_of_the_base_name_its_weights(build):
    """A base module that saves a weight under another name, and loads it from there."""

    def wrapped() -> nn.Module:
        model = pyfused.get_peft_model(build("llama"), pyfused.LoraConfig(target_modules=["q_proj"]))
        embedding = model.get_base_model().model.embed_tokens

        def rename(module, state_dict, prefix, metadata):
            state_dict[f"{prefix}table"] = state_dict.pop(f"{prefix}weight")

        def rename_back(module, state_dict, prefix, *rest):
            if f"{prefix}table" in state_dict:
                state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}table")

        embedding.register_state_dict_post_hook(rename)
        embedding.register_load_state_dict_pre_hook(rename_back)
        return model

    source, target = wrapped(), wrapped()
    saved = pyfused.get_peft_model_state_dict(source, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.table"
    assert key in saved and key.replace("table", "weight") not in saved
    saved = {name: tensor.clone() + 1 for name, tensor in saved.items()}
    pyfused.set_peft_model_state_dict(target, saved)
    assert torch.equal(target.get_base_model().model.embed_tokens.weight, saved[key])
    with pytest.raises(ValueError, match=r"keys that the model has no place for: .*embed_tokens\.weight"):
        pyfused.set_peft_model_state_dict(target, {key.replace("table", "weight"): saved[key]})
