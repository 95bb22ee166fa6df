"""A fused model gives what HF PEFT gives: outputs and gradients, in fp32 and with fp32 adapters on a bf16 base."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import OWN_NARROW_PRODUCTS, assert_error_rule
from torch import nn

from pyfused.integrations.hf_peft import fuse


def run(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of every trainable parameter for a fixed linear function of them."""
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.linspace(-1.0, 1.0, logits.numel(), dtype=torch.float64).view(logits.shape)
    (logits.double() * weights).sum().backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return logits.detach(), grads


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def total_error(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Root of the sum of the squared relative errors of the tensors, each by its norm."""
    return sum(((got[key].double() - value).norm() / value.norm()).item() ** 2 for key, value in exact.items()) ** 0.5


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_fp32_logits_and_gradients(name, train, hf_model, twins, calls):
    model, inputs, layers = hf_model(name)
    fused, eager = twins(model.train(train))
    report = fuse(fused)
    assert len(report.fused) == layers and not report.skipped and not report.notes

    logits, grads = run(fused, inputs)
    assert calls == {"lora_linear": layers}
    expected_logits, expected_grads = run(eager, inputs)
    assert calls == {"lora_linear": layers}, "the other model must not have been fused"

    assert relative_error(logits, expected_logits) < 1e-5
    assert grads.keys() == expected_grads.keys() and len(grads) >= 2 * layers
    for key, grad in grads.items():
        assert relative_error(grad, expected_grads[key]) < 1e-5, key


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_bf16_base_with_fp32_adapters(name, hf_model, twins, calls):
    model, inputs, layers = hf_model(name, torch.bfloat16)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    assert adapters and all(p.dtype == torch.float32 for p in adapters)
    exact_logits, exact_grads = run(copy.deepcopy(model).double(), inputs)
    fused, eager = twins(model)
    fuse(fused)
    logits, grads = run(fused, inputs)
    assert calls["lora_linear"] == layers
    eager_logits, eager_grads = run(eager, inputs)

    assert_error_rule("logits", logits, eager_logits, exact_logits)
    # Each gradient has gone through a whole network in bf16, where one tensor may have luck that another has not:
    # the error of all of them together is compared.
    assert total_error(grads, exact_grads) <= 1.5 * total_error(eager_grads, exact_grads)


def test_bf16_layer(two_linears, twins, calls):
    """Output within one bf16 ulp of PEFT's, element by element; gradients by the error rule, and the output too where
    the base product is ours, with the update in its sums, so that PEFT rounds twice what is rounded once."""
    fused, eager = twins(two_linears(torch.bfloat16, targets=["up"]).base_model.model.up)
    exact = copy.deepcopy(eager).double()
    fuse(fused)
    x, grad_y = torch.randn(64, 20).bfloat16(), torch.randn(64, 24).bfloat16()
    outputs, grads = [], []
    for layer, dtype in ((fused, torch.bfloat16), (eager, torch.bfloat16), (exact, torch.float64)):
        leaf = x.to(dtype).requires_grad_()
        outputs.append(layer(leaf))
        trained = {"x": leaf, "lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}
        grads.append(torch.autograd.grad(outputs[-1], list(trained.values()), grad_y.to(dtype)))
    assert calls == {"lora_linear": 1} and outputs[0].dtype == torch.bfloat16
    got, expected = outputs[0].float(), outputs[1].float()
    if OWN_NARROW_PRODUCTS:
        assert_error_rule("output", *outputs)
    else:
        exponent = torch.maximum(got.abs(), expected.abs()).log2().floor()
        assert ((got - expected).abs() <= torch.exp2(exponent - 7)).all()
    for name, *gradients in zip(trained, *grads, strict=True):
        assert_error_rule(f"gradient of {name}", *gradients)


@pytest.mark.parametrize("autocast", [torch.bfloat16, None], ids=["autocast", "plain"])
@pytest.mark.parametrize("adapters", ["one", "two"])
def test_autocast_and_two_adapters(adapters, autocast, two_linears, lora_config, twins, calls):
    model = two_linears()
    if adapters == "two":
        model.add_adapter("second", lora_config(["up", "down"], r=3))
        model.base_model.set_adapter(["default", "second"])
    exact = copy.deepcopy(model).double()
    fused, eager = twins(model)
    fuse(fused)
    x = torch.randn(5, 3, 20)
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        got, expected = fused(x), eager(x)
    assert calls == {"lora_linear": 2, "lora_delta": 2} if adapters == "two" else {"lora_linear": 2}
    assert got.dtype == expected.dtype == (autocast or torch.float32)
    if autocast is None:
        assert relative_error(got, expected) < 1e-5
    else:
        assert_error_rule("output", got, expected, exact(x.double()))


def test_fp64_model(two_linears, twins, calls):
    fused, eager = twins(two_linears(torch.float64))
    fuse(fused)
    x = torch.randn(4, 20, dtype=torch.float64)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-13, atol=1e-13)
    assert calls == {"lora_linear": 2}


def test_adapter_wider_than_the_input_keeps_pefts_forward(two_linears, twins, calls):
    """fp64 adapters on an fp32 base are outside the op; PEFT computes them in fp64."""
    fused, eager = twins(two_linears())
    for model in (fused, eager):
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.lora_A.double()
            layer.lora_B.double()
    fuse(fused)
    x = torch.randn(4, 20)
    assert torch.equal(fused(x), eager(x)) and not calls
