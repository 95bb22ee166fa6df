"""Adapters of several methods in one model, each on layers of its own: alone, together, in files, merged.

On the same layers: ``test_methods_on_one_layer.py``.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pyfused

_CONFIGS = {
    "lora": lambda: pyfused.LoraConfig(r=4, lora_alpha=13, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: pyfused.IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=[]),
    "bottleneck": lambda: pyfused.BottleneckConfig(mh_adapter=False, output_adapter=True, reduction_factor=4),
    "prompt": lambda: pyfused.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def _randomise(model: nn.Module, name: str) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    state = pyfused.get_peft_model_state_dict(model, adapter_name=name)
    for tensor in state.values():
        tensor.copy_(tensor + torch.randn(tensor.shape, generator=generator) / 5)


@pytest.fixture
def model(build) -> nn.Module:
    names = list(_CONFIGS)
    torch.manual_seed(3)
    model = pyfused.get_peft_model(build("llama"), _CONFIGS[names[0]](), names[0])
    for name in names[1:]:
        model.add_adapter(name, _CONFIGS[name]())
    with torch.no_grad():
        for name in names:
            _randomise(model, name)
    return model.eval()


@pytest.fixture
def logits(batch):
    return lambda model: model(**batch("llama")).logits.detach()


@pytest.mark.parametrize("name", _CONFIGS)
def test_one_of_them_is_that_adapter_alone(model, build, logits, tmp_path, name):
    model.set_adapter(name)
    trained = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(f".{name}" in key for key in trained)
    model.save_pretrained(tmp_path, selected_adapters=[name])
    alone = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / name, name)
    torch.testing.assert_close(logits(model), logits(alone))


def test_several_act_together(model, build, logits):
    model.set_adapter(["lora", "ia3", "bottleneck"])
    together = logits(model)
    for name in ("lora", "ia3", "bottleneck"):
        others = [other for other in ("lora", "ia3", "bottleneck") if other != name]
        model.set_adapter(others)
        assert not torch.allclose(logits(model), together)
    # LoRA and IA3 merged into the base, with the bottlenecks around it
    model.set_adapter(["lora", "ia3", "bottleneck"])
    model.merge_adapter(["lora", "ia3"])
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)


def test_files_of_each_go_into_one_model(model, build, logits, tmp_path):
    model.save_pretrained(tmp_path)
    names = list(_CONFIGS)
    other = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / names[0], names[0])
    for name in names[1:]:
        other.load_adapter(tmp_path / name, name)
    for active in ("ia3", ["bottleneck", "lora"], ["lora", "ia3", "prompt"]):
        model.set_adapter(active)
        other.set_adapter(active)
        torch.testing.assert_close(logits(other), logits(model))


def test_gradients_reach_all_that_are_active(model, batch):
    model.set_adapter(["lora", "ia3", "bottleneck", "prompt"])
    inputs = batch("llama")
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not missing
    frozen: list[Tensor | None] = [p.grad for p in model.parameters() if not p.requires_grad]
    assert all(grad is None for grad in frozen)


def test_deleting_one_leaves_the_others(model, logits):
    model.set_adapter("ia3")
    expected = logits(model)
    for name in ("lora", "bottleneck", "prompt"):
        model.delete_adapter(name)
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        base = logits(model)
    assert torch.equal(logits(model.unload()), base)
