"""Which layers a configuration adapts: the same as in HF PEFT, for many configurations and models."""

from __future__ import annotations

import re
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import pyfused
from pyfused.methods import adalora, ia3, lora

CASES = [
    ("llama", {}),
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": {"proj"}, "exclude_modules": r".*"}),  # nothing
    ("llama", {"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"]}),
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.[01]\..*proj"}),
    ("llama", {"target_modules": r".*self_attn\.q"}),  # nothing: a regular expression matches whole names
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "ALL-LINEAR", "task_type": "CAUSAL_LM"}),
    ("llama_deep", {"target_modules": "all-linear"}),
    ("llama_deep", {"target_modules": "all-linear", "exclude_modules": ["down_proj"]}),
    ("llama_deep", {"target_modules": [f"model.layers.{i}.mlp.up_proj" for i in range(12)] + ["lm_head"]}),
    ("llama_deep", {"target_modules": [f"model.layers.{i}.mlp.{n}_proj" for i in range(11) for n in ("up", "gate")]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "o_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),  # nothing
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"}),  # nothing
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [7]}),  # nothing
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["model.layers.2.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),  # every norm: no dot is needed
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama_cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {}),
    ("bert", {"target_modules": ["dense"]}),
    ("bert", {"target_modules": ["attention.output.dense"]}),
    ("bert", {"target_modules": "all-linear", "task_type": "FEATURE_EXTRACTION"}),
    ("bert_cls", {"task_type": "SEQ_CLS"}),
    ("bert_cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert_cls", {"target_modules": "all-linear"}),
    ("bert_tokens", {"target_modules": "all-linear", "task_type": "TOKEN_CLS", "modules_to_save": ["classifier"]}),
    ("bert_qa", {"target_modules": "all-linear", "task_type": "QUESTION_ANS", "modules_to_save": ["qa_outputs"]}),
    ("roberta_cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("roberta_cls", {"target_modules": ["dense"], "modules_to_save": ["pooler"]}),
    ("t5", {}),
    ("t5", {"target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("t5", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "block"}),
    ("t5", {"target_modules": ["SelfAttention.q", "wo"]}),
    ("gpt_neox", {}),
    ("gpt2", {}),
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_fc", "lm_head"]}),
    ("plain", {"target_modules": "all-linear"}),
    ("plain", {"target_modules": ["up"]}),
    ("plain", {"target_modules": ["p"]}),  # nothing: a suffix starts after a dot
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_same_layers_as_hf_peft(wrap, name, options):
    try:
        theirs = wrap(peft, name, **options)
    except ValueError:
        with pytest.raises(ValueError, match=r"not found|All modules that target_modules .* were excluded"):
            wrap(pyfused, name, **options)
        return
    ours = wrap(pyfused, name, **options)
    assert ours.base_model.targeted_module_names == theirs.base_model.targeted_module_names
    assert list(ours.state_dict()) == list(theirs.state_dict())
    got, expected = ours.peft_config["default"].to_dict(), theirs.peft_config["default"].to_dict()
    assert set(got.pop("modules_to_save") or ()) == set(expected.pop("modules_to_save") or ())
    assert got == expected


def test_defaults_of_all_families_are_those_of_hf_peft():
    tables = peft.utils.constants
    assert tables.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING == lora._TARGETS
    assert tables.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING == adalora._TARGETS
    assert tables.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING == ia3._TARGETS
    assert tables.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING == ia3._FEEDFORWARD


def test_rank_and_alpha_patterns(pair):
    options = {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 3, r"layers\.[02]\.self_attn\.q_proj": 5, "self_attn.q_proj": 7, "^v_proj": 9},
        "alpha_pattern": {"up_proj": 31, "0.self_attn.v_proj": 1, "nothing": 3},
        "use_rslora": True,
    }
    theirs, ours = pair("llama", **options)
    names = theirs.base_model.targeted_module_names
    assert len(names) == 9
    for name in names:
        expected = theirs.base_model.model.get_submodule(name)
        layer = ours.base_model.layers.of("default")[name]
        assert (layer.r, layer.lora_alpha, layer.scaling) == (expected.r, expected.lora_alpha, expected.scaling), name
    with pytest.warns(RuntimeWarning, match=r"alpha_pattern.*\['nothing'\]"):
        pyfused.get_peft_model(
            nn.Sequential(nn.Linear(4, 4)), pyfused.LoraConfig(target_modules=["0"], alpha_pattern={"nothing": 1})
        )


@pytest.mark.parametrize(
    ("targets", "layers"), [("all-linear", 8), (["q_proj", "w1", "w2", "w3"], 2), (r".*\.(q_proj|w2)", 2)], ids=str
)
def test_which_experts_are_left_out_is_said(targets, layers):
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.MixtralConfig(num_hidden_layers=2, num_local_experts=2, vocab_size=16, **sizes)
    model = transformers.MixtralForCausalLM(config)
    with pytest.warns(UserWarning, match=r"no adapter: model\.layers\.0\.mlp\.experts, model.*\.experts$"):
        adapted = pyfused.get_peft_model(model, pyfused.LoraConfig(target_modules=targets))
    assert len(adapted.base_model.targeted_module_names) == layers
    if isinstance(targets, list):
        # or HF PEFT would put new adapters on the experts where it loads this one
        assert adapted.peft_config["default"].target_modules == {"q_proj"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            config = pyfused.LoraConfig(target_modules=targets, exclude_modules=r".*\.experts\..*")
            pyfused.get_peft_model(transformers.MixtralForCausalLM(model.config), config)


def test_a_second_adapter_on_other_layers(pair):
    models = pair("llama", target_modules=["q_proj"], modules_to_save=["norm"])
    for library, model in zip((peft, pyfused), models, strict=True):
        torch.manual_seed(3)
        model.add_adapter("all", library.LoraConfig(r=2, target_modules="all-linear"))
    theirs, ours = models
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert sorted(ours.base_model.targeted_module_names) == sorted(theirs.base_model.targeted_module_names)


def test_task_heads_are_left_to_be_trained_in_full(build):
    """HF PEFT targets this head first and then finds that it cannot train it."""
    model = pyfused.get_peft_model(
        build("bert_tokens"), pyfused.LoraConfig(target_modules="all-linear", task_type="TOKEN_CLS")
    )
    assert list(model.base_model.wrappers) == ["classifier"] and "classifier" not in model.base_model.layers.names


def test_nothing_found_names_what_there_is(build):
    with pytest.raises(ValueError, match=r"\['nope', 'query'\] not found.*down_proj, gate_proj.*v_proj\.") as error:
        pyfused.get_peft_model(build("llama"), pyfused.LoraConfig(target_modules=["query", "nope"]))
    assert str(error.value).count("q_proj") == 1


def test_unknown_architecture_asks_for_names(build):
    with pytest.raises(ValueError, match=r"specify target_modules.*head, up\."):
        pyfused.get_peft_model(build("plain"), pyfused.LoraConfig())


def test_unused_settings_are_told(build):
    config = pyfused.LoraConfig(
        target_modules=["q_proj"], exclude_modules=["w"], modules_to_save=["z"], rank_pattern={"k": 1}
    )
    with pytest.warns(Warning) as caught:
        pyfused.get_peft_model(build("llama"), config)
    messages = "\n".join(str(item.message) for item in caught)
    assert re.search(r"exclude_modules=\{'w'\} excluded nothing", messages)
    assert re.search(r"modules_to_save: no module of the model is called z", messages)
    assert re.search(r"rank_pattern: keys that match no adapted layer were ignored: \['k'\]", messages)


class Shared(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)
        self.again = self.first

    def forward(self, x):
        return self.again(self.other(self.first(x)))


def test_a_shared_layer_has_one_adapter_in_all_its_places():
    model = Shared()
    with pytest.warns(UserWarning, match="first, again: one layer in several places"):
        wrapped = pyfused.get_peft_model(model, pyfused.LoraConfig(target_modules=["first"], init_lora_weights=False))
    assert wrapped.base_model.targeted_module_names == ["first"]
    assert model.again is model.first
    assert list(pyfused.get_peft_model_state_dict(wrapped)) == [
        "base_model.model.first.lora_A.weight",
        "base_model.model.first.lora_B.weight",
    ]
    x = torch.randn(3, 6)
    before = wrapped(x)
    merged = wrapped.merge_and_unload()
    assert isinstance(merged.again, nn.Linear) and merged.again is merged.first
    torch.testing.assert_close(merged(x), before)


def test_tied_output_layer_is_untied_by_merging(build, batch):
    base = build("llama_tied")
    embedding = base.get_input_embeddings().weight
    config = pyfused.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    with pytest.warns(UserWarning, match="lm_head are tied"):
        model = pyfused.get_peft_model(base, config)
    before, values = model(**batch("llama_tied")).logits, embedding.detach().clone()
    with pytest.warns(UserWarning, match="lm_head are tied"):
        model.merge_adapter()
    torch.testing.assert_close(model(**batch("llama_tied")).logits, before, rtol=1e-4, atol=1e-4)
    assert torch.equal(embedding, values)
    model.unmerge_adapter()
    assert base.lm_head.base_layer.weight is embedding
    with pytest.warns(UserWarning, match="tie_word_embeddings is set to False"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(embedding, values)
    torch.testing.assert_close(merged(**batch("llama_tied")).logits, before, rtol=1e-4, atol=1e-4)


def test_fan_in_fan_out_is_turned_off(build):
    config = pyfused.LoraConfig(target_modules=["up"], fan_in_fan_out=True)
    with pytest.warns(UserWarning, match="fan_in_fan_out is True"):
        model = pyfused.get_peft_model(build("plain"), config)
    assert model.peft_config["default"].fan_in_fan_out is False
    assert config.fan_in_fan_out is True, "the caller's configuration is not to be touched"


def test_the_configuration_is_copied(build):
    config = pyfused.LoraConfig(task_type="SEQ_CLS", modules_to_save=["pooler"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pyfused.get_peft_model(build("bert_cls"), config)
    assert config.target_modules is None and config.modules_to_save == ["pooler"]
    assert model.peft_config["default"].modules_to_save == ["pooler", "classifier", "score"]
