"""pyfused's LoRA backend against SGLang's own code, in the environment that has SGLang; run by test_sglang.py.

The reference is SGLang's ``torch_native`` backend. Its ``prepare_lora_batch`` pins memory, which needs an accelerator,
so its description of a batch is put together here; forwards and loaders are SGLang's as they are.
"""

from __future__ import annotations

import argparse
import sys
import types
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

transformers.utils.import_utils.is_torchvision_available()  # asked before there is a stub


class _Stub(types.ModuleType):
    """torchvision, which SGLang imports for images: whatever is asked of it is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for _name in (
    "",
    ".io",
    ".ops",
    ".transforms",
    ".transforms.functional",
    ".transforms.v2",
    ".transforms.v2.functional",
):
    sys.modules[f"torchvision{_name}"] = _Stub(f"torchvision{_name}")

from sglang.srt.configs.load_config import LoadConfig  # noqa: E402
from sglang.srt.lora.backend.base_backend import BaseLoRABackend  # noqa: E402
from sglang.srt.lora.backend.lora_registry import get_backend_from_name  # noqa: E402
from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend, TorchNativeLoRABatchInfo  # noqa: E402
from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

import pyfused  # noqa: E402
from pyfused.integrations import sglang as ours  # noqa: E402

CPU = torch.device("cpu")
K, MAX_RANK, VOCAB = 64, 8, 50
RANKS, SCALINGS = [4, 0, 8, 1], [0.5, 0, 2.0, 1.25]  # slot 1 is the base model's
SLICES = {"linear": [0, 48], "gate_up": [0, 32, 64], "qkv": [0, 32, 48, 64]}
# Rows of each request, and its slot.
BATCHES = {"decode": ([1] * 6, [2, 1, 0, 0, 3, 1]), "extend": ([7, 1, 20, 3], [0, 1, 2, 3]), "base": ([5, 2], [1, 1])}


def forward_batch(lengths: list[int], **fields) -> SimpleNamespace:
    decode = all(length == 1 for length in lengths)
    values = {
        "forward_mode": ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        "batch_size": len(lengths),
        "extend_seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "extend_seq_lens_cpu": lengths,
        "return_logprob": False,
    }
    return SimpleNamespace(**(values | fields))


def backend(lengths: list[int], slots: list[int], ranks=RANKS, scalings=SCALINGS) -> ours.LoraBackend:
    made = ours.LoraBackend(len(ranks), CPU, server_args=None)
    made.prepare_lora_batch(forward_batch(lengths), slots, ranks, scalings, False)
    return made


def reference(lengths: list[int], slots: list[int], ranks=RANKS, scalings=SCALINGS) -> TorchNativeLoRABackend:
    made = TorchNativeLoRABackend(len(ranks), CPU)
    own = ours._batch(lengths, slots, ranks, scalings, CPU)
    fields = {name: getattr(own, name) for name in ("bs", "num_segments", "seg_indptr", "weight_indices", "max_len")}
    fields |= {name: getattr(own, name) for name in ("lora_ranks", "scalings", "seg_lens", "use_cuda_graph")}
    on_cpu = {f"{name}_cpu": fields[name] for name in ("lora_ranks", "seg_indptr", "seg_lens", "weight_indices")}
    made.batch_info = TorchNativeLoRABatchInfo(**fields, **on_cpu, scalings_cpu=own.scalings)
    return made


def buffers(slices: int, outputs: int, dtype: torch.dtype, inputs: int = K) -> tuple[Tensor, Tensor]:
    """As SGLang's memory pool has them: what a rank does not reach is left from adapters before."""
    a = torch.full((len(RANKS), slices * MAX_RANK, inputs), float("nan"))
    b = torch.full((len(RANKS), outputs, MAX_RANK), float("nan"))
    for slot, rank in enumerate(RANKS):
        a[slot, : slices * rank] = torch.randn(slices * rank, inputs) / 8
        b[slot, :, :rank] = torch.randn(outputs, rank)
    return a.to(dtype), b.to(dtype)


def exact(y: Tensor, x: Tensor, a: Tensor, b: Tensor, offsets: list[int], lengths, slots) -> Tensor:
    y, x, a, b = (tensor.double().clone() for tensor in (y, x, a, b))
    rows = [slot for slot, length in zip(slots, lengths, strict=True) for _ in range(length)]
    for row, slot in enumerate(rows):
        rank = RANKS[slot]
        for place, (begin, end) in enumerate(pairwise(offsets)):
            s = a[slot, place * rank : (place + 1) * rank] @ x[row]
            y[row, begin:end] += SCALINGS[slot] * (b[slot, begin:end, :rank] @ s)
    return y


def call(made: BaseLoRABackend, kind: str, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    offsets = torch.tensor(SLICES[kind])
    options = {"output_offset": offsets, "output_offset_cpu": offsets, "base_output": y.clone()}
    if kind == "qkv":
        return made.run_qkv_lora(x, a, b, max_qkv_out_dim=32, **options)
    if kind == "gate_up":
        return made.run_gate_up_lora(x, a, b, **options)
    return made.run_lora_b_sgemm(made.run_lora_a_sgemm(x, a), b, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("kind", SLICES)
def test_layers(kind, name, dtype):
    """Each against fp64, no further off than SGLang's reference; base rows to the bit; and both ways into a layer."""
    torch.manual_seed(0)
    lengths, slots = BATCHES[name]
    offsets = SLICES[kind]
    x, y = torch.randn(sum(lengths), K).to(dtype), torch.randn(sum(lengths), offsets[-1]).to(dtype)
    a, b = buffers(len(offsets) - 1, offsets[-1], dtype)
    expected = exact(y, x, a, b, offsets, lengths, slots)
    theirs = call(reference(lengths, slots), kind, y, x, a, b)
    made = backend(lengths, slots)
    in_one = made.forward_with_base(None, x, lambda: y.clone(), a, b, None, tuple(offsets))
    ulp = torch.finfo(dtype).eps * expected.abs().max()
    for result in (in_one, call(made, kind, y, x, a, b)):
        assert result.dtype == dtype
        assert (result - expected).abs().max() <= 2 * (theirs - expected).abs().max() + ulp
        base = torch.tensor([slot == 1 for slot in slots]).repeat_interleave(torch.tensor(lengths))
        assert torch.equal(result[base], y[base])


def test_a_reduced_layer_takes_its_halves_apart():
    torch.manual_seed(0)
    lengths, slots = BATCHES["extend"]
    x, y = torch.randn(sum(lengths), K), torch.randn(sum(lengths), 48)
    a, b = buffers(1, 48, torch.float32)
    layer = SimpleNamespace(output_offset_cpu=torch.tensor([0, 48]))
    reduced = backend(lengths, slots).forward_with_base(
        layer, x / 2, lambda: y / 2, a, b, None, (0, 48), all_reduce=lambda tensor: tensor * 2
    )
    torch.testing.assert_close(reduced.double(), exact(y, x, a, b, [0, 48], lengths, slots), rtol=1e-4, atol=1e-4)


def test_embeddings():
    torch.manual_seed(0)
    lengths, slots = BATCHES["extend"]
    ids = torch.randint(VOCAB, (sum(lengths),))
    a, b = buffers(1, 48, torch.float32, VOCAB)
    y, offsets = torch.randn(len(ids), 48), torch.tensor([0, 48])
    results = []
    for made in (reference(lengths, slots), backend(lengths, slots)):
        s = made.run_lora_a_embedding(ids, a, VOCAB)
        results.append(made.run_lora_b_sgemm(s, b, output_offset_cpu=offsets, base_output=y.clone()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="added tokens"):
        made.run_lora_a_embedding(ids, a, VOCAB, extra_embeddings=a)


@pytest.mark.parametrize("logprobs", [False, True])
def test_the_head_sees_the_rows_that_are_sampled(logprobs):
    torch.manual_seed(0)
    lengths, slots = BATCHES["extend"]
    made = ours.LoraBackend(len(RANKS), CPU)
    starts = [4, 0, 17, 3]
    fields = {"return_logprob": logprobs, "extend_logprob_start_lens_cpu": starts}
    made.prepare_lora_batch(forward_batch(lengths, **fields), slots, RANKS, SCALINGS, False)
    rows = [max(length - start, 1) for length, start in zip(lengths, starts, strict=True)] if logprobs else [1] * 4
    info = made.lm_head_batch_info
    assert info.expected_tokens == sum(rows)
    x, y = torch.randn(sum(rows), K), torch.randn(sum(rows), VOCAB + 6)  # padded to a round vocabulary
    a, b = buffers(1, VOCAB, torch.float32)
    result = made.forward_with_base(
        None, x, lambda: y.clone(), a, b, None, (0, VOCAB), kind="lm_head", pruned_batch_info=info
    )
    expected = exact(y[:, :VOCAB], x, a, b, [0, VOCAB], rows, slots)
    torch.testing.assert_close(result[:, :VOCAB].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(result[:, VOCAB:], y[:, VOCAB:])
    made.reset_batch_state()
    assert made.batch_info is None and made.lm_head_batch_info is None


def test_adapters_that_come_into_a_slot():
    """Another rank and scaling in the same buffers; a batch says them of its own slots alone."""
    torch.manual_seed(0)
    lengths, slots = BATCHES["decode"]
    x, y = torch.randn(len(lengths), K), torch.randn(len(lengths), 48)
    a, b = buffers(1, 48, torch.float32)
    made = ours.LoraBackend(len(RANKS), CPU)
    for ranks, scalings in ((RANKS, SCALINGS), ([2, 0, 3, 0], [3.0, 0, 0.1, 0]), (RANKS, SCALINGS)):
        made.prepare_lora_batch(forward_batch(lengths), slots, ranks, scalings, False)
        result = made.forward_with_base(None, x, lambda: y.clone(), a, b, None, (0, 48))
        made.prepare_lora_token_segments(
            segment_lens=lengths, weight_indices=slots, lora_ranks=ranks, scalings=scalings
        )
        assert torch.equal(result, made.forward_with_base(None, x, lambda: y.clone(), a, b, None, (0, 48)))
        theirs = call(reference(lengths, slots, ranks, scalings), "linear", y, x, a, b)
        torch.testing.assert_close(result, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_refused():
    made = ours.LoraBackend(2, CPU)
    with pytest.raises(NotImplementedError, match="--disable-cuda-graph"):
        made.prepare_lora_batch(forward_batch([1]), [0], [2, 0], [1.0, 0], True)
    with pytest.raises(NotImplementedError, match="--disable-cuda-graph"):
        made.init_decode_cuda_graph_batch_info(8, 1)


def test_the_name_on_the_command_line():
    from sglang.srt.server_args import ServerArgs

    ours.register()
    ours.register()
    assert get_backend_from_name("pyfused") is ours.LoraBackend
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert parser.parse_args(["--model-path", "x", "--lora-backend", "pyfused"]).lora_backend == "pyfused"


# Loaders --------------------------------------------------------------------------------------------------------------

CONFIG = transformers.LlamaConfig(
    hidden_size=K,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    tie_word_embeddings=False,
)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# How an adapter is made, and whether it is exported or saved as it is.
ADAPTERS = {
    "saved": (pyfused.LoraConfig(r=6, lora_alpha=13, target_modules=ALL), False),
    "exported": (
        pyfused.LoraConfig(
            r=6, target_modules=["q_proj", "up_proj"], use_rslora=True, rank_pattern={"up_proj": 3}, lora_alpha=5
        ),
        True,
    ),
    "adalora": (pyfused.AdaLoraConfig(init_r=6, target_r=3, total_step=10, target_modules=["v_proj"]), True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_of_pyfused_in_sglangs_loader(tmp_path: Path, name):
    """SGLang reads the files; what it reads, in its buffers, gives each layer's output."""
    torch.manual_seed(0)
    config, export = ADAPTERS[name]
    model = pyfused.get_peft_model(transformers.LlamaForCausalLM(CONFIG), config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape) / 3)
    model.export_for_serving(tmp_path) if export else model.save_pretrained(tmp_path)
    lora_config = LoRAConfig(str(tmp_path))
    adapter = LoRAAdapter("one", lora_config, CONFIG, LoadConfig(), ours.LoraBackend(2, CPU))
    # initialize_weights, which also opens the files, asks for a running server's arguments
    adapter.initialize_weights_from_tensors(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    rank, checked = lora_config.r, 0
    for number, layer in enumerate(adapter.layers):
        for key, lora_a in layer.weights.items():
            if "lora_A" not in key:
                continue
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            parent, _, leaf = path.rpartition(".")
            parts = [model.get_submodule(f"base_model.model.{parent}.{part}") for part in FUSED.get(leaf, [leaf])]
            lora_b = layer.weights[key.replace("lora_A", "lora_B")]
            assert f"layers.{number}." in path and lora_a.shape[0] == len(parts) * rank
            x = torch.randn(5, lora_a.shape[1])
            base = torch.cat([_base(part)(x) for part in parts], dim=1)
            offsets = [0, *torch.tensor([part.out_features for part in parts]).cumsum(0).tolist()]
            made = backend([5], [0], [rank, 0], [adapter.scaling, 0])
            a, b = (torch.stack((tensor, tensor)) for tensor in (lora_a, lora_b))
            result = made.forward_with_base(None, x, base.clone, a, b, None, tuple(offsets))
            expected = torch.cat([part(x) for part in parts], dim=1)
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
            checked += (expected - base).abs().max().item() > 1e-3
    assert checked == 2 * {"saved": 4, "exported": 2, "adalora": 1}[name]


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield
