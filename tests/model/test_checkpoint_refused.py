"""Adapter files that are damaged, do not fit, or hold what is not built: refused, and the model stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from checkpoint_cases import assert_same_tensors, randomize

import pyfused


@pytest.fixture
def saved(wrap, tmp_path) -> Path:
    model = wrap(pyfused, "llama", target_modules=["q_proj"], modules_to_save=["lm_head"])
    randomize(model)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit_config(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
DAMAGE = {
    "cut": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0"),
        "adapter_model.safetensors is damaged",
    ),
    "shorter": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-7]),
        "adapter_model.safetensors is damaged or cut short",
    ),
    "empty": (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), "adapter_model.safetensors is damaged"),
    "no_weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "Can't find 'adapter_model.safetensors'"),
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        r"adapter_model.bin is a pickle.*safetensors.torch.save_file\(torch.load",
    ),
    "no_config": (lambda f: (f / "adapter_config.json").unlink(), "Can't find 'adapter_config.json'"),
    "no_folder": (lambda f: shutil.rmtree(f), "Can't find 'adapter_config.json' at .*saved"),
    "bad_json": (
        lambda f: (f / "adapter_config.json").write_text("{"),
        "adapter_config.json is damaged: no valid JSON",
    ),
    "no_type": (lambda f: (f / "adapter_config.json").write_text("[]"), "is no adapter configuration"),
    "other_type": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type must be one of LORA, .*got 'LOHA'"),
    "unknown_field": (lambda f: edit_config(f, new_thing="x"), "field 'new_thing' = 'x' is not known"),
    "bad_rank": (lambda f: edit_config(f, r=0), "r must be at least 1, got 0"),
    "other_rank": (lambda f: edit_config(f, r=4), r"q_proj.lora_A.weight must have shape \[4, 32\], got \[6, 32\]"),
    "no_target": (lambda f: edit_config(f, target_modules=["query"]), r"\['query'\] not found"),
    "fewer_targets": (
        lambda f: edit_config(f, layers_to_transform=[0]),
        "keys that the model has no place for: base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
    ),
    "extra_key": (
        lambda f: edit_tensors(f, lambda t: t.update(more=torch.ones(2))),
        "keys that the model has no place for: more",
    ),
    "other_adapters_key": (
        lambda f: edit_tensors(f, lambda t: t.update({A.replace("lora_A", "lora_A.first"): torch.ones(6, 32)})),
        "no place for: .*lora_A.first.weight",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda t: t.update({A: torch.ones(6, 31)})),
        r"q_proj.lora_A.weight must have shape \[6, 32\], got \[6, 31\]",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({A: torch.ones(6, 32, dtype=torch.int64)})),
        "q_proj.lora_A.weight must hold floating-point numbers, got torch.int64",
    ),
    "no_head": (
        lambda f: edit_tensors(f, lambda t: t.pop("base_model.model.lm_head.weight")),
        "weights of modules_to_save are missing: base_model.model.lm_head.weight",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_change_nothing(wrap, build, unchanged, saved, damage, message):
    base, model = build("llama"), wrap(pyfused, "llama", target_modules=["q_proj"], r=3)
    damage(saved)
    state = torch.get_rng_state()
    with unchanged(base), pytest.raises(ValueError, match=message):
        pyfused.PeftModel.from_pretrained(base, saved)
    with unchanged(model), pytest.raises(ValueError, match=message):
        model.load_adapter(saved, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_qalora": True}, "use_qalora is not built yet"),
        ({"init_lora_weights": "corda"}, "'corda' is not built"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not built yet"),
    ],
)
def test_methods_that_are_not_built_are_named(build, unchanged, saved, values, message):
    edit_config(saved, **values)
    base = build("llama")
    with unchanged(base), pytest.raises(NotImplementedError, match=message):
        pyfused.PeftModel.from_pretrained(base, saved)


def test_missing_adapter_keys_are_told(build, saved):
    edit_tensors(saved, lambda tensors: tensors.pop(A))
    with pytest.warns(
        UserWarning, match="Found missing adapter keys while loading the checkpoint.*q_proj.lora_A"
    ) as caught:
        pyfused.PeftModel.from_pretrained(build("llama"), saved)
    assert sum("missing adapter keys" in str(item.message) for item in caught) == 1


def test_newer_fields_at_their_defaults_are_passed_over(build, saved):
    edit_config(saved, a_null=None, a_false=False, a_zero=0, a_dict={}, a_list=[], runtime_config={"x": True})
    with pytest.warns(UserWarning, match="passed over: a_dict, a_false, a_list, a_null, a_zero"):
        pyfused.PeftModel.from_pretrained(build("llama"), saved)


@pytest.mark.parametrize("init", ["eva"])
def test_adapters_that_only_began_in_another_way_can_be_loaded(build, saved, init):
    edit_config(saved, init_lora_weights=init, eva_config={"rho": 2.0} if init == "eva" else None)
    theirs, ours = (library.PeftModel.from_pretrained(build("llama"), saved) for library in (peft, pyfused))
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    edit_tensors(saved, lambda tensors: tensors.pop(A))
    with pytest.raises(ValueError, match="adapter keys are missing"):
        pyfused.PeftModel.from_pretrained(build("llama"), saved)
    config = pyfused.LoraConfig(target_modules=["q_proj"], init_lora_weights=init)
    with pytest.raises(NotImplementedError, match=f"'{init}' is not built"):
        pyfused.get_peft_model(build("llama"), config)
