"""How long an adapter takes into a model and out of it: AdapterPool, from disk and from host memory, the model's own
functions, HF PEFT.

python benchmarks/bench_adapter_pool.py --quick
python benchmarks/bench_adapter_pool.py --quick --device cuda

A Llama of 12 layers of width 768 in bf16, LoRA of rank 8 on all seven linears, adapters in bf16. The folder has as many
adapters as asked for; their weights are hard links to a few files. Files are in the page cache. On a GPU a time ends
when the GPU has done it; the pool's own ("load", "insert", "evict") are the host's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import records
import torch
from runner import find_gpu
from torch import nn

import pyfused

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FILES = 8
RESULTS = Path(__file__).parent / "results"
FIELDS = ("what", "provider", "in_memory", "count", "min_ms", "median_ms", "max_ms")


def make_base(device: torch.device) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, vocab_size=32000
    )
    with device:
        model = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


def write_folder(folder: Path, count: int, device: torch.device) -> None:
    config = pyfused.LoraConfig(r=8, target_modules=TARGETS, init_lora_weights=False)
    for place in range(min(count, FILES)):
        torch.manual_seed(place)
        model = pyfused.get_peft_model(make_base(device), config, autocast_adapter_dtype=False)
        model.save_pretrained(folder / f"a{place}")
    for place in range(FILES, count):
        own, source = folder / f"a{place}", folder / f"a{place % FILES}"
        own.mkdir()
        shutil.copy(source / "adapter_config.json", own)
        os.link(source / "adapter_model.safetensors", own / "adapter_model.safetensors")


def timed(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    if torch.cuda.is_initialized():  # until the adapter is there
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)


def row(what: str, provider: str, in_memory: int, times: list[float]) -> dict[str, object]:
    times = times or [float("nan")]
    low, middle, high = min(times), statistics.median(times), max(times)
    numbers = dict(zip(FIELDS[4:], (f"{value:.4f}" for value in (low, middle, high)), strict=True))
    print(f"{what:24} {provider:14} {in_memory:5} in memory  min {low:9.3f} ms, median {middle:9.3f}, max {high:9.3f}")
    return {"what": what, "provider": provider, "in_memory": in_memory, "count": len(times), **numbers}


def measure_pool(model: nn.Module, folder: Path, total: int, in_memory: int, swaps: int) -> list[dict[str, object]]:
    rows = []
    with pyfused.AdapterPool(model, folder, in_memory, autocast_adapter_dtype=False) as pool:
        times: dict[str, list[float]] = {"load": [], "insert": [], "evict": [], "use, missing": [], "use, there": []}

        def use(name: str) -> None:
            with pool.use([name]):
                pass

        for place in range(min(in_memory, total)):
            use(f"a{place}")
        for place in range(swaps):
            name, before = f"a{(in_memory + place) % total}", pool.stats()
            times["use, missing"].append(timed(lambda name=name: use(name)))
            times["use, there"].append(timed(lambda name=name: use(name)))
            after = pool.stats()
            for what in ("load", "insert", "evict"):
                field = f"{what}_seconds"
                times[what].append(1e3 * (getattr(after, field) - getattr(before, field)))
        stats = pool.stats()
        print(f"{stats.adapters} adapters, {stats.bytes / 1e6:.0f} MB in memory, {total} on disk")
        rows += [row(what, "pool", in_memory, values) for what, values in times.items()]
    return rows


def measure_host(model: nn.Module, folder: Path, in_memory: int, swaps: int) -> list[dict[str, object]]:
    """Adapters that have left the model, each of them the next time that it is asked for."""
    names = [f"a{place}" for place in range(in_memory + swaps)]
    options = {"autocast_adapter_dtype": False, "max_host_adapters": len(names)}
    times: dict[str, list[float]] = {"load, from host": [], "use, from host": []}
    with pyfused.AdapterPool(model, folder, in_memory, **options) as pool:

        def use(name: str) -> None:
            with pool.use([name]):
                pass

        for name in names:
            use(name)
        for name in names[:swaps]:
            before = pool.stats()
            times["use, from host"].append(timed(lambda name=name: use(name)))
            times["load, from host"].append(1e3 * (pool.stats().load_seconds - before.load_seconds))
        if pool.stats().host_hits != swaps:
            raise RuntimeError(f"{swaps} swaps, and {pool.stats().host_hits} of them from host memory")
    return [row(what, "pool", in_memory, values) for what, values in times.items()]


def measure_functions(model: nn.Module, folder: Path, provider: str, in_memory: int, swaps: int) -> list[dict]:
    """``load_adapter`` and ``delete_adapter`` with so many adapters in the model."""
    load, delete = [], []
    for place in range(swaps):
        source = str(folder / f"a{place}")
        load.append(timed(lambda source=source: model.load_adapter(source, "new", autocast_adapter_dtype=False)))
        delete.append(timed(lambda: model.delete_adapter("new")))
    return [row("load_adapter", provider, in_memory, load), row("delete_adapter", provider, in_memory, delete)]


def measure(total: int, in_memory: int, swaps: int, device: torch.device) -> list[dict[str, object]]:
    config = {"r": 8, "target_modules": TARGETS}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder, total, device)
        for many in (1, in_memory):
            model = pyfused.get_peft_model(
                make_base(device), pyfused.LoraConfig(**config), autocast_adapter_dtype=False
            )
            rows += measure_pool(model, folder, total, many, swaps)
            rows += measure_host(model, folder, many, swaps)
        import peft

        few = 2
        for library, provider in ((pyfused, "pyfused"), (peft, "peft")):
            model = library.get_peft_model(
                make_base(device), library.LoraConfig(**config), autocast_adapter_dtype=False
            )
            rows += measure_functions(model, folder, provider, 1, few)
            if library is pyfused:  # the fast way to the same state
                with pyfused.AdapterPool(model, folder, in_memory, autocast_adapter_dtype=False) as pool:
                    for place in range(min(in_memory, total)):
                        pool.prefetch(f"a{place}").result()
                    rows += measure_functions(model, folder, provider, in_memory, few)
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2000, help="in the folder")
    parser.add_argument("--in-memory", type=int, default=200)
    parser.add_argument("--swaps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="50 adapters, 10 in memory, 20 swaps")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    options = parser.parse_args(arguments)
    sizes = (50, 10, 20) if options.quick else (options.adapters, options.in_memory, options.swaps)
    if sizes[0] < sizes[1] + sizes[2]:
        parser.error("--adapters must be at least --in-memory and --swaps together")
    gpu = find_gpu() if options.device == "cuda" else None
    warnings.simplefilter("ignore")
    rows = measure(*sizes, torch.device("cpu") if gpu is None else gpu.device)
    info = records.environment() if gpu is None else gpu.environment()
    name = records.result_name("adapter-pool", info) + ("-quick" if options.quick else "")
    records.write_csv(options.output / f"{name}.csv", info | {"adapters_on_disk": str(sizes[0])}, [], rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
