"""``AdapterPool`` with host memory beneath the model: what is kept there, what is not read again, and when it is."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from helpers import CUDA_DEVICE, needs_gpu
from pool_cases import CONFIGS, WEIGHTS, run, save, use
from torch import Tensor

from pyfused import AdapterPool
from pyfused.host_cache import AdapterFiles


@pytest.fixture
def pool(model, folder):
    with AdapterPool(model, folder, max_adapters=1, max_host_adapters=3) as pool:
        yield pool
    assert list(model.peft_config) == ["default"]


def ruin(folder: Path) -> None:
    """Overwrite an adapter's files with zeros; nothing but their content tells."""
    for file in folder.iterdir():
        stat = file.stat()
        file.write_bytes(b"\0" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_what_is_in_host_memory_is_not_read_again(model, mixed, inputs):
    """Adapters of every method, with one at a time in the model."""

    def rows() -> dict[str, Tensor]:
        found = {}
        for name in CONFIGS:
            with pool.use([name]) as given:
                found[name] = run(model, inputs, given)
        return found

    with AdapterPool(model, mixed, max_adapters=1, max_host_adapters=len(CONFIGS)) as pool:
        before = rows()
        for name in CONFIGS:
            ruin(mixed / name)
        after = rows()
        stats = pool.stats()
    assert all(torch.equal(after[name], row) for name, row in before.items())
    assert (stats.loads, stats.host_hits, stats.failures) == (len(CONFIGS), len(CONFIGS), 0)
    with AdapterPool(model, mixed) as without, pytest.raises(ValueError, match="damaged"):
        use(without, "lora")


def test_outputs_are_those_of_adapters_loaded_by_hand(pool, model, folder, inputs, by_hand):
    for name in ("a2", "a3", "a2"):
        with pool.use([name]) as given:
            torch.testing.assert_close(run(model, inputs, given), by_hand(folder, name), rtol=1e-5, atol=1e-5)
    assert pool.stats().host_hits == 1


def test_the_least_recently_used_goes_first(pool):
    for name in ("a0", "a1", "a2"):
        use(pool, name)
    assert pool.resident == ["a2"] and pool.resident_on_host == ["a0", "a1", "a2"]
    use(pool, "a0")
    assert pool.resident_on_host == ["a1", "a2", "a0"]
    use(pool, "a3")
    assert pool.resident == ["a3"] and pool.resident_on_host == ["a2", "a0", "a3"]
    stats = pool.stats()
    assert (stats.loads, stats.host_hits, stats.host_adapters) == (4, 1, 3)


def test_use_in_the_model_counts_in_host_memory(model, folder):
    with AdapterPool(model, folder, max_adapters=2, max_host_adapters=2) as pool:
        for name in ("a0", "a1", "a0", "a2"):
            use(pool, name)
        assert pool.resident == pool.resident_on_host == ["a0", "a2"]


def test_bytes_are_bounded_too(model, folder):
    with AdapterPool(model, folder, max_adapters=1, max_host_adapters=8) as pool:
        use(pool, "a0")
        size = pool.stats().host_bytes
        assert size >= sum(tensor.nbytes for tensor in AdapterFiles.read(folder / "a0").tensors.values())
        use(pool, "a4")  # of the same size
        assert pool.stats().host_bytes == 2 * size
    with AdapterPool(model, folder, max_adapters=1, max_host_adapters=8, max_host_bytes=2 * size - 1) as pool:
        use(pool, "a0")
        use(pool, "a4")
        assert pool.resident_on_host == ["a4"] and pool.stats().host_bytes == size
    with AdapterPool(model, folder, max_adapters=1, max_host_adapters=8, max_host_bytes=size - 1) as pool:
        use(pool, "a1")  # smaller
        use(pool, "a0")
        assert pool.resident == ["a0"] and pool.resident_on_host == ["a1"]


def test_pinned_ones_stay_in_the_model(model, folder, inputs):
    with AdapterPool(model, folder, max_adapters=2, max_host_adapters=2) as pool:
        pool.pin("a0")
        for name in ("a1", "a2", "a3"):
            use(pool, name)
        assert pool.resident == ["a0", "a3"] and pool.resident_on_host == ["a2", "a3"]
        ruin(folder / "a0")
        use(pool, "a0")
        assert pool.stats().loads == 4


def test_replaced_files_are_read_without_refresh_once_out_of_the_model(pool, model, writer, folder, inputs, by_hand):
    use(pool, "a0")
    use(pool, "a1")
    save(writer, folder, "a0", 123, r=2)
    with pool.use(["a0"]) as given:
        torch.testing.assert_close(run(model, inputs, given), by_hand(folder, "a0"), rtol=1e-5, atol=1e-5)
    assert pool.stats().host_hits == 0
    use(pool, "a1")
    assert pool.stats().host_hits == 1
    shutil.rmtree(folder / "a0")
    with pytest.raises(ValueError, match="Can't find"):
        use(pool, "a0")
    assert pool.resident_on_host == ["a1"]


def test_refresh(pool, folder):
    for name in ("a0", "a1", "a2"):
        use(pool, name)
    assert pool.refresh() == []
    shutil.rmtree(folder / "a0")
    os.utime(folder / "a2" / WEIGHTS)
    assert pool.refresh() == ["a2", "a0"]
    assert pool.resident == [] and pool.resident_on_host == ["a1"]


def test_a_broken_file_fails_alone_and_is_not_kept(pool, folder, inputs):
    use(pool, "a0")
    content = (folder / "a4" / WEIGHTS).read_bytes()
    shutil.copy(folder / "a1" / WEIGHTS, folder / "a4" / WEIGHTS)  # whole, and of another rank
    for _ in range(2):
        with pytest.raises(ValueError, match="must have shape"):
            use(pool, "a4")
    assert pool.resident == pool.resident_on_host == ["a0"]
    assert (pool.stats().failures, pool.stats().host_hits) == (2, 0)
    (folder / "a4" / WEIGHTS).write_bytes(content)
    use(pool, "a4")
    assert pool.resident_on_host == ["a0", "a4"]


def test_prefetch_goes_to_host_memory_where_the_model_has_no_room(pool, folder):
    with pool.use(["a0"]):
        assert pool.prefetch("a1").result(60) is None
        assert pool.resident == ["a0"] and pool.resident_on_host == ["a0", "a1"]
    ruin(folder / "a1")
    use(pool, "a1")
    assert pool.stats().host_hits == 1
    pool.prefetch("a2").result(60)
    assert pool.resident == ["a2"]


def test_close_frees(model, folder):
    pool = AdapterPool(model, folder, max_adapters=1, max_host_adapters=3)
    use(pool, "a0")
    use(pool, "a1")
    memory = [weakref.ref(files.memory) for files in pool._host.by_name.values()]
    assert len(memory) == 2 and all(block() is not None for block in memory)
    pool.close()
    gc.collect()
    assert [block() for block in memory] == [None, None]
    assert pool.resident_on_host == [] and pool.stats().host_bytes == 0


def test_packed_tensors_are_the_same(mixed):
    for name in CONFIGS:
        files = AdapterFiles.read(mixed / name)
        packed = files.packed(pinned=False)
        for tensors in (packed.tensors, packed.on(torch.device("cpu"))):
            assert list(tensors) == list(files.tensors)
            for key, tensor in files.tensors.items():
                assert tensors[key].dtype == tensor.dtype and torch.equal(tensors[key], tensor)
                assert tensors[key].untyped_storage().data_ptr() == packed.memory.data_ptr()


def test_packing_takes_any_dtype_and_shape():
    tensors = {
        "byte": torch.arange(3, dtype=torch.uint8),
        "none": torch.empty(0, 4, dtype=torch.float16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.arange(6, dtype=torch.bfloat16).view(2, 3).t(),
        "truth": torch.tensor([True, False]),
    }
    packed = AdapterFiles(None, tensors, None).packed(pinned=False)
    for found in (packed.tensors, packed.on(torch.device("cpu"))):
        for key, tensor in tensors.items():
            assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor)


def test_arguments(model, folder):
    for wrong, message in (
        ({"max_host_adapters": 2}, r"max_host_adapters must be 0, or at least max_adapters \(64\), got 2"),
        ({"max_host_adapters": -1}, "max_host_adapters must be 0, or at least"),
        ({"max_host_adapters": 64, "max_host_bytes": 0}, "max_host_bytes must be at least 1, got 0"),
        ({"max_host_bytes": 5}, "max_host_bytes must be None where max_host_adapters is 0, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterPool(model, folder, **wrong)


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_host_memory_of_a_model_on_a_gpu_is_page_locked(model, mixed, inputs, autocast_adapter_dtype):
    model.to(CUDA_DEVICE)
    inputs = {key: value.to(CUDA_DEVICE) for key, value in inputs.items()}
    options = {"max_host_adapters": len(CONFIGS), "autocast_adapter_dtype": autocast_adapter_dtype}
    with AdapterPool(model, mixed, max_adapters=1, **options) as pool:
        before = {}
        for name in CONFIGS:
            with pool.use([name]) as given:
                before[name] = run(model, inputs, given)
            assert pool._host.by_name[name].memory.is_pinned()
            ruin(mixed / name)
        other = torch.cuda.Stream(CUDA_DEVICE)  # on which nothing waits for the copies, so they are to be done
        for name in CONFIGS:
            with pool.use([name]) as given, torch.cuda.stream(other):
                row = run(model, inputs, given)
                other.synchronize()
            torch.testing.assert_close(row, before[name], rtol=1e-4, atol=1e-5)
        assert pool.stats().host_hits == len(CONFIGS)
