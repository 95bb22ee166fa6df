"""Small models built from a config, wrapped by HF PEFT, and a count of the layer calls that reach pyfused's ops."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_layers import count_calls  # noqa: E402

from pyfused.integrations.hf_peft import fuse  # noqa: E402


class TwoLinears(nn.Module):
    """The smallest model with a layer that has a bias and one that has none."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.up = nn.Linear(20, 24, dtype=dtype)
        self.down = nn.Linear(24, 8, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config)


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        vocab_size=64,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


# name -> (builder, target modules, number of layers they match)
MODELS = {
    "llama": (_llama, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], 14),
    "bert": (_bert, ["query", "value", "dense"], 11),
    "t5": (_t5, ["q", "v", "wi", "wo"], 20),
    "gpt2": (_gpt2, ["c_attn", "c_fc", "c_proj"], 8),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How many layers ran on each op; PEFT's own forward counts nothing."""
    return count_calls(monkeypatch)


@pytest.fixture
def lora_config() -> Callable:
    """A LoraConfig whose scaling is no power of two and whose adapter is not zero at the start."""

    def make(targets, **options):
        options = {"r": 6, "lora_alpha": 13, "init_lora_weights": False} | options
        return peft.LoraConfig(target_modules=targets, **options)

    return make


@pytest.fixture
def two_linears(lora_config) -> Callable:
    """``TwoLinears`` wrapped by HF PEFT."""

    def make(dtype: torch.dtype = torch.float32, targets=("up", "down"), **options):
        return peft.get_peft_model(TwoLinears(dtype), lora_config(list(targets), **options))

    return make


@pytest.fixture
def hf_model(lora_config) -> Callable:
    """A transformers model wrapped by HF PEFT, its inputs, and the number of its LoRA layers."""

    def make(name: str, dtype: torch.dtype = torch.float32, **options):
        build, targets, layers = MODELS[name]
        options = {"fan_in_fan_out": name == "gpt2"} | options
        model = peft.get_peft_model(build().to(dtype), lora_config(targets, **options))
        inputs = {"input_ids": torch.randint(1, 64, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
        inputs["attention_mask"][1, 5:] = 0
        if name == "t5":
            inputs["decoder_input_ids"] = torch.randint(1, 64, (2, 5))
        return model, inputs, layers

    return make


@pytest.fixture
def twins() -> Callable:
    """Two equal models: one to be fused, one to stay as PEFT made it."""
    return lambda model: (copy.deepcopy(model), model)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 20)


@pytest.fixture
def pair(two_linears, lora_config, twins):
    """``two_linears`` with the adapters "default" and "second" (another rank, one layer only), fused and not."""
    model = two_linears()
    model.add_adapter("second", lora_config(["up"], r=3, use_rslora=True))
    fused, eager = twins(model)
    fuse(fused)
    return fused, eager
