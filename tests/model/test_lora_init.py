"""LoRA's initialisations against HF PEFT: the same numbers, in the adapter and in what is left of the base."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from lora_models import assert_close, assert_same_state, logits

import pyfused

LIBRARIES = (peft, pyfused)
TARGETS = {"llama": ["q_proj", "v_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"], "bert_cls": ["query", "dense"]}
INITS = ("pissa", "pissa_niter_4", "olora", "orthogonal", "gaussian")
CASES = [(name, init) for name in TARGETS for init in INITS if (name, init) != ("gpt2", "olora")]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "init"), CASES)
def test_same_numbers(pair, name, init, dtype):
    theirs, ours = pair(name, dtype, target_modules=TARGETS[name], init_lora_weights=init)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize(
    ("name", "targets"), [("conv", ["c1", "c2", "c3", "c4"]), ("bert_cls", ["word_embeddings"]), ("gpt2", ["wpe"])]
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gaussian_on_other_layers(pair, name, targets, use_dora):
    options = {"target_modules": targets, "use_dora": use_dora, "init_lora_weights": "gaussian"}
    theirs, ours = pair(name, **options)
    assert_same_state(ours, theirs)


@pytest.mark.parametrize(("name", "init"), [*CASES, ("gpt2", "olora")])
def test_starts_as_the_base(wrap, build, batch, name, init):
    """HF PEFT's olora on Conv1D does not: it decomposes the transposed weight."""
    base = logits(build(name).eval(), batch(name))
    model = wrap(pyfused, name, target_modules=TARGETS[name], init_lora_weights=init).eval()
    assert_close(logits(model, batch(name)), base, tolerance=1e-4)
    changed = init.startswith(("pissa", "olora"))
    with model.disable_adapter():
        assert torch.allclose(logits(model, batch(name)), base, atol=1e-6) is not changed
    assert_close(logits(model.merge_and_unload(), batch(name)), base, tolerance=1e-4)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_with_other_options(pair, batch, init, options):
    theirs, ours = pair("llama", target_modules=["q_proj", "embed_tokens"], init_lora_weights=init, **options)
    assert_same_state(ours, theirs)
    assert_close(logits(ours.eval(), batch("llama")), logits(theirs.eval(), batch("llama")))


def test_a_second_adapter_changes_the_base_again(pair, batch):
    models = pair("llama", target_modules=["q_proj"], init_lora_weights="pissa", use_dora=True)
    for library, model in zip(LIBRARIES, models, strict=True):
        logits(model.eval(), batch("llama"))  # norms are known now
        model.add_adapter("other", library.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora"))
    theirs, ours = models
    assert_same_state(ours, theirs)
    assert_close(logits(ours, batch("llama")), logits(theirs, batch("llama")))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("writer", LIBRARIES, ids=lambda library: library.__name__)
def test_files(wrap, build, batch, tmp_path, init, writer):
    """Loaded onto the original base, from which the same part is taken."""
    source = wrap(writer, "llama", target_modules=["q_proj"], init_lora_weights=init)
    with torch.no_grad():
        for parameter in source.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    source.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == init
    theirs, ours = (library.PeftModel.from_pretrained(build("llama"), tmp_path) for library in LIBRARIES)
    assert_same_state(ours, theirs)
    assert_close(logits(ours, batch("llama")), logits(source.eval(), batch("llama")))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("llama", {"init_lora_weights": "orthogonal", "r": 3}, ValueError, "needs an even rank, got r=3"),
        ("llama", {"init_lora_weights": "pissa", "r": 17}, ValueError, "needs r of at most 16, got r=17"),
        ("llama", {"init_lora_weights": "pissa_niter_x"}, ValueError, "got 'pissa_niter_x'"),
        ("llama", {"init_lora_weights": "loftq"}, NotImplementedError, "init_lora_weights: 'loftq' is not built"),
        ("llama", {"init_lora_weights": "corda"}, NotImplementedError, "init_lora_weights: 'corda' is not built"),
        ("llama", {"init_lora_weights": "eva"}, NotImplementedError, "init_lora_weights: 'eva' is not built"),
        ("llama", {"init_lora_weights": "pissa", "lora_bias": True}, ValueError, "lora_bias needs init_lora_weights"),
        ("conv", {"init_lora_weights": "pissa", "target_modules": ["c1"]}, ValueError, "for the convolution of 'c1'"),
    ],
)
def test_errors_change_nothing(build, unchanged, name, options, error, message):
    base = build(name)
    with unchanged(base), pytest.raises(error, match=message):
        pyfused.get_peft_model(base, pyfused.LoraConfig(**{"target_modules": ["q_proj", "v_proj"]} | options))


def test_other_dtypes_are_refused(build, unchanged):
    base = build("llama", torch.float64)
    with unchanged(base), pytest.raises(TypeError, match=r"'olora' needs a base weight in float32.*got .*float64"):
        pyfused.get_peft_model(base, pyfused.LoraConfig(target_modules=["q_proj"], init_lora_weights="olora"))


def test_converting_at_saving_is_not_built(wrap, tmp_path):
    model = wrap(pyfused, "llama", init_lora_weights="pissa")
    with pytest.raises(NotImplementedError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="initial")
    assert not list(tmp_path.iterdir())


def test_a_weighted_adapter_leaves_the_base_alone(wrap):
    model = wrap(pyfused, "llama", target_modules=["q_proj"], init_lora_weights="pissa")
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.weight
    before = weight.clone()
    model.add_weighted_adapter(["default"], [0.5], "weighted")
    assert torch.equal(weight, before)
    assert model.peft_config["weighted"].init_lora_weights is True


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_adapters_on_a_reduced_base_are_warned_of(wrap, tmp_path, init):
    """As HF PEFT does, which does not know of pissa_niter's."""
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "plain")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_adapter(tmp_path / "plain", "second")
        model = wrap(pyfused, "llama", target_modules=["q_proj"], init_lora_weights=init)
    plain = pyfused.LoraConfig(target_modules=["q_proj"])
    calls = (
        lambda: model.load_adapter(tmp_path / "plain", "loaded"),
        lambda: model.add_adapter("new", plain),
        lambda: model.add_adapter("ia3", pyfused.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        lambda: pyfused.AdapterPool(model, tmp_path).close(),
    )
    for call in calls:
        with pytest.warns(UserWarning, match=f"init_lora_weights='{init}' took a part of the base weights") as told:
            call()
        assert [warning.filename for warning in told] == [__file__]
    other = wrap(pyfused, "llama", target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=f"init_lora_weights='{init}' took a part of the base weights"):
        other.add_adapter("second", pyfused.LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
