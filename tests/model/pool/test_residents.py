"""``AdapterPool``: what is in memory and when, adapters against themselves loaded by hand."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from pool_cases import TARGETS, run, save, use
from torch import nn

import pyfused
from pyfused import AdapterPool

peft = pytest.importorskip("peft")


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


def test_arguments(model, folder, pool):
    for name in ("../all/a0", "a0/", "..", ".", "", "a\\b", "/a0", "a\0", "ä" * 128):
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
    for name in ("max_adapters", "workers", "max_host_adapters", "max_host_bytes", "max_bytes"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got float"):
            AdapterPool(model, folder, **{name: 1.5})
    with pytest.raises(TypeError, match="max_adapters must be an int, got NoneType"):
        AdapterPool(model, folder, max_adapters=None)


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


def test_a_new_pool_while_the_old_ones_adapters_are_in_use(model, folder, inputs):
    """Both number their adapters from 1."""
    old = AdapterPool(model, folder)
    with old.use(["a0"]) as names:
        before = run(model, inputs, names)
        old.close()
        with AdapterPool(model, folder) as new, new.use(["a0"]) as others:
            assert set(model.peft_config) == {"default", *names, *others}
            assert torch.equal(run(model, inputs, others), before)
            assert torch.equal(run(model, inputs, names), before)
    assert list(model.peft_config) == ["default"]


def test_an_adapter_that_was_deleted_by_hand_leaves_room(model, folder):
    with AdapterPool(model, folder, max_adapters=1) as pool:
        with pool.use(["a0"]) as names:
            pass
        model.delete_adapter(*names)
        use(pool, "a1")
        assert (pool.resident, pool.stats().adapters) == (["a1"], 1)
        model.unload()


def test_layers_without_an_adapter_go_on_as_before(pool, model, inputs):
    before = run(model, inputs, ["default", "__base__"])
    base = model.model.model.layers[0].self_attn.o_proj
    with pool.use(["a2"]):
        assert isinstance(model.model.model.layers[0].self_attn.o_proj, pyfused.nn.LoraLinear)
        assert model.model.model.layers[0].self_attn.o_proj.base_layer is base
        assert torch.equal(run(model, inputs, ["default", "__base__"]), before)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, before[:1], rtol=1e-5, atol=1e-5)
