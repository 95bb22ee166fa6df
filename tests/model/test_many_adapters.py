"""What a model with many adapters must not pay for: walks over all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

import pyfused

OPTIONS = {"r": 2, "target_modules": "all-linear"}


def calls_of(function: Callable[[], object]) -> int:
    """How many Python functions are called by it."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_loading_does_not_walk_over_the_adapters_that_are_there(build, tmp_path, modules_to_save):
    config = pyfused.LoraConfig(**OPTIONS, modules_to_save=modules_to_save)
    model = pyfused.get_peft_model(build("llama"), config).eval()
    model.save_pretrained(tmp_path)
    counts = []
    for others in (2, 30):
        for index in range(others):
            model.add_adapter(f"{others}-{index}", config)
        model.load_adapter(tmp_path, f"first of {others}")
        counts.append(calls_of(lambda others=others: model.load_adapter(tmp_path, f"second of {others}")))
    # A function for each of the 30 and of the 21 layers would be 630 more.
    assert counts[1] - counts[0] < 300, counts
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("trains", ["all", "a layer", "none"])
def test_loading_puts_the_model_into_evaluation_mode(build, tmp_path, trains):
    model = pyfused.get_peft_model(build("llama"), pyfused.LoraConfig(**OPTIONS, lora_dropout=0.1))
    model.save_pretrained(tmp_path)
    model.train(trains == "all")
    if trains == "a layer":
        model.base_model.layers.of("default")["model.layers.1.mlp.up_proj"].train()
    model.load_adapter(tmp_path, "other")
    assert not any(module.training for module in model.modules())
