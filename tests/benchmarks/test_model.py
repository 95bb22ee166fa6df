"""bench_model.py: providers compute the same, what is saved for the backward, and a file that is written in parts."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_model  # noqa: E402
import harness  # noqa: E402
import records  # noqa: E402

CASE = bench_model.CASES[0]


@pytest.fixture
def encoder(monkeypatch):
    """Six layers, small."""

    def base(case):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 6}
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes, **off), add_pooling_layer=False)
        return model.to(bench_model.DTYPES[case.dtype]).train().requires_grad_(False)

    monkeypatch.setattr(bench_model, "make_base", base)


def test_labels_tell_cases_apart():
    assert len({case.label for case in bench_model.CASES}) == len(bench_model.CASES)


def test_a_provider_that_is_wrong_is_noticed(encoder, monkeypatch):
    monkeypatch.setattr(bench_model, "PROVIDERS", ("base", "eager", "pyfused"))
    make = bench_model.make

    def other_rank(case, provider):
        return make(dataclasses.replace(case, r=4) if provider == "pyfused" else case, provider)

    monkeypatch.setattr(bench_model, "make", other_rank)
    with pytest.raises(RuntimeError, match="pyfused is wrong"):
        bench_model.check(CASE)


@pytest.mark.parametrize("adapter_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_memory_that_adapters_add(encoder, dtype, adapter_dtype):
    """An encoder of six layers, every linear layer adapted, dropout on: at most 55 % of what HF PEFT adds."""
    case = dataclasses.replace(CASE, dtype=dtype, adapter_dtype=adapter_dtype, batch=2, length=16)
    work = {name: bench_model.make_workload(case, name) for name in ("base", "peft", "pyfused")}
    saved = {name: harness.saved_bytes(workload) for name, workload in work.items()}
    assert 0 < saved["pyfused"] - saved["base"] <= 0.55 * (saved["peft"] - saved["base"])
    for workload in work.values():
        assert all(gradient is not None for gradient in workload.train_step())


def test_a_file_in_parts(tmp_path):
    path = tmp_path / "model.csv"
    info = {key: "same" for key in ("commit", "cpu", "isa", "threads", "onednn_max_cpu_isa")}

    def write(case, info):
        stats = harness.Stats(1.0, 1.0, 1.0, 1.0, 0.0)
        result = harness.Result(case, "full", "base", stats, 1.0, 1.0, 7, 1, None, {"peak_bytes": ""})
        records.write_csv(path, info, [result], records.others(path, info, {case.label}))
        return [row["label"] for row in records.read_csv(path)[1]]

    first, second = bench_model.CASES[:2]
    assert write(first, info) == [first.label]
    assert write(second, info) == write(second, info) == [first.label, second.label]
    assert write(first, info | {"commit": "another"}) == [first.label]
