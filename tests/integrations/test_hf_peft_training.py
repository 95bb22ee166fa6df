"""A fused model in training: dropout, gradient checkpointing, torch.compile, transformers.Trainer."""

from __future__ import annotations

import copy
from collections import Counter

import peft
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from pyfused.integrations.hf_peft import fuse


def layer_of_ones(p: float) -> nn.Module:
    """A fused layer with a zero base and A = B = 1: for x = 1 its output is the dropout mask times 1 / (1 - p)."""
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=64, lora_alpha=64, lora_dropout=p, target_modules=["0"]),
        nn.Sequential(nn.Linear(64, 64, bias=False)),
    )
    layer = model[0]
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.copy_(torch.eye(64))
        layer.lora_B["default"].weight.copy_(torch.eye(64))
    fuse(model)
    return model


def test_dropout_statistics(calls):
    model = layer_of_ones(0.25)
    x = torch.ones(500, 64)
    mask = model(x).detach()
    assert calls == {"lora_linear": 1}
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full((int(kept.sum()),), 1 / 0.75), rtol=1e-4, atol=0.0)
    # 32,000 draws: a standard deviation of 0.0024 for the share of the zeros, of 0.019 for a column's.
    assert abs(kept.float().mean().item() - 0.75) < 0.012
    assert (kept.float().mean(0) - 0.75).abs().max() < 0.1
    assert not torch.equal(model(x), mask), "each call draws another mask"


def test_manual_seed_reproduces_dropout(two_linears, calls):
    model = two_linears(lora_dropout=0.5)
    fuse(model)
    x = torch.randn(5, 20)
    outputs = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outputs.append(model(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    assert calls == {"lora_linear": 6}


def test_dropout_is_off_in_eval_and_without_p(two_linears, twins, calls):
    x = torch.randn(5, 20)
    fused, eager = twins(two_linears(lora_dropout=0.5).eval())
    fuse(fused)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fused.train()(x), eager(x))
    model = two_linears()
    fuse(model)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert calls == {"lora_linear": 8}


def test_dropout_module_decides_not_the_layer(two_linears, calls):
    """PEFT calls the dropout module, whose own mode counts."""
    model = two_linears(lora_dropout=0.5).train()
    fuse(model)
    x = torch.randn(5, 20)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.lora_dropout["default"].eval()
    assert torch.equal(model(x), model(x)) and calls == {"lora_linear": 4}


def test_same_mask_forward_and_backward(two_linears, calls):
    """Finite differences under one seed: a backward with another mask than the forward's would be far off."""
    model = two_linears(torch.float64, lora_dropout=0.5)
    fuse(model)
    x = torch.randn(6, 20, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 8, dtype=torch.float64)
    tensors = [x] + [p for p in model.parameters() if p.requires_grad]

    def loss() -> torch.Tensor:
        torch.manual_seed(3)
        return (model(x) * weights).sum()

    grads = torch.autograd.grad(loss(), tensors)
    assert len(tensors) == 5 and calls == {"lora_linear": 2}
    step = 1e-6
    for tensor, grad in zip(tensors, grads, strict=True):
        direction = torch.randn_like(tensor)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
                values.append(loss().item())
                tensor -= sign * step * direction
        assert (values[0] - values[1]) / (2 * step) == pytest.approx((grad * direction).sum().item(), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(use_reentrant, hf_model, twins, calls):
    model, inputs, layers = hf_model("llama", lora_dropout=0.3)
    checkpointed, plain = twins(model.train())
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    grads = []
    for model in (checkpointed, plain):
        fuse(model)
        torch.manual_seed(5)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert len(grads[0]) == 2 * layers
    # Layers of one x are computed together in the plain model alone: their gradients of x are added in another order.
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-7)
    assert calls == {"lora_linear": 3 * layers}, "the checkpointed forward runs twice"


class RecordingBackend:
    """``aot_eager`` that counts the graphs, and which ops they and their subgraphs call."""

    def __init__(self) -> None:
        self.graphs = 0
        self.ops: Counter = Counter()

    def __call__(self, module: torch.fx.GraphModule, inputs: list):
        self.graphs += 1
        for part in module.modules():
            if isinstance(part, torch.fx.GraphModule):
                calls = (str(node.target) for node in part.graph.nodes if node.op == "call_function")
                self.ops.update(call.removesuffix(".default") for call in calls)
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)


@pytest.mark.parametrize("state", ["grad", "no_grad", "dropout", "two adapters"])
def test_compile_fullgraph(state, two_linears, lora_config):
    torch._dynamo.reset()
    model = two_linears(lora_dropout=0.25 if state == "dropout" else 0.0)
    if state == "two adapters":
        model.add_adapter("second", lora_config(["up", "down"], r=3))
        model.base_model.set_adapter(["default", "second"])
    fuse(model)
    backend = RecordingBackend()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    x = torch.randn(5, 20)
    with torch.set_grad_enabled(state != "no_grad"):
        got, expected = compiled(x), model(x)
    assert backend.graphs == 1
    assert backend.ops["pyfused._lora_linear_forward"] == 2
    assert backend.ops["pyfused._lora_delta_forward"] == (2 if state == "two adapters" else 0)
    if state == "dropout":
        return
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if state != "no_grad":
        got.square().sum().backward()
        expected.square().sum().backward()
        grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (compiled._orig_mod, model)]
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_compiled_model_follows_its_state(two_linears):
    """What the fused forward decides by is guarded: a change after compiling shows (not hooks: PyTorch's own limit)."""
    torch._dynamo.reset()
    model = two_linears()
    fuse(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 20)
    for change in (
        lambda: None,
        lambda: model.base_model.model.up.set_scale("default", 2.0),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.merge_adapter(),
    ):
        change()
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


class Sentences(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 64, (6,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 3}


def test_trainer(hf_model, twins, tmp_path, calls):
    from transformers import Trainer, TrainingArguments

    model, _, layers = hf_model("bert")
    fused, eager = twins(model)
    fuse(fused)
    parameters = []
    for name, model in (("fused", fused), ("eager", eager)):
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            seed=1,
        )
        Trainer(model=model, args=arguments, train_dataset=Sentences()).train()
        parameters.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    assert calls == {"lora_linear": 2 * layers}
    # Adam divides by the size of the gradient: where that is next to nothing, its rounding shows.
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-3, atol=1e-4)
    start = dict(hf_model("bert")[0].named_parameters())
    assert any(not torch.equal(value, start[name]) for name, value in parameters[0].items())
