"""vLLM's OpenAI-compatible server with two adapters, and a client that asks both at once.

python examples/vllm_two_adapters.py                     # with a small random model, nothing is downloaded
python examples/vllm_two_adapters.py --model MODEL --adapter sales=FOLDER --adapter law=FOLDER

To be run where vLLM and pyfused are installed side by side: on CPUs vLLM then computes LoRA with pyfused's kernels. The
script's first line says whether it does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import transformers

import pyfused

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(folder: Path) -> str:
    """A small Llama of random weights, and a tokenizer whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=128,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(100)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_adapters(model: str, folder: Path) -> dict[str, str]:
    """Two adapters of random weights, written as engines read them."""
    for seed, (name, rank) in enumerate((("sales", 8), ("law", 4))):
        torch.manual_seed(seed)
        base = transformers.AutoModelForCausalLM.from_pretrained(model)
        config = pyfused.LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=16, target_modules=LINEARS, init_lora_weights=False
        )
        pyfused.get_peft_model(base, config).export_for_serving(folder / name)
    return {name: str(folder / name) for name in ("sales", "law")}


def start_server(model: str, adapters: dict[str, str], port: int, python: str, log: Path) -> subprocess.Popen:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "128", "--enforce-eager"]
    command += ["--enable-lora", "--max-loras", str(len(adapters)), "--max-lora-rank", "8", "--lora-modules"]
    command += [f"{name}={folder}" for name, folder in adapters.items()]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    return subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise SystemExit(f"the server did not start; the end of its log:\n{log.read_text()[-4000:]}")


def kernels_of(log: Path) -> str:
    """Whose kernels the server's log says that it computes LoRA with."""
    found = re.search(r"Using (PunicaWrapper\w*)\.", log.read_text())
    if found and found[1] == "PunicaWrapper":
        return "LoRA on pyfused's kernels"
    own = f"vLLM's own {found[1]}" if found else "kernels that the server's log does not name"
    return (
        f"LoRA on {own}: pyfused's plug-in is not active. Is pyfused installed for that Python, with PYFUSED_VLLM and "
        f"VLLM_PLUGINS not set to leave it out? On a GPU it takes PYFUSED_VLLM=1."
    )


def complete(url: str, name: str, prompt: str) -> str:
    """A client's request: the adapter is what it calls the model."""
    body = json.dumps({"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or a name; a small random one is made where it is left out")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=FOLDER", help="twice or more")
    parser.add_argument("--prompt", default="w5 w9 w17 w33")
    parser.add_argument("--python", default=sys.executable, help="the Python that has vLLM (default: this one)")
    options = parser.parse_args()
    if bool(options.model) != bool(options.adapter):
        parser.error("--model and --adapter go together")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or make_model(folder / "base")
        adapters = dict(given.split("=", 1) for given in options.adapter) or make_adapters(model, folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url, log = f"http://127.0.0.1:{port}", folder / "server.log"
        server = start_server(model, adapters, port, options.python, log)
        try:
            wait_for(url, server, log)
            names = ["base", *adapters] * 2
            kernels = kernels_of(log)
            print(kernels, flush=True)
            try:
                with ThreadPoolExecutor(len(names)) as clients:
                    answers = list(clients.map(lambda name: complete(url, name, options.prompt), names))
            except OSError as error:  # urllib's errors among them
                end = log.read_text()[-4000:]
                raise SystemExit(
                    f"a request failed ({error}) with {kernels}\nThe end of the server's log:\n{end}"
                ) from None
            for name, answer in zip(names, answers, strict=True):
                print(f"{name}: {answer}")
        finally:
            server.terminate()
            server.wait(30)


if __name__ == "__main__":
    main()
