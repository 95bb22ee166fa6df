"""Drawn mixtures of adapters of all methods in one batch: each sample is as with its adapter alone."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from helpers import assert_error_rule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import pyfused  # noqa: E402

ADAPTERS: dict[str, pyfused.PeftConfig] = {
    "lora": pyfused.LoraConfig(r=4, lora_alpha=13, target_modules=["q_proj", "up_proj"]),
    "lora-1": pyfused.LoraConfig(r=1, lora_alpha=3, target_modules=["q_proj"], use_rslora=True),
    "dora": pyfused.LoraConfig(r=2, target_modules=["up_proj"], use_dora=True),
    "bias": pyfused.LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True),
    "adalora": pyfused.AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, target_modules=["v_proj"], orth_reg_weight=0.0
    ),
    "ia3": pyfused.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "bottleneck": pyfused.BottleneckConfig(mh_adapter=True, output_adapter=False, reduction_factor=4),
    "prompt": pyfused.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": pyfused.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
}
NAMES = [*ADAPTERS, "__base__"]
TEXTS = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(1))


@functools.cache
def model_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    base = transformers.LlamaForCausalLM(config).to(dtype)
    model = pyfused.get_peft_model(base, ADAPTERS["lora"], "lora")
    for name in list(ADAPTERS)[1:]:
        model.add_adapter(name, ADAPTERS[name])
    with torch.no_grad():
        for name in ADAPTERS:
            for tensor in pyfused.get_peft_model_state_dict(model, adapter_name=name).values():
                tensor.add_(torch.randn(tensor.shape) / 5)
    return model.eval()


@functools.cache
def alone(dtype: torch.dtype, exact: bool, name: str, text: int, length: int, padding: int) -> Tensor:
    """Logits of a text of so many tokens, after so many of padding, with one adapter in ``dtype``; ``exact``: of the
    same weights in fp64.
    """
    model = in_fp64(dtype) if exact else model_of(dtype)
    ids = nn.functional.pad(TEXTS[text, :length], (padding, 0))[None]
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(len(ids[0])) >= padding).long()[None]}
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs).logits[0, -length:]
    model.set_adapter(name)
    return model(**inputs).logits[0, -length:]


@functools.cache
def in_fp64(dtype: torch.dtype) -> nn.Module:
    return copy.deepcopy(model_of(dtype)).double()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, len(TEXTS) - 1), st.integers(1, TEXTS.shape[1])),
        min_size=1,
        max_size=9,
    ),
    padding=st.sampled_from(["left", "right"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@torch.no_grad()
def test_drawn_mixtures(rows, padding, dtype):
    """Rows are texts of several lengths, padded on one side; a text's logits are those of the text alone, unpadded.

    But with virtual tokens, padding on the left is between them and the text, and counts in its positions: there they
    are those of the padded text alone.
    """
    lengths = torch.tensor([length for _, _, length in rows])
    places = torch.arange(int(lengths.max()))
    mask = places < lengths[:, None]
    mask = mask.flip(1) if padding == "left" else mask
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    ids[mask] = torch.cat([TEXTS[text, :length] for _, text, length in rows])
    names = [name for name, _, _ in rows]
    logits = model_of(dtype)(ids, attention_mask=mask.long(), adapter_names=names).logits[:, -len(places) :]
    for row, (name, text, length) in enumerate(rows):
        between = len(places) - length if padding == "left" and name in ("prompt", "prefix") else 0
        expected, exact = (alone(dtype, exact, name, text, length, between) for exact in (False, True))
        assert_error_rule(name, logits[row, mask[row]], expected, exact)
