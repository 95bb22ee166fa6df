"""AdaLoRA and DoRA in a Llama: a training step over the frozen model's, AdaLoRA's allocation, and ``set_adapter``.

python benchmarks/bench_methods.py --only 'train adalora'
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import harness
import peft
import torch
from harness import Workload
from in_parts import measure_in_parts
from lora_common import DTYPES, TOLERANCE
from torch import Tensor, nn

import pyfused

LAYERS, WIDTH, BATCH, LENGTH = 4, 768, 4, 128
OPTIONS = {
    "lora": {"r": 8, "lora_alpha": 16},
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True},
    "adalora": {
        "init_r": 12,
        "target_r": 8,
        "lora_alpha": 16,
        "tinit": 0,
        "tfinal": 1,
        "deltaT": 1,
        "total_step": 1000,
    },
}


@dataclass(frozen=True)
class Case:
    """``part`` is "step" (train), or what is called: "update_and_allocate" or "set_adapter" (of all layers)."""

    stage: str
    method: str
    part: str
    dtype: str = "fp32"
    dropout: float = 0.0

    @property
    def label(self) -> str:
        return f"{self.stage} {self.method} {self.part} {7 * LAYERS} layers p={self.dropout} {self.dtype}"


CASES = [
    *(Case("train", method, "step", dtype, p) for method in OPTIONS for dtype in ("fp32", "bf16") for p in (0.0, 0.1)),
    Case("infer", "adalora", "update_and_allocate"),
    Case("infer", "lora", "set_adapter"),
]


def make_base(case: Case) -> nn.Module:
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 2048, "num_hidden_layers": LAYERS, "num_attention_heads": 12}
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=64, use_cache=False, **sizes))
    return model.to(DTYPES[case.dtype]).train().requires_grad_(False)


def make(case: Case, provider: str) -> nn.Module:
    """The model with adapters in its own dtype; their weights are random, so that none is without effect."""
    model = make_base(case)
    if provider == "base":
        return model
    library: ModuleType = pyfused if provider == "pyfused" else peft
    options = OPTIONS[case.method] | {"target_modules": "all-linear", "lora_dropout": case.dropout}
    config = getattr(library, "AdaLoraConfig" if case.method == "adalora" else "LoraConfig")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(model, config(**options), autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name and "ranknum" not in name:
                std = 1.0 if "lora_E" in name else 0.02
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    if provider == "peft-fused":
        pyfused.fuse(model)
    return model


def step(case: Case, provider: str) -> Workload:
    """Forward to the last hidden state, backward to the input of the first block."""
    model = make(case, provider)
    generator, dtype = torch.Generator().manual_seed(2), DTYPES[case.dtype]
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(BATCH, LENGTH, WIDTH, generator=generator).to(dtype)
    trained = tuple(parameter for name, parameter in model.named_parameters() if is_trained(name, parameter))
    return Workload(lambda: model(inputs_embeds=x)[0], (x, *trained), grad, (*model.parameters(), *model.buffers()))


def is_trained(name: str, parameter: Tensor) -> bool:
    return parameter.requires_grad and "ranknum" not in name


def allocation(case: Case, provider: str) -> Workload:
    """A step in the middle of the schedule, in which importances are updated and ranks are chosen."""
    model = make(case, provider)
    for name, parameter in model.named_parameters():
        if is_trained(name, parameter):
            parameter.grad = torch.randn_like(parameter)
    update: Callable[[int], None] = model.base_model.update_and_allocate
    return Workload(lambda: update(500))


def switching(case: Case, provider: str) -> Workload:
    model = make(case, provider)
    library: ModuleType = pyfused if provider == "pyfused" else peft
    model.add_adapter("other", library.LoraConfig(**OPTIONS["lora"], target_modules="all-linear"))
    names = itertools.cycle(["other", "default"])
    return Workload(lambda: model.set_adapter(next(names)))


def build(case: Case) -> dict[str, Workload]:
    if case.part == "step":
        verify(case)
        return {provider: step(case, provider) for provider in ("base", "peft", "peft-fused", "pyfused")}
    made = allocation if case.part == "update_and_allocate" else switching
    return {provider: made(case, provider) for provider in ("peft", "pyfused")}


def verify(case: Case) -> None:
    """In evaluation all providers give HF PEFT's result, relative to what the adapters change."""
    results = {}
    for provider in ("base", "peft", "peft-fused", "pyfused"):
        model = make(case, provider).eval()
        x = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(2)).to(DTYPES[case.dtype])
        with torch.no_grad():
            results[provider] = model(inputs_embeds=x)[0].double()
    for provider in ("peft-fused", "pyfused"):
        error = harness.relative_error(results[provider], results["peft"], results["peft"] - results["base"])
        if not error <= 10 * TOLERANCE[case.dtype]:
            raise RuntimeError(f"{case.label}: {provider} is wrong, its error is {error:.1e} of the adapters' share")


def main(arguments: list[str] | None = None) -> None:
    measure_in_parts("methods", __doc__, CASES, build, arguments)


if __name__ == "__main__":
    main()
