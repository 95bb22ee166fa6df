"""AdaLoRA in a model, next to HF PEFT's: names, outputs, gradients, a whole schedule, files, merging."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
from torch import nn

import pyfused
from pyfused import AdaLoraConfig

FP32, BF16 = torch.float32, torch.bfloat16
MODELS = {"llama": "CAUSAL_LM", "bert_cls": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
STEPS = 30
# The scaling is no power of two; ranks are pruned from step 6 to step 22.
OPTIONS = {
    **{"init_r": 6, "target_r": 3, "lora_alpha": 13, "orth_reg_weight": 0.3},
    **{"tinit": 5, "tfinal": STEPS - 22, "deltaT": 2, "total_step": STEPS, "beta1": 0.8, "beta2": 0.9},
}


def wrap(library, base: nn.Module, **options) -> nn.Module:
    """Adapted by ``library``; seeds are the same for both libraries."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base, library.AdaLoraConfig(**(OPTIONS | options)))
    return model.eval()  # GPT-2 has dropout of its own


@pytest.fixture
def pair(build):
    """The same model twice: wrapped by HF PEFT, and by pyfused."""

    def make(name: str, dtype: torch.dtype = FP32, **options):
        options = {"task_type": MODELS[name]} | options
        return tuple(wrap(library, build(name, dtype), **options) for library in (peft, pyfused))

    return make


@pytest.fixture
def inputs(batch):
    """A batch with labels; another one for each seed."""

    def make(name: str, seed: int = 1) -> dict:
        found = batch(name)
        generator = torch.Generator().manual_seed(seed)
        found["input_ids"] = torch.randint(1, 64, found["input_ids"].shape, generator=generator)
        labels = torch.randint(3, (2,), generator=generator) if name == "bert_cls" else found["input_ids"]
        return found | {"labels": found.get("decoder_input_ids", labels)}

    return make


def train(model: nn.Module, name: str, inputs, steps=range(STEPS), patterns: list | None = None) -> list[float]:
    """A run as HF PEFT's example of AdaLoRA has it; ``patterns`` collects the rank pattern after each step."""
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        loss = model(**inputs(name, step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        if patterns is not None:
            patterns.append(pattern(model))
    return losses


def pattern(model: nn.Module) -> dict[str, list[bool]] | None:
    found = model.peft_config["default"].rank_pattern
    return found and {key.removesuffix(".default"): value for key, value in found.items()}


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        if "ranknum" in name and tensor == 0:  # of a layer without ranks in a file, where it means nothing
            continue
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    # HF PEFT trains ranknum where it was cast, and never saves it.
    flags = [
        {name: parameter.requires_grad for name, parameter in model.named_parameters() if "ranknum" not in name}
        for model in (ours, theirs)
    ]
    assert flags[0] == flags[1]
    assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if "ranknum" in name)


def assert_close(got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    error, their_error = ((tensor - exact).abs().max().item() for tensor in (got, theirs))
    room = 1e-5 * exact.abs().max().item()
    assert error <= max(2 * their_error, room), f"{what}: error {error}, HF PEFT's is {their_error}, room {room}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("init", [True, False], ids=["zero", "random"])
def test_names_and_initial_weights(pair, name, dtype, init):
    theirs, ours = pair(name, dtype, init_lora_weights=init)
    assert_same_state(ours, theirs)
    if dtype is FP32:
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.peft_config["default"].to_dict() == theirs.peft_config["default"].to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(pair, inputs, fused_calls, name):
    theirs, ours = pair(name, init_lora_weights=False, lora_alpha=0.3)
    exact = copy.deepcopy(theirs).double()
    results = [model(**inputs(name)) for model in (ours, theirs, exact)]
    assert fused_calls == {"lora_linear": len(ours.base_model.layers), "lora_delta": 0}
    assert_close(*(result.logits for result in results), "logits")
    assert_close(*(result.loss for result in results), "loss")
    for result in results:
        result.loss.backward()
    parameters = zip(ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True)
    for (parameter_name, got), expected, truth in parameters:
        assert (got.grad is None) == (expected.grad is None), parameter_name
        if got.grad is not None:
            assert_close(got.grad, expected.grad, truth.grad, f"gradient of {parameter_name}")


@pytest.mark.parametrize("name", MODELS)
def test_fp32_adapters_on_a_bf16_base(pair, inputs, name):
    theirs, ours = pair(name, BF16, init_lora_weights=False, lora_alpha=1)
    exact = copy.deepcopy(theirs).double()(**inputs(name)).logits
    got, expected = (model(**inputs(name)).logits for model in (ours, theirs))
    errors = [(result.double() - exact).abs().max() for result in (got, expected)]
    assert got.dtype == BF16
    assert errors[0] <= 2 * errors[1] + torch.finfo(BF16).eps * exact.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_schedule(pair, inputs, name):
    models, patterns = pair(name), ([], [])
    losses = [train(model, name, inputs, patterns=seen) for model, seen in zip(models, patterns, strict=True)]
    assert patterns[1] == patterns[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    left = [sum(ranks) for ranks in patterns[1][-1].values()]
    assert sum(left) == 3 * len(left)
    theirs, ours = (dict(model.named_parameters()) for model in models)
    for parameter_name, parameter in theirs.items():
        torch.testing.assert_close(ours[parameter_name], parameter, rtol=1e-3, atol=1e-4, msg=parameter_name)


def test_what_is_left_out_after_the_last_allocation(pair, inputs, monkeypatch):
    monkeypatch.setenv("PYFUSED_SHARED_INPUT", "0")  # layers compute alone, so each is seen
    _, ours = pair("llama")
    seen = []
    op = pyfused.ops.lora_linear
    monkeypatch.setattr(pyfused.ops, "lora_linear", lambda *args: seen.append(args[3].shape[0]) or op(*args))
    train(ours, "llama", inputs, range(22))
    assert set(seen) == {6}
    seen.clear()
    train(ours, "llama", inputs, [22])
    assert set(seen) == {6}
    left = [sum(ranks) for ranks in pattern(ours).values()]
    for steps, again in (([23, 24], 2), ([], 1)):
        seen.clear()
        train(ours, "llama", inputs, steps)
        if not steps:
            with torch.no_grad():
                ours(**inputs("llama"))
        assert seen == [rank for rank in left if rank or steps] * again
    assert ours.base_model.layers.of("default")["model.layers.0.self_attn.q_proj"].r == {"default": 6}, (
        "parameters stay"
    )


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


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe_merge"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_merging(pair, build, batch, name, safe_merge, dtype):
    theirs, ours = pair(name, dtype, init_lora_weights=False, lora_alpha=0.1)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    expected = ours(**batch(name)).logits
    ours.merge_adapter(safe_merge=safe_merge)
    theirs.merge_adapter(safe_merge=safe_merge)
    assert_same_state(ours, theirs)
    if dtype is FP32:
        torch.testing.assert_close(ours(**batch(name)).logits, expected, rtol=1e-4, atol=1e-5)
    ours.unmerge_adapter()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=8 * torch.finfo(dtype).eps, msg=key)
    merged = wrap(pyfused, build(name, dtype), init_lora_weights=False, lora_alpha=0.1).merge_and_unload()
    reference = wrap(peft, build(name, dtype), init_lora_weights=False, lora_alpha=0.1).merge_and_unload()
    assert all(torch.equal(value, reference.state_dict()[key]) for key, value in merged.state_dict().items())


class TestAllocation:
    @pytest.fixture
    def model(self, build):
        return lambda **options: wrap(pyfused, build("llama"), task_type="CAUSAL_LM", **options)

    def test_it_needs_gradients(self, model):
        with pytest.raises(ValueError, match=r"update_and_allocate: no parameter .* after loss.backward\(\)"):
            model().update_and_allocate(0)

    def test_only_a_trained_adalora_adapter_has_one(self, build, model, inputs, tmp_path):
        lora = pyfused.get_peft_model(build("llama"), pyfused.LoraConfig())
        model().save_pretrained(tmp_path)
        loaded = pyfused.PeftModel.from_pretrained(build("llama"), tmp_path)
        for other in (lora, loaded):
            assert not hasattr(other, "update_and_allocate") and not hasattr(other.base_model, "rankallocator")
        assert torch.isfinite(loaded(**inputs("llama")).loss)
        deleted = model()
        assert deleted.trainable_adapter_name == "default"
        deleted.delete_adapter("default")
        assert not hasattr(deleted, "update_and_allocate")

    def test_nothing_to_prune(self, model, inputs):
        """HF PEFT's kthvalue fails where init_r is target_r."""
        ours = model(target_r=6)
        train(ours, "llama", inputs)
        assert all(all(ranks) for ranks in pattern(ours).values())

    def test_everything_is_pruned(self, model, inputs):
        ours = model(target_r=0)
        losses = train(ours, "llama", inputs)
        assert not any(any(ranks) for ranks in pattern(ours).values())
        with torch.no_grad(), ours.disable_adapter():
            expected = ours(**inputs("llama")).logits
        torch.testing.assert_close(ours.eval()(**inputs("llama")).logits, expected)
        assert all(map(torch.isfinite, map(torch.tensor, losses)))

    def test_a_step_that_was_left_out(self, model, inputs):
        """The last allocation comes late where the training did not stop at it."""
        ours = model()
        train(ours, "llama", inputs, [0, 3, 25, 26])
        assert sum(map(sum, pattern(ours).values())) == 3 * len(pattern(ours))

    def test_a_layer_that_was_not_called(self, model, inputs):
        ours = model()
        layer = ours.base_model.layers.of("default")["model.layers.1.self_attn.q_proj"]
        with torch.no_grad():
            layer.lora_E["default"].fill_(1.0)
        ours.base_model.peft_config["default"].orth_reg_weight = 0.0
        for step in range(8):
            ours(**inputs("llama")).loss.backward()
            for parameter in layer.parameters():
                parameter.grad = None
            ours.update_and_allocate(step)
        assert not any(pattern(ours)["model.layers.1.self_attn.q_proj.lora_E"]), "it is of no importance"

    def test_budget(self, model):
        theirs = peft.tuners.adalora.layer.RankAllocator
        ours = model().base_model.rankallocator
        reference = theirs.__new__(theirs)
        reference.peft_config, reference.init_bgt, reference.target_bgt = ours.peft_config, 36, 18
        assert (ours.init_bgt, ours.target_bgt) == (36, 18)
        assert [ours.budget_schedule(step) for step in range(STEPS)] == [
            reference.budget_schedule(step) for step in range(STEPS)
        ]
        ours.set_total_step(40)
        assert ours.peft_config.total_step == 40
        with pytest.raises(ValueError, match="tinit must be less than total_step - tfinal"):
            ours.set_total_step(10)

    def test_copies_have_a_budget_of_their_own(self, model, inputs):
        ours = model()
        train(ours, "llama", inputs, range(10))
        other = copy.deepcopy(ours)
        train(ours, "llama", inputs, range(10, 24))
        assert pattern(other) != pattern(ours)
        train(other, "llama", inputs, range(10, 24))
        assert sum(map(sum, pattern(other).values())) == sum(map(sum, pattern(ours).values()))


class TestRegularisation:
    def test_without_a_task_type_there_is_none(self, build, inputs):
        """As in HF PEFT, whose trained weights depend on it; but it is said."""
        with pytest.warns(UserWarning, match="orth_reg_weight: .* only where task_type is set"):
            ours = pyfused.get_peft_model(build("llama"), AdaLoraConfig(**OPTIONS))
        theirs = wrap(peft, build("llama"))
        losses = [model(**inputs("llama")).loss for model in (ours.eval(), theirs)]
        torch.testing.assert_close(*losses)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pyfused.get_peft_model(build("llama"), AdaLoraConfig(**OPTIONS | {"orth_reg_weight": 0.0}))

    def test_it_follows_the_formula(self, build):
        ours = wrap(pyfused, build("t5"))
        layers = ours.base_model.layers.of("default")
        norms = []
        for layer in layers.values():
            for rows in (layer.lora_A["default"], layer.lora_B["default"].T):
                norms.append((rows.double() @ rows.double().T - torch.eye(6)).norm())
        penalty = ours.base_model.rankallocator.orthogonality(layers)
        torch.testing.assert_close(penalty.double(), torch.stack(norms).mean(), rtol=1e-6, atol=0)

    @pytest.mark.parametrize("options", [{"return_dict": False}, {"labels": None}])
    def test_outputs_without_a_loss(self, build, inputs, options):
        ours = wrap(pyfused, build("llama"), task_type="CAUSAL_LM")
        ours(**(inputs("llama") | options))

    def test_autocast(self, pair, inputs):
        losses = []
        for model in pair("llama", init_lora_weights=False, lora_alpha=0.1):
            with torch.autocast("cpu", BF16):
                losses.append(model(**inputs("llama")).loss)
        assert losses[1].dtype == losses[0].dtype
        torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


def test_several_active_adapters(pair, batch):
    models = pair("llama", init_lora_weights=False)
    for library, model in zip((peft, pyfused), models, strict=True):
        torch.manual_seed(4)
        options = OPTIONS | {"init_r": 3, "init_lora_weights": False, "target_modules": ["k_proj", "v_proj"]}
        model.add_adapter("other", library.AdaLoraConfig(**options, inference_mode=True, task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["other", "default"])
    theirs, ours = models
    exact = copy.deepcopy(theirs).double()
    assert_close(*(model(**batch("llama")).logits for model in (ours, theirs, exact)), "logits")
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(**batch("llama")).logits, theirs(**batch("llama")).logits)


def test_one_trainable_adapter(build, unchanged):
    model = wrap(pyfused, build("llama"))
    with unchanged(model), pytest.raises(ValueError, match="supports only 1 trainable adapter"):
        model.add_adapter("second", AdaLoraConfig(**OPTIONS))
    with pytest.raises(TypeError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_modules_to_save_and_biases(pair):
    assert_same_state(*reversed(pair("llama", modules_to_save=["lm_head"], bias="lora_only")))
    assert_same_state(*reversed(pair("bert_cls", bias="all")))


def test_default_targets_are_those_of_hf_peft():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING as THEIRS

    from pyfused.methods.adalora import _TARGETS

    assert _TARGETS == THEIRS


def test_fields_and_defaults_are_those_of_hf_peft():
    assert AdaLoraConfig(total_step=10).to_dict() == peft.AdaLoraConfig(total_step=10).to_dict()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_step": None}, ValueError, "total_step: AdaLoRA needs the number of steps"),
        ({"total_step": 0}, ValueError, "total_step must be at least 1, got 0"),
        ({"total_step": 2.5}, TypeError, "total_step must be an integer, got 2.5"),
        ({"tinit": 7, "tfinal": 3}, ValueError, "tinit must be less than total_step - tfinal"),
        ({"deltaT": 0}, ValueError, "deltaT must be at least 1, got 0"),
        ({"init_r": -1}, ValueError, "init_r must be at least 0, got -1"),
        ({"target_r": True}, TypeError, "target_r must be an integer, got True"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"beta2": "0.5"}, TypeError, "beta2 must be a number, got '0.5'"),
        ({"orth_reg_weight": -0.1}, ValueError, "orth_reg_weight must be at least 0, got -0.1"),
        ({"use_dora": True}, ValueError, "use_dora: AdaLoRA does not support DoRA"),
        ({"loftq_config": {"loftq_bits": 4}}, ValueError, "loftq_config: AdaLoRA does not support LoftQ"),
        ({"lora_bias": True}, ValueError, "lora_bias: AdaLoRA has no bias"),
        ({"rank_pattern": {"a": 3}}, TypeError, "rank_pattern must map names to lists of True and False"),
        ({"rank_pattern": [True]}, TypeError, "rank_pattern must be a dict or None, got list"),
        ({"layer_replication": [(0, 1)]}, NotImplementedError, "layer_replication"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be True or False in AdaLoRA, got 'pissa'"),
        ({"peft_type": "LORA"}, ValueError, "peft_type must be 'ADALORA' in AdaLoraConfig, got 'LORA'"),
    ],
    ids=str,
)
def test_config_errors(options, error, message):
    with pytest.raises(error, match=message):
        AdaLoraConfig(**({"total_step": 10} | options))


@pytest.mark.parametrize("options", [{"r": 4}, {"use_rslora": True}, {"alpha_pattern": {"q": 1}}], ids=str)
def test_fields_that_mean_nothing_are_named(options):
    with pytest.warns(UserWarning, match=f"without a meaning in AdaLoRA: {next(iter(options))}"):
        AdaLoraConfig(total_step=10, **options)


def test_what_does_not_fit_the_model(build, unchanged):
    model = build("plain")
    options = OPTIONS | {"task_type": "CAUSAL_LM"}
    with unchanged(model), pytest.raises(ValueError, match=r"'act' is not supported: .*got Tanh"):
        pyfused.get_peft_model(model, AdaLoraConfig(**options, target_modules=["act"]))
    with pytest.raises(NotImplementedError, match="AdaLoRA on Conv2d is not built yet"):
        pyfused.get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), AdaLoraConfig(**options, target_modules=["0"]))
