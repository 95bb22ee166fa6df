"""Folders of adapters for the tests of ``AdapterPool``, and requests for them."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

import pyfused
from pyfused import AdapterPool

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def randomise(model: nn.Module, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name or name.endswith(f".{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def save(model: nn.Module, folder: Path, name: str, seed: int, library=pyfused, **options) -> None:
    """Write an adapter into ``folder / name``, made on a model that has others."""
    model.add_adapter("written", library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options))
    randomise(model, "written", seed)
    model.save_pretrained(folder / "_tmp", selected_adapters=["written"])
    model.delete_adapter("written")
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "_tmp" / "written").rename(folder / name)
    shutil.rmtree(folder / "_tmp")


def run(model: nn.Module, inputs: dict, names: list[str]) -> Tensor:
    with torch.no_grad():
        repeated = {key: value.repeat(len(names), 1) for key, value in inputs.items()}
        return model(**repeated, adapter_names=names).logits


def use(pool: AdapterPool, *names: str, **options) -> None:
    with pool.use(list(names), **options):
        pass


# An adapter of every method, on layers that they share.
CONFIGS = {
    "lora": lambda: pyfused.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "dora": lambda: pyfused.LoraConfig(r=3, target_modules=["q_proj"], use_dora=True),
    "adalora": lambda: pyfused.AdaLoraConfig(
        init_r=6, target_r=3, total_step=10, target_modules=["q_proj", "down_proj"], orth_reg_weight=0.0
    ),
    "ia3": lambda: pyfused.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "bottleneck": lambda: pyfused.BottleneckConfig(mh_adapter=True, output_adapter=True, reduction_factor=4),
    "parallel": lambda: pyfused.BottleneckConfig(
        mh_adapter=False,
        output_adapter=True,
        is_parallel=True,
        reduction_factor=8,
        scaling="learned",
        ln_before=True,
    ),
    "prefix": lambda: pyfused.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "projected": lambda: pyfused.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True
    ),
    "prompt": lambda: pyfused.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def randomise_trained(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 5)


def save_alone(base: nn.Module, config: pyfused.PeftConfig, folder: Path, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = pyfused.get_peft_model(base, config)
    randomise_trained(model, seed)
    model.save_pretrained(folder)
