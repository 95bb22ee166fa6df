"""``add_weighted_adapter`` against HF PEFT's, and against the sum that it stands for."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from torch import nn

import pyfused

_WEIGHTS = [0.7, -0.4]


def _lora(library, rank: int = 4, **options):
    return library.LoraConfig(**{"r": rank, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"]} | options)


def _ia3(library, **options):
    return library.IA3Config(
        **{"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]} | options
    )


def _two(library, build, first, second) -> nn.Module:
    """A Llama with adapters "first" and "second" of random weights."""
    model = library.get_peft_model(build("llama"), first, "first")
    model.add_adapter("second", second)
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if ".first" in key or ".second" in key:
                generator = torch.Generator().manual_seed(sum(map(ord, key)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


def _tensors(library, model: nn.Module, name: str = "sum") -> dict:
    return library.get_peft_model_state_dict(model, adapter_name=name)


def _products(tensors: dict) -> dict:
    return {key: tensors[key.replace("lora_A", "lora_B")] @ a for key, a in tensors.items() if "lora_A" in key}


@pytest.mark.parametrize(
    ("kind", "ranks"), [("linear", (4, 4)), ("cat", (4, 3)), ("svd", (4, 3)), (None, (4, 3))], ids=str
)
@pytest.mark.parametrize("targets", ["set", "pattern"])
def test_lora_as_hf_peft(build, kind, ranks, targets):
    first, second = ["q_proj", "down_proj"], ["q_proj", "up_proj"]
    if targets == "pattern":
        first, second = (f".*({'|'.join(names)})" for names in (first, second))
    result = []
    for library in (peft, pyfused):
        configs = (_lora(library, ranks[0], target_modules=first), _lora(library, ranks[1], target_modules=second))
        model = _two(library, build, *configs)
        options = {"combination_type": kind} if kind else {}
        model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", **options)
        result.append((model.peft_config["sum"], _tensors(library, model)))
    (theirs, expected), (ours, got) = result
    assert ours.to_dict() | {"peft_version": None} == theirs.to_dict() | {"peft_version": None}
    assert got.keys() == expected.keys()
    if kind in ("svd", None):  # beyond a sum's rank, singular vectors are any
        got, expected = _products(got), _products(expected)
    for key in got:
        torch.testing.assert_close(got[key], expected[key], msg=key)


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_result_is_the_sum(build, batch, kind, rslora):
    model = _two(pyfused, build, _lora(pyfused, use_rslora=rslora), _lora(pyfused, 3))
    model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", kind, svd_rank=7)
    assert model.active_adapters == ["first"]
    for layer in model.base_model.layers:
        expected = sum(
            layer.delta_weight(name) * weight for name, weight in zip(["first", "second"], _WEIGHTS, strict=True)
        )
        torch.testing.assert_close(layer.delta_weight("sum"), expected)
        assert not any(parameter.requires_grad for parameter in layer.adapter_tensors("sum").values())


def test_rslora_in_hf_peft_scales_the_sum(build):
    """What docs/differences-from-peft.md says of it."""
    result = []
    for library in (peft, pyfused):
        model = _two(library, build, _lora(library, use_rslora=True), _lora(library))
        model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", "cat")
        result.append((_tensors(library, model), next(iter(model.get_base_model().model.layers)).self_attn.q_proj))
    (expected, theirs), (got, ours) = result
    torch.testing.assert_close(got, expected)
    assert theirs.scaling["sum"] == pytest.approx(8**0.5) and ours.scaling["sum"] == 1


def test_one_adapter_times_a_weight(build):
    model = _two(pyfused, build, _lora(pyfused), _lora(pyfused, 3))
    model.add_weighted_adapter(["first"], [-2.5], "sum", "svd")
    for layer in model.base_model.layers:
        torch.testing.assert_close(layer.delta_weight("sum"), layer.delta_weight("first") * -2.5)


def test_svd_options_as_hf_peft(build):
    result = []
    for library in (peft, pyfused):
        model = _two(library, build, _lora(library), _lora(library))
        options = {"svd_rank": 2, "svd_clamp": 0.9, "svd_full_matrices": False}
        model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", "svd", **options)
        result.append(_tensors(library, model))
    for key in result[0]:
        torch.testing.assert_close(result[1][key], result[0][key], msg=key)


def test_ia3_as_hf_peft(build):
    result = []
    for library in (peft, pyfused):
        model = _two(library, build, _ia3(library), _ia3(library, target_modules=["v_proj", "down_proj"]))
        model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum")
        result.append((model.peft_config["sum"], _tensors(library, model)))
    (theirs, expected), (ours, got) = result
    assert ours.target_modules == theirs.target_modules and ours.feedforward_modules == theirs.feedforward_modules
    assert got.keys() == expected.keys()
    for key in got:
        torch.testing.assert_close(got[key], expected[key], msg=key)


def test_a_head_is_taken_over(build, tmp_path):
    model = pyfused.get_peft_model(
        build("bert_cls"), pyfused.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]), "first"
    )
    model.add_adapter("second", pyfused.LoraConfig(target_modules=["value"]))
    nn.init.normal_(model.base_model.wrappers["classifier"].modules_to_save["first"].weight)
    model.add_weighted_adapter(["second", "first"], [1, 1], "sum", "cat")
    copies = model.base_model.wrappers["classifier"].modules_to_save
    assert torch.equal(copies["first"].weight, copies["sum"].weight)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = pyfused.PeftModel.from_pretrained(build("bert_cls"), tmp_path / "sum")
    assert torch.equal(
        loaded.base_model.wrappers["classifier"].modules_to_save["default"].weight, copies["first"].weight
    )


_KINDS_OF_LAYER = {
    "gpt2": ["c_attn", "c_fc", "wpe"],
    "bert": ["word_embeddings", "query"],
    "conv": ["c1", "c2", "head"],
}


def _on_other_layers(library, base: nn.Module, targets: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is set
        return _two(
            library, lambda _: base, _lora(library, target_modules=targets), _lora(library, target_modules=targets)
        )


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize(("name", "targets"), _KINDS_OF_LAYER.items(), ids=_KINDS_OF_LAYER)
def test_other_layers_as_hf_peft(build, name, targets, kind):
    result = []
    for library in (peft, pyfused):
        model = _on_other_layers(library, build(name), targets)
        model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", kind)
        result.append(_tensors(library, model))
    assert result[1].keys() == result[0].keys()
    expected, got = map(_flat_products, result) if kind == "svd" else result
    for key in got:
        torch.testing.assert_close(got[key], expected[key], msg=key)


def _flat_products(tensors: dict) -> dict:
    keys = [key for key in tensors if "lora_A" in key or "lora_embedding_A" in key]
    pairs = {key: (tensors[key.replace("_A", "_B")], tensors[key]) for key in keys}
    return {key: b.flatten(1) @ a.flatten(1) for key, (b, a) in pairs.items()}


def _grouped(library, ranks: tuple[int, int]) -> nn.Module:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    return _two(library, lambda _: base, *(_lora(library, rank, target_modules=["0"]) for rank in ranks))


def test_a_convolution_with_groups():
    """HF PEFT's cat gives ranks of one group to another."""
    model, x = _grouped(pyfused, (4, 2)), torch.randn(2, 4, 5, 5)
    model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", "cat")
    with model.disable_adapter():
        plain = model(x)
    changes = {}
    for name in ("first", "second", "sum"):
        model.set_adapter(name)
        changes[name] = model(x) - plain
    torch.testing.assert_close(changes["sum"], _WEIGHTS[0] * changes["first"] + _WEIGHTS[1] * changes["second"])
    with pytest.raises(NotImplementedError, match="'svd' is not built for a convolution with groups"):
        model.add_weighted_adapter(["first", "second"], _WEIGHTS, "other", "svd")
    result = []
    for library in (peft, pyfused):
        model = _grouped(library, (4, 4))
        model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", "linear")
        result.append(_tensors(library, model))
    torch.testing.assert_close(result[1], result[0])


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("which", ["only in some layers", "in others"])
def test_layers_that_the_first_configuration_does_not_name(build, batch, kind, which):
    """HF PEFT asks the first adapter's other fields: it leaves layers out without a word, or finds nothing to add."""
    fields = {"layers_to_transform": [0], "layers_pattern": "layers"}
    second = {} if which == "in others" else fields
    first = fields if which == "in others" else {}
    configs = (_lora(pyfused, **first), _lora(pyfused, target_modules=["up_proj"], **second))
    model = _two(pyfused, build, *configs)
    layers = model.base_model.layers
    there = layers.of("first").keys() | layers.of("second").keys()
    model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", kind, svd_rank=8)
    layers = model.base_model.layers
    assert layers.of("sum").keys() == there
    for layer in layers.of("sum").values():
        pairs = zip(("first", "second"), _WEIGHTS, strict=True)
        expected = sum(layer.delta_weight(name) * weight for name, weight in pairs if layer.has_adapter(name))
        torch.testing.assert_close(layer.delta_weight("sum"), expected)


def test_layers_of_ia3_that_the_first_configuration_does_not_name(build, tmp_path):
    first = _ia3(pyfused, exclude_modules=["layers.0.mlp.down_proj", "layers.1.self_attn.q_proj"])
    model = _two(pyfused, build, first, _ia3(pyfused))
    model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum")
    layers = model.base_model.layers
    assert layers.of("sum").keys() == layers.of("second").keys()
    for layer in layers.of("sum").values():
        pairs = zip(("first", "second"), _WEIGHTS, strict=True)
        vectors = [layer.ia3_l[name] * weight for name, weight in pairs if name in layer.ia3_l]
        torch.testing.assert_close(layer.ia3_l["sum"], sum(vectors))
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / "sum", "sum")
    assert loaded.base_model.layers.of("sum").keys() == layers.of("sum").keys()


def test_an_existing_name_is_left_alone(build, unchanged):
    model = _two(pyfused, build, _lora(pyfused), _lora(pyfused))
    with unchanged(model):
        model.add_weighted_adapter(["first", "second"], _WEIGHTS, "second", "cat")


@pytest.mark.parametrize(
    ("adapters", "options", "error", "message"),
    [
        (["first", "x"], {}, ValueError, "Adapter x does not exist, there are"),
        ([], {}, ValueError, "at least one"),
        (["first", "first"], {}, ValueError, "each adapter once"),
        (["first", "second", "second"], {}, ValueError, "each adapter once"),
        (["first", "second"], {"weights": [1.0]}, ValueError, "one number for each of 2 adapters, got 1"),
        (["first", "second"], {"combination_type": "linear"}, ValueError, "same r value"),
        (["first", "second"], {"combination_type": "sum"}, ValueError, "Invalid combination_type: 'sum'"),
        (["first", "second"], {"combination_type": "ties"}, NotImplementedError, "'ties' is not built"),
        (["first", "second"], {"combination_type": "svd", "svd_rank": 0}, ValueError, "svd_rank must be"),
    ],
)
def test_errors_change_nothing(build, unchanged, adapters, options, error, message):
    model = _two(pyfused, build, _lora(pyfused), _lora(pyfused, 3))
    weights = options.pop("weights", [1.0] * len(adapters))
    with unchanged(model), warnings.catch_warnings(), pytest.raises(error, match=message):
        model.add_weighted_adapter(adapters, weights, "sum", **options)


def test_patterns_and_sets_do_not_go_together(build, unchanged):
    model = _two(pyfused, build, _lora(pyfused), _lora(pyfused, target_modules=".*q_proj"))
    with unchanged(model), pytest.raises(ValueError, match="target_modules: all adapters"):
        model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", "cat")


def test_linear_of_ranks_that_differ_in_a_layer_changes_nothing(build, unchanged):
    """Both have 6 as their largest rank. HF PEFT compares the largest ones, and fails in the middle."""
    patterns = ({"q_proj": 6, "v_proj": 2}, {"q_proj": 2, "v_proj": 6})
    targets = {"target_modules": ["q_proj", "v_proj"]}
    model = _two(pyfused, build, *(_lora(pyfused, rank_pattern=pattern, **targets) for pattern in patterns))
    with unchanged(model), pytest.raises(ValueError, match="same r value in every layer"):
        model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", "linear")
    for kind in ("svd", "cat"):
        model.add_weighted_adapter(["first", "second"], _WEIGHTS, kind, kind, svd_rank=8)
        for layer in model.base_model.layers.of(kind).values():
            expected = sum(
                layer.delta_weight(name) * weight for name, weight in zip(("first", "second"), _WEIGHTS, strict=True)
            )
            torch.testing.assert_close(layer.delta_weight(kind), expected)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", None])
def test_adaloras_are_not_combined(build, unchanged, kind):
    """Whatever their ranks; nor by HF PEFT."""
    for library in (peft, pyfused):
        ranks = {"model.layers.0.self_attn.q_proj.lora_E": [True, False, True]}
        options = {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        trained, frozen = library.AdaLoraConfig(**options), library.AdaLoraConfig(**options, inference_mode=True)
        frozen.rank_pattern = ranks
        model = _two(library, build, trained, frozen)
        with unchanged(model), pytest.raises(TypeError, match=r"AdaLoraModel|AdaLoRA's"):
            model.base_model.add_weighted_adapter(["first", "second"], _WEIGHTS, "sum", kind)
