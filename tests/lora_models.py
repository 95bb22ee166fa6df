"""What the tests of LoRA in whole models share: outputs, how they are compared, and masks."""

from __future__ import annotations

import torch
from torch import nn

from pyfused import ops


def logits(model: nn.Module, inputs: dict) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


def assert_close(got: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = 2e-5) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, what
    error = (got.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.abs().max(), f"{what}: {error}"


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random adapters, the same for a parameter's name and a seed; in evaluation mode."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model.eval()


def drop_as_pyfused(model: nn.Module) -> None:
    """Lets an HF PEFT model's adapters drop what pyfused's drop for the same state of torch's generator."""
    for path, module in model.named_modules():
        if ".lora_dropout." in path and type(module) is nn.Dropout:
            module.forward = lambda x, module=module: ops.dropout(x, module.p, module.training)
