"""What ``fuse`` takes, what it leaves to HF PEFT, and what it says about it."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyfused
from pyfused.integrations import hf_peft
from pyfused.integrations.hf_peft import fuse, unfuse


class ScaledLinear(nn.Linear):
    """Stands for a quantised layer: a subclass of nn.Linear with its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class Fp32Linear(nn.Linear):
    """Returns another dtype than it is given, as some quantised layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class Zoo(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.linear = nn.Linear(12, 12)
        self.subclass = ScaledLinear(12, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.subclass(self.linear(self.embed(ids)))
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.attention(x, x, x, need_weights=False)[0]


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 12, 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight)


def up_and_down(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model.base_model.model.up, model.base_model.model.down


def test_public_names():
    assert pyfused.fuse is fuse and pyfused.unfuse is unfuse


def test_each_kind_of_layer(lora_config, twins, calls, caplog):
    targets = ["embed", "linear", "subclass", "conv", "attention"]
    # fp64: the layers in a row enlarge what fp32 rounds
    fused, eager = twins(peft.get_peft_model(Zoo(), lora_config(targets, r=4)).double())
    with caplog.at_level(logging.INFO, logger="pyfused"):
        report = fuse(fused)
    name = "base_model.model.{}".format
    assert report.fused == [name("embed"), name("linear"), name("subclass")]
    assert list(report.notes) == [name("subclass")] and "ScaledLinear" in report.notes[name("subclass")]
    assert report.skipped == {
        name("conv"): "LoRA on a convolution (Conv1d)",
        name("attention"): "LoRA on nn.MultiheadAttention (MultiheadAttention)",
        name("attention.base_layer.out_proj"): "inside nn.MultiheadAttention",
    }
    assert str(report) in caplog.text and {record.levelno for record in caplog.records} == {logging.INFO}

    ids = torch.randint(0, 16, (3, 5))
    torch.testing.assert_close(fused(ids), eager(ids), rtol=1e-10, atol=1e-10)
    assert calls == {"lora_linear": 1, "lora_delta": 1}


def test_a_conv1d_with_hooks_takes_the_delta_path(lora_config, twins, calls):
    fused, eager = twins(peft.get_peft_model(nn.Sequential(Conv1D(8, 12)), lora_config(["0"], fan_in_fan_out=True)))
    fuse(fused)
    for model in (fused, eager):
        add_forward_hook(model.base_model.model[0].base_layer)
    report, x = fuse(fused), torch.randn(5, 12)
    assert "(Conv1D)" in report.notes["base_model.model.0"]
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
    assert calls == {"lora_delta": 1}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_bdlora": {"target_modules_bd_a": ["up", "down"], "nblocks": 2}}, "LoRA variant BdLora"),
        ({"alora_invocation_tokens": [1, 2]}, "LoRA variant ALora"),
    ],
    ids=["bdlora", "alora"],
)
def test_adapters_that_are_no_plain_lora(options, reason, two_linears):
    with pytest.raises(ValueError, match=reason):
        fuse(two_linears(**options))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (peft.LoHaConfig(target_modules=["up"]), "loha is none of LoRA, AdaLoRA and IA3"),
    ],
    ids=["loha"],
)
def test_other_tuners(config, reason, two_linears):
    model = peft.get_peft_model(two_linears().unload(), config)
    with pytest.raises(ValueError, match=reason):
        fuse(model)


def test_target_parameters(lora_config):
    model = nn.Sequential(nn.Linear(12, 12), Experts())
    model = peft.get_peft_model(model, lora_config(["0"], target_parameters=["1.weight"]))
    report = fuse(model)
    assert report.fused == ["base_model.model.0"]
    assert report.skipped == {"base_model.model.1": "LoRA on an nn.Parameter (target_parameters) (ParamWrapper)"}


def test_quantised_class_of_peft(two_linears):
    """PEFT's layer classes for some quantised bases keep their forward, even where they derive from lora.Linear."""
    kind = type("IncLoraLinear", (peft.tuners.lora.Linear,), {"__module__": "peft.tuners.lora.inc"})
    model = two_linears()
    up, _down = up_and_down(model)
    up.__class__ = kind
    report = fuse(model)
    assert report.skipped == {"base_model.model.up": "base quantised by Intel Neural Compressor (IncLoraLinear)"}
    assert type(up) is kind


def test_tensor_parallel_layer(two_linears):
    model = two_linears()
    up_and_down(model)[0].base_layer._hf_device_mesh = object()
    assert fuse(model).skipped == {"base_model.model.up": "tensor-parallel layer"}


def test_forward_replaced_on_the_layer_is_a_warning(two_linears, caplog):
    """Another library's wrapper around the layer's forward would hide the fused one."""
    model = two_linears()
    up, _ = up_and_down(model)
    up.forward = up.forward
    with caplog.at_level(logging.WARNING, logger="pyfused"):
        report = fuse(model)
    assert list(report.skipped) == ["base_model.model.up"] and "forward was replaced" in caplog.text


def add_forward_hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: 2.0 * y)


def add_forward_pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))


def add_backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda module, grad_x, grad_y: tuple(2.0 * grad for grad in grad_x))


def set_forward(module: nn.Module) -> None:
    """What accelerate does to offload a module."""
    forward = module.forward
    module.forward = lambda x: forward(0.5 * x)


def parametrise(module: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(module)


class Quantised(nn.Parameter):
    """A weight of a class of its own, as bitsandbytes' are."""


def quantise(module: nn.Module) -> None:
    module.weight = Quantised(module.weight.detach(), requires_grad=False)


def attach(pair, where: str, change) -> None:
    for model in pair:
        up, _ = up_and_down(model)
        module = getattr(up, where)
        change(module if where == "base_layer" else module["default"])


def outputs_and_gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), x.grad] + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize(
    "change",
    [add_forward_hook, add_forward_pre_hook, add_backward_hook, set_forward, parametrise, quantise],
    ids=lambda change: change.__name__,
)
def test_a_base_that_must_be_called_takes_the_delta_path(change, when, two_linears, twins, calls):
    fused, eager = pair = twins(two_linears())
    if when == "before fuse":
        attach(pair, "base_layer", change)
    report = fuse(fused)
    assert len(report.fused) == 2 and len(report.notes) == (when == "before fuse")
    if when == "after fuse":
        attach(pair, "base_layer", change)
    x = torch.randn(5, 20)
    got, expected = outputs_and_gradients(fused, x), outputs_and_gradients(eager, x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert calls == {"lora_linear": 1, "lora_delta": 1}


@pytest.mark.parametrize("where", ["lora_A", "lora_B", "lora_dropout"])
@pytest.mark.parametrize("change", [add_forward_hook, set_forward], ids=lambda change: change.__name__)
def test_hooks_on_the_adapter_take_pefts_forward(change, where, two_linears, twins, calls):
    fused, eager = pair = twins(two_linears())
    fuse(fused)
    attach(pair, where, change)
    x = torch.randn(5, 20)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
    assert calls == {"lora_linear": 1}, "the other layer stays fused"


def test_hooks_on_the_layer_itself_run(two_linears, twins, calls):
    fused, eager = pair = twins(two_linears())
    fuse(fused)
    for model in pair:
        add_forward_hook(up_and_down(model)[0])
    x = torch.randn(5, 20)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
    assert calls == {"lora_linear": 2}


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(0.5), nn.Dropout(1.0), nn.Dropout(0.5, inplace=True)], ids=repr)
def test_other_dropouts_take_pefts_forward(dropout, two_linears, calls):
    model = two_linears()
    fuse(model)
    up_and_down(model)[0].lora_dropout["default"] = dropout
    model(torch.randn(5, 20))
    assert calls == {"lora_linear": 1}


def test_base_that_returns_another_dtype(lora_config, twins, calls):
    model = nn.Sequential(Fp32Linear(12, 9, dtype=torch.bfloat16))
    fused, eager = twins(peft.get_peft_model(model, lora_config(["0"])))
    fuse(fused)
    x = torch.randn(7, 12).bfloat16()
    got, expected = fused(x), eager(x)
    assert got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert calls == {"lora_delta": 1}


def test_inside_function_transforms(two_linears, twins, calls):
    """``torch.func`` cannot go through the op's autograd function: PEFT's forward runs."""
    fused, eager = twins(two_linears())
    fuse(fused)
    x = torch.randn(5, 20)
    torch.testing.assert_close(torch.func.vmap(fused)(x), eager(x), rtol=1e-5, atol=1e-5)
    grads = [torch.func.grad(lambda x, model=model: model(x).square().sum())(x) for model in (fused, eager)]
    assert torch.equal(grads[0], grads[1]) and not calls


def test_functional_call(two_linears, calls):
    model = two_linears()
    fuse(model)
    x = torch.randn(5, 20)
    doubled = {name: 2.0 * parameter for name, parameter in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, x)
    unfuse(model)
    torch.testing.assert_close(got, torch.func.functional_call(model, doubled, x), rtol=1e-4, atol=1e-5)
    assert calls == {"lora_linear": 2}


@pytest.mark.parametrize("function", [fuse, unfuse])
def test_not_a_module(function):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        function({})


def test_not_a_peft_model():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"wrapped by HF PEFT .*got torch.*Sequential"):
        fuse(model)
    unfuse(model)
    model = pyfused.get_peft_model(model, pyfused.LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"a pyfused\.PeftModel, which runs on pyfused's ops as it is"):
        fuse(model)


def test_peft_is_imported_by_fuse_only():
    code = "import sys, pyfused; print({'peft', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="wrapped by HF PEFT, and peft is not installed"):
        fuse(nn.Linear(2, 2))


def test_untested_version_warns_once(two_linears, monkeypatch):
    assert peft.__version__ in hf_peft.TESTED_PEFT_VERSIONS
    monkeypatch.setattr(peft, "__version__", "0.99.0")
    hf_peft._warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"not tested with peft 0\.99\.0; tested: 0\.21\.2"):
        fuse(two_linears())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fuse(two_linears())


def test_report_names_each_reason_once(lora_config):
    model = nn.Sequential(*(nn.Conv1d(8, 8, 1) for _ in range(5)), nn.Linear(8, 8))
    report = fuse(peft.get_peft_model(model, lora_config([str(i) for i in range(6)])))
    lines = str(report).splitlines()
    assert lines[0] == "1 layers fused, 5 skipped" and len(lines) == 2
    assert lines[1].endswith("base_model.model.0, base_model.model.1, base_model.model.2 and 2 more)")
