"""Prompt and prefix tuning of a Llama: what goes into the model alone, a training step, and the first step of decoding.

python benchmarks/bench_prompt.py --only 'train prefix.* fp32'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness
import peft
import torch
from harness import Workload
from in_parts import measure_in_parts
from lora_common import DTYPES, TOLERANCE
from torch import Tensor, nn

import pyfused

PROVIDERS = ("base", "peft", "peft-fused", "pyfused")
METHODS = {"prompt": "PromptTuningConfig", "prefix": "PrefixTuningConfig", "projected": "PrefixTuningConfig"}


@dataclass(frozen=True)
class Case:
    """A batch ``[batch, length]`` with ``n`` virtual tokens; ``part`` is "model", or "inputs" for what goes into it.

    ``base`` is the frozen model on as many tokens as it has to compute: n more than the text for a prompt, those of the
    text for a prefix. For "inputs" it is the embedding of the text, or the text's keys and values alone in the cache.
    """

    stage: str
    method: str
    part: str
    batch: int
    length: int
    dtype: str
    n: int = 20

    @property
    def label(self) -> str:
        return f"{self.stage} {self.method} {self.part} {self.batch}x{self.length} n={self.n} {self.dtype}"


CASES = [
    Case(stage, method, part, batch, length, dtype)
    for dtype in ("fp32", "bf16")
    for method in METHODS
    for stage, part, batch, length in (
        ("train", "model", 8, 128),
        ("infer", "inputs", 8, 128),
        ("infer", "model", 8, 16),
    )
]


def make_base(case: Case) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12}
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=16000, use_cache=False, **sizes))
    return model.to(DTYPES[case.dtype]).train(case.stage == "train").requires_grad_(False)


def make(case: Case, provider: str, base: nn.Module) -> nn.Module:
    library = pyfused if provider == "pyfused" else peft
    options = {"prefix_projection": True, "encoder_hidden_size": 768} if case.method == "projected" else {}
    config = getattr(library, METHODS[case.method])
    torch.manual_seed(1)
    model = library.get_peft_model(base, config(task_type="FEATURE_EXTRACTION", num_virtual_tokens=case.n, **options))
    if provider == "peft-fused":
        pyfused.fuse(model)
    return model.train(case.stage == "train")


def make_call(case: Case, provider: str, base: nn.Module, ids: Tensor) -> tuple[Callable[[], Tensor], Any]:
    """One forward of a provider, and what is trained in it."""
    words = base.get_input_embeddings()
    if provider == "base":
        tokens = case.length + (case.n if case.method == "prompt" else 0)
        x = torch.randn(case.batch, tokens, 768, dtype=DTYPES[case.dtype]).requires_grad_(case.stage == "train")
        if case.part == "model":
            return lambda: base(inputs_embeds=x)[0], (x,)
        if case.method == "prompt":
            return lambda: words(ids), ()
        return lambda: _keys_of(_Cache(), x), (x,)
    model = make(case, provider, base)
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    if case.part == "model":
        return lambda: model(input_ids=ids)[0], trained
    seen: list[Any] = []

    class Stop(Exception):
        pass

    def catch(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen[:] = [kwargs]
        raise Stop

    base.register_forward_pre_hook(catch, with_kwargs=True)
    keys = torch.randn(case.batch, case.length, 768, dtype=DTYPES[case.dtype])

    def call() -> Tensor:
        try:
            model(input_ids=ids)
        except Stop:
            inputs = seen.pop()
        if case.method == "prompt":
            return inputs["inputs_embeds"]
        return _keys_of(inputs.get("cache") or inputs["past_key_values"], keys)

    return call, trained


class _Cache:
    """What a layer without a prefix does with its keys and values: nothing."""

    @staticmethod
    def update(key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        return key, value


def _keys_of(cache: Any, x: Tensor) -> Tensor:
    """All layers' first update of their caches, and something that depends on all of it."""
    key = x.view(*x.shape[:2], 12, 64).transpose(1, 2)
    results = [tensor for layer in range(6) for tensor in cache.update(key, key, layer)]
    return torch.stack([tensor[:, :, 0] for tensor in results])


def build(case: Case) -> dict[str, Workload]:
    ids = torch.randint(16000, (case.batch, case.length), generator=torch.Generator().manual_seed(2))
    workloads = {}
    for provider in PROVIDERS:
        base = make_base(case)
        call, trained = make_call(case, provider, base, ids)
        training = case.stage == "train"
        with torch.no_grad():
            shape = call().shape
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(DTYPES[case.dtype])
        own = (*base.parameters(), *base.buffers(), *trained)
        workloads[provider] = Workload(call, trained if training else (), grad if training else None, own)
    verify(case, workloads)
    return workloads


def verify(case: Case, workloads: dict[str, Workload]) -> None:
    with torch.no_grad():
        results = {name: work.call() for name, work in workloads.items()}
    for name in PROVIDERS[2:]:
        error = harness.relative_error(results[name], results["peft"])
        if not error <= 10 * TOLERANCE[case.dtype]:
            raise RuntimeError(f"{case.label}: {name} is wrong by {error:.1e}")


def main(arguments: list[str] | None = None) -> None:
    measure_in_parts("prompt", __doc__, CASES, build, arguments)


if __name__ == "__main__":
    main()
