"""Requests in several threads, each for an adapter of its own, out of a folder with more adapters than stay in memory.

python examples/adapter_pool.py

A small random Llama and its adapters are made first, so that nothing is downloaded; put your model and your folder of
adapters in their place.
"""

from __future__ import annotations

import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

import pyfused

CUSTOMERS = [f"customer-{number}" for number in range(12)]


def make_base() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=200
    )
    return transformers.LlamaForCausalLM(config).eval()


def write_adapters(folder: Path) -> None:
    """One adapter for each customer, of different ranks, as training would leave them."""
    for number, name in enumerate(CUSTOMERS):
        config = pyfused.LoraConfig(
            r=2 + number % 3, lora_alpha=64, target_modules=["v_proj", "up_proj"], init_lora_weights=False
        )
        base = make_base()
        torch.manual_seed(1 + number)
        pyfused.get_peft_model(base, config).save_pretrained(folder / name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder))
        # The model needs an adapter to be a PeftModel; nobody has to use it.
        model = pyfused.PeftModel.from_pretrained(make_base(), Path(folder) / CUSTOMERS[0], "first")
        with pyfused.AdapterPool(model, folder, max_adapters=6) as pool:
            pool.pin(CUSTOMERS[0])  # it stays, whoever else comes
            busy = threading.Semaphore(2)  # batches that run at once

            def answer(names: list[str]) -> list[list[int]]:
                """A batch of requests, one for each name; "__base__" is the model without an adapter."""
                ids = torch.arange(1, 6).repeat(len(names), 1)
                with busy, pool.use(names) as resident:
                    tokens = model.generate(
                        ids, adapter_names=resident, max_new_tokens=8, do_sample=False, pad_token_id=0
                    )
                return tokens[:, ids.shape[1] :].tolist()

            batches = [[CUSTOMERS[0], CUSTOMERS[first], "__base__"] for first in range(1, len(CUSTOMERS))]
            with ThreadPoolExecutor(4) as threads:
                answers = list(threads.map(answer, batches))
            for names, tokens in zip(batches, answers, strict=True):
                print(*(f"{name}: {own}" for name, own in zip(names, tokens, strict=True)), sep="\n")
            stats = pool.stats()
            print(f"in memory: {len(pool.resident)}, read from disk: {stats.loads}, found in memory: {stats.hits}")


if __name__ == "__main__":
    main()
