"""AdaLoRA in a model, next to HF PEFT's: names, outputs, gradients, a whole schedule, merging."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
from adalora_cases import BF16, FP32, MODELS, OPTIONS, assert_same_state, labelled, pair_of, pattern, train, wrap

import pyfused
from pyfused import AdaLoraConfig


@pytest.fixture
def pair(build):
    return functools.partial(pair_of, build)


@pytest.fixture
def inputs(batch):
    return functools.partial(labelled, batch)


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
