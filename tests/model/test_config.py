"""LoraConfig: HF PEFT's fields, defaults and files; values that are refused, each by its name."""

from __future__ import annotations

import json

import peft
import pytest

import pyfused
from pyfused.config import PEFT_VERSION


def test_fields_and_defaults_are_those_of_hf_peft():
    assert peft.__version__ == PEFT_VERSION
    assert pyfused.LoraConfig().to_dict() == peft.LoraConfig().to_dict()
    assert pyfused.PeftConfig().to_dict() == peft.PeftConfig().to_dict()
    assert list(pyfused.TaskType) == list(peft.TaskType)


@pytest.mark.parametrize("library", [peft, pyfused], ids=["peft", "pyfused"])
def test_files_go_both_ways(tmp_path, library):
    options = {"r": 3, "target_modules": ["b", "a"], "rank_pattern": {"a": 2}, "task_type": "SEQ_CLS", "revision": "x"}
    library.LoraConfig(**options).save_pretrained(tmp_path)
    loaded = [other.PeftConfig.from_pretrained(tmp_path) for other in (peft, pyfused)]
    assert isinstance(loaded[1], pyfused.LoraConfig)
    assert loaded[0].to_dict() == loaded[1].to_dict()
    assert loaded[1].target_modules == {"a", "b"} and loaded[1].task_type is pyfused.TaskType.SEQ_CLS
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert pyfused.LoraConfig.from_pretrained(tmp_path) == loaded[1]


def test_the_order_of_patterns_stays(tmp_path):
    """The first that matches a layer counts; HF PEFT's files have them sorted."""
    pyfused.LoraConfig(target_modules=["a"], alpha_pattern={"b.a": 3, "a": 2}).save_pretrained(tmp_path)
    for library in (peft, pyfused):
        assert list(library.LoraConfig.from_pretrained(tmp_path).alpha_pattern) == ["b.a", "a"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": -3}, ValueError, "r must be at least 1, got -3"),
        ({"r": 2.5}, TypeError, "r must be an integer, got 2.5"),
        ({"r": True}, TypeError, "r must be an integer, got True"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number, got '8'"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"lora_dropout": float("nan")}, ValueError, r"lora_dropout must be in \[0, 1\), got nan"),
        ({"lora_dropout": None}, TypeError, "lora_dropout must be a number, got None"),
        ({"bias": "some"}, ValueError, "bias must be 'none', 'all' or 'lora_only', got 'some'"),
        ({"task_type": "CHESS"}, ValueError, "task_type must be one of SEQ_CLS, .*got 'CHESS'"),
        ({"peft_type": "IA3"}, ValueError, "peft_type must be 'LORA' in LoraConfig, got 'IA3'"),
        ({"target_modules": "(x"}, ValueError, r"target_modules: '\(x' is no valid regular expression"),
        ({"exclude_modules": "*"}, ValueError, "exclude_modules: '\\*' is no valid regular expression"),
        ({"target_modules": [1]}, TypeError, "target_modules must be a list of strings, got 1 in it"),
        ({"target_modules": 1}, TypeError, "target_modules must be a list of strings, got 1"),
        ({"modules_to_save": "score"}, TypeError, "modules_to_save must be a list of strings, got 'score'"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be an integer or a list of integers"),
        ({"layers_to_transform": [1.5]}, TypeError, "layers_to_transform must be an integer or a list of integers"),
        (
            {"target_modules": "x", "layers_to_transform": 1},
            ValueError,
            "layers_to_transform cannot be used when .* a str",
        ),
        ({"target_modules": "x", "layers_pattern": "h"}, ValueError, "layers_pattern cannot be used when .* a str"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform must also be specified"),
        (
            {"layers_pattern": "(", "layers_to_transform": 1},
            ValueError,
            "layers_pattern: .* no valid regular expression",
        ),
        ({"rank_pattern": {"q": 0}}, ValueError, "rank_pattern must map to integers of at least 1, got 0 for 'q'"),
        ({"rank_pattern": {"(": 1}}, ValueError, "rank_pattern: '\\(' is no valid regular expression"),
        ({"rank_pattern": ["q"]}, TypeError, "rank_pattern must be a dict"),
        ({"alpha_pattern": {"q": "1"}}, TypeError, "alpha_pattern must map to numbers, got '1' for 'q'"),
        (
            {"init_lora_weights": "zeros"},
            ValueError,
            "init_lora_weights must be True, .*, got 'zeros'",
        ),
        ({"init_lora_weights": None}, ValueError, "init_lora_weights must be True, .*, got None"),
        ({"no_such_field": 1}, TypeError, "no_such_field"),
    ],
)
def test_wrong_values(options, error, message):
    with pytest.raises(error, match=message):
        pyfused.LoraConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["w"]},
        {"layer_replication": [(0, 1)]},
        {"trainable_token_indices": [1]},
        {"alora_invocation_tokens": [1]},
        {"megatron_config": {"a": 1}},
        {"loftq_config": {"loftq_bits": 4}},
        {"eva_config": {"rho": 1}},
        {"corda_config": {"a": 1}},
        {"lora_ga_config": {"a": 1}},
        {"velora_config": {"a": 1}},
        {"monteclora_config": {"a": 1}},
        {"use_qalora": True},
        {"use_bdlora": {"a": 1}},
        {"arrow_config": {"a": 1}},
        {"kasa_config": {"a": 1}},
        {"ensure_weight_tying": True},
        *({"init_lora_weights": name} for name in ("corda", "loftq", "mica", "lora_ga")),
    ],
    ids=str,
)
def test_what_is_not_built_is_named(options):
    with pytest.raises(NotImplementedError, match=next(iter(options))):
        pyfused.LoraConfig(**options)


def test_every_field_of_hf_peft_is_known():
    """A field at a value other than its default is either built, refused, or means nothing on its own."""
    inert = {"megatron_core", "qalora_group_size"}
    for name in inert:
        pyfused.LoraConfig(**{name: 32})
    assert set(pyfused.LoraConfig().to_dict()) >= inert


def test_saving_over_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="save_directory must be a folder"):
        pyfused.LoraConfig().save_pretrained(tmp_path / "file")


def test_values_set_later_are_checked(wrap):
    config = pyfused.LoraConfig(target_modules=["up"])
    config.r = 0
    with pytest.raises(ValueError, match="r must be at least 1, got 0"):
        pyfused.get_peft_model(wrap(pyfused, "plain", target_modules=["up"]).unload(), config)
