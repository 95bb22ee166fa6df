"""What of pyfused.integrations.vllm needs no server, on vLLM's own classes: run by test_vllm.py with vLLM's Python."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import transformers
import vllm.platforms
from torch import Tensor
from vllm.config.lora import LoRAConfig
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper

import pyfused
from pyfused import _library
from pyfused.integrations import vllm as integration
from pyfused.integrations.vllm import PunicaWrapper

SLOTS, RANK, WIDTH = 3, 4, 24
SLICES = (16, 8, 8)
# Adapters 11, 12 and 13 are in slots 2, 0 and 1; the last token is the base model's, as are two others.
IDS = [12, 13, 11]
TOKENS = (11, 0, 12, 12, 13, 0, 11, 0)
PLACES = [2, -1, 0, 0, 1, -1, 2, -1]


def make(tokens: tuple[int, ...] = TOKENS) -> PunicaWrapper:
    wrapper = PunicaWrapper(32, 16, torch.device("cpu"))
    wrapper.update_metadata(LoRAMapping(tokens, tokens, is_prefill=True), IDS, SLOTS + 1, 100)
    return wrapper


def stacks(dtype: torch.dtype, sizes: tuple[int, ...] = SLICES) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    a = tuple(torch.randn(SLOTS, 1, RANK, WIDTH, dtype=dtype) for _ in sizes)
    return a, tuple(torch.randn(SLOTS, 1, size, RANK, dtype=dtype) for size in sizes)


def rows(dtype: torch.dtype, width: int, count: int = len(TOKENS)) -> Tensor:
    """Random numbers with a negative zero in each row, whose sign an addition of 0 would change."""
    out = torch.randn(count, width, dtype=dtype)
    out[:, 0] = -0.0
    return out


def assert_added(got: Tensor, before: Tensor, delta) -> None:
    """``delta(row, slot)`` in fp64 was added to rows with a slot, and the others have the bits they had."""
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    for row, slot in enumerate(PLACES):
        if slot < 0:
            bits = {2: torch.int16, 4: torch.int32}[got.element_size()]
            assert torch.equal(got[row].view(bits), before[row].view(bits))
            continue
        expected = before[row].double() + delta(row, slot)
        assert not torch.allclose(expected, before[row].double())
        torch.testing.assert_close(got[row].double(), expected, rtol=tolerance, atol=10 * tolerance)


def check_linear_layers() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        wrapper, (a, b), x, y = make(), stacks(dtype), rows(dtype, WIDTH), rows(dtype, sum(SLICES))
        before = y.clone()
        wrapper.add_lora_linear(y, x, a, b, 1.5, SLICES)
        offset = 0
        for size, one_a, one_b in zip(SLICES, a, b, strict=True):
            assert_added(
                y[:, offset : offset + size].contiguous(),
                before[:, offset : offset + size].contiguous(),
                lambda row, slot, x=x, a=one_a, b=one_b: (
                    1.5 * x[row].double() @ a[slot, 0].double().t() @ b[slot, 0].double().t()
                ),
            )
            offset += size


def check_shrink_and_expand() -> None:
    """Called apart in fully sharded layers: fp32 in between, columns from an offset, and rows set instead of added."""
    wrapper, (a, b), x = make(), stacks(torch.bfloat16), rows(torch.bfloat16, WIDTH)
    between = torch.zeros(len(SLICES), len(TOKENS), RANK)
    wrapper.add_shrink(between, x, a, 2.0)
    for one, one_a in zip(between, a, strict=True):
        assert_added(
            one, torch.zeros_like(one), lambda row, slot, a=one_a: 2.0 * x[row].double() @ a[slot, 0].double().t()
        )
    y = rows(torch.bfloat16, 3 + sum(SLICES))
    before = y.clone()
    wrapper.add_expand(y, between, b, SLICES, offset_start=3, add_inputs=True)
    assert torch.equal(y[:, :3], before[:, :3])
    assert_added(
        y[:, 3:19].contiguous(),
        before[:, 3:19].contiguous(),
        lambda row, slot: between[0, row].double() @ b[0][slot, 0].double().t(),
    )
    fresh = before.clone()
    wrapper.add_expand(fresh, between, b, SLICES, offset_start=3, add_inputs=False)
    for row, slot in enumerate(PLACES):
        if slot < 0:
            assert torch.equal(fresh[row], before[row])
        else:
            torch.testing.assert_close(
                fresh[row, 3:19].float(), between[0, row] @ b[0][slot, 0].float().t(), rtol=2e-2, atol=2e-1
            )


def check_embedding_and_logits() -> None:
    wrapper, (a, b) = make(), stacks(torch.bfloat16)
    y, x = rows(torch.bfloat16, SLICES[0]), rows(torch.bfloat16, RANK)
    before = y.clone()
    wrapper.add_lora_embedding(y, x, b[0], add_input=True)
    assert_added(y, before, lambda row, slot: x[row].double() @ b[0][slot, 0].double().t())
    # Logits wider than the hidden states, and padded to a round vocabulary.
    y, x = rows(torch.float32, SLICES[0] + 5), rows(torch.bfloat16, WIDTH)
    before = y.clone()
    wrapper.add_lora_logits(y, x, a[0], b[0], 1.0)
    assert torch.equal(y[:, SLICES[0] :], before[:, SLICES[0] :])
    assert_added(
        y[:, : SLICES[0]].contiguous(),
        before[:, : SLICES[0]].contiguous(),
        lambda row, slot: x[row].double() @ a[0][slot, 0].double().t() @ b[0][slot, 0].double().t(),
    )


def check_classification_heads() -> None:
    wrapper, x = make(), rows(torch.bfloat16, WIDTH)
    weight, bias = torch.randn(SLOTS, 1, 5, WIDTH, dtype=torch.bfloat16), torch.randn(SLOTS, 5, dtype=torch.bfloat16)
    enabled = torch.tensor([True, False, True])
    y = rows(torch.bfloat16, 5)
    before = y.clone()
    wrapper.apply_lora_full_linear(y, x, weight, bias, enabled)
    for row, slot in enumerate(PLACES):
        if slot >= 0 and enabled[slot]:
            expected = x[row].float() @ weight[slot, 0].float().t() + bias[slot].float()
            torch.testing.assert_close(y[row].float(), expected, rtol=2e-2, atol=1e-1)
        else:
            assert torch.equal(y[row], before[row])


def check_adapters_that_come_later() -> None:
    """An empty slot is used once it is filled in place, and no more when it is emptied."""
    wrapper, x = make(), rows(torch.float32, WIDTH)
    a, b = (torch.zeros(SLOTS, 1, RANK, WIDTH),), (torch.zeros(SLOTS, 1, 16, RANK),)
    before = rows(torch.float32, 16)

    def changed() -> list[bool]:
        y = before.clone()
        wrapper.add_lora_linear(y, x, a, b, 1.0, (16,))
        bits = y.view(torch.int32) != before.view(torch.int32)
        return bits.any(dim=1).tolist()

    assert not any(changed())
    a[0][2, 0, 1:].normal_()  # a first row of zeros
    b[0][2].normal_()
    assert changed() == [slot == 2 for slot in PLACES]
    a[0][2] = 0
    b[0][2] = 0
    assert not any(changed())
    a[0][:] = 1
    b[0][:] = 1
    assert changed() == [slot >= 0 for slot in PLACES]
    wrapper.update_metadata(LoRAMapping((0,) * 8, (0,) * 8, True), IDS, SLOTS + 1, 100)
    assert not any(changed())


def check_rows_beyond_the_batch() -> None:
    """A batch that is filled up, after a longer one: what fills it belongs to the base model."""
    wrapper, (a, b) = make((13,) * 12), stacks(torch.float32, (16,))
    wrapper.update_metadata(LoRAMapping((12, 13), (12, 13), True), IDS, SLOTS + 1, 100)
    x, y = rows(torch.float32, WIDTH, 6), rows(torch.float32, 16, 6)
    before = y.clone()
    wrapper.add_lora_linear(y, x, a, b, 1.0, (16,))
    assert [not torch.equal(one, other) for one, other in zip(y, before, strict=True)] == [True] * 2 + [False] * 4


def check_compiled() -> None:
    """One graph for all batches: the mapping, empty slots and batches of the base model alone are seen when it runs."""
    wrapper, (a, b) = make(), stacks(torch.float32)
    b_embedding = torch.randn(SLOTS, 1, sum(SLICES), RANK)
    looked_up = rows(torch.float32, RANK)

    def layer(x: Tensor, weight: Tensor) -> Tensor:
        y = x @ weight.t()
        wrapper.add_lora_linear(y, x, a, b, 1.0, SLICES)
        z = torch.relu(y)
        wrapper.add_lora_embedding(z, looked_up[: z.shape[0]], b_embedding, add_input=True)
        return z * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    weight = torch.randn(sum(SLICES), WIDTH)
    with torch.no_grad():
        for tokens in (TOKENS, (12,) * 8, (0,) * 8, (13, 0, 11)):
            wrapper.update_metadata(LoRAMapping(tokens, tokens, True), IDS, SLOTS + 1, 100)
            x = rows(torch.float32, WIDTH, len(tokens))
            torch.testing.assert_close(compiled(x, weight), layer(x, weight))


def check_which_devices_have_it() -> None:
    def registered(device: str, kernels: set[str], value: str | None) -> bool:
        class Platform:
            device_type = device

            @classmethod
            def get_punica_wrapper(cls) -> str:
                return "vllm's"

            @classmethod
            def check_and_update_config(cls, config) -> None:
                config.seen.append(config.lora_config)
                if config.fails:
                    raise ValueError

            @classmethod
            def is_cpu(cls) -> bool:
                return device == "cpu"

        environment = {key: text for key, text in os.environ.items() if key != "PYFUSED_VLLM"}
        environment |= {} if value is None else {"PYFUSED_VLLM": value}
        with (
            mock.patch.dict(os.environ, environment, clear=True),
            mock.patch.object(vllm.platforms, "current_platform", Platform(), create=True),
            mock.patch.object(_library, "has_kernel", lambda device: device in kernels),
        ):
            integration.register()
        ours = Platform.get_punica_wrapper() == "pyfused.integrations.vllm.PunicaWrapper"
        for fails in (False, True):
            parallel = SimpleNamespace(worker_cls="vllm.v1.worker.cpu_worker.CPUWorker")
            config = SimpleNamespace(lora_config="lora", parallel_config=parallel, seen=[], fails=fails)
            try:
                Platform.check_and_update_config(config)
            except ValueError:
                assert fails
            assert config.lora_config == "lora"
            # Whether a model with LoRA is compiled on CPUs, and then has a worker of ours.
            compiled = ours and device == "cpu"
            assert config.seen == [None if compiled else "lora"]
            assert parallel.worker_cls.startswith("pyfused.") == (compiled and not fails)
        return ours

    assert registered("cpu", {"cpu"}, None)
    assert registered("cpu", {"cpu"}, "1")
    assert not registered("cpu", {"cpu"}, "0")
    assert not registered("cpu", set(), None)
    assert registered("cuda", {"cpu", "cuda"}, "1")
    assert not registered("cuda", {"cpu", "cuda"}, None)
    assert not registered("cuda", {"cpu"}, "1")
    assert not registered("xpu", {"cpu", "cuda"}, "1")


def check_worker() -> None:
    """A step has room for many frames, and its result comes back."""
    from pyfused.integrations.vllm_worker import CPUWorker, Worker, _call

    assert _call.__code__.co_stacksize == 20_000
    with mock.patch.object(CPUWorker, "execute_model", lambda self, output: (self, output)):
        worker = object.__new__(Worker)
        assert worker.execute_model("step") == (worker, "step")


def check_files_of_pyfused_load() -> None:
    """``save_pretrained`` and ``export_for_serving`` in vLLM's loader, and what it refuses."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=50, **sizes)
    limits = LoRAConfig(max_lora_rank=8)

    def save(folder: str, **options) -> pyfused.PeftModel:
        base = transformers.LlamaForCausalLM(config)
        options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | options
        model = pyfused.get_peft_model(base, pyfused.LoraConfig(task_type="CAUSAL_LM", **options))
        model.save_pretrained(folder)
        return model

    def load(folder: str) -> LoRAModel:
        helper = PEFTHelper.from_local_dir(folder, None)
        helper.validate_legal(limits)
        names = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
        return LoRAModel.from_local_checkpoint(folder, names, helper, device="cpu", dtype=torch.float32)

    for options in ({}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}):
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as exported:
            model = save(folder, **options)
            model.export_for_serving(exported)
            deltas = {
                path: layer.delta_weight("default").detach()
                for path, layer in model.base_model.layers.of("default").items()
            }
            for source in (folder, exported):
                loaded = load(source)
                for path, delta in deltas.items():
                    found = loaded.get_lora(path)
                    torch.testing.assert_close(found.lora_b @ found.lora_a * found.scaling, delta)
                for path in set(loaded.loras) - set(deltas):  # what an export fills up
                    assert source == exported and not loaded.get_lora(path).lora_b.any()

    refused = {
        "DoRA": {"use_dora": True},
        "bias is not supported": {"bias": "all"},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "greater than max_lora_rank": {"r": 16},
    }
    for message, options in refused.items():
        with tempfile.TemporaryDirectory() as folder:
            save(folder, **options)
            try:
                load(folder)
            except ValueError as error:
                assert message in str(error), error
            else:
                raise AssertionError(f"vLLM took {options}")


def main() -> None:
    assert Path(pyfused.__file__).resolve().parents[1] == Path(__file__).resolve().parents[2]
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            torch.manual_seed(0)
            check()
            print(f"passed: {name}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
