"""Linear layers of real models: the shapes that every benchmark chooses from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """A linear layer ``[out_features, in_features]`` as a model has it."""

    name: str
    in_features: int
    out_features: int
    bias: bool


MINILM_384 = LinearShape("minilm-384", 384, 384, bias=True)  # all-MiniLM-L6, query/key/value/output
BERT_768 = LinearShape("bert-768", 768, 768, bias=True)  # BERT base, query/key/value/output
BERT_FFN = LinearShape("bert-ffn-768x3072", 768, 3072, bias=True)  # BERT base, intermediate
LLAMA_2048 = LinearShape("llama-2048", 2048, 2048, bias=False)  # Llama 3.2 1B, TinyLlama: query and output
LLAMA_4096 = LinearShape("llama-4096", 4096, 4096, bias=False)  # Llama 2 7B, Llama 3 8B: query and output

LINEAR_SHAPES = (MINILM_384, BERT_768, BERT_FFN, LLAMA_2048, LLAMA_4096)

# Llama 3 8B on a GPU: attention's query and output, feed-forward, key and value of grouped queries.
LLAMA3_ATTENTION = LinearShape("attn-4096x4096", 4096, 4096, bias=False)
LLAMA3_UP = LinearShape("up-4096x14336", 4096, 14336, bias=False)
LLAMA3_DOWN = LinearShape("down-14336x4096", 14336, 4096, bias=False)
LLAMA3_KEY_VALUE = LinearShape("kv-4096x1024", 4096, 1024, bias=False)

GPU_SHAPES = (LLAMA3_ATTENTION, LLAMA3_UP, LLAMA3_DOWN, LLAMA3_KEY_VALUE)

# Near the layers that goals are set for, see bench_lora_goals.py.
BERT_LARGE_1024 = LinearShape("bert-large-1024", 1024, 1024, bias=True)  # BERT large, query/key/value/output
LLAMA_KEY_VALUE = LinearShape("llama-kv-2048x512", 2048, 512, bias=False)  # Llama 3.2 1B, key and value

NEAR_SHAPES = (BERT_LARGE_1024, LLAMA_KEY_VALUE)


def named(name: str) -> LinearShape:
    return next(shape for shape in (*LINEAR_SHAPES, *GPU_SHAPES, *NEAR_SHAPES) if shape.name == name)
