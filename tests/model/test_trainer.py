"""transformers.Trainer as it comes: adapters in its checkpoints, resuming from them, and the best one at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import pyfused

peft = pytest.importorskip("peft")

STEPS = 4


class Rows(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.ids = torch.randint(1, 64, (8, 6), generator=torch.Generator().manual_seed(8))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def bert_mlm() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **sizes))


@pytest.fixture
def make(build):
    """A model with tied weights and an adapter with dropout by ``library``: "pyfused", "peft", or "fused" for both."""

    def make(name: str, library: str) -> nn.Module:
        base = bert_mlm() if name == "bert_mlm" else build(name)
        targets = ["query", "value"] if name == "bert_mlm" else ["q_proj", "v_proj"]
        package = pyfused if library == "pyfused" else peft
        torch.manual_seed(1)
        config = package.LoraConfig(r=4, lora_alpha=13, lora_dropout=0.1, target_modules=targets)
        model = package.get_peft_model(base, config)
        if library == "fused":
            pyfused.fuse(model)
        return model

    return make


@pytest.fixture
def train(tmp_path):
    """Train a model and return its trainer."""

    def train(model: nn.Module, folder: str, resume: Path | None = None, **options) -> transformers.Trainer:
        options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1} | options
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=4,
            learning_rate=0.02,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **options,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows())
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return trainer

    return train


def adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_" in name}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("library", ["pyfused", "fused"])
@pytest.mark.parametrize("name", ["bert_mlm", "llama_tied"])
def test_checkpoints_hold_the_adapter_and_resume(make, train, name, library):
    whole = train(make(name, library), "whole")
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    files = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    model = make(name, library)
    start = adapter(model)
    resumed = train(model, "resumed", resume=checkpoint)
    assert resumed.state.global_step == STEPS
    assert_same(adapter(model), adapter(whole.model))
    assert not all(torch.equal(value, start[key]) for key, value in adapter(model).items())


_VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
METHODS = {
    "dora": lambda: pyfused.LoraConfig(use_dora=True, target_modules=["q_proj"]),
    "adalora": lambda: pyfused.AdaLoraConfig(init_r=4, target_r=2, total_step=9, task_type="CAUSAL_LM"),
    "ia3": lambda: pyfused.IA3Config(),
    "bottleneck": lambda: pyfused.BottleneckConfig.houlsby(reduction_factor=4),
    "prefix": lambda: pyfused.PrefixTuningConfig(**_VIRTUAL),
    "prompt": lambda: pyfused.PromptTuningConfig(**_VIRTUAL),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes(build, train, method):
    def make() -> nn.Module:
        torch.manual_seed(1)
        return pyfused.get_peft_model(build("llama_tied"), METHODS[method]())

    def trained(model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    whole = train(make(), "whole")
    checkpoint = Path(whole.args.output_dir, "checkpoint-2")
    files = {file.name for file in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert "model.safetensors" not in files
    model = make()
    start = trained(model)
    assert train(model, "resumed", resume=checkpoint).state.global_step == STEPS
    assert_same(trained(model), trained(whole.model))
    assert not all(torch.equal(value, start[name]) for name, value in trained(model).items())


@pytest.fixture
def best_is_the_second(monkeypatch) -> dict:
    """Arguments of a training that keeps its best checkpoint, whose loss is least after the second step."""
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": losses[self.state.global_step]}
        self.log(metrics)
        return metrics

    monkeypatch.setattr(transformers.Trainer, "evaluate", evaluate)
    return {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}


@pytest.mark.parametrize("library", ["pyfused", "fused"])
def test_the_best_checkpoint_is_loaded_at_the_end(make, train, best_is_the_second, library):
    trainer = train(make("bert_mlm", library), "best", **best_is_the_second)
    best = Path(trainer.args.output_dir, "checkpoint-2")
    assert Path(trainer.state.best_model_checkpoint) == best
    kept, last = (
        adapter(pyfused.PeftModel.from_pretrained(bert_mlm(), folder))
        for folder in (best, best.with_name(f"checkpoint-{STEPS}"))
    )
    assert_same(adapter(trainer.model), kept)
    assert not any(torch.equal(kept[name], last[name]) for name in kept)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_checkpoint_of_every_method(build, train, best_is_the_second, method):
    torch.manual_seed(1)
    model = pyfused.get_peft_model(build("llama_tied"), METHODS[method]())
    trainer = train(model, "best", **best_is_the_second)
    best, last = (Path(trainer.args.output_dir, f"checkpoint-{step}") for step in (2, STEPS))
    assert Path(trainer.state.best_model_checkpoint) == best
    kept, final = (pyfused.PeftModel.from_pretrained(build("llama_tied"), folder) for folder in (best, last))
    got, expected, other = map(pyfused.get_peft_model_state_dict, (model, kept, final))
    assert_same(got, expected)
    assert not all(torch.equal(other[key], value) for key, value in expected.items())
    inputs = {"input_ids": Rows().ids}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, kept(**inputs).logits)


def test_the_best_checkpoint_of_a_projected_prefix_cannot_be_trained_on(build, train, best_is_the_second, tmp_path):
    """Files hold what comes out of the projection; the checkpoint is there, for inference."""
    config = pyfused.PrefixTuningConfig(**_VIRTUAL, prefix_projection=True, encoder_hidden_size=9)
    model = pyfused.get_peft_model(build("llama_tied"), config)
    with pytest.raises(ValueError, match="'default' is trained with prefix_projection"):
        train(model, "best", **best_is_the_second)
    loaded = pyfused.PeftModel.from_pretrained(build("llama_tied"), tmp_path / "best" / f"checkpoint-{STEPS}")
    inputs = {"input_ids": Rows().ids}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, loaded(**inputs).logits)


def test_a_checkpoint_loads_in_hf_peft(make, train):
    trainer = train(make("llama_tied", "pyfused"), "whole")
    base = make("llama_tied", "peft").unload()
    theirs = peft.PeftModel.from_pretrained(base, Path(trainer.args.output_dir, f"checkpoint-{STEPS}"))
    inputs = {"input_ids": Rows().ids}
    torch.testing.assert_close(trainer.model.eval()(**inputs).logits, theirs(**inputs).logits, rtol=1e-5, atol=1e-5)


def test_save_model_writes_the_adapter(make, train, tmp_path):
    trainer = train(make("llama_tied", "pyfused"), "whole", save_strategy="no")
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "saved" / "model.safetensors").exists()


def test_without_peft(tmp_path):
    worker = Path(__file__).with_name("trainer_without_peft.py")
    done = subprocess.run([sys.executable, str(worker), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_with_peft_it_is_transformers_trainer(make, tmp_path):
    from pyfused.integrations.trainer import Trainer

    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(make("llama_tied", "pyfused"), arguments)
    assert trainer._adapters() is None
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()
