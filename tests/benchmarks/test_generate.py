"""bench_generate.py: both libraries get the same adapters, a difference ends the run, and tokens are counted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_generate  # noqa: E402
import harness  # noqa: E402

CASE = bench_generate.Case("infer", 4, 2, 3)


@pytest.fixture
def small(monkeypatch):
    def base(dtype):
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        torch.manual_seed(0)
        config = transformers.LlamaConfig(vocab_size=16000, eos_token_id=None, pad_token_id=0, **sizes)
        return transformers.LlamaForCausalLM(config).to(bench_generate.DTYPES[dtype]).eval().requires_grad_(False)

    monkeypatch.setattr(bench_generate, "make_base", base)


def test_cases_have_labels_of_their_own():
    assert len({case.label for case in bench_generate.CASES}) == len(bench_generate.CASES)


def test_providers_generate(small):
    for case in (CASE, bench_generate.Case("infer", 3, 1, 3, "fp32")):
        workloads = bench_generate.build(case)
        assert ("pyfused-active" in workloads) == (case.adapters == 1)
        for work in workloads.values():
            with torch.no_grad():
                assert work.call().shape == (case.requests, bench_generate.LENGTH + 3)


@pytest.mark.parametrize("providers", [("base", "peft", "pyfused"), ("base", "pyfused")], ids=len)
def test_other_adapters_are_an_error(small, providers):
    models = {provider: bench_generate.make(provider, 2, "bf16") for provider in providers}
    bench_generate.verify(CASE, models)
    forward = models["pyfused"].forward  # with the active adapter for all
    models["pyfused"].forward = lambda *args, adapter_names=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"4 requests of .* 2 adapters, bf16: pyfused is wrong"):
        bench_generate.verify(CASE, models)


def test_tokens_per_second():
    stats = harness.summarize([2e6, 4e6])
    result = harness.Result(CASE, "forward", "pyfused", stats, 1.0, 1.0, 2, 1, None)
    assert bench_generate.tokens_per_second(result) == {"tokens_per_s": "6"}
