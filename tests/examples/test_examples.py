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


def run(name: str, *arguments: str, **environment: str) -> str:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
    )
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


def test_the_server_is_what_the_script_starts(tmp_path):
    """With a stand-in for vLLM: it answers with the name that it was asked for, and knows the folders it was given."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(_STAND_IN)
    lines = run("vllm_two_adapters.py", PYTHONPATH=os.pathsep.join((str(tmp_path), str(ROOT)))).splitlines()
    assert lines == [f"{name}: {name} w5 w9 w17 w33" for name in ("base", "sales", "law")] * 2


_STAND_IN = """
import argparse, json, pathlib
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
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] in known
        self.answer({"choices": [{"text": asked["model"] + " " + asked["prompt"]}]})


ThreadingHTTPServer((options.host, options.port), Handler).serve_forever()
"""
