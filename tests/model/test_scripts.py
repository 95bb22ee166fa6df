"""Lines of scripts that were written for HF PEFT: the imports change, the calls stay; what is not built says so."""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

import pyfused


@pytest.fixture
def model(wrap) -> nn.Module:
    return wrap(pyfused, "llama", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM").eval()


@pytest.fixture
def folder(model, tmp_path) -> Path:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)
    return tmp_path / "saved"


LOADS = {
    "hub_and_dtype_options": {"torch_dtype": torch.float16, "device_map": {"": 0}, "token": None},
    "memory_options": {"low_cpu_mem_usage": True, "torch_device": "cpu"},
    "subfolder": {"subfolder": "saved"},
}


@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS)
def test_options_of_loading(model, folder, build, batch, options):
    path = folder.parent if "subfolder" in options else folder
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), path, **options)
    assert torch.equal(loaded(**batch("llama")).logits, model(**batch("llama")).logits)
    model.load_adapter(path, adapter_name="again", **options)
    model.set_adapter("again")
    assert torch.equal(loaded(**batch("llama")).logits, model(**batch("llama")).logits)


def test_a_config_in_place_of_the_files(model, folder, build, batch):
    config = pyfused.PeftConfig.from_pretrained(folder, revision="main")
    config.lora_alpha *= 2
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), folder, config=config)
    assert loaded.peft_config["default"].lora_alpha == config.lora_alpha
    assert not torch.allclose(loaded(**batch("llama")).logits, model(**batch("llama")).logits)
    assert config.inference_mode is True and loaded.peft_config["default"] is not config


def test_several_adapters_by_set_adapter(model, batch):
    config = pyfused.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    model.add_adapter("other", config)
    model.set_adapter(["default", "other"])
    first = model(**batch("llama")).logits
    model.base_model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    assert torch.equal(model(**batch("llama")).logits, first)


def test_merge_and_unload_takes_a_progress_bar_first(model, batch):
    before = model(**batch("llama")).logits
    merged = copy.deepcopy(model).merge_and_unload(True, True, ["default"])
    torch.testing.assert_close(merged(**batch("llama")).logits, before, rtol=1e-4, atol=1e-4)
    model.base_model.layers.of("default")["model.layers.0.self_attn.q_proj"].lora_A["default"].weight.data.fill_(
        float("inf")
    )
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_and_unload(progressbar=True, safe_merge=True)


@pytest.mark.parametrize("name", ["push_to_hub"])
def test_methods_that_are_not_built_name_themselves(model, name):
    assert not hasattr(model, name)
    with pytest.raises(AttributeError, match=rf"pyfused\.PeftModel: {name} is not built; \w+"):
        getattr(model, name)


def test_wrong_options(model, folder, build, unchanged):
    base = build("llama")
    for call in (
        lambda: pyfused.PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True),
        lambda: model.load_adapter(folder, "x", key_mapping={}),
        lambda: pyfused.PeftConfig.from_pretrained(folder, trust=True),
    ):
        with unchanged(base), unchanged(model), pytest.raises(TypeError, match="options that pyfused does not have: "):
            call()
    with pytest.raises(ValueError, match="safe_serialization must be True"):
        model.save_pretrained(folder / "new", safe_serialization=False)
    assert not (folder / "new").exists()


def test_nothing_is_saved_of_an_unloaded_model(model, tmp_path):
    model.merge_and_unload()
    assert model.peft_config == {} and model.active_adapters == []
    with pytest.raises(ValueError, match="the model has no adapters"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_of_another_scaling_are_not_loaded_over(model, folder, unchanged):
    model.peft_config["default"].lora_alpha = 1
    with unchanged(model), pytest.raises(ValueError, match="lora_alpha is 13 in the file and 1 in the model"):
        model.load_adapter(folder, "default")


def test_an_adapter_on_meta_takes_no_weights(model, folder, build):
    base = build("llama").to("meta")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj is on the meta device"):
        pyfused.PeftModel.from_pretrained(base, folder)
    assert not any(isinstance(module, pyfused.nn.LoraLinear) for module in base.modules())
    with pytest.raises(ValueError, match="on the meta device"):
        model.to("meta").load_adapter(folder, "default")


class Quantised(nn.Module):
    """What prepare_model_for_kbit_training looks at."""

    def __init__(self, **marks) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 5, dtype=torch.float16)
        self.quantised = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
        self.checkpointing: dict | None = None
        vars(self).update(marks)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        self.checkpointing = gradient_checkpointing_kwargs or {}


@pytest.mark.parametrize("marks", [{}, {"is_loaded_in_4bit": True}, {"quantization_method": "gptq"}], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}], ids=str)
@pytest.mark.parametrize("use", [True, False])
def test_prepare_model_for_kbit_training(marks, options, use):
    states = []
    for library in (peft, pyfused):
        model = Quantised(**marks)
        assert library.prepare_model_for_kbit_training(model, use, dict(options)) is model
        parameters = {name: (value.dtype, value.requires_grad) for name, value in model.named_parameters()}
        states.append((parameters, model.checkpointing, model.embed(torch.tensor([1])).requires_grad))
    assert states[0] == states[1]


def test_isinstance_of_hf_pefts_model(model):
    assert isinstance(model, peft.PeftModel) and isinstance(model, pyfused.PeftModel)
    assert not issubclass(type(model), peft.PeftModel)
    for kind in (model, model.__class__):
        assert not hasattr(kind, "get_prompt")  # a method of HF PEFT's class only
    assert model.__class__.save_pretrained is pyfused.PeftModel.save_pretrained
    assert repr(model).startswith("PeftModel(")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and isinstance(twin, peft.PeftModel)


def test_a_type_made_of_the_shown_class_inherits_nothing(model, batch):
    """What FSDP2's fully_shard does to a module."""
    before = model(**batch("llama")).logits
    model.__class__ = type("Sharded", (model.__class__,), {})
    assert type(model).__name__ == "Sharded" and isinstance(model, peft.PeftModel)
    assert not hasattr(model, "get_prompt") and not hasattr(type(model), "get_prompt")
    assert torch.equal(model(**batch("llama")).logits, before)


def test_peft_is_not_imported_by_wrapping():
    code = """
        import sys, torch, pyfused
        base = torch.nn.Sequential(torch.nn.Linear(2, 2))
        model = pyfused.get_peft_model(base, pyfused.LoraConfig(target_modules=["0"]))
        assert model.__class__ is type(model)
        assert not {"peft", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=Path(pyfused.__file__).parents[1])


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_cut_and_corrupted_files(model, folder, build, unchanged, name):
    """Cut anywhere, or with other bytes where the format is written: an error that names the file, or no difference."""
    good = (folder / name).read_bytes()
    written = len(good) if name.endswith(".json") else 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(0)
    damaged = [good[: draw.randrange(len(good))] for _ in range(100)] + [good + b"\0", b"[" * 100_000]
    for _ in range(100):
        position = draw.randrange(written)
        damaged.append(good[:position] + bytes([draw.randrange(256)]) + good[position + 1 :])
    base, errors = build("llama").eval().requires_grad_(False), 0
    for data in damaged:
        (folder / name).write_bytes(data)
        with warnings.catch_warnings(), unchanged(base):
            warnings.simplefilter("ignore")
            try:
                pyfused.PeftModel.from_pretrained(base, folder).unload()
            except (ValueError, NotImplementedError) as error:
                assert str(error) and not isinstance(error, UnicodeDecodeError)
                errors += 1
    assert errors > 150


def test_a_killed_save_leaves_the_old_files(folder, tmp_path):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    code = f"""
        import os, signal, sys, torch, safetensors.torch, pyfused
        def half(tensors, filename, metadata):
            open(filename, "wb").write(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.torch.save_file = half
        model = torch.nn.Sequential(torch.nn.Linear(2, 2))
        pyfused.get_peft_model(model, pyfused.LoraConfig(target_modules=["0"])).save_pretrained({str(folder)!r})
    """
    root = Path(pyfused.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=root, env=dict(os.environ), check=False)
    assert result.returncode == -signal.SIGKILL
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_hf_pefts_names_of_its_classes_for_tasks(model, folder, build):
    """``from peft import PeftModelForCausalLM`` -> ``from pyfused import ...``."""
    names = [name for name in dir(peft) if name.startswith(("PeftModelFor", "AutoPeftModel"))]
    assert len(names) == 13
    missing = [name for name in names if not hasattr(pyfused, name)]
    assert not missing
    loaded = pyfused.PeftModelForCausalLM.from_pretrained(build("llama"), folder)
    assert isinstance(loaded, pyfused.PeftModel)
