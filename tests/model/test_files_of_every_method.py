"""Every method's files: never half written, never unpickled."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import pyfused

_VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
_CONFIGS = {
    "lora": lambda: pyfused.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False),
    "dora": lambda: pyfused.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "adalora": lambda: pyfused.AdaLoraConfig(init_r=4, target_r=2, total_step=9, task_type="CAUSAL_LM"),
    "ia3": lambda: pyfused.IA3Config(init_ia3_weights=False),
    "bottleneck": lambda: pyfused.BottleneckConfig.houlsby(reduction_factor=4, init_weights="mam_adapter"),
    "prefix": lambda: pyfused.PrefixTuningConfig(**_VIRTUAL),
    "projected prefix": lambda: pyfused.PrefixTuningConfig(**_VIRTUAL, prefix_projection=True),
    "prompt": lambda: pyfused.PromptTuningConfig(**_VIRTUAL),
}

pytestmark = pytest.mark.parametrize("method", _CONFIGS)


@pytest.fixture
def model(build, method) -> nn.Module:
    torch.manual_seed(1)
    return pyfused.get_peft_model(build("llama"), _CONFIGS[method]()).eval()


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


def test_a_failed_write_leaves_the_old_files(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    before = _contents(tmp_path)

    def fail(tensors, filename, metadata=None):
        Path(filename).write_bytes(b"half of it")
        raise OSError("disk full")

    _change(model)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(tmp_path)
    assert _contents(tmp_path) == before
    model.save_pretrained(tmp_path)
    assert _contents(tmp_path).keys() == before.keys() and _contents(tmp_path) != before


def test_nothing_is_unpickled(model, method, build, batch, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)

    def unpickle(*args, **kwargs):
        raise AssertionError("a pickle was opened")

    for module, names in ((pickle, ("load", "loads", "Unpickler")), (torch, ("load",))):
        for name in names:
            monkeypatch.setattr(module, name, unpickle)
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path)
    if method != "adalora":
        loaded.load_adapter(tmp_path, "again")
        loaded.set_adapter("again")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch("llama")).logits, model(**batch("llama")).logits)
    weights = tmp_path / "adapter_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    for load in (
        lambda: pyfused.PeftModel.from_pretrained(build("llama"), tmp_path),
        lambda: loaded.load_adapter(tmp_path, "third"),
    ):
        with pytest.raises(ValueError, match=r"adapter_model\.bin is a pickle"):
            load()
