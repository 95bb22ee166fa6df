"""A fused model looks like HF PEFT's to code that inspects it, and says what HF PEFT's says."""

from __future__ import annotations

import warnings

import pytest
import torch
from fused_pairs import assert_same, both
from peft.utils.hotswap import hotswap_adapter

from pyfused.integrations.hf_peft import fuse

TOLD = {
    "merged twice": lambda model, config: (model.merge_adapter(), model.merge_adapter()),
    "one more is merged": lambda model, config: (model.merge_adapter(), model.base_model.merge_adapter(["second"])),
    "merged under an unknown name": lambda model, config: model.merge_adapter(["unknown"]),
    "merging what is not finite": lambda model, config: (
        model.base_model.model.up.lora_A["default"].weight.data.fill_(float("nan")),
        model.merge_adapter(safe_merge=True),
    ),
    "unmerged without being merged": lambda model, config: model.unmerge_adapter(),
    "switched while merged": lambda model, config: (model.merge_adapter(), model.set_adapter("second")),
    "an unknown adapter": lambda model, config: model.set_adapter("unknown"),
    "a name that is taken": lambda model, config: model.add_adapter("second", config(["up"])),
    "another name's layers": lambda model, config: model.add_adapter("third", config(["nowhere"])),
    "a second bias": lambda model, config: model.add_adapter("third", config(["up"], bias="all")),
    "an unknown adapter deleted": lambda model, config: model.delete_adapter("unknown"),
    "the active adapter deleted": lambda model, config: model.delete_adapter("default"),
    "an active adapter in a mixed batch": lambda model, config: model.train()(
        torch.randn(2, 20), adapter_names=["a", "b"]
    ),
    "a mixed batch while merged": lambda model, config: (
        model.eval().merge_adapter(),
        model(torch.randn(2, 20), adapter_names=["default", "second"]),
    ),
    "no such scale": lambda model, config: model.base_model.model.up.set_scale("unknown", 2.0),
    "an input of another width": lambda model, config: model(torch.randn(5, 21)),
    "an input without a width": lambda model, config: model(torch.randn(())),
    "an input of integers": lambda model, config: model(torch.ones(5, 20, dtype=torch.int64)),
    "an input of another dtype": lambda model, config: model(torch.randn(5, 20, dtype=torch.float64)),
}


@pytest.mark.parametrize("action", TOLD.values(), ids=TOLD)
def test_warnings_and_errors_are_pefts(pair, lora_config, action):
    told = []
    for model in pair:
        error = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            try:
                action(model, lora_config)
            except Exception as raised:  # whichever it is: the other model's is to be the same
                error = (type(raised), str(raised))
        told.append((error, [(warning.category, str(warning.message)) for warning in caught]))
    assert told[0] == told[1]
    layers = [model.base_model.model.up for model in pair]
    for attribute in ("active_adapters", "merged_adapters", "merged", "scaling", "r", "lora_alpha", "disable_adapters"):
        assert getattr(layers[0], attribute) == getattr(layers[1], attribute), attribute
    assert repr(pair[0]) == repr(pair[1])


def test_load_adapter_after_fuse(pair, lora_config, x, tmp_path):
    pair[1].save_pretrained(tmp_path)
    results = [model.load_adapter(tmp_path / "second", "third") for model in pair]
    assert results[0] == results[1]
    both(pair, lambda model: model.set_adapter("third"))
    assert_same(pair, x)
    for model in pair:
        assert torch.equal(
            model.base_model.model.up.lora_A["third"].weight, model.base_model.model.up.lora_A["second"].weight
        )


def test_hotswap_in_place(two_linears, twins, x, tmp_path, calls):
    other = two_linears()
    other.save_pretrained(tmp_path)
    pair = twins(two_linears())
    fuse(pair[0])
    places, before = [parameter.data_ptr() for parameter in pair[0].parameters()], pair[0](x)
    both(pair, lambda model: hotswap_adapter(model, tmp_path, adapter_name="default"))
    assert [parameter.data_ptr() for parameter in pair[0].parameters()] == places
    assert_same(pair, x)
    assert not torch.allclose(pair[0](x), before)
    assert calls["lora_linear"] == 6
