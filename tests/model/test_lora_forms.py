"""LoRA's forms in whole models, against HF PEFT: outputs, gradients, steps of training, merging, several adapters."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from lora_models import assert_close, assert_same_state, logits
from torch import nn

import pyfused

LIBRARIES = (peft, pyfused)
GPT2 = ["c_attn", "c_fc", "c_proj"]
FORMS = {
    "conv1d": ("gpt2", {"target_modules": GPT2}),
    "conv1d_rslora": ("gpt2", {"target_modules": GPT2, "use_rslora": True, "fan_in_fan_out": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_padding": ("bert_cls", {"target_modules": ["word_embeddings"]}),
    "embedding_gpt2": ("gpt2", {"target_modules": ["wpe", "c_attn"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "dora_bert": ("bert_cls", {"target_modules": ["query", "dense", "word_embeddings"], "use_dora": True}),
    "dora_conv1d": ("gpt2", {"target_modules": GPT2, "use_dora": True}),
    "dora_t5": ("t5", {"target_modules": ["q", "v"], "use_dora": True, "use_rslora": True}),
    "lora_bias": ("bert_cls", {"target_modules": ["query", "dense"], "lora_bias": True}),
    "conv": ("conv", {"target_modules": ["c1", "c2", "c3", "c4", "head"]}),
    "dora_conv": ("conv", {"target_modules": ["c1", "c2", "c3", "c4"], "use_dora": True}),
    "lora_bias_conv": ("conv", {"target_modules": ["c1", "c3", "c4"], "lora_bias": True}),
    # Not c_attn: attention does not see a bias of its keys, and the gradient there is noise.
    "lora_bias_conv1d": ("gpt2", {"target_modules": ["c_fc", "c_proj"], "lora_bias": True}),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
forms = pytest.mark.parametrize(("name", "options"), FORMS.values(), ids=FORMS)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("init", [True, False])
def test_initial_state(pair, name, options, dtype, init):
    theirs, ours = pair(name, dtype, **options, init_lora_weights=init)
    assert_same_state(ours, theirs)
    assert trained(ours).keys() == trained(theirs).keys()
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()


@forms
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_outputs_and_gradients(pair, batch, name, options, train):
    models = pair(name, init_lora_weights=False, **options)
    outputs = []
    for model in models:
        outputs.append(logits(model.train(train), batch(name)))
        outputs[-1].square().mean().backward()
    assert_close(outputs[1], outputs[0], "logits")
    theirs, ours = map(trained, models)
    for key, parameter in theirs.items():
        assert_close(ours[key].grad, parameter.grad, key, 1e-4)


@forms
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_three_steps(pair, batch, name, options, optimizer):
    """In fp64: where a gradient is close to zero AdamW divides it by itself, and enlarges what fp32 has rounded."""
    models = [model.double() for model in pair(name, init_lora_weights=False, **options)]
    for model in models:
        steps = optimizer(trained(model).values(), lr=0.01)
        for _ in range(3):
            steps.zero_grad()
            logits(model.train(), batch(name)).square().mean().backward()
            steps.step()
    theirs, ours = map(trained, models)
    for key, parameter in theirs.items():
        assert_close(ours[key], parameter, key, 1e-9)
    theirs, ours = (logits(model.eval(), batch(name)) for model in models)
    assert_close(ours, theirs, "logits", 1e-4)


@forms
def test_fp32_adapters_on_a_bf16_base(pair, batch, name, options):
    theirs, ours = pair(name, torch.bfloat16, init_lora_weights=False, **options)
    exact = logits(copy.deepcopy(theirs).double(), batch(name))
    errors = []
    for model in (ours, theirs):
        result = logits(model, batch(name))
        assert result.dtype == torch.bfloat16
        errors.append((result.double() - exact).abs().max())
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps * exact.abs().max()


@forms
def test_merging(pair, batch, name, options):
    models = pair(name, init_lora_weights=False, **options)
    theirs, ours = models
    before = logits(ours.eval(), batch(name))
    for model in models:
        model.merge_adapter()
    for (key, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(got, expected, key, 1e-6)
    assert_close(logits(ours, batch(name)), before, "merged", 1e-4)
    for model in models:
        model.unmerge_adapter()
    for (key, got), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert_close(got, expected, key, 1e-6)
    assert_close(logits(ours, batch(name)), before, "unmerged", 1e-4)
    merged = ours.merge_and_unload(safe_merge=True)
    assert_close(logits(merged, batch(name)), before, "unloaded", 1e-4)
    assert not any(type(module).__module__.startswith("pyfused") for module in merged.modules())


@forms
def test_several_adapters(pair, batch, name, options):
    models = pair(name, init_lora_weights=False, **options)
    for library, model in zip(LIBRARIES, models, strict=True):
        torch.manual_seed(4)
        other = {**options, "r": 4, "lora_alpha": 7, "init_lora_weights": False}
        model.add_adapter("other", library.LoraConfig(**other))
    theirs, ours = models
    assert_same_state(ours, theirs)
    for names in (["other"], ["default", "other"], ["other", "default"]):
        for model in models:
            model.base_model.set_adapter(names)
        assert_close(logits(ours, batch(name)), logits(theirs, batch(name)), str(names), 1e-4)
        assert trained(ours).keys() == trained(theirs).keys()
    with ours.disable_adapter():
        base = logits(ours, batch(name))
    with theirs.disable_adapter():
        assert_close(base, logits(theirs, batch(name)))
    for model in models:
        model.delete_adapter("other")
    assert_same_state(ours, theirs)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fan_in_fan_out_is_corrected(build, name, fan_in_fan_out):
    targets = {"gpt2": ["c_attn"], "llama": ["q_proj"]}[name]
    told = []
    for library in LIBRARIES:
        config = library.LoraConfig(target_modules=targets, fan_in_fan_out=fan_in_fan_out)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = library.get_peft_model(build(name), config)
        told.append(any("fan_in_fan_out" in str(item.message) for item in caught))
        assert model.peft_config["default"].fan_in_fan_out is (name == "gpt2")
    assert told == [fan_in_fan_out is not (name == "gpt2")] * 2


def test_a_bias_where_the_layer_has_none_is_told(build):
    config = pyfused.LoraConfig(target_modules=["q_proj"], lora_bias=True)
    with pytest.warns(UserWarning, match="cannot be merged into them: model.layers.0.self_attn.q_proj"):
        model = pyfused.get_peft_model(build("llama"), config)
    with pytest.raises(RuntimeError, match="impossible to merge adapter 'default', which has lora_bias=True"):
        model.merge_adapter()
