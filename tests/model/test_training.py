"""Training loops: transformers' Trainer, a plain loop, torch.compile."""

from __future__ import annotations

import inspect

import pytest
import torch
import transformers
from torch import nn

import pyfused


class Rows(torch.utils.data.Dataset):
    """Token rows with a label, and a column that no model takes."""

    def __init__(self, name: str) -> None:
        generator = torch.Generator().manual_seed(8)
        self.ids = torch.randint(1, 64, (8, 6), generator=generator)
        self.name = name

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        labels = ids if self.name == "llama" else int(ids[0]) % 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "origin": 1.0}


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("name", "task"), [("llama", "CAUSAL_LM"), ("bert_cls", "SEQ_CLS"), ("llama", None)])
def test_trainer(pair, tmp_path, name, task):
    """Two steps and an evaluation, with the same losses and weights as HF PEFT's model."""
    results = []
    for model in pair(name, task_type=task):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=0.01,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(name), eval_dataset=Rows(name))
        loss = trainer.train().training_loss
        results.append((loss, trainer.evaluate()["eval_loss"], trainable(model)))
    (their_loss, their_eval, theirs), (loss, evaluation, ours) = results
    assert loss == pytest.approx(their_loss, rel=1e-5)
    assert evaluation == pytest.approx(their_eval, rel=1e-5)
    for parameter_name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[parameter_name], rtol=1e-4, atol=1e-5)


def test_plain_loop_with_dropout(wrap, batch):
    model = wrap(pyfused, "llama", lora_dropout=0.1, modules_to_save=["lm_head"]).train()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.01)
    losses = []
    for _ in range(30):
        inputs = batch("llama")
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_dropout_only_while_training(wrap, batch):
    model = wrap(pyfused, "llama", target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)

    def logits() -> torch.Tensor:
        return model(**batch("llama")).logits

    model.train()
    assert not torch.equal(logits(), logits())
    torch.manual_seed(1)
    first = logits()
    torch.manual_seed(1)
    assert torch.equal(logits(), first)
    model.eval()
    assert torch.equal(logits(), logits())


def test_forward_has_the_models_signature(wrap, build):
    for name in ("llama", "bert_qa", "plain"):
        model = wrap(pyfused, name, target_modules="all-linear")
        assert inspect.signature(model.forward) == inspect.signature(build(name).forward)
        assert inspect.signature(type(model).forward) == inspect.signature(type(build(name)).forward)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compile_without_graph_breaks(wrap, batch, p):
    model = wrap(pyfused, "plain", target_modules=["up", "head"], lora_dropout=p, init_lora_weights=False).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (model, compiled):
        torch.manual_seed(3)
        result = call(**batch("plain"))
        grads.append([result, *torch.autograd.grad(result.square().sum(), list(trainable(model).values()))])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)
    with model.disable_adapter():
        torch.testing.assert_close(compiled(**batch("plain")), model(**batch("plain")))
