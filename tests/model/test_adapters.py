"""Life of adapters in a model: switching, disabling, merging, deleting, unloading; and what is refused."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import pyfused
from pyfused.nn import LoraLinear

TARGETS = ["q_proj", "up_proj"]


@pytest.fixture
def model(wrap) -> nn.Module:
    """A llama with an active adapter "default", and "other" on other layers and with an output layer of its own."""
    model = wrap(pyfused, "llama", target_modules=TARGETS, init_lora_weights=False)
    torch.manual_seed(4)
    config = pyfused.LoraConfig(
        r=3, target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"], init_lora_weights=False
    )
    model.add_adapter("other", config)
    with torch.no_grad():
        model.base_model.wrappers["lm_head"].modules_to_save["other"].weight.add_(0.1)
    return model.eval()


@pytest.fixture
def logits(model, batch):
    """The model's logits, and those of the bare model under ``None``."""

    def call(name: str | None = "now", of: nn.Module | None = None) -> torch.Tensor:
        if name is None:
            with model.disable_adapter(), torch.no_grad():
                return model(**batch("llama")).logits
        with torch.no_grad():
            return (of or model)(**batch("llama")).logits

    return call


def test_set_adapter(model, logits, build):
    base = build("llama")
    first = logits()
    assert not torch.equal(first, logits(of=base))
    model.set_adapter("other")
    assert (model.active_adapters, model.active_adapter) == (["other"], "other")
    second = logits()
    assert not torch.allclose(first, second)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 6 + 1
    assert all(".other." in name for name in trainable)
    model.set_adapter("default", inference_mode=True)
    assert torch.equal(logits(), first)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(None), logits(of=base))


def test_disable_adapter_restores_what_was(model, logits, build):
    first, base = logits(), logits(of=build("llama"))
    with model.disable_adapter():
        assert torch.equal(logits(), base)
        with model.disable_adapter():
            assert torch.equal(logits(), base)
        assert torch.equal(logits(), base)
        model.set_adapter("other")
        assert torch.equal(logits(), base)
        model.set_adapter("default")
    assert torch.equal(logits(), first)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
    assert torch.equal(logits(), first)


def test_disabling_with_a_bias_warns(wrap):
    model = wrap(pyfused, "bert_cls", task_type="SEQ_CLS", bias="all")
    with pytest.warns(UserWarning, match=r"bias configured to be \['all'\]"), model.disable_adapter():
        pass


def test_an_adapter_added_while_disabled_is_disabled(model, logits, build):
    with model.disable_adapter():
        model.add_adapter("third", pyfused.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
        model.set_adapter("third")
        assert torch.equal(logits(), logits(of=build("llama")))
    assert not torch.allclose(logits(), logits(None))


def test_merge_and_unmerge(model, logits, fused_calls):
    first, base = logits(), logits(None)
    fused_calls["lora_linear"] = 0
    model.merge_adapter()
    torch.testing.assert_close(logits(), first, rtol=1e-5, atol=1e-5)
    assert fused_calls == {"lora_linear": 0, "lora_delta": 0}, "a merged layer costs what the base costs"
    torch.testing.assert_close(logits(None), base, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(), first, rtol=1e-5, atol=1e-5)  # merged again
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["default", "other"])
    model.unmerge_adapter()
    torch.testing.assert_close(logits(), first, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(None), base, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_set_adapter_unmerges(model, logits):
    model.set_adapter("other")
    second = logits()
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("other")
    torch.testing.assert_close(logits(), second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["default", "other"])
def test_merge_and_unload(model, logits, name):
    model.set_adapter(name)
    expected = logits()
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(type(module).__module__.startswith("pyfused") for module in merged.modules())
    assert not any("lora" in key or "base_layer" in key for key in merged.state_dict())
    torch.testing.assert_close(logits(of=merged), expected, rtol=1e-5, atol=1e-5)


def test_unload_gives_the_base_model_back(build, batch):
    base = build("llama")
    modules, before = dict(base.named_modules()), base(**batch("llama")).logits
    model = pyfused.get_peft_model(base, pyfused.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert not torch.allclose(model(**batch("llama")).logits, before)
    assert model.unload() is base
    assert dict(base.named_modules()) == modules
    assert torch.equal(base(**batch("llama")).logits, before)
    pyfused.get_peft_model(
        base, pyfused.LoraConfig(target_modules=["q_proj"])
    )  # nothing is left that would be in the way


def test_safe_merge_of_a_broken_adapter_changes_nothing(model, unchanged):
    layers = list(model.base_model.layers)
    layers[3].lora_A["default"].weight.data[0, 0] = float("inf")
    with unchanged(model), pytest.raises(ValueError, match="NaNs detected in the merged weights: adapter 'default'"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in layers)


def test_delete_adapter(model, logits):
    first = logits()
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and torch.equal(logits(), first)
    assert not any(".other." in name for name, _ in model.named_parameters())
    model.add_adapter("b", pyfused.LoraConfig(target_modules=["v_proj"]))
    model.add_adapter("a", pyfused.LoraConfig(target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match="default was active which is now deleted. Setting active adapter to a"):
        model.delete_adapter("default")
    assert model.active_adapters == ["a"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".a." in name for name in trainable)
    for name in ("a", "b"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter(name)
    assert model.active_adapters == [] and torch.equal(logits(), logits(None))


def test_set_requires_grad(model):
    model.set_requires_grad("other")
    model.set_requires_grad(["default"], False)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    assert model.active_adapters == ["default"]


def test_adding_an_adapter_leaves_flags_alone(wrap):
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    base = model.get_base_model()
    base.lm_head.weight.requires_grad = True
    base.model.layers[0].self_attn.v_proj.weight.requires_grad = True
    before = {id(p): p.requires_grad for p in model.parameters()}
    model.add_adapter("other", pyfused.LoraConfig(target_modules=["q_proj", "v_proj"]))
    new = [p for p in model.parameters() if id(p) not in before]
    assert all(p.requires_grad == before[id(p)] for p in model.parameters() if id(p) in before)
    assert len(new) == 12 and not any(p.requires_grad for p in new)


def test_attributes_are_the_models(model):
    base = model.get_base_model()
    assert model.base_model.model is base
    assert model.config is base.config and model.dtype == torch.float32 and model.lm_head is base.lm_head
    assert model.lm_head.weight is base.lm_head.original_module.weight  # "default" has no output layer of its own
    model.set_adapter("other")
    assert model.lm_head.weight is base.lm_head.modules_to_save["other"].weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018
    assert model.modules_to_save == {"lm_head"}


def test_copies_and_pickles(model, logits, build):
    second = type(model)(build("plain"), config(target_modules=["up"]))
    assert pickle.loads(pickle.dumps(second)).active_adapters == ["default"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other, pyfused.PeftModel)
        assert torch.equal(logits(of=other), logits())
        other.set_adapter("other")
        assert not torch.allclose(logits(of=other), logits())
        assert model.active_adapters == ["default"]
        assert next(iter(other.base_model.layers)) in set(other.modules())


# What is refused ------------------------------------------------------------------------------------------------------


def config(**options) -> pyfused.LoraConfig:
    return pyfused.LoraConfig(**({"target_modules": ["q_proj"]} | options))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.set_adapter("nope"), ValueError, r"Adapter 'nope' not found, there are \['default', 'other'\]"),
        (lambda m: m.set_adapter(["default", "nope"]), ValueError, "'nope' not found"),
        (lambda m: m.delete_adapter("nope"), ValueError, "'nope' does not exist"),
        (lambda m: m.set_requires_grad("nope"), ValueError, "'nope' not found"),
        (lambda m: m.merge_adapter("default"), TypeError, "got the string 'default'"),
        (lambda m: m.merge_adapter(["nope"]), ValueError, "'nope' not found"),
        (lambda m: m.merge_and_unload(adapter_names=["nope"]), ValueError, "'nope' not found"),
        (lambda m: m.add_adapter("default", config()), ValueError, "'default' already exists"),
        (lambda m: m.add_adapter("a.b", config()), ValueError, "got 'a.b'"),
        (lambda m: m.add_adapter("", config()), ValueError, "got ''"),
        (lambda m: m.add_adapter("keys", config()), ValueError, "got 'keys'"),
        (lambda m: m.add_adapter("training", config()), ValueError, "got 'training'"),
        (lambda m: m.add_adapter("__base__", config()), ValueError, "got '__base__'"),
        (lambda m: m.add_adapter(3, config()), TypeError, "must be a string, got int"),
        (lambda m: m.add_adapter("x", {"r": 8}), TypeError, "pyfused.LoraConfig.*, got builtins.dict"),
        (lambda m: m.add_adapter("x", config(target_modules=["nope"])), ValueError, "not found in the base model"),
        (lambda m: m.add_adapter("x", config(target_modules=[])), ValueError, "not found in the base model"),
        (
            lambda m: m.add_adapter("x", config(target_modules=["lm_head"])),
            ValueError,
            "'lm_head' is a modules_to_save",
        ),
        (
            lambda m: m.add_adapter("x", config(target_modules=["norm"])),
            ValueError,
            "must be an nn.Linear, .*, got LlamaRMSNorm",
        ),
        (
            lambda m: m.add_adapter("x", config(target_modules=["embed_tokens"], lora_bias=True)),
            ValueError,
            "lora_bias: 'model.embed_tokens' is an nn.Embedding",
        ),
        (lambda m: m.add_adapter("x", config(modules_to_save=["q_proj"])), ValueError, "q_proj' is adapted by LORA"),
        (
            lambda m: m.add_adapter("x", config(modules_to_save=["up_proj"])),
            ValueError,
            "'.*up_proj' is adapted by LORA",
        ),
        (lambda m: m.add_adapter("x", config(modules_to_save=["self_attn"])), ValueError, "were excluded by"),
    ],
)
def test_errors_change_nothing(model, unchanged, call, error, message):
    state = torch.get_rng_state()
    with unchanged(model), pytest.raises(error, match=message):
        call(model)
    assert list(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]
    assert torch.equal(torch.get_rng_state(), state)


def test_merged_adapters_cannot_be_deleted_or_replaced(model, unchanged, tmp_path):
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with unchanged(model), pytest.raises(ValueError, match="'default' is merged into the base weights"):
        model.load_adapter(tmp_path, "default")
    with unchanged(model), pytest.raises(ValueError, match="Cannot delete adapter 'default' while it is merged"):
        model.delete_adapter("default")
    with model.disable_adapter(), unchanged(model), pytest.raises(ValueError, match="adapters are disabled"):
        model.merge_adapter(["other"])


def test_two_adapters_with_their_own_head_cannot_be_active(model, unchanged):
    model.add_adapter("third", config(modules_to_save=["lm_head"]))
    with unchanged(model), pytest.raises(ValueError, match=r"only one of \['other', 'third'\].*lm_head"):
        model.base_model.set_adapter(["other", "third"])


def test_only_one_adapter_trains_biases(wrap, unchanged):
    model = wrap(pyfused, "bert_cls", task_type="SEQ_CLS", bias="all")
    with unchanged(model), pytest.raises(ValueError, match="only one adapter of a model can train biases"):
        model.add_adapter("x", config(target_modules=["query"], bias="lora_only"))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["f_attn"]}, ValueError, "attn' holds '.*q_proj'"),
        ("llama", {"target_modules": ["embed_tokens"], "lora_bias": True}, ValueError, "is an nn.Embedding"),
        ("llama", {"target_modules": ["q_proj", "norm"]}, ValueError, "must be an nn.Linear, .*, got LlamaRMSNorm"),
        (
            "llama",
            {"modules_to_save": ["layers"], "target_modules": ["lm_head"]},
            TypeError,
            "'model.layers' is a ModuleList",
        ),
    ],
)
def test_what_a_bare_model_refuses(build, unchanged, name, options, error, message):
    base = build(name)
    with unchanged(base), pytest.raises(error, match=message):
        pyfused.get_peft_model(base, pyfused.LoraConfig(**options))


def test_models_that_have_adapters_already(wrap, unchanged):
    model = wrap(pyfused, "llama")
    for target in (model, model.get_base_model()):
        with unchanged(model), pytest.raises(ValueError, match="model has adapters already"):
            pyfused.get_peft_model(target, config())


def test_a_model_of_hf_peft_is_sent_to_fuse(wrap, unchanged):
    import peft

    model = wrap(peft, "llama")
    with unchanged(model), pytest.raises(ValueError, match=r"wrapped by HF PEFT; pyfused\.fuse"):
        pyfused.get_peft_model(model, config())
    with pytest.raises(TypeError, match=r"pyfused.LoraConfig.*, got peft\.tuners\.lora"):
        pyfused.get_peft_model(nn.Linear(2, 2), peft.LoraConfig())
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got str"):
        pyfused.get_peft_model("model", config())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)


def test_layers_that_are_never_called_are_refused(unchanged):
    model = Attention()
    with unchanged(model), pytest.raises(NotImplementedError, match=r"'attention\.out_proj'.*exclude_modules"):
        pyfused.get_peft_model(model, config(target_modules="all-linear"))
    wrapped = pyfused.get_peft_model(model, config(target_modules="all-linear", exclude_modules=["out_proj"]))
    assert wrapped.base_model.targeted_module_names == ["out"]


def test_torchs_encoder_layer_needs_its_fast_path_off(unchanged):
    """It reads the weights of its linear layers in evaluation, past any adapter."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    lora = config(target_modules=["linear1"], init_lora_weights=False)
    with unchanged(model), pytest.raises(ValueError, match=r"set_fastpath_enabled\(False\) first"):
        pyfused.get_peft_model(model, lora)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        wrapped, x = pyfused.get_peft_model(model, lora).eval(), torch.randn(2, 3, 8)
        with torch.no_grad():
            adapted = wrapped(x)
            with wrapped.disable_adapter():
                assert not torch.allclose(wrapped(x), adapted)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_layers_inside_of_a_parametrized_base(build):
    base = build("plain")
    parametrizations.spectral_norm(base.up)
    model = pyfused.get_peft_model(base, config(target_modules=["up"], init_lora_weights=False))
    assert isinstance(base.up, LoraLinear)
    assert model(torch.ones(2, 12)).shape == (2, 5)
    with pytest.raises(NotImplementedError, match="merge: the base weight must be a plain"):
        model.merge_adapter()
