"""LoRA's forms with fields drawn at random: what HF PEFT makes of them, and what pyfused does."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lora_models import assert_close, assert_same_state, logits

import pyfused

TARGETS = {
    "gpt2": ["c_attn", "c_fc", "wpe", "c_proj"],
    "bert_cls": ["query", "dense", "word_embeddings", "position_embeddings"],
    "conv": ["c1", "c2", "c3", "c4", "head"],
}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(sorted(TARGETS)), form=st.sampled_from(["", "use_dora", "lora_bias"]))
def test_any_configuration(build, batch, data, name, form):
    targets = data.draw(st.lists(st.sampled_from(TARGETS[name]), min_size=1, unique=True))
    inits = [True, False] if form == "lora_bias" else [True, False, "gaussian"]
    options = {
        "target_modules": targets,
        "r": data.draw(st.integers(1, 5)),
        "lora_alpha": data.draw(st.floats(0.5, 20.0)),
        "use_rslora": data.draw(st.booleans()),
        "init_lora_weights": data.draw(st.sampled_from(inits)),
        "rank_pattern": data.draw(st.dictionaries(st.sampled_from(targets), st.integers(1, 4), max_size=2)),
        "fan_in_fan_out": data.draw(st.booleans()),
    } | ({form: True} if form else {})
    models = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in (peft, pyfused):
            base = build(name)
            torch.manual_seed(3)
            try:
                models.append(library.get_peft_model(base, library.LoraConfig(**options)))
            except ValueError as error:
                assert "lora_bias" in str(error) and any("embeddings" in t or t == "wpe" for t in targets)
    if not models:
        return
    theirs, ours = models
    assert_same_state(ours, theirs)
    results = [logits(model.eval(), batch(name)) for model in models]
    assert_close(results[1], results[0], tolerance=1e-4)
    trained = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in models]
    grads = [
        torch.autograd.grad(result.square().mean(), list(parameters.values()))
        for result, parameters in zip(results, trained, strict=True)
    ]
    largest = max(grad.abs().max().item() for grad in grads[0])
    for key, theirs_grad, grad in zip(trained[0], *grads, strict=True):
        assert (grad - theirs_grad).abs().max() <= 1e-4 * max(largest, 1e-6), key


def test_what_is_drawn_is_what_there_is(build):
    for name, targets in TARGETS.items():
        names = [module for module, _ in build(name).named_modules()]
        assert all(any(module.rpartition(".")[2] == target for module in names) for target in targets)


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_all_forms_at_once_survive_a_file(build, batch, name, tmp_path):
    """Plain, DoRA and rsLoRA adapters next to each other in one model, each to its file and back."""
    kinds = {"default": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"target_modules": TARGETS[name], "r": 4, "init_lora_weights": False}
        model = pyfused.get_peft_model(build(name), pyfused.LoraConfig(**options))
        for kind, fields in list(kinds.items())[1:]:
            model.add_adapter(kind, pyfused.LoraConfig(**options, **fields))
        model.save_pretrained(tmp_path)
        for kind in kinds:
            model.set_adapter(kind)
            folder = tmp_path if kind == "default" else tmp_path / kind
            loaded = pyfused.PeftModel.from_pretrained(build(name), folder)
            assert_close(logits(loaded, batch(name)), logits(model.eval(), batch(name)), kind)
