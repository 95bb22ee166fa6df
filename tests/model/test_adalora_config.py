"""AdaLoraConfig: fields, defaults, and what is refused."""

from __future__ import annotations

import peft
import pytest
from adalora_cases import OPTIONS
from torch import nn

import pyfused
from pyfused import AdaLoraConfig


def test_default_targets_are_those_of_hf_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as THEIRS

    from pyfused.methods.adalora import _TARGETS

    assert _TARGETS == THEIRS


def test_fields_and_defaults_are_those_of_hf_peft():
    assert AdaLoraConfig(total_step=10).to_dict() == peft.AdaLoraConfig(total_step=10).to_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_step": None}, ValueError, "total_step: AdaLoRA needs the number of steps"),
        ({"total_step": 0}, ValueError, "total_step must be at least 1, got 0"),
        ({"total_step": 2.5}, TypeError, "total_step must be an integer, got 2.5"),
        ({"tinit": 7, "tfinal": 3}, ValueError, "tinit must be less than total_step - tfinal"),
        ({"deltaT": 0}, ValueError, "deltaT must be at least 1, got 0"),
        ({"init_r": -1}, ValueError, "init_r must be at least 0, got -1"),
        ({"target_r": True}, TypeError, "target_r must be an integer, got True"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"beta2": "0.5"}, TypeError, "beta2 must be a number, got '0.5'"),
        ({"orth_reg_weight": -0.1}, ValueError, "orth_reg_weight must be at least 0, got -0.1"),
        ({"use_dora": True}, ValueError, "use_dora: AdaLoRA does not support DoRA"),
        ({"loftq_config": {"loftq_bits": 4}}, ValueError, "loftq_config: AdaLoRA does not support LoftQ"),
        ({"lora_bias": True}, ValueError, "lora_bias: AdaLoRA has no bias"),
        ({"rank_pattern": {"a": 3}}, TypeError, "rank_pattern must map names to lists of True and False"),
        ({"rank_pattern": [True]}, TypeError, "rank_pattern must be a dict or None, got list"),
        ({"layer_replication": [(0, 1)]}, NotImplementedError, "layer_replication"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be True or False in AdaLoRA, got 'pissa'"),
        ({"peft_type": "LORA"}, ValueError, "peft_type must be 'ADALORA' in AdaLoraConfig, got 'LORA'"),
    ],
    ids=str,
)
def test_config_errors(options, error, message):
    with pytest.raises(error, match=message):
        AdaLoraConfig(**({"total_step": 10} | options))


@pytest.mark.parametrize("options", [{"r": 4}, {"use_rslora": True}, {"alpha_pattern": {"q": 1}}], ids=str)
def test_fields_that_mean_nothing_are_named(options):
    with pytest.warns(UserWarning, match=f"without a meaning in AdaLoRA: {next(iter(options))}"):
        AdaLoraConfig(total_step=10, **options)


def test_what_does_not_fit_the_model(build, unchanged):
    model = build("plain")
    options = OPTIONS | {"task_type": "CAUSAL_LM"}
    with unchanged(model), pytest.raises(ValueError, match=r"'act' is not supported: .*got Tanh"):
        pyfused.get_peft_model(model, AdaLoraConfig(**options, target_modules=["act"]))
    with pytest.raises(NotImplementedError, match="AdaLoRA on Conv2d is not built yet"):
        pyfused.get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), AdaLoraConfig(**options, target_modules=["0"]))
