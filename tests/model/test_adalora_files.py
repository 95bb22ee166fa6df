"""AdaLoRA's files: HF PEFT's both ways, and training that goes on from one."""

from __future__ import annotations

import functools
import json

import peft
import pytest
import torch
from adalora_cases import MODELS, STEPS, assert_same_state, labelled, pair_of, pattern, train, wrap

import pyfused


@pytest.fixture
def pair(build):
    return functools.partial(pair_of, build)


@pytest.fixture
def inputs(batch):
    return functools.partial(labelled, batch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("steps", [0, 13, STEPS], ids=["new", "between", "trained"])
def test_files_both_ways(pair, build, inputs, tmp_path, name, steps):
    theirs, ours = pair(name)
    train(theirs, name, inputs, range(steps))
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            ours.state_dict()[key].copy_(value)
    ours.peft_config["default"].rank_pattern = pattern(theirs)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("ours", "theirs")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    assert steps == 0 or configs[0]["rank_pattern"]
    found = inputs(name)
    found.pop("labels")  # HF PEFT's fails for an adapter that is not trained
    if name == "t5":
        found["decoder_input_ids"] = inputs(name)["labels"]
    with torch.no_grad():
        loaded = pyfused.PeftModel.from_pretrained(build(name), tmp_path / "theirs")
        back = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
        assert_same_state(loaded, back)
        torch.testing.assert_close(loaded(**found).logits, ours(**found).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(back(**found).logits, ours(**found).logits, rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == files[0]


class TestFiles:
    """What HF PEFT cannot do: see docs/differences-from-peft.md."""

    @pytest.fixture
    def trained(self, pair, inputs, tmp_path):
        _, ours = pair("llama")
        train(ours, "llama", inputs, range(15))
        ours.save_pretrained(tmp_path / "half")
        return ours

    def test_training_goes_on_from_a_file(self, trained, build, inputs, tmp_path):
        again = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / "half", is_trainable=True)
        left = pattern(trained)
        assert pattern(again) == left
        assert {name: layer.r["default"] for name, layer in again.base_model.layers.named()} == {
            name.removesuffix(".lora_E"): sum(ranks) for name, ranks in left.items()
        }
        train(again, "llama", inputs, range(15, STEPS))
        final = pattern(again)
        assert sum(map(sum, final.values())) == 3 * len(final)
        for name, ranks in final.items():
            assert len(ranks) == 6
            assert all(before or not after for before, after in zip(left[name], ranks, strict=True))
        again.save_pretrained(tmp_path / "all")
        theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path / "all")
        ids = {"input_ids": inputs("llama")["input_ids"]}
        with torch.no_grad():
            torch.testing.assert_close(theirs(**ids).logits, again.eval()(**ids).logits, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("step", [22, 25], ids=["last allocation", "after it"])
    def test_training_goes_on_late(self, trained, build, inputs, tmp_path, step):
        again = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path / "half", is_trainable=True)
        train(again, "llama", inputs, range(step, STEPS))
        ranks = sum(map(sum, pattern(again).values()))
        assert ranks == (3 * len(pattern(again)) if step == 22 else sum(map(sum, pattern(trained).values())))

    @pytest.mark.parametrize("live", ["new", "trained on"])
    def test_into_an_adapter_that_is_there(self, trained, pair, inputs, tmp_path, live):
        """As Trainer does to resume, and to load the best model at the end."""
        saved, expected = pattern(trained), trained(**inputs("llama")).logits
        other = pair("llama")[1] if live == "new" else trained
        if live != "new":
            train(trained, "llama", inputs, range(15, STEPS))
        parameters = list(other.parameters())
        other.load_adapter(tmp_path / "half", "default", is_trainable=True)
        assert all(one is same for one, same in zip(other.parameters(), parameters, strict=True))
        assert pattern(other) == saved
        torch.testing.assert_close(other(**inputs("llama")).logits, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(other.eval()(**inputs("llama")).logits, expected, rtol=1e-4, atol=1e-5)
        train(other, "llama", inputs, [23])

    def test_another_adapter_beside_it(self, trained, inputs, tmp_path):
        trained.load_adapter(tmp_path / "half", "second")
        assert trained.peft_config["second"].inference_mode
        expected = trained(**inputs("llama")).logits
        trained.set_adapter("second", inference_mode=True)
        torch.testing.assert_close(trained(**inputs("llama")).logits, expected, rtol=1e-4, atol=1e-5)
        trained.save_pretrained(tmp_path / "both")
        files = [tmp_path / "both" / folder / "adapter_model.safetensors" for folder in ("", "second")]
        assert files[0].read_bytes() == files[1].read_bytes()
        with pytest.raises(ValueError, match="supports only 1 trainable adapter"):
            trained.load_adapter(tmp_path / "half", "third", is_trainable=True)

    def test_a_file_that_does_not_fit(self, trained, build, unchanged, tmp_path):
        other = wrap(pyfused, build("llama"), init_r=4)
        with unchanged(other), pytest.raises(ValueError, match="init_r is 6 in the file and 4 in the model"):
            other.load_adapter(tmp_path / "half", "default")
        file = tmp_path / "half" / "adapter_config.json"
        config = json.loads(file.read_text())
        name = next(iter(config["rank_pattern"]))
        config["rank_pattern"][name] = [True]
        file.write_text(json.dumps(config))
        base = build("llama")
        with unchanged(base), pytest.raises(ValueError, match=r"rank_pattern: .*q_proj.lora_E must have init_r = 6"):
            pyfused.PeftModel.from_pretrained(base, tmp_path / "half")
        config["rank_pattern"][name] = [1]
        file.write_text(json.dumps(config))
        with unchanged(base), pytest.raises(ValueError, match="rank_pattern must map names to lists of True and False"):
            pyfused.PeftModel.from_pretrained(base, tmp_path / "half")

    def test_removing_pruned_ranks(self, trained, build, inputs, unchanged, tmp_path):
        before, expected = pattern(trained), trained(**inputs("llama")).logits
        with unchanged(trained), pytest.raises(ValueError, match=r"'nowhere.lora_E' names no layer"):
            trained.resize_modules_by_rank_pattern({"nowhere.lora_E": [True]}, "default")
        name = next(iter(before))
        for wrong, error in (([True], ValueError), ((True,), TypeError), ([1] * 6, ValueError)):
            with unchanged(trained), pytest.raises(error, match="rank_pattern"):
                trained.resize_modules_by_rank_pattern({name: wrong}, "default")
        as_tensors = {f"{name}.default": torch.tensor(ranks) for name, ranks in before.items()}
        trained.base_model.resize_modules_by_rank_pattern(as_tensors, "default")
        assert pattern(trained) == before
        torch.testing.assert_close(trained(**inputs("llama")).logits, expected, rtol=1e-4, atol=1e-5)
        trained.save_pretrained(tmp_path / "removed")
        files = [tmp_path / folder / "adapter_model.safetensors" for folder in ("half", "removed")]
        assert files[0].read_bytes() == files[1].read_bytes()
        train(trained, "llama", inputs, range(15, STEPS))
        assert sum(map(sum, pattern(trained).values())) == 3 * len(before)
