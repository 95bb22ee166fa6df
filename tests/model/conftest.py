"""Small transformers models built from a configuration, alone and wrapped by HF PEFT and by pyfused alike."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from lora_layers import count_calls  # noqa: E402
from prompt_cases import build_case  # noqa: E402

import pyfused  # noqa: E402

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


class Plain(nn.Module):
    """No transformers model: two linear layers, one of them without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20)
        self.act = nn.Tanh()
        self.head = nn.Linear(20, 5, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.act(self.up(input_ids)))


class Convolutions(nn.Module):
    """Convolutions of several kinds, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.c2 = nn.Conv2d(8, 6, 1, bias=False)
        self.c3 = nn.Conv1d(6, 12, 3, padding="same")
        self.c4 = nn.Conv3d(3, 4, (2, 3, 1), padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.c3(torch.tanh(self.c2(torch.tanh(self.c1(input_ids)))).flatten(2))
        x = torch.tanh(x).view(len(x), 3, 4, 5, 5)
        return self.head(torch.tanh(self.c4(x)).flatten(2)[..., :12])


def _llama(**options) -> nn.Module:
    options = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "tie_word_embeddings": False,
    } | options
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))


def _llama_cls() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, num_labels=3
    )
    config.pad_token_id = 0
    return transformers.LlamaForSequenceClassification(config)


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


def _gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return transformers.GPTNeoXForCausalLM(config)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "conv": Convolutions,
    "llama": _llama,
    "llama_tied": lambda: _llama(tie_word_embeddings=True),
    "llama_deep": lambda: _llama(num_hidden_layers=12),
    "llama_cls": _llama_cls,
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_BERT)),
    "bert_cls": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**_BERT)),
    "bert_tokens": lambda: transformers.BertForTokenClassification(transformers.BertConfig(**_BERT)),
    "bert_qa": lambda: transformers.BertForQuestionAnswering(transformers.BertConfig(**_BERT | {"num_labels": 2})),
    "roberta_cls": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**_BERT)),
    "t5": _t5,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
}


@pytest.fixture
def build() -> Callable[..., nn.Module]:
    """A base model by its name; the same weights at every call."""

    def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return _BUILDERS[name]().to(dtype)

    return make


@pytest.fixture
def build_trained(build) -> Callable[..., nn.Module]:
    """A Llama with an adapter of each config, by its name, as training might leave them."""

    def make(configs: dict[str, object], dtype: torch.dtype = torch.float32) -> nn.Module:
        base = build("llama", dtype)
        first, *others = configs
        torch.manual_seed(3)
        model = pyfused.get_peft_model(base, configs[first], first)
        for name in others:
            model.add_adapter(name, configs[name])
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if any(f".{name}." in f"{key}." for name in configs) and "ranknum" not in key:
                    parameter.add_(torch.randn(parameter.shape) / 5)
        return model

    return make


@pytest.fixture
def build_task() -> Callable[..., nn.Module]:
    """A base model of a task by its name in ``prompt_cases``; the same weights at every call."""
    return build_case


@pytest.fixture
def batch() -> Callable[[str], dict[str, Tensor]]:
    """Inputs for a model of that name, with padding where it can be."""

    def make(name: str) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        if name == "plain":
            return {"input_ids": torch.randn(3, 12, generator=generator)}
        if name == "conv":
            return {"input_ids": torch.randn(2, 3, 9, 9, generator=generator)}
        inputs = {
            "input_ids": torch.randint(1, 64, (2, 7), generator=generator),
            "attention_mask": torch.ones(2, 7, dtype=torch.int64),
        }
        inputs["attention_mask"][1, 5:] = 0
        if name == "t5":
            inputs["decoder_input_ids"] = torch.randint(1, 64, (2, 5), generator=generator)
        return inputs

    return make


@pytest.fixture
def wrap(build) -> Callable[..., nn.Module]:
    """A model of that name, wrapped by ``library`` (``peft`` or ``pyfused``) with a LoraConfig of these options.

    The scaling is no power of two, so that another order of operations shows; seeds are the same for both libraries.
    """

    def make(library, name: str, dtype: torch.dtype = torch.float32, base: nn.Module | None = None, **options):
        base = build(name, dtype) if base is None else base
        config = library.LoraConfig(**({"r": 6, "lora_alpha": 13} | options))
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.get_peft_model(base, config)

    return make


@pytest.fixture
def pair(wrap) -> Callable[..., tuple[nn.Module, nn.Module]]:
    """The same model twice: wrapped by HF PEFT, and by pyfused."""
    return lambda name, *args, **options: (wrap(peft, name, *args, **options), wrap(pyfused, name, *args, **options))


@pytest.fixture
def unchanged() -> Callable[[nn.Module], object]:
    """A context in which an error must leave the modules, parameters and their flags of a model as they were."""

    def state(model: nn.Module) -> tuple:
        modules = [(name, id(module), module.training) for name, module in model.named_modules()]
        flags = [(name, id(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()]
        return modules, flags

    @contextmanager
    def check(model: nn.Module) -> Iterator[None]:
        before, values = state(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield
        assert state(model) == before
        after = model.state_dict()
        assert list(after) == list(values)
        assert all(torch.equal(after[name], value) for name, value in values.items())

    return check


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many layers ran on each op."""
    counts = count_calls(monkeypatch)
    counts.update(lora_linear=0, lora_delta=0)
    return counts
