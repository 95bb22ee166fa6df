"""The scripts of ``examples/`` run and print what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def start_example(name: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(ROOT / "examples" / name)],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )


def run(name: str) -> str:
    done = start_example(name)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_adapter_pool():
    *lines, last = run("adapter_pool.py").splitlines()
    answers = defaultdict(set)
    for line in lines:
        name, tokens = re.fullmatch(r"(\S+): \[([\d, ]+)\]", line).groups()
        answers[name].add(tokens)
    assert set(answers) == {"__base__", *(f"customer-{number}" for number in range(12))}
    assert all(len(found) == 1 for found in answers.values())  # whatever else was in the batch
    assert len(set.union(*answers.values())) > 6
    in_memory, loads, hits = map(
        int, re.fullmatch(r"in memory: (\d+), read from disk: (\d+), found in memory: (\d+)", last).groups()
    )
    # One pinned and used by all eleven batches, eleven others read once each.
    assert in_memory == 6 and loads == 12 and hits >= 11


@pytest.fixture
def stand_in(tmp_path):
    """Runs the script with a stand-in for vLLM, whose log says that it uses this wrapper."""

    def start(wrapper: str) -> subprocess.CompletedProcess:
        package = tmp_path / "vllm" / "entrypoints" / "openai"
        package.mkdir(parents=True)
        (package / "api_server.py").write_text(f"print('Using {wrapper}.', flush=True)\n{_STAND_IN}")
        return start_example("vllm_two_adapters.py", PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT))))

    return start


ANSWERS = [f"{name}: {name} w5 w9 w17 w33" for name in ("base", "sales", "law")] * 2


def test_the_server_is_what_the_script_starts(stand_in):
    """It answers with the name that it was asked for, and knows the folders it was given."""
    done = stand_in("PunicaWrapper")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines() == ["LoRA on pyfused's kernels", *ANSWERS]


def test_a_server_without_the_plug_in(stand_in):
    done = stand_in("PunicaWrapperGPU")
    assert done.returncode == 0, done.stderr[-4000:]
    first, *answers = done.stdout.splitlines()
    assert first.startswith("LoRA on vLLM's own PunicaWrapperGPU: pyfused's plug-in is not active.")
    assert answers == ANSWERS


def test_a_server_that_dies(stand_in):
    """As vLLM's own kernels on CPUs may: the stand-in of that name ends at its first request."""
    done = stand_in("PunicaWrapperCPU")
    assert done.returncode == 1
    assert "a request failed" in done.stderr and "with LoRA on vLLM's own PunicaWrapperCPU" in done.stderr
    assert "died of a request" in done.stderr and "Traceback" not in done.stderr


_STAND_IN = """
import argparse, json, os, pathlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--max-model-len", "--max-loras", "--max-lora-rank"):
    parser.add_argument(name, required=True)
parser.add_argument("--port", type=int)
parser.add_argument("--lora-modules", nargs="+")
for name in ("--enforce-eager", "--enable-lora"):
    parser.add_argument(name, action="store_true")
options = parser.parse_args()
known = {options.served_model_name: options.model} | dict(each.split("=") for each in options.lora_modules)
for name, folder in known.items():
    assert (pathlib.Path(folder) / ("config.json" if name == "base" else "adapter_config.json")).exists()


class Handler(BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        if "PunicaWrapperCPU" in pathlib.Path(__file__).read_text().splitlines()[0]:
            print("died of a request", flush=True)
            os._exit(1)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] in known
        self.answer({"choices": [{"text": asked["model"] + " " + asked["prompt"]}]})


ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
"""
