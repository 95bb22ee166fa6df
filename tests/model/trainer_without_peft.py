"""Run as a program in which peft is not installed: pyfused's Trainer on a model with tied weights, and what came of it.

python trainer_without_peft.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.modules["peft"] = None  # as if it was not installed

import torch  # noqa: E402
import transformers  # noqa: E402

import pyfused  # noqa: E402
from pyfused.integrations.trainer import Trainer  # noqa: E402

assert not transformers.utils.is_peft_available()


def make() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=64, **sizes))
    torch.manual_seed(1)
    model = pyfused.get_peft_model(base, pyfused.LoraConfig(lora_dropout=0.1, target_modules=["query", "value"]))
    model.add_adapter("second", pyfused.IA3Config(target_modules=["key"], feedforward_modules=[]))
    return model


class Rows(torch.utils.data.Dataset):
    ids = torch.randint(1, 64, (8, 6), generator=torch.Generator().manual_seed(8))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Scripted(Trainer):
    """With a best checkpoint that is not the last."""

    def evaluate(self, *args, **kwargs):
        metrics = {"eval_loss": {1: 3.0, 2: 1.0, 3: 2.0, 4: 4.0}[self.state.global_step]}
        self.log(metrics)
        return metrics


def train(folder: Path, resume: Path | None = None, kind: type[Trainer] = Trainer, **options) -> Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = kind(make(), arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def adapters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "base_layer" not in name}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def main(folder: Path) -> None:
    whole = train(folder / "whole")
    checkpoint = folder / "whole" / "checkpoint-2"
    files = {str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*")}
    assert {"adapter_model.safetensors", "second/adapter_model.safetensors", "optimizer.pt"} <= files, files
    assert "model.safetensors" not in files
    resumed = train(folder / "resumed", checkpoint)
    assert_same(adapters(resumed.model), adapters(whole.model))
    assert any(not torch.equal(tensor, adapters(make())[name]) for name, tensor in adapters(whole.model).items())
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best = train(folder / "best", kind=Scripted, **options)
    model = make()
    for name, place in (("default", "checkpoint-2"), ("second", "checkpoint-2/second")):
        model.load_adapter(folder / "best" / place, name, is_trainable=True)
    assert_same(adapters(best.model), adapters(model))
    best.save_model(str(folder / "saved"))
    assert sorted(file.name for file in (folder / "saved").glob("*.safetensors")) == ["adapter_model.safetensors"]
    plain = Trainer(make().unload(), whole.args)  # a model without adapters is saved as ever
    plain.save_model(str(folder / "plain"))
    assert (folder / "plain" / "model.safetensors").is_file()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
