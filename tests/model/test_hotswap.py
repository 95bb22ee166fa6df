"""``hotswap_adapter``: another adapter's weights under a name that is there, without compiling anew."""

from __future__ import annotations

import pytest
import torch
from lora_models import randomise

import pyfused

peft = pytest.importorskip("peft")

_OPTIONS = {"r": 6, "lora_alpha": 13, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture
def saved(build, tmp_path):
    """An adapter's folder, and the model that wrote it."""

    def make(library=pyfused, **options):
        model = library.get_peft_model(build("llama"), library.LoraConfig(**_OPTIONS | options))
        randomise(model, 7).save_pretrained(tmp_path / "new")
        return tmp_path / "new", model

    return make


@pytest.fixture
def model(wrap):
    return randomise(wrap(pyfused, "llama", **_OPTIONS), 1)


@pytest.mark.parametrize("library", [pyfused, peft], ids=["ours", "theirs"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"target_modules": ["q_proj"]},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ],
    ids=["same", "smaller", "fewer layers", "patterns"],
)
def test_the_new_adapters_results(model, batch, saved, library, options):
    folder, expected = saved(library, **options)
    places = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    flags = {name: tensor.requires_grad for name, tensor in model.named_parameters()}
    pyfused.hotswap_adapter(model, folder, "default")
    torch.testing.assert_close(model(**batch("llama")).logits, expected(**batch("llama")).logits)
    assert {name: tensor.data_ptr() for name, tensor in model.named_parameters()} == places
    assert {name: tensor.requires_grad for name, tensor in model.named_parameters()} == flags
    assert model.peft_config["default"].lora_alpha == expected.peft_config["default"].lora_alpha


@pytest.mark.parametrize("target_rank", [None, 9])
@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"target_modules": ["q_proj"], "r": 2},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 9}},
    ],
    ids=["smaller", "fewer layers", "patterns"],
)
def test_a_smaller_adapter_is_saved_and_combined(model, batch, build, saved, tmp_path, options, target_rank):
    """With the zeros that are there."""
    folder, expected = saved(**options)
    logits = expected(**batch("llama")).logits
    pyfused.prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
    pyfused.hotswap_adapter(model, folder, "default")
    model.save_pretrained(tmp_path / "again")
    for library in (pyfused, peft):
        loaded = library.PeftModel.from_pretrained(build("llama"), tmp_path / "again")
        torch.testing.assert_close(loaded(**batch("llama")).logits, logits, rtol=1e-4, atol=1e-5)
    model.add_weighted_adapter(["default"], [1.0], "sum", combination_type="linear")
    model.set_adapter("sum")
    torch.testing.assert_close(model(**batch("llama")).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "fits"),
    [
        ({"init_lora_weights": "pissa"}, {}, False),
        ({}, {"init_lora_weights": "olora"}, False),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa", "r": 3}, False),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}, True),
    ],
    ids=str,
)
def test_adapters_that_took_a_part_of_the_base(wrap, batch, saved, unchanged, old, new, fits):
    folder, expected = saved(**new)
    model = wrap(pyfused, "llama", **_OPTIONS | old)
    if fits:
        pyfused.hotswap_adapter(model, folder, "default")
        torch.testing.assert_close(model(**batch("llama")).logits, expected(**batch("llama")).logits)
        return
    with unchanged(model), pytest.raises(ValueError, match="they are for different base weights unless both took"):
        pyfused.hotswap_adapter(model, folder, "default")


def test_a_compiled_model_is_not_compiled_anew(build, batch, saved):
    torch.compiler.reset()
    model = randomise(pyfused.get_peft_model(build("llama"), pyfused.LoraConfig(**_OPTIONS)), 1)
    before = model(**batch("llama")).logits
    pyfused.prepare_model_for_compiled_hotswap(model, target_rank=9)
    torch.testing.assert_close(model(**batch("llama")).logits, before)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch("llama")).logits, before)
    for options in ({"r": 9, "lora_alpha": 3}, {"r": 4, "lora_alpha": 17, "use_rslora": True}):
        folder, expected = saved(**options)
        with torch._dynamo.config.patch(error_on_recompile=True):
            pyfused.hotswap_adapter(compiled, folder, "default")
            got = compiled(**batch("llama")).logits
        torch.testing.assert_close(got, expected(**batch("llama")).logits)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"v_proj": 2}}], ids=str)
def test_a_prepared_model_is_saved_and_merged(wrap, batch, tmp_path, build, options):
    model = randomise(wrap(pyfused, "llama", **_OPTIONS | options), 1)
    pyfused.prepare_model_for_compiled_hotswap(model, target_rank=8)
    expected = model(**batch("llama")).logits
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    torch.testing.assert_close(model(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)
    for library in (pyfused, peft):
        loaded = library.PeftModel.from_pretrained(build("llama"), tmp_path)
        assert loaded.peft_config["default"].r == 8
        torch.testing.assert_close(loaded(**batch("llama")).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 7}, "rank 7, and adapter 'default' has room for 6"),
        ({"target_modules": ["q_proj", "o_proj"]}, "layers that adapter 'default' has not: .*o_proj"),
        ({"use_dora": True}, "must be plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, r"has modules_to_save \(lm_head\)"),
    ],
)
def test_what_does_not_fit(model, saved, unchanged, options, message):
    folder, _ = saved(**options)
    with unchanged(model), pytest.raises(ValueError, match=message):
        pyfused.hotswap_adapter(model, folder, "default")


def test_no_room_beside_a_part_of_the_base(wrap, unchanged):
    """A file of a larger rank takes a larger part."""
    model = wrap(pyfused, "llama", **_OPTIONS, init_lora_weights="pissa")
    with unchanged(model), pytest.raises(ValueError, match="target_rank must be None or the rank of adapter 'default'"):
        pyfused.prepare_model_for_compiled_hotswap(model, target_rank=9)
    pyfused.prepare_model_for_compiled_hotswap(model, target_rank=6)


def test_wrong_calls(model, saved, unchanged):
    folder, _ = saved()
    with unchanged(model), pytest.raises(ValueError, match="'x' not found"):
        pyfused.hotswap_adapter(model, folder, "x")
    with unchanged(model), pytest.raises(ValueError, match="target_rank must be at least 6"):
        pyfused.prepare_model_for_compiled_hotswap(model, target_rank=4)
    model.merge_adapter()
    with unchanged(model), pytest.raises(ValueError, match="merged into the base"):
        pyfused.hotswap_adapter(model, folder, "default")
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        pyfused.prepare_model_for_compiled_hotswap(torch.compile(model))
