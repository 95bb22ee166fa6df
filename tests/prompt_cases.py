"""Models, inputs and comparisons of the tests of prompt and prefix tuning."""

from __future__ import annotations

import json

import torch
import transformers
from torch import Tensor, nn

# Virtual tokens.
N = 3

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_labels": 3,
    "pad_token_id": 0,
}
_GEMMA = _LLAMA | {"head_dim": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "num_labels": 3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "classifier_dropout": 0.0,
}
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 64,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "is_encoder_decoder": True,
    "num_labels": 3,
}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "dropout": 0.0,
    "forced_eos_token_id": None,
}

_MAMBA = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "pad_token_id": 0, "eos_token_id": None}
_FALCON_H1 = _MAMBA | {
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_chunk_size": 4,
}
_MAMBA2 = _MAMBA | {"num_heads": 8, "head_dim": 8, "state_size": 4, "n_groups": 2, "chunk_size": 4}
# Layers with a state that counts no tokens: beside attention in each layer, and alone.
STATES = {
    "falcon_h1": ("FalconH1ForCausalLM", "FalconH1Config", _FALCON_H1, "CAUSAL_LM"),
    "mamba2": ("Mamba2ForCausalLM", "Mamba2Config", _MAMBA2, "CAUSAL_LM"),
}

# name: (class of the model, class of its configuration, options, task)
_CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA, "CAUSAL_LM"),
    "llama_cls": ("LlamaForSequenceClassification", "LlamaConfig", _LLAMA, "SEQ_CLS"),
    "llama_tokens": ("LlamaForTokenClassification", "LlamaConfig", _LLAMA, "TOKEN_CLS"),
    "llama_qa": ("LlamaForQuestionAnswering", "LlamaConfig", _LLAMA | {"num_labels": 2}, "QUESTION_ANS"),
    "llama_base": ("LlamaModel", "LlamaConfig", _LLAMA, "FEATURE_EXTRACTION"),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 6}, "CAUSAL_LM"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA, "CAUSAL_LM"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2, "CAUSAL_LM"),
    "gpt2_cls": ("GPT2ForSequenceClassification", "GPT2Config", _GPT2, "SEQ_CLS"),
    "gpt2_tokens": ("GPT2ForTokenClassification", "GPT2Config", _GPT2, "TOKEN_CLS"),
    "gpt2_qa": ("GPT2ForQuestionAnswering", "GPT2Config", _GPT2 | {"num_labels": 2}, "QUESTION_ANS"),
    "gpt2_base": ("GPT2Model", "GPT2Config", _GPT2, "FEATURE_EXTRACTION"),
    "bert_cls": ("BertForSequenceClassification", "BertConfig", _BERT, "SEQ_CLS"),
    "bert_tokens": ("BertForTokenClassification", "BertConfig", _BERT, "TOKEN_CLS"),
    "bert_qa": ("BertForQuestionAnswering", "BertConfig", _BERT | {"num_labels": 2}, "QUESTION_ANS"),
    "bert": ("BertModel", "BertConfig", _BERT, "FEATURE_EXTRACTION"),
    "roberta_cls": ("RobertaForSequenceClassification", "RobertaConfig", _BERT, "SEQ_CLS"),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, "SEQ_2_SEQ_LM"),
    "t5_tokens": ("T5ForTokenClassification", "T5Config", _T5, "TOKEN_CLS"),
    "t5_encoder": ("T5EncoderModel", "T5Config", _T5, "FEATURE_EXTRACTION"),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART, "SEQ_2_SEQ_LM"),
}
TASKS = {name: task for name, (_, _, _, task) in _CASES.items()}


def build_case(name: str, **options: object) -> nn.Module:
    """A base model; the same weights at every call."""
    torch.manual_seed(0)
    model, config, defaults, _ = (_CASES | STATES)[name]
    return getattr(transformers, model)(getattr(transformers, config)(**defaults | options)).eval()


def inputs_of(name: str, labels: bool = True, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def ids(*shape: int, top: int = 64) -> Tensor:
        return torch.randint(1, top, shape, generator=generator)

    inputs = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    if padded:
        inputs["attention_mask"][1, 5:] = 0
    task = TASKS[name]
    if task == "SEQ_2_SEQ_LM":
        inputs["labels" if labels else "decoder_input_ids"] = ids(2, 5)
    elif labels and task == "CAUSAL_LM":
        inputs["labels"] = inputs["input_ids"]
    elif labels and task == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 2])
    elif labels and task == "TOKEN_CLS":
        inputs["labels"] = ids(2, 7, top=3)
    elif labels and task == "QUESTION_ANS":
        inputs |= {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])}
    return inputs


def loss_of(output: object) -> Tensor:
    loss = getattr(output, "loss", None)
    return output[0].square().mean() if loss is None else loss


def heads(model: nn.Module) -> dict[str, Tensor]:
    """What is trained, by names that both libraries have."""
    return {
        name.removeprefix("base_model.").removeprefix("model."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in heads(model).items() if p.grad is not None}


def equal_models(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)


def prompted(library, base: nn.Module, task: str, **options) -> nn.Module:
    """A model with prompt tuning by ``library``; seeds are the same for both libraries."""
    torch.manual_seed(3)
    return library.get_peft_model(base, library.PromptTuningConfig(task_type=task, num_virtual_tokens=N, **options))


def prompted_pair(build_task, name: str, **options) -> tuple[nn.Module, nn.Module]:
    """The same model twice: wrapped by HF PEFT, and by pyfused."""
    import peft

    import pyfused

    return tuple(prompted(library, build_task(name), TASKS[name], **options) for library in (peft, pyfused))


def check_another_turn(
    ours: nn.Module, ids: Tensor, adapter_names: list[str] | None = None, **tolerance: float
) -> None:
    """``generate`` of a "llama" that goes on from a cache of its own: only what the cache does not hold is read."""
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    if adapter_names is not None:
        options["adapter_names"] = adapter_names
    first = ours.generate(ids, **options)
    longer = torch.cat((first.sequences, ids[:, :2]), dim=1)
    expected = ours.generate(longer, **options)
    lengths = []
    ours.get_base_model().model.embed_tokens.register_forward_hook(lambda _, args, y: lengths.append(y.shape[1]))
    got = ours.generate(longer, cache=first.cache, **options)
    assert lengths[0] == 3  # the last token of the first turn was not read yet
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits, **tolerance)


def config_in(folder) -> dict:
    values = json.loads((folder / "adapter_config.json").read_text())
    return {key: set(value) if isinstance(value, list) else value for key, value in values.items()}
