"""Tokens per second of a Llama of 97 M parameters in vLLM, without LoRA and with 1 to 32 adapters in one batch.

python benchmarks/bench_vllm.py --python .venv-vllm/bin/python [--dtype fp32] [--check]

Greedy, LoRA of rank 8 on all seven linear layers of a block. Each engine lives in a process of its own, with
vLLM's Python; they take turns in an order that is drawn anew in each round, and wait without using the cores otherwise:
"base" is vLLM without LoRA, "vllm" has vLLM's own wrapper, "pyfused" ours, compiled; engines whose names end with
"-eager" are not compiled, and neither is "vllm". Ratios refer to the first engine, which has to be one without LoRA.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
RANK = 8
LENGTH = 16  # tokens of a prompt
VOCABULARY = 16000
REQUESTS = 32
ADAPTERS = (0, 1, 8, 32)
# The goal: with adapters no more than so many times the time of the same engine without LoRA.
GOAL = 1.25


@dataclass(frozen=True)
class Case:
    """``requests`` over ``adapters`` in turn, 0 for the base model; ``new`` tokens are made for each."""

    stage: str
    requests: int
    adapters: int
    new: int
    dtype: str

    @property
    def label(self) -> str:
        tokens = f"{LENGTH} + {self.new} tokens"
        return f"{self.stage} {self.requests} requests of {tokens}, {self.adapters} adapters, {self.dtype}"


# ---- an engine, with vLLM's Python -----------------------------------------------------------------------------------


def serve(kind: str, folder: Path, new: int) -> None:
    """Answer each line of the input, a number of adapters, with the seconds that the requests took and their tokens."""
    import vllm
    from vllm.lora.request import LoRARequest

    options = {}
    if not kind.startswith("base"):
        options = {"enable_lora": True, "max_loras": max(ADAPTERS), "max_lora_rank": RANK}
    llm = vllm.LLM(
        str(folder / "base"),
        skip_tokenizer_init=True,
        dtype="auto",  # the checkpoint's
        enforce_eager=kind.endswith("-eager"),
        max_model_len=256,
        max_num_seqs=REQUESTS,
        max_num_batched_tokens=REQUESTS * LENGTH,  # all prompts in one step; the engine warms up with as many
        enable_prefix_caching=False,
        **options,
    )
    generator = random.Random(0)
    prompts = [{"prompt_token_ids": generator.choices(range(1, VOCABULARY), k=LENGTH)} for _ in range(REQUESTS)]
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    print("ready", vllm.__version__, flush=True)
    for line in sys.stdin:
        count = int(line)
        lora = (
            [LoRARequest(f"a{i % count}", 1 + i % count, str(folder / f"a{i % count}")) for i in range(REQUESTS)]
            if count
            else None
        )
        begin = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False, lora_request=lora)
        seconds = time.perf_counter() - begin
        print("answer", json.dumps([seconds, [list(one.outputs[0].token_ids) for one in outputs]]), flush=True)


def preloaded(python: Path) -> list[str]:
    """torch's libgomp, so that compiled code does not bring a second pool of threads, and vLLM's allocator."""
    code = "from importlib.util import find_spec as f; print(f('torch').origin); print(f('vllm').origin)"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    of_torch, of_vllm = (Path(origin).parent for origin in found)
    return [str(path) for path in (*of_torch.glob("lib/libgomp*.so*"), *of_vllm.glob("libs/libtcmalloc*.so*"))]


class Engine:
    """A process that runs :func:`serve`."""

    def __init__(self, python: Path, kind: str, folder: Path, new: int) -> None:
        self.kind, self.log = kind, folder / f"{kind}.log"
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "PYFUSED_VLLM": "1" if kind.startswith("pyfused") else "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # One process with a thread on each core, and the libraries that vLLM puts before others for its workers.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "LD_PRELOAD": ":".join(preloaded(python)),
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(python), __file__, "--serve", kind, "--folder", str(folder), "--new", str(new)]
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        self.version = self._read("ready").strip()
        own = "Using PunicaWrapper." in self.log.read_text()
        if own != kind.startswith("pyfused"):
            raise RuntimeError(f"{kind}: vLLM took {'pyfused' if own else 'another'} wrapper; its log is above")

    def _read(self, word: str) -> str:
        log = self.log.open("a")
        for line in self.process.stdout:
            if line.startswith(word):
                return line[len(word) :]
            log.write(line)
        raise RuntimeError(f"{self.kind}: the engine ended:\n{self.log.read_text()[-4000:]}")

    def run(self, adapters: int) -> tuple[float, list[list[int]]]:
        self.process.stdin.write(f"{adapters}\n")
        self.process.stdin.flush()
        seconds, tokens = json.loads(self._read("answer"))
        return seconds, tokens

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(60)


# ---- the benchmark, with pyfused's own Python ------------------------------------------------------------------------


def write_models(folder: Path, dtype: str) -> None:
    """The base, and adapters a0, a1, ... of random values beside it, all in one dtype."""
    import torch
    import transformers
    from lora_common import DTYPES

    import pyfused

    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, **sizes)
    model = transformers.LlamaForCausalLM(config).to(DTYPES[dtype])
    model.save_pretrained(folder / "base")
    options = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapted = pyfused.get_peft_model(
        model, pyfused.LoraConfig(**options, init_lora_weights=False), autocast_adapter_dtype=False
    )
    for place in range(max(ADAPTERS)):
        torch.manual_seed(1 + place)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.3 * parameter.shape[1] ** -0.5)
        adapted.export_for_serving(folder / f"a{place}")


def jobs_of(kind: str) -> tuple[int, ...]:
    return (0,) if kind.startswith("base") else ADAPTERS


def check(answers: Mapping[tuple[str, int], list[list[int]]]) -> None:
    """Rows without an adapter make the base model's tokens, others mostly not.

    Tokens are not compared one by one: in bf16 two roundings of logits that lie close together choose another one.
    """
    base = next(iter(answers.values()))

    def agreement(tokens: list[list[int]]) -> float:
        """Of the first tokens of requests: later ones follow from them."""
        return sum(one[0] == other[0] for one, other in zip(tokens, base, strict=True)) / len(base)

    for (kind, adapters), tokens in answers.items():
        expected = agreement(tokens)
        if (adapters == 0 and expected < 0.9) or (adapters > 0 and expected > 0.5):
            raise RuntimeError(f"{kind}, {adapters} adapters: {expected:.0%} of first tokens are the base model's")


def measure(engines: Mapping[str, Engine], rounds: int, new: int, dtype: str):
    from harness import Result, summarize

    jobs = [(kind, adapters) for kind in engines for adapters in jobs_of(kind)]
    answers = {job: engines[job[0]].run(job[1])[1] for job in jobs}  # loads the adapters, too
    check(answers)
    times: dict[tuple[str, int], list[float]] = {job: [] for job in jobs}
    order, shuffle = list(jobs), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for kind, adapters in order:
            times[kind, adapters].append(1e6 * engines[kind].run(adapters)[0])
    stats = {job: summarize(samples) for job, samples in times.items()}
    base = next(iter(stats.values()))
    results = []
    for (kind, adapters), found in stats.items():
        tokens = REQUESTS * new / (found.min_us / 1e6)
        ratios = found.min_us / base.min_us, found.p50_us / base.p50_us
        case, extra = Case("infer", REQUESTS, adapters, new, dtype), {"tokens_per_s": f"{tokens:.0f}"}
        results.append(Result(case, "forward", kind, found, *ratios, rounds, 1, None, extra))
        print(f"{kind:10} {adapters:3} adapters  {tokens:7.0f} tokens/s  {ratios[0]:.3f}x  (median {ratios[1]:.3f}x)")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="vLLM's Python")
    parser.add_argument("--engines", nargs="+", default=["base", "base-eager", "vllm", "pyfused", "pyfused-eager"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=64, help="tokens for each request")
    parser.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="the file keeps the other's rows of this commit"
    )
    parser.add_argument("--check", action="store_true", help=f"exit code 1 where adapters cost more than {GOAL}x")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the result")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.folder, options.new)
        return 0
    import records

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # By its metadata vLLM finds the plug-in.
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)], cwd=ROOT, check=True)
        write_models(folder, options.dtype)
        engines: dict[str, Engine] = {}
        try:
            for kind in options.engines:
                engines[kind] = Engine(options.python, kind, folder, options.new)
            results = measure(engines, options.rounds, options.new, options.dtype)
            versions = {"vllm": next(iter(engines.values())).version}
        finally:
            for engine in engines.values():
                engine.close()
    info = records.environment()
    path = options.output / f"{records.result_name('vllm', info)}.csv"
    before = records.others(path, info, {result.case.label for result in results})
    records.write_csv(path, info | versions, results, before)
    slow = [result for result in results if result.provider == "pyfused" and result.ratio_min > GOAL]
    return 1 if options.check and slow else 0


if __name__ == "__main__":
    sys.exit(main())
