"""``AdapterPool`` over files that change and files that are broken."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from pool_cases import WEIGHTS, run, save, use
from torch import Tensor


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
