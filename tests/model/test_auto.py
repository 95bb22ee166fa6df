"""Base model and adapter from the adapter's folder alone, as HF PEFT's classes of these names load them."""

from __future__ import annotations

import json

import peft
import pytest
import torch

import pyfused

# Model, task, and the last part of the class's name.
_TASKS = [
    ("llama", "CAUSAL_LM", "ForCausalLM"),
    ("t5", "SEQ_2_SEQ_LM", "ForSeq2SeqLM"),
    ("bert_cls", "SEQ_CLS", "ForSequenceClassification"),
    ("bert_tokens", "TOKEN_CLS", "ForTokenClassification"),
    ("bert_qa", "QUESTION_ANS", "ForQuestionAnswering"),
    ("bert", "FEATURE_EXTRACTION", "ForFeatureExtraction"),
    ("gpt2_free", None, ""),
]
_TARGETS = {"llama": "q_proj", "t5": "q", "gpt2_free": "c_attn"}


@pytest.fixture
def saved(build, tmp_path):
    """The folder of an adapter, and what the model gives with it; the base model lies beside it."""

    def make(name: str, task: str | None, batch: dict, library=pyfused):
        base = build(name.removesuffix("_free"))
        base.save_pretrained(tmp_path / "base")
        base = type(base).from_pretrained(tmp_path / "base")
        targets = [_TARGETS.get(name, "query")]
        config = library.IA3Config(task_type=task, target_modules=targets, feedforward_modules=[])
        model = library.get_peft_model(base, config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "ia3_l" in key:
                    parameter.uniform_(0.5, 1.5)
        model.save_pretrained(tmp_path / "adapter")
        with torch.no_grad():
            return tmp_path / "adapter", model(**batch)[0]

    return make


@pytest.mark.parametrize(("name", "task", "ending"), _TASKS, ids=[task[0] for task in _TASKS])
@pytest.mark.parametrize("library", [pyfused, peft], ids=["ours", "theirs"])
def test_loads_what_was_saved(saved, batch, name, task, ending, library):
    inputs = batch(name.removesuffix("_free"))
    folder, expected = saved(name, task, inputs, library)
    model = getattr(pyfused, f"AutoPeftModel{ending}").from_pretrained(folder)
    assert isinstance(model, pyfused.PeftModel) and not model.training
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], expected)


def test_options_reach_the_base_model(saved, batch):
    folder, _ = saved("llama", "CAUSAL_LM", batch("llama"))
    model = pyfused.AutoPeftModelForCausalLM.from_pretrained(
        folder, adapter_name="first", is_trainable=True, dtype=torch.bfloat16, autocast_adapter_dtype=False
    )
    assert model.active_adapters == ["first"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.get_nb_trainable_parameters()[0] > 0


def test_a_larger_tokenizer_makes_room(saved, batch, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder, _ = saved("llama", "CAUSAL_LM", batch("llama"))
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(70)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    model = pyfused.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == 70


def test_the_class_for_another_task_is_named(saved, batch):
    folder, _ = saved("llama", "CAUSAL_LM", batch("llama"))
    with pytest.raises(ValueError, match=r"task_type CAUSAL_LM.*use AutoPeftModelForCausalLM"):
        pyfused.AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
    with pytest.raises(ValueError, match="use AutoPeftModelForCausalLM"):
        pyfused.AutoPeftModel.from_pretrained(folder)


def test_nothing_is_imported_that_is_not_allowed(saved, batch):
    folder, _ = saved("gpt2_free", None, batch("gpt2"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "system", "parent_library": "os"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names 'os', which is not in one of the packages"):
        pyfused.AutoPeftModel.from_pretrained(folder)


def test_a_base_model_that_is_not_known(build, tmp_path):
    config = pyfused.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    pyfused.get_peft_model(build("llama"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="base_model_name_or_path is empty"):
        pyfused.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_is_not_made_by_calling_it():
    with pytest.raises(OSError, match="from_pretrained"):
        pyfused.AutoPeftModelForCausalLM()
