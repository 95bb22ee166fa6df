"""One adapter for each sample of a batch: parity with HF PEFT, each sample against its adapter alone, errors."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import transformers
from helpers import OWN_NARROW_PRODUCTS, run_in_threads
from torch import nn

import pyfused
from pyfused.nn.by_row import RowAdapters

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "plain": ["up", "head"],
    "llama": LLAMA,
    "bert": ["query", "value", "dense"],
    "t5": ["q", "v", "wi", "wo"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}
NAMES = ["other", "__base__", "default", "small", "other", "default"]


def add_adapters(model: nn.Module, library, targets: list[str], **options) -> nn.Module:
    """Two more adapters: another rank and scale, and one on the first kind of target only."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = {"init_lora_weights": False, **options}
        model.add_adapter("other", library.LoraConfig(r=3, lora_alpha=17, target_modules=targets, **config))
        model.add_adapter("small", library.LoraConfig(r=1, lora_alpha=2, target_modules=targets[:1], **config))
    return model.eval()


def repeat(inputs: dict, count: int) -> dict:
    return {key: torch.cat([value] * count)[:count] for key, value in inputs.items()}


def output(model: nn.Module, inputs: dict, **options) -> torch.Tensor:
    result = model(**inputs, **options)
    return result if isinstance(result, torch.Tensor) else result[0]


@pytest.fixture
def models(pair):
    def make(name: str, **options):
        theirs, ours = pair(name, target_modules=MODELS[name], init_lora_weights=False, **options)
        return add_adapters(theirs, peft, MODELS[name]), add_adapters(ours, pyfused, MODELS[name])

    return make


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_hf_pefts(models, batch, name):
    theirs, ours = models(name)
    inputs = repeat(batch(name), len(NAMES))
    with torch.no_grad():
        got, expected = (output(model, inputs, adapter_names=NAMES) for model in (ours, theirs))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_sample_has_its_adapter(wrap, batch, name, dtype):
    model = add_adapters(
        wrap(pyfused, name, dtype, target_modules=MODELS[name], init_lora_weights=False), pyfused, MODELS[name]
    )
    inputs = repeat(batch(name), len(NAMES))
    if name == "plain":
        inputs = {key: value.to(dtype) for key, value in inputs.items()}
    with torch.no_grad():
        mixed = output(model, inputs, adapter_names=NAMES)
        for adapter in set(NAMES):
            if adapter == "__base__":
                with model.disable_adapter():
                    alone = output(model, inputs)
            else:
                model.set_adapter(adapter)
                alone = output(model, inputs)
            chosen = [row for row, one in enumerate(NAMES) if one == adapter]
            room = 1e-5 if dtype == torch.float32 else 2e-2
            # a row alone goes through a product of ours, among others through torch's: a rounding of the largest more
            other_order = OWN_NARROW_PRODUCTS and dtype == torch.bfloat16
            more = torch.finfo(dtype).eps * alone.abs().max().item() if other_order else 0.0
            torch.testing.assert_close(mixed[chosen], alone[chosen], rtol=room, atol=room + more)
        with model.disable_adapter():
            assert torch.equal(output(model, inputs, adapter_names=NAMES), output(model, inputs))


def test_samples_without_an_adapter_have_the_bases_bits(wrap, build, batch):
    model = add_adapters(wrap(pyfused, "llama", target_modules=LLAMA, init_lora_weights=False), pyfused, LLAMA)
    inputs = repeat(batch("llama"), 4)
    with torch.no_grad():
        mixed = output(model, inputs, adapter_names=["__base__", "other", "__base__", "default"])
        base = output(build("llama").eval(), inputs)
    assert torch.equal(mixed[::2], base[::2])


def test_layers_of_one_x_are_one_call(wrap, batch, monkeypatch):
    model = add_adapters(wrap(pyfused, "llama", target_modules=LLAMA, init_lora_weights=False), pyfused, LLAMA)
    sizes, original = [], pyfused.ops.multi_lora_

    def spy(y, *arguments):
        sizes.append(1 if isinstance(y, torch.Tensor) else len(y))
        return original(y, *arguments)

    monkeypatch.setattr(pyfused.ops, "multi_lora_", spy)
    inputs = repeat(batch("llama"), len(NAMES))
    with torch.no_grad():
        shared = output(model, inputs, adapter_names=NAMES)
        assert sizes == [3, 1, 2, 1] * 3
        for module in model.modules():
            if getattr(module, "_shared_input", None) is not None:
                module._shared_input = None
        assert torch.equal(output(model, inputs, adapter_names=NAMES), shared)
    assert sizes[12:] == [1] * 21


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_other_forms(wrap, batch, options):
    model = wrap(pyfused, "llama", target_modules=LLAMA, init_lora_weights=False, **options)
    model = add_adapters(model, pyfused, LLAMA)
    inputs = repeat(batch("llama"), len(NAMES))
    with torch.no_grad():
        mixed = output(model, inputs, adapter_names=NAMES)
        for adapter in ("default", "other"):
            model.set_adapter(adapter)
            chosen = [row for row, one in enumerate(NAMES) if one == adapter]
            torch.testing.assert_close(mixed[chosen], output(model, inputs)[chosen], rtol=1e-5, atol=1e-5)


def test_embeddings_and_whole_modules(pair, batch):
    targets = ["query", "word_embeddings"]
    theirs, ours = pair("bert_cls", target_modules=targets, init_lora_weights=False, modules_to_save=["classifier"])
    inputs, results = repeat(batch("bert_cls"), 4), []
    for model, library in ((ours, pyfused), (theirs, peft)):
        add_adapters(model, library, targets, modules_to_save=["classifier"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "classifier.modules_to_save.other" in name:
                    parameter.add_(1.0)
            results.append(output(model, inputs, adapter_names=["other", "__base__", "default", "other"]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["greedy", "beams", "several beams", "samples"],
)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generate(models, batch, name, options):
    theirs, ours = models(name)
    names = ["other", "__base__", "default"]
    inputs = {key: value for key, value in repeat(batch(name), 3).items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 6, "pad_token_id": 0} | options
    results = []
    for model in (ours, theirs):
        if model is theirs and options.get("do_sample"):
            # HF PEFT does not repeat names for returned sequences: repeated inputs say the same.
            inputs = {key: value.repeat_interleave(3, 0) for key, value in inputs.items()}
            names = [each for each in names for _ in range(3)]
            del options["num_return_sequences"]
        torch.manual_seed(0)
        results.append(model.generate(**inputs, adapter_names=names, **options))
    assert torch.equal(*results)


def test_beams_of_a_generation_config(models, batch):
    _, ours = models("llama")
    config = copy.deepcopy(ours.get_base_model().generation_config)
    config.num_beams, config.max_new_tokens, config.pad_token_id = 3, 4, 0
    inputs, names = batch("llama"), ["other", "default"]
    expected = ours.generate(**inputs, adapter_names=names, num_beams=3, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(ours.generate(**inputs, adapter_names=names, generation_config=config), expected)
    ours.generation_config = config
    assert torch.equal(ours.generate(**inputs, adapter_names=names), expected)


def test_beams_of_the_models_generation_config_beside_another(models, batch):
    _, ours = models("llama")
    names, options = ["other", "default"], {"max_new_tokens": 4, "pad_token_id": 0}
    inputs = batch("llama")
    expected = ours.generate(**inputs, adapter_names=names, num_beams=3, **options)
    ours.get_base_model().generation_config.num_beams = 3
    config = transformers.GenerationConfig(**options)
    assert torch.equal(ours.generate(**inputs, adapter_names=names, generation_config=config), expected)


@pytest.mark.parametrize("copies", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_names_are_for_prompts_and_not_for_their_copies(models, batch, name, copies):
    _, ours = models(name)
    ids = batch(name)["input_ids"]
    embeds = ours.get_input_embeddings()(ids)
    encoded = ours.get_encoder()(ids) if name == "t5" else None
    names = ["other", "default"] * 2
    given = [{"inputs": ids}, {"input_ids": ids}, {"inputs_embeds": embeds}, {"encoder_outputs": encoded}]
    for inputs in given[: 4 if name == "t5" else 3]:
        with pytest.raises(ValueError, match="one name for each of the 2 samples, got 4"):
            ours.generate(**inputs, adapter_names=names, max_new_tokens=2, pad_token_id=0, **copies)
    with pytest.raises(ValueError, match="one name for each of the 1 samples, got 2"):
        ours.generate(adapter_names=names[:2], max_new_tokens=2, pad_token_id=0, **copies)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_beams_are_those_of_each_prompt_alone(models, batch, name, options):
    _, ours = models(name)
    names, ids = ["other", "__base__", "default"], repeat(batch(name), 3)["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None} | options
    together = ours.generate(ids, adapter_names=names, **options).chunk(3)
    for row, adapter in enumerate(names):
        assert torch.equal(together[row], ours.generate(ids[row : row + 1], adapter_names=[adapter], **options))


def test_training_together_is_training_apart(wrap, batch):
    model = wrap(pyfused, "llama", target_modules=LLAMA, init_lora_weights=False).double()
    model = add_adapters(model, pyfused, LLAMA).train()
    model.set_requires_grad(["default", "other", "small"])
    inputs = repeat(batch("llama"), len(NAMES))
    result = output(model, inputs, adapter_names=NAMES)
    weights = torch.randn_like(result)
    (result * weights).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for adapter in ("default", "other", "small"):
        model.zero_grad()
        model.set_adapter(adapter)
        chosen = [row for row, one in enumerate(NAMES) if one == adapter]
        alone = {key: value[chosen] for key, value in inputs.items()}
        (output(model, alone) * weights[chosen]).sum().backward()
        apart = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert apart and all(f".{adapter}." in name for name in apart)
        for name, grad in apart.items():
            torch.testing.assert_close(together[name], grad, msg=name)


def test_weights_that_changed_count(models, batch):
    """Values written in place, and parameters that were replaced."""
    _, ours = models("llama")
    inputs, names = batch("llama"), ["other", "default"]
    with torch.no_grad():
        output(ours, inputs, adapter_names=names)
        for name, parameter in ours.named_parameters():
            if "lora_B.other" in name:
                parameter.mul_(2.0)
        for replace in (lambda: None, lambda: ours.double().float(), lambda: copy.deepcopy(ours)):
            model = replace() or ours
            mixed = output(model, inputs, adapter_names=names)
            model.set_adapter("other")
            torch.testing.assert_close(mixed[:1], output(model, inputs)[:1], rtol=1e-5, atol=1e-5)


def test_ranks_that_were_cut_off_do_not_count(models, batch):
    """Factors whose first ranks stay where they were."""
    _, ours = models("llama")
    inputs, names = batch("llama"), ["other", "default"]
    with torch.no_grad():
        output(ours, inputs, adapter_names=names)
        for layer in ours.base_model.layers.of("other").values():
            a, b = layer.lora_A["other"].weight, layer.lora_B["other"].weight
            a.data, b.data = a.data[:1], b.data[:, :1]
        mixed = output(ours, inputs, adapter_names=names)
        ours.set_adapter("other")
        torch.testing.assert_close(mixed[:1], output(ours, inputs)[:1], rtol=1e-5, atol=1e-5)


def test_threads_do_not_see_each_others_names(models, batch):
    _, ours = models("llama")
    inputs = batch("llama")
    cases = [["other", "default"], ["default", "__base__"], ["__base__", "other"], None]
    with torch.no_grad():
        expected = [output(ours, inputs, adapter_names=names) for names in cases]
    wrong = []

    def call(names, result):
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(output(ours, inputs, adapter_names=names), result):
                    wrong.append(names)

    run_in_threads(call, zip(cases, expected, strict=True))
    assert not wrong


def test_the_active_adapters_are_as_before(models, batch):
    _, ours = models("llama")
    inputs = batch("llama")
    with torch.no_grad():
        before = output(ours, inputs)
        output(ours, inputs, adapter_names=["other", "small"])
        with pytest.raises(ValueError, match="one name for each"):
            ours(**inputs, adapter_names=["other"])
        assert torch.equal(output(ours, inputs), before)
        assert torch.equal(output(ours, inputs, adapter_names=None), before)


@pytest.mark.parametrize("method", ["forward", "generate"])
@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("default", TypeError, "adapter_names must be a list of names, got str"),
        (["default", "missing"], ValueError, r"no adapters \['missing'\], there are \['default', 'other', 'small'\]"),
        (["default", None], ValueError, r"no adapters \[None\]"),
        (["default"], ValueError, "one name for each of the 2 samples, got 1"),
        (["default"] * 3, ValueError, "one name for each of the 2 samples, got 3"),
        ([], ValueError, "one name for each of the 2 samples, got 0"),
    ],
)
def test_errors(models, batch, method, names, error, message):
    _, ours = models("llama")
    with pytest.raises(error, match=message):
        getattr(ours, method)(**batch("llama"), adapter_names=names)


def test_many_names_are_sorted_into_groups():
    names = [f"a{row % 5}" if row % 3 else "__base__" for row in range(40)]
    rows, x = RowAdapters(names, [], 2), torch.zeros(80, 1)
    repeated = [name for name in names for _ in range(2)]
    assert [-1 if name == "__base__" else int(name[1:]) for name in repeated] == rows.index(x).tolist()
    assert list(rows.groups(x)) == sorted(set(names))
    for name, group in rows.groups(x).items():
        assert group.tolist() == [row for row, other in enumerate(repeated) if other == name]


def test_merged_adapters(models, batch):
    _, ours = models("llama")
    ours.merge_adapter()
    with pytest.raises(ValueError, match=r"\['default'\] are merged, call unmerge_adapter first"):
        ours(**batch("llama"), adapter_names=["default", "other"])


def test_methods_without_it(build, batch):
    config = pyfused.LoraConfig(target_modules=["c2", "head"])
    model = pyfused.get_peft_model(build("conv"), config)
    with pytest.raises(NotImplementedError, match=r"adapter_names: not built for LoraConv \(c2\)"):
        model(**batch("conv"), adapter_names=["default", "__base__"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_one_adapter_in_a_small_batch(wrap, fused_calls, dtype):
    """It runs on the op for one adapter, with the bits that it has beside others."""
    model = wrap(pyfused, "llama", dtype, target_modules=LLAMA, init_lora_weights=False)
    model = add_adapters(model, pyfused, LLAMA)
    ids = torch.tensor([[5], [9]])
    mixed = model(ids, adapter_names=["other", "default"]).logits
    assert fused_calls["lora_linear"] == 0
    alone = model(ids[[0, 0]], adapter_names=["other", "other"]).logits
    assert fused_calls["lora_linear"] == 7 * 3
    assert torch.equal(alone[:1], mixed[:1])
    fused_calls["lora_linear"] = 0
    model(ids, adapter_names=["small", "__base__"])
    model(ids.repeat(1, 9), adapter_names=["small", "small"])  # more rows than the loops agree on
    assert fused_calls["lora_linear"] == 0
    with pytest.raises(ValueError, match="one name for each of the 2 samples, got 1"):
        model(ids, adapter_names=["other"])
