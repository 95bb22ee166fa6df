"""What HF PEFT's examples of each method do, with both libraries: the import is all that differs.

Base models are on disk, as if they came from the hub: train, evaluate, save, read the configuration back, load the base
model that it names, load the adapter, generate or predict. Dropout is 0, so that losses can be compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from prompt_cases import build_case
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pyfused

EPOCHS, BATCH, LENGTH = 2, 4, 9
# What the examples import.
IMPORTS = (
    "AdaLoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model",
    "get_peft_config, get_peft_model, get_peft_model_state_dict, LoraConfig, TaskType",
    "get_peft_config, get_peft_model, get_peft_model_state_dict, IA3Config, TaskType",
    "get_peft_config, get_peft_model, get_peft_model_state_dict, PrefixTuningConfig, TaskType",
    "get_peft_config, get_peft_model, PromptTuningInit, PromptTuningConfig, TaskType, PeftType",
    "get_peft_model_state_dict, set_peft_model_state_dict, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig",
    "AutoPeftModel, AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, prepare_model_for_kbit_training",
)


@pytest.mark.parametrize("names", IMPORTS)
def test_what_the_examples_import(names):
    exec(f"from peft import {names}", {})
    exec(f"from pyfused import {names}", {})


def test_an_imported_method_that_is_not_built_says_so():
    with pytest.raises(NotImplementedError, match="PromptEncoderConfig: P-tuning is not built"):
        pyfused.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)


def rows(task: str, count: int = 8) -> list[dict[str, Tensor]]:
    """Sentences whose labels depend on their first word."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 64, (LENGTH,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones(LENGTH, dtype=torch.int64)}
        row["labels"] = {"SEQ_CLS": ids[0] % 3, "SEQ_2_SEQ_LM": ids[:4], "CAUSAL_LM": ids}[task]
        found.append(row)
    return found


def train(
    model: nn.Module, task: str, lr: float, after_step: Callable[[nn.Module, int], Any] = lambda *_: None
) -> dict[str, Any]:
    """The examples' loop: every parameter to the optimizer, a linear schedule, evaluation after each epoch."""
    loader = DataLoader(rows(task), batch_size=BATCH, collate_fn=transformers.default_data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(loader) * EPOCHS)
    seen: dict[str, Any] = {"train": [], "evaluation": []}
    step = 0
    for _ in range(EPOCHS):
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            seen["train"].append(loss.item())
            loss.backward()
            optimizer.step()
            schedule.step()
            after_step(model, step)
            optimizer.zero_grad()
            step += 1
        model.eval()
        with torch.no_grad():
            outputs = [model(**batch) for batch in loader]
        seen["evaluation"] += [output.loss.item() for output in outputs]
        predictions = torch.cat([output.logits.argmax(-1) for output in outputs])
    return seen | {"predictions": predictions}


def saved_and_loaded(library: ModuleType, model: nn.Module, auto: type, folder: Path) -> nn.Module:
    """In a second script: what is on disk is all that is known."""
    model.save_pretrained(folder)
    config = library.PeftConfig.from_pretrained(folder)
    base = auto.from_pretrained(config.base_model_name_or_path)
    return library.PeftModel.from_pretrained(base, folder).eval()


def answer(model: nn.Module) -> Tensor:
    """What an encoder-decoder generates for the first row."""
    ids = rows("SEQ_2_SEQ_LM")[0]["input_ids"][None]
    return model.generate(input_ids=ids, max_new_tokens=5)


def base_on_disk(name: str, folder: Path) -> Path:
    build_case(name).save_pretrained(folder / "base")
    return folder / "base"


def lora_seq2seq(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForSeq2SeqLM
    config = lib.LoraConfig(task_type=lib.TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32)
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("t5", folder)), config)
    model.print_trainable_parameters()
    seen = train(model, "SEQ_2_SEQ_LM", 1e-3)
    state = lib.get_peft_model_state_dict(model)
    loaded = saved_and_loaded(lib, model, auto, folder / f"t5_{config.peft_type}_{config.task_type}")
    return seen | {"generated": answer(loaded), "state": state}


def lora_quick_tour(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForCausalLM
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
    config = lib.get_peft_config(values | {"inference_mode": False, "target_modules": ["q_proj", "v_proj"]})
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("llama", folder)), config)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "runs"),
        learning_rate=1e-3,
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        weight_decay=0.01,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows("CAUSAL_LM"))
    seen = {"train": [trainer.train().training_loss]}
    model.save_pretrained(folder / "output_dir")
    loaded = lib.AutoPeftModelForCausalLM.from_pretrained(folder / "output_dir").eval()
    ids = rows("CAUSAL_LM")[0]["input_ids"][None]
    merged = loaded.merge_and_unload()
    with torch.no_grad():
        return seen | {"generated": merged.generate(input_ids=ids, max_new_tokens=5), "state": merged.state_dict()}


def lora_classification(lib: ModuleType, folder: Path) -> dict[str, Any]:
    config = lib.LoraConfig(task_type="SEQ_CLS", inference_mode=False, r=8, lora_alpha=16)
    return classification(lib, folder, config, "roberta_cls")


def adalora_seq2seq(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForSeq2SeqLM
    config = lib.AdaLoraConfig(
        init_r=6,
        target_r=4,
        beta1=0.85,
        beta2=0.85,
        tinit=0,
        tfinal=1,
        deltaT=1,
        lora_alpha=32,
        task_type=lib.TaskType.SEQ_2_SEQ_LM,
        inference_mode=False,
        total_step=1000,
    )
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("bart", folder)), config)
    model.print_trainable_parameters()
    model.base_model.peft_config["default"].total_step = 2 * EPOCHS
    seen = train(model, "SEQ_2_SEQ_LM", 1e-2, lambda model, step: model.base_model.update_and_allocate(step))
    return seen | {"generated": answer(saved_and_loaded(lib, model, auto, folder / "adapter"))}


def ia3_seq2seq(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForSeq2SeqLM
    config = lib.IA3Config(task_type=lib.TaskType.SEQ_2_SEQ_LM)
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("t5", folder)), config)
    seen = train(model, "SEQ_2_SEQ_LM", 8e-3)
    return seen | {"generated": answer(saved_and_loaded(lib, model, auto, folder / "adapter"))}


def prefix_seq2seq(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForSeq2SeqLM
    config = lib.PrefixTuningConfig(task_type=lib.TaskType.SEQ_2_SEQ_LM, inference_mode=False, num_virtual_tokens=20)
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("t5", folder)), config)
    model.print_trainable_parameters()
    seen = train(model, "SEQ_2_SEQ_LM", 1e-2)
    return seen | {"generated": answer(saved_and_loaded(lib, model, auto, folder / "adapter"))}


def prefix_causal(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForCausalLM
    config = lib.PrefixTuningConfig(task_type=lib.TaskType.CAUSAL_LM, num_virtual_tokens=5, prefix_projection=True)
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("gpt2", folder)), config)
    seen = train(model, "CAUSAL_LM", 3e-2)
    loaded = saved_and_loaded(lib, model, auto, folder / "adapter")
    batch = rows("CAUSAL_LM")[0]
    inputs = {name: batch[name][None] for name in ("input_ids", "attention_mask")}
    return seen | {"generated": loaded.generate(**inputs, max_new_tokens=5, eos_token_id=3)}


def prompt_causal(lib: ModuleType, folder: Path) -> dict[str, Any]:
    auto = transformers.AutoModelForCausalLM
    config = lib.PromptTuningConfig(
        task_type=lib.TaskType.CAUSAL_LM,
        prompt_tuning_init=lib.PromptTuningInit.TEXT,
        num_virtual_tokens=8,
        prompt_tuning_init_text="is it good or bad",
        tokenizer_name_or_path=str(folder / "tokenizer"),
    )
    words = {word: index for index, word in enumerate("[UNK] it is good or bad".split())}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        folder / "tokenizer"
    )
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk("gpt2", folder)), config)
    model.print_trainable_parameters()
    seen = train(model, "CAUSAL_LM", 3e-2)
    loaded = saved_and_loaded(lib, model, auto, folder / "adapter")
    batch = rows("CAUSAL_LM")[0]
    inputs = {name: batch[name][None] for name in ("input_ids", "attention_mask")}
    return seen | {"generated": loaded.generate(**inputs, max_new_tokens=5, eos_token_id=3)}


def prompt_classification(lib: ModuleType, folder: Path) -> dict[str, Any]:
    config = lib.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    return classification(lib, folder, config, "roberta_cls")


def classification(lib: ModuleType, folder: Path, config: Any, name: str) -> dict[str, Any]:
    auto = transformers.AutoModelForSequenceClassification
    model = lib.get_peft_model(auto.from_pretrained(base_on_disk(name, folder)), config)
    model.print_trainable_parameters()
    seen = train(model, "SEQ_CLS", 1e-3)
    model.save_pretrained(folder / "adapter")
    told = lib.PeftConfig.from_pretrained(folder / "adapter")
    base = auto.from_pretrained(told.base_model_name_or_path, num_labels=3)
    loaded = lib.PeftModel.from_pretrained(base, folder / "adapter").eval()
    batch = transformers.default_data_collator(rows("SEQ_CLS"))
    with torch.no_grad():
        return seen | {"generated": loaded(**batch).logits.argmax(-1)}


EXAMPLES = (
    *(lora_seq2seq, lora_quick_tour, lora_classification, adalora_seq2seq, ia3_seq2seq),
    *(prefix_seq2seq, prefix_causal, prompt_causal, prompt_classification),
)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_example(example, tmp_path, capsys):
    results, printed = [], []
    for library in (peft, pyfused):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results.append(example(library, tmp_path))
        printed.append([line for line in capsys.readouterr().out.splitlines() if "trainable params" in line])
    expected, got = results
    assert printed[0] == printed[1]
    assert got.keys() == expected.keys()
    for losses in ("train", "evaluation"):
        assert got.get(losses, []) == pytest.approx(expected.get(losses, []), rel=1e-4), losses
    for tensor in ("predictions", "generated"):
        assert tensor not in got or torch.equal(got[tensor], expected[tensor]), tensor
    if "state" in got:
        torch.testing.assert_close(dict(got["state"]), dict(expected["state"]), rtol=1e-3, atol=1e-5)
