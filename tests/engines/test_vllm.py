"""vLLM's OpenAI-compatible server with pyfused's Punica wrapper, as its clients use it, against HF PEFT.

vLLM has an environment of its own, .venv-vllm, which ``make test-all`` makes; pyfused is on its path with its metadata,
by whose entry point vLLM finds the plug-in.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import pyfused

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("PYFUSED_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with vLLM: make .venv-vllm"),
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = ["first", "second", "third"]
PROMPTS = [[1, 5 + place, 9, 17, 33 + place] for place in range(8)]
TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer in ``base``, and adapters beside it: one of pyfused's, two of HF PEFT's."""
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({f"w{place}": place for place in range(100)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2")
    tokenizer.save_pretrained(folder / "base")
    options = {"target_modules": TARGETS, "init_lora_weights": False, "task_type": "CAUSAL_LM", "lora_alpha": 16}
    for place, name in enumerate(ADAPTERS):
        library = pyfused if name == "first" else peft
        torch.manual_seed(1 + place)
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        model = library.get_peft_model(base, library.LoraConfig(r=8 - place, **options))
        if library is pyfused:  # uneven ranks and scalings, which only an export brings into vLLM
            model.export_for_serving(folder / name)
        else:
            model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def expected(folder) -> dict[str | None, list[tuple[list[int], list[float]]]]:
    """What HF PEFT decodes for each prompt with each adapter: tokens, and their log-probabilities."""
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / ADAPTERS[0], ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(folder / name, name)
    found = {}
    for name in ADAPTERS:
        model.set_adapter(name)
        found[name] = [_greedy(model, prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        found[None] = [_greedy(model, prompt) for prompt in PROMPTS]
    return found


@torch.no_grad()
def _greedy(model: nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    ids, values = list(prompt), []
    for _ in range(TOKENS):
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
        ids.append(int(scores.argmax()))
        values.append(float(scores.max()))
    return ids[len(prompt) :], values


class Server:
    """A running server, and the calls of a client."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        names = [f"{name}={folder / name}" for name in ADAPTERS[:2]]
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "base")]
        command += ["--served-model-name", "base", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
        command += ["--enforce-eager", "--max-model-len", "64", "--enable-lora", "--max-loras", "2"]
        command += ["--max-lora-rank", "8", "--lora-modules", *names]
        subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)], cwd=ROOT, check=True)
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
        }
        self.process = subprocess.Popen(
            command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise TimeoutError(self.log.read_text()[-4000:])

    def post(self, path: str, body: dict) -> dict | str:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Content-Type": "application/json"})
        text = urllib.request.urlopen(request, timeout=120).read().decode()
        return json.loads(text) if text.startswith("{") else text

    def complete(self, name: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
        body = {"model": name or "base", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 1}
        answer = self.post("/v1/completions", body | {"ignore_eos": True, "return_tokens_as_token_ids": True})
        found = answer["choices"][0]["logprobs"]
        return [int(token.removeprefix("token_id:")) for token in found["tokens"]], found["token_logprobs"]


@pytest.fixture(scope="module")
def server(folder):
    server = Server(folder, folder / "server.log")
    try:
        server.wait()
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(30)
        except subprocess.TimeoutExpired:
            server.process.kill()


def _check(got: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    assert got[0] == expected[0]
    assert got[1] == pytest.approx(expected[1], abs=1e-4)


def test_the_wrapper_is_pyfuseds(server):
    assert "Using PunicaWrapper." in server.log.read_text()


def test_models_in_flight_at_once(server, expected):
    """Two adapters and the base model over all prompts, in any order and batch."""
    jobs = [(name, place) for place in range(len(PROMPTS)) for name in ("first", "second", None)]
    with ThreadPoolExecutor(len(jobs)) as threads:
        answers = list(threads.map(lambda job: server.complete(job[0], PROMPTS[job[1]]), jobs))
    for (name, place), answer in zip(jobs, answers, strict=True):
        _check(answer, expected[name][place])


def test_adapters_are_loaded_and_unloaded_while_requests_run(server, folder, expected):
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(server.complete, "first", prompt) for prompt in PROMPTS for _ in range(3)]
        server.post("/v1/load_lora_adapter", {"lora_name": "third", "lora_path": str(folder / "third")})
        more = [threads.submit(server.complete, "third", prompt) for prompt in PROMPTS]
        for place, answer in enumerate(more):
            _check(answer.result(), expected["third"][place])
        server.post("/v1/unload_lora_adapter", {"lora_name": "third"})
        for place, answer in enumerate(running):
            _check(answer.result(), expected["first"][place // 3])
    with pytest.raises(urllib.error.HTTPError):
        server.complete("third", PROMPTS[0])
    _check(server.complete(None, PROMPTS[0]), expected[None][0])
