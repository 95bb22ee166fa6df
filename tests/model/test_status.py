"""``get_layer_status`` and ``get_model_status`` against HF PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict

import pytest
from torch import nn

import pyfused

peft = pytest.importorskip("peft")


def _two(model: nn.Module) -> None:
    config = pyfused.LoraConfig if isinstance(model.base_model, pyfused.tuner.AdapterModel) else peft.LoraConfig
    model.add_adapter("other", config(r=3, target_modules=["v_proj"]))


def _mixed(model: nn.Module) -> None:
    _two(model)
    next(model.base_model.model.model.layers[0].self_attn.q_proj.lora_A.parameters()).requires_grad_(False)


def _merged_half(model: nn.Module) -> None:
    model.base_model.model.model.layers[0].self_attn.q_proj.merge()


_STATES: dict[str, Callable[[nn.Module], None]] = {
    "new": lambda model: None,
    "two": _two,
    "other active": lambda model: (_two(model), model.set_adapter("other")),
    "merged": lambda model: model.merge_adapter(),
    "half merged": _merged_half,
    "irregular": _mixed,
}
# What names classes of either library, or a feature of HF PEFT's.
_OTHER = ("module_type", "adapter_model_type", "quantization_backend")


def _dict(status) -> dict:
    return {name: value for name, value in asdict(status).items() if name not in _OTHER}


@pytest.mark.parametrize("state", _STATES)
def test_as_hf_peft(pair, state):
    result = []
    for model in pair("llama", target_modules=["q_proj", "v_proj"]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _STATES[state](model)
        result.append(([_dict(layer) for layer in model.get_layer_status()], _dict(model.get_model_status())))
    theirs, ours = result
    assert ours == theirs


def test_a_head_beside_the_layers(wrap):
    model = wrap(pyfused, "bert_cls", task_type="SEQ_CLS", target_modules=["query"])
    status = pyfused.get_model_status(model)
    assert status.base_model_type == "BertForSequenceClassification" and status.adapter_model_type == "AdapterModel"
    assert status.active_adapters == ["default"] and status.enabled is True and status.merged_adapters == []
    assert status.requires_grad == {"default": True} and status.peft_types == {"default": "LORA"}
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    head = next(layer for layer in model.get_layer_status() if layer.module_type == "ModulesToSaveWrapper")
    assert head.available_adapters == head.active_adapters == ["default"]


def test_switched_off(wrap):
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    next(iter(model.base_model.layers)).enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"


def test_a_bare_module(build):
    block = nn.Sequential(pyfused.nn.LoraLinear(nn.Linear(4, 4)))
    assert [layer.name for layer in pyfused.get_layer_status(block)] == ["0"]
    assert pyfused.get_model_status(block).peft_types == {}
    with pytest.raises(ValueError, match="no layers with adapters"):
        pyfused.get_layer_status(build("plain"))
