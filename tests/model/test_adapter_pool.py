"""``AdapterPool``: what is in memory and when, adapters against themselves loaded by hand, threads, bad files."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import pyfused
from pyfused import AdapterPool

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = "adapter_model.safetensors"


def randomise(model: nn.Module, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name or name.endswith(f".{adapter}"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)


def save(model: nn.Module, folder: Path, name: str, seed: int, library=pyfused, **options) -> None:
    """Write an adapter into ``folder / name``, made on a model that has others."""
    model.add_adapter("written", library.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS} | options))
    randomise(model, "written", seed)
    model.save_pretrained(folder / "_tmp", selected_adapters=["written"])
    model.delete_adapter("written")
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "_tmp" / "written").rename(folder / name)
    shutil.rmtree(folder / "_tmp")


@pytest.fixture
def writer(wrap):
    return wrap(pyfused, "llama", target_modules=["q_proj"])


@pytest.fixture
def folder(writer, tmp_path):
    """Eight adapters, of several ranks and layers."""
    options = [{}, {"r": 1}, {"target_modules": ["o_proj"]}, {"use_rslora": True, "r": 7}] * 2
    for place, each in enumerate(options):
        save(writer, tmp_path / "all", f"a{place}", place, **each)
    return tmp_path / "all"


@pytest.fixture
def model(wrap):
    model = wrap(pyfused, "llama", target_modules=["q_proj"])
    randomise(model, "default", 77)
    return model.eval()


@pytest.fixture
def pool(model, folder):
    with AdapterPool(model, folder, max_adapters=3) as pool:
        yield pool
    assert list(model.peft_config) == ["default"]


@pytest.fixture
def inputs(batch):
    return {key: value[:1] for key, value in batch("llama").items()}


def run(model: nn.Module, inputs: dict, names: list[str]) -> Tensor:
    with torch.no_grad():
        repeated = {key: value.repeat(len(names), 1) for key, value in inputs.items()}
        return model(**repeated, adapter_names=names).logits


@pytest.fixture
def by_hand(wrap, inputs):
    """The logits of an adapter that ``load_adapter`` put into a model of its own."""

    def make(folder: Path, name: str) -> Tensor:
        other = wrap(pyfused, "llama", target_modules=["q_proj"])
        other.load_adapter(folder / name, "hand")
        return run(other, inputs, ["hand"])

    return make


def use(pool: AdapterPool, *names: str, **options) -> None:
    with pool.use(list(names), **options):
        pass


# What is in memory ----------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_adapters_loaded_by_hand(pool, model, folder, inputs, by_hand, wrap):
    names = ["a2", "__base__", "a3", "default", "a2", "a1"]
    alone = {name: by_hand(folder, name) for name in ("a1", "a2", "a3")}
    alone["__base__"] = run(model, inputs, ["__base__"])
    alone["default"] = run(model, inputs, ["default"])
    with pool.use(names) as given:
        assert [given[1], given[3]] == ["__base__", "default"] and given[0] == given[4]
        mixed = run(model, inputs, given)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row : row + 1], alone[name], rtol=1e-5, atol=1e-5)
        one = run(model, inputs, given[:1])
    assert torch.equal(one, alone["a2"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_tensors_are_those_of_load_adapter(wrap, folder, dtype, autocast_adapter_dtype):
    model = wrap(pyfused, "llama", dtype, target_modules=["q_proj"])
    with AdapterPool(model, folder, autocast_adapter_dtype=autocast_adapter_dtype) as pool, pool.use(["a0"]) as (name,):
        model.load_adapter(folder / "a0", "hand", autocast_adapter_dtype=autocast_adapter_dtype)
        ours, hand = (pyfused.get_peft_model_state_dict(model, None, one) for one in (name, "hand"))
        assert list(ours) == list(hand)
        for key, tensor in hand.items():
            assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key])
            assert not ours[key].requires_grad
        assert model.peft_config[name].to_dict() == model.peft_config["hand"].to_dict()
        assert pool.stats().bytes == sum(tensor.nbytes for tensor in ours.values())


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_other_forms(pool, model, writer, folder, inputs, by_hand, options):
    save(writer, folder, "other", 5, **options)
    with pool.use(["other"]) as names:
        torch.testing.assert_close(run(model, inputs, names), by_hand(folder, "other"), rtol=1e-5, atol=1e-5)


def test_embeddings_and_whole_modules(wrap, batch, tmp_path):
    targets = ["query", "word_embeddings"]
    writer = wrap(pyfused, "bert_cls", target_modules=["query"])
    for seed, name in enumerate("ab"):
        save(writer, tmp_path, name, seed, target_modules=targets, modules_to_save=["classifier"])
    model = wrap(pyfused, "bert_cls", target_modules=["query"]).eval()
    inputs = batch("bert_cls")
    with AdapterPool(model, tmp_path) as pool, torch.no_grad():
        with pool.use(["b", "a"]) as names:
            mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate("ba"):
            alone = pyfused.PeftModel.from_pretrained(_base_of(wrap, "bert_cls"), tmp_path / name)
            torch.testing.assert_close(mixed[row], alone(**inputs).logits[row], rtol=1e-5, atol=1e-5)


def _base_of(wrap, name: str) -> nn.Module:
    return wrap(pyfused, name, target_modules=["query"]).unload()


def test_an_adapter_of_hf_peft(pool, model, folder, inputs, build, by_hand):
    theirs = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    theirs.save_pretrained(folder / "theirs-1.5")
    with pool.use(["theirs-1.5"]) as names:
        torch.testing.assert_close(run(model, inputs, names), theirs.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_the_least_recently_used_goes_first(pool):
    for name in ("a0", "a1", "a2", "a0", "a3"):
        use(pool, name)
    assert pool.resident == ["a2", "a0", "a3"]
    use(pool, "a4", "a2")
    assert pool.resident == ["a3", "a4", "a2"]
    assert "a0" not in pool and "a2" in pool
    stats = pool.stats()
    assert (stats.hits, stats.misses, stats.loads, stats.evictions, stats.failures) == (2, 5, 5, 2, 0)
    assert stats.adapters == 3 and min(stats.load_seconds, stats.insert_seconds, stats.evict_seconds) > 0


def test_pinned_ones_stay(pool):
    pool.pin("a0")
    for name in ("a1", "a2", "a3", "a4"):
        use(pool, name)
    assert set(pool.resident) == {"a0", "a3", "a4"}
    pool.unpin("a0")
    use(pool, "a5")
    assert "a0" not in pool


def test_bytes_are_bounded_too(model, folder):
    with AdapterPool(model, folder) as pool:
        use(pool, "a0")
        size = pool.stats().bytes
    with AdapterPool(model, folder, max_bytes=int(1.5 * size)) as pool:
        use(pool, "a0")
        use(pool, "a4")  # of the same size
        assert pool.resident == ["a4"] and pool.stats().bytes == size
        with pytest.raises(ValueError, match=f"{2 * size} bytes of adapters at once, and max_bytes is"):
            use(pool, "a0", "a4")
        assert pool.resident == ["a4"]


def test_what_is_in_use_stays(pool):
    with pool.use(["a0", "a1"]), pool.use(["a1", "a2"]):
        with pytest.raises(TimeoutError, match=r"no room for \['a3'\].*in use: \['a0', 'a1', 'a2'\]"):
            use(pool, "a3", timeout=0.05)
        assert pool.resident == ["a0", "a1", "a2"]
    use(pool, "a3", timeout=0.0 if "a3" in pool else 60)
    assert pool.resident == ["a1", "a2", "a3"]
    for name in ("a1", "a2", "a3"):
        pool.pin(name)
    with pytest.raises(TimeoutError, match=r"pinned: \['a1', 'a2', 'a3'\], in use: \[\]"):
        use(pool, "a0", timeout=0.05)
    with pytest.raises(ValueError, match="4 adapters at once, and max_adapters is 3"):
        use(pool, "a0", "a1", "a2", "a3")


def test_a_request_waits_for_room(pool):
    with ThreadPoolExecutor(1) as threads:
        with pool.use(["a0", "a1", "a2"]):
            waiting = threads.submit(use, pool, "a3")
            time.sleep(0.05)
            assert not waiting.done()
        waiting.result(60)
    assert pool.resident == ["a1", "a2", "a3"]


def test_those_who_wait_are_served_in_their_order(pool):
    """One that needs all the room is not starved by small ones that come later."""
    order = []

    def request(*names: str) -> None:
        with pool.use(names):
            order.append(names)

    with ThreadPoolExecutor(2) as threads:
        with pool.use(["a0"]):
            large = threads.submit(request, "a1", "a2", "a3")
            while not pool._waiting:
                time.sleep(0.001)
            small = threads.submit(request, "a4")
            while len(pool._waiting) < 2:
                time.sleep(0.001)
            assert not order
        large.result(60), small.result(60)
    assert order[0] == ("a1", "a2", "a3")


def test_prefetch(pool, folder):
    assert pool.prefetch("a0").result(60) is None and pool.resident == ["a0"]
    assert pool.prefetch("a0").done()
    use(pool, "a0")
    assert pool.stats().misses == 0
    with pytest.raises(ValueError, match="Can't find"):
        pool.prefetch("none").result(60)
    with pool.use(["a1", "a2", "a3"]), pytest.raises(TimeoutError, match="no room for"):
        pool.prefetch("a4").result(60)
    assert pool.available() == sorted(os.listdir(folder))


# Files that change ----------------------------------------------------------------------------------------------------


def test_refresh(pool, model, writer, folder, inputs, by_hand):
    use(pool, "a0", "a1")
    assert pool.refresh() == []
    before = by_hand(folder, "a0")
    with pool.use(["a0"]) as old:
        save(writer, folder, "a0", 123, r=2)
        shutil.rmtree(folder / "a1")
        assert set(pool.refresh()) == {"a0", "a1"}
        with pool.use(["a0"]) as new:
            mixed = run(model, inputs, old + new)
        assert len(model.peft_config) == 3
    torch.testing.assert_close(mixed[:1], before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1:], by_hand(folder, "a0"), rtol=1e-5, atol=1e-5)
    assert old != new and set(model.peft_config) == {"default", *new}
    with pytest.raises(ValueError, match="Can't find"):
        use(pool, "a1")


def test_a_file_that_changes_in_place_does_not_change_what_was_read(pool, model, folder, inputs):
    with pool.use(["a0"]) as names:
        before = run(model, inputs, names)
        file = folder / "a0" / WEIGHTS
        file.write_bytes(b"\0" * file.stat().st_size)
        assert torch.equal(run(model, inputs, names), before)


def test_files_that_change_while_a_request_waits_are_read_again(pool, model, writer, folder, inputs, by_hand):
    def request() -> Tensor:
        with pool.use(["a3"]) as names:
            return run(model, inputs, names)

    with ThreadPoolExecutor(1) as threads:
        with pool.use(["a0", "a1", "a2"]):
            waiting = threads.submit(request)
            while not pool._waiting:
                time.sleep(0.001)
            save(writer, folder, "a3", 321)
        torch.testing.assert_close(waiting.result(60), by_hand(folder, "a3"), rtol=1e-5, atol=1e-5)


def _cut(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _edit(**fields):
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def _change_tensors(change):
    def apply(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = {key: tensor.clone() for key, tensor in load_file(folder / WEIGHTS).items()}
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


BROKEN = {
    "cut short": (_cut, ValueError, WEIGHTS),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), ValueError, WEIGHTS),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), ValueError, WEIGHTS),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), ValueError, "adapter_config.json"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), ValueError, "adapter_config.json"),
    "another rank": (_edit(r=5), ValueError, f"{WEIGHTS}: .* must have shape"),
    "other layers": (_edit(target_modules=["none"]), ValueError, "adapter_config.json: Target modules"),
    "a new layer": (_edit(target_modules=["gate_proj"]), ValueError, WEIGHTS),
    "a key less": (
        _change_tensors(lambda tensors: tensors.popitem()),
        ValueError,
        f"{WEIGHTS}: adapter keys are missing",
    ),
    "pissa": (_edit(init_lora_weights="pissa"), NotImplementedError, "adapter_config.json: init_lora_weights='pissa'"),
    "biases": (_edit(bias="all"), NotImplementedError, "adapter_config.json: bias='all'"),
    "another base": (
        _change_tensors(lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.zeros(64, 32)})),
        ValueError,
        f"{WEIGHTS}: base_model.model.lm_head.weight is not the base model's",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_fails_that_request_alone(pool, model, folder, inputs, unchanged, case):
    damage, kind, message = BROKEN[case]
    use(pool, "a0", "a1", "a3")
    damage(folder / "a4")
    with pool.use(["a0"]) as names:
        before = run(model, inputs, names)
        with unchanged(model):
            for _ in range(2):  # what fails is not remembered
                with pytest.raises(kind, match=message) as raised:
                    use(pool, "a1", "a4")
                assert str(folder / "a4") in str(raised.value)
        assert pool.resident == ["a1", "a3", "a0"]
        assert torch.equal(run(model, inputs, names), before)
    assert pool.stats().failures == 2
    use(pool, "a5")


def test_other_methods(pool, wrap, build, folder):
    for config in (
        pyfused.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        pyfused.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        pyfused.get_peft_model(build("llama"), config).save_pretrained(folder / "other")
        with pytest.raises((ValueError, NotImplementedError), match=r"adapter_config\.json: "):
            use(pool, "other")
    use(pool, "a0")


def test_arguments(model, folder, pool):
    for name in ("../all/a0", "a0/", "..", ".", "", "a\\b", "/a0", "a\0"):
        with pytest.raises(ValueError, match="names must be those of sub-folders"):
            use(pool, name)
        with pytest.raises(ValueError, match="names must be those of sub-folders"):
            pool.prefetch(name)
    with pytest.raises(ValueError, match="names must be those of sub-folders"):
        pool.pin("__base__")
    with pytest.raises(TypeError, match="names must be a list of names, got str"):
        use_all = pool.use("a0")
        use_all.__enter__()
    with pytest.raises(TypeError, match="names must be strings, got int"):
        use(pool, 3)
    with pytest.raises(TypeError, match=r"model must be a pyfused\.PeftModel, got Linear"):
        AdapterPool(nn.Linear(2, 2), folder)
    with pytest.raises(ValueError, match="folder must be"):
        AdapterPool(model, folder / "none")
    with pytest.raises(ValueError, match="max_adapters must be at least 1, got 0"):
        AdapterPool(model, folder, max_adapters=0)


def test_close(model, folder, inputs):
    pool = AdapterPool(model, folder)
    with pool.use(["a0"]) as names:
        use(pool, "a1")
        before = run(model, inputs, names)
        pool.close()
        assert set(model.peft_config) == {"default", *names}
        assert torch.equal(run(model, inputs, names), before)
        for call in (lambda: use(pool, "a0"), lambda: pool.prefetch("a0")):
            with pytest.raises(RuntimeError, match="the pool is closed"):
                call()
    assert list(model.peft_config) == ["default"]
    pool.close()


def test_layers_without_an_adapter_go_on_as_before(pool, model, inputs):
    before = run(model, inputs, ["default", "__base__"])
    base = model.model.model.layers[0].self_attn.o_proj
    with pool.use(["a2"]):
        assert isinstance(model.model.model.layers[0].self_attn.o_proj, pyfused.nn.LoraLinear)
        assert model.model.model.layers[0].self_attn.o_proj.base_layer is base
        assert torch.equal(run(model, inputs, ["default", "__base__"]), before)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, before[:1], rtol=1e-5, atol=1e-5)


# Threads and time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_threads_do_not_disturb_each_other(wrap, folder, inputs, seed):
    """More adapters than room, requested, prefetched and refreshed at once; each row is its adapter's, to the bit."""
    model = wrap(pyfused, "llama", target_modules=["q_proj"]).eval()
    names = [f"a{place}" for place in range(8)]
    with AdapterPool(model, folder) as pool:
        with pool.use(names) as given:
            alone = {name: run(model, inputs, [one] * 2) for name, one in zip(names, given, strict=True)}
    alone["__base__"] = run(model, inputs, ["__base__"] * 2)
    own = sum(parameter.numel() for parameter in model.parameters())
    errors, stop = [], time.monotonic() + 1.5

    def client(number: int) -> None:
        rng = random.Random(100 * seed + number)
        while time.monotonic() < stop and not errors:
            asked = [rng.choice([*names, "__base__"]) for _ in range(2)]
            try:
                with pool.use(asked) as given:
                    rows = run(model, inputs, given)
                for row, name in enumerate(asked):
                    assert torch.equal(rows[row], alone[name][row])
                if rng.random() < 0.2:
                    assert sum(parameter.numel() for parameter in model.parameters()) >= own
                if rng.random() < 0.3:
                    pool.prefetch(rng.choice(names))
                if rng.random() < 0.2:
                    os.utime(folder / rng.choice(names) / WEIGHTS)
                    pool.refresh()
            except BaseException as error:
                errors.append(error)

    with AdapterPool(model, folder, max_adapters=4, workers=2) as pool:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.stats()
        assert stats.adapters == len(pool.resident) <= 4 and stats.evictions > 0
    if errors:
        raise errors[0]
    assert list(model.peft_config) == ["default"]


def test_generate_while_others_come_and_go(pool, model, inputs):
    names = ["a0", "__base__"]
    ids = inputs["input_ids"].repeat(2, 1)

    def generate() -> Tensor:
        with pool.use(names) as given:
            return model.generate(ids, adapter_names=given, max_new_tokens=12, do_sample=False, pad_token_id=0)

    expected = generate()
    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(generate) for _ in range(6)]
        while not all(result.done() for result in results):
            use(pool, f"a{1 + pool.stats().misses % 7}")
    assert all(torch.equal(result.result(), expected) for result in results)
    assert pool.stats().evictions > 0


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("swaps", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(pool, model, folder, inputs, swaps):
    names = pool.available()

    def counts() -> tuple[int, int]:
        gc.collect()
        tensors = sum(isinstance(thing, Tensor) for thing in gc.get_objects())
        return tensors, len(list(model.modules()))

    def swap(count: int) -> None:
        for place in range(count):
            with pool.use([names[place % len(names)], names[(place + 1) % len(names)]]) as given:
                if place % 20 == 0:
                    run(model, inputs, given)

    swap(5 * len(names))
    run(model, inputs, ["__base__"])
    before, memory = counts(), _resident_bytes()
    swap(swaps // len(names) * len(names))
    run(model, inputs, ["__base__"])
    assert counts() == before
    assert _resident_bytes() - memory < 30e6
    assert pool.stats().evictions > swaps * 0.9
