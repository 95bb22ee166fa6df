"""``fuse`` on HF PEFT's IA3 layers: outputs and gradients, what keeps PEFT's forward, what stays PEFT's."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

from pyfused import ops
from pyfused.integrations.hf_peft import fuse, unfuse


@pytest.fixture
def ia3_calls(monkeypatch) -> list[str]:
    names: list[str] = []

    def counted(name):
        op = getattr(ops, name)

        def call(*args):
            names.append(name)
            return op(*args)

        return call

    for name in ("ia3_linear", "ia3_scale"):
        monkeypatch.setattr(ops, name, counted(name))
    return names


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))


@pytest.fixture
def ia3_model(hf_model):
    """A transformers model with HF PEFT's IA3 layers, and its inputs."""

    def make(name: str, dtype: torch.dtype = torch.float32):
        _, inputs, _ = hf_model("llama" if name == "gpt2" else name)
        torch.manual_seed(0)
        base = gpt2() if name == "gpt2" else hf_model(name)[0].unload()
        config = peft.IA3Config(init_ia3_weights=False, fan_in_fan_out=name == "gpt2")
        return peft.get_peft_model(base.to(dtype), config).eval(), inputs

    return make


def run(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(**inputs).logits
    weights = torch.linspace(-1.0, 1.0, logits.numel(), dtype=torch.float64).view(logits.shape)
    (logits.double() * weights).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_logits_and_gradients(ia3_model, name, ia3_calls):
    model, inputs = ia3_model(name)
    fused, eager = copy.deepcopy(model), model
    report = fuse(fused)
    assert report.fused and not report.skipped and len(report.notes) == (len(report.fused) if name == "gpt2" else 0)
    got = run(fused, inputs)
    assert ia3_calls == ["ia3_scale" if name == "gpt2" else "ia3_linear"] * len(report.fused)
    expected = run(eager, inputs)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert (got[key] - value).abs().max() <= 1e-5 * value.abs().max(), key


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2"])
def test_fp32_vectors_on_a_bf16_base(ia3_model, name):
    model, inputs = ia3_model(name, torch.bfloat16)
    fused, eager, exact = copy.deepcopy(model), model, run(copy.deepcopy(model).double(), inputs)
    fuse(fused)
    got, expected = run(fused, inputs), run(eager, inputs)
    assert got["logits"].dtype == torch.bfloat16
    for key, value in exact.items():
        errors = [(result[key].double() - value).norm() for result in (got, expected)]
        assert errors[0] <= 2 * errors[1] + 0.01 * value.norm(), key


def test_what_stays_pefts(ia3_model, ia3_calls, tmp_path):
    model, inputs = ia3_model("llama")
    expected = model(**inputs).logits
    state = list(model.state_dict())
    count = len(fuse(model).fused)
    assert list(model.state_dict()) == state and len(fuse(model).fused) == count
    with model.disable_adapter():
        model(**inputs)
    assert ia3_calls == []
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert ia3_calls == []
    model.base_model.unmerge_adapter()
    model.add_adapter("second", peft.IA3Config(init_ia3_weights=False))
    model.base_model.set_adapter(["default", "second"])
    both = model(**inputs).logits
    assert ia3_calls == ["ia3_linear"] * count
    model.save_pretrained(tmp_path)
    unfuse(model)
    torch.testing.assert_close(both, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not any(type(module).__module__.startswith("pyfused") for module in model.modules())


@pytest.mark.parametrize("x", [torch.randn(5, 7), torch.randn(5, 8, dtype=torch.float64)], ids=["width", "dtype"])
def test_an_x_that_does_not_fit_is_refused_as_by_hf_peft(x):
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=[])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 4)), config)
    messages = []
    for action in (lambda model: None, fuse):
        action(model)
        with pytest.raises(RuntimeError) as error:
            model(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
