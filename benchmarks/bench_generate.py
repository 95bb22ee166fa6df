"""Tokens per second of a Llama of 97 M parameters in ``generate``, each request with its own LoRA adapter.

python benchmarks/bench_generate.py --only '32 requests.*, 8 adapters'

LoRA on all seven linear layers of a block, greedy. "base": plain weights, which is what one merged adapter
costs; "peft" and "pyfused" are called with ``adapter_names=``; in "pyfused-active" one adapter is active.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Workload
from in_parts import measure_in_parts
from lora_common import DTYPES, TOLERANCE
from torch import Tensor, nn

import pyfused

RANK = 8
LENGTH = 16  # tokens of a request


@dataclass(frozen=True)
class Case:
    """``requests`` over ``adapters`` in turn; ``new`` tokens are made for each."""

    stage: str
    requests: int
    adapters: int
    new: int = 16
    dtype: str = "bf16"

    @property
    def label(self) -> str:
        tokens = f"{LENGTH} + {self.new} tokens"
        return f"{self.stage} {self.requests} requests of {tokens}, {self.adapters} adapters, {self.dtype}"


SIZES = ((32, 1, 16), (32, 8, 16), (32, 32, 8), (128, 128, 8))
CASES = [Case("infer", *size, dtype) for dtype in ("bf16", "fp32") for size in SIZES]
MAX_PEFT_ADAPTERS = 32  # its loop over more takes too long to be timed as often as the others


def make_base(dtype: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=16000, eos_token_id=None, pad_token_id=0, **sizes)
    model = transformers.LlamaForCausalLM(config).to(DTYPES[dtype]).eval().requires_grad_(False)
    # The first step's is a slice of all hidden states, for which torch's linear copies the weight once for each row.
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
    return model


def make(provider: str, adapters: int, dtype: str) -> nn.Module:
    """The model with adapters "0", "1", ... of random values, alike in both libraries."""
    model = make_base(dtype)
    if provider == "base":
        return model
    if provider == "peft":
        import peft as library
    else:
        library = pyfused
    config = library.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", inference_mode=True)
    model = library.get_peft_model(model, config, "0", autocast_adapter_dtype=False)
    for name in range(1, adapters):
        model.add_adapter(str(name), config, autocast_adapter_dtype=False)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            generator = torch.Generator().manual_seed(hash_of(key))
            parameter.data.normal_(std=0.3 * parameter.shape[1] ** -0.5, generator=generator)
    return model.eval()


def hash_of(key: str) -> int:
    """A number for a name, the same in every process."""
    return int.from_bytes(key.encode(), "little") % (2**63 - 1)


def inputs(case: Case) -> dict[str, Tensor]:
    ids = torch.randint(1, 16000, (case.requests, LENGTH), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def names(case: Case) -> list[str]:
    return [str(request % case.adapters) for request in range(case.requests)]


def build(case: Case) -> dict[str, Workload]:
    providers = ("base", "peft", "pyfused") if case.adapters <= MAX_PEFT_ADAPTERS else ("base", "pyfused")
    models = {provider: make(provider, case.adapters, case.dtype) for provider in providers}
    options: dict[str, dict[str, Any]] = {provider: {"adapter_names": names(case)} for provider in providers[1:]}
    options["base"] = {}
    verify(case, models)
    if case.adapters == 1:
        models["pyfused-active"], options["pyfused-active"] = make("pyfused", 1, case.dtype), {}

    def call_of(provider: str):
        limits = {"max_new_tokens": case.new, "min_new_tokens": case.new, "do_sample": False}
        return lambda: models[provider].generate(**inputs(case), **limits, **options[provider])

    return {provider: Workload(call_of(provider)) for provider in models}


@torch.no_grad()
def verify(case: Case, models: dict[str, nn.Module]) -> None:
    """Logits are HF PEFT's, up to the dtype's rounding, measured against what adapters change.

    Without HF PEFT the first and the last request are compared with their adapters alone.
    """
    rows = slice(None) if "peft" in models else slice(None, None, case.requests - 1)
    given = {key: tensor[rows] for key, tensor in inputs(case).items()}
    base = models["base"](**given).logits
    ours = models["pyfused"](**inputs(case), adapter_names=names(case)).logits[rows]
    if "peft" in models:
        expected = models["peft"](**given, adapter_names=names(case)).logits
    else:
        alone = []
        for row, name in enumerate(names(case)[rows]):
            models["pyfused"].set_adapter(name)
            alone.append(models["pyfused"](**{key: tensor[[row]] for key, tensor in given.items()}).logits)
        expected = torch.cat(alone)
    error = harness.relative_error(ours, expected, expected - base)
    if not error <= 10 * TOLERANCE[case.dtype]:
        raise RuntimeError(f"{case.label}: pyfused is wrong by {error:.1e} of the adapters' share")


def tokens_per_second(result: harness.Result) -> dict[str, str]:
    return {"tokens_per_s": f"{result.case.requests * result.case.new / (result.stats.min_us / 1e6):.0f}"}


def main(arguments: list[str] | None = None) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    measure_in_parts("generate", __doc__, CASES, build, arguments, tokens_per_second)


if __name__ == "__main__":
    main()
