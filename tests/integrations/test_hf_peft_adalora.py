"""``fuse`` on HF PEFT's AdaLoRA layers: outputs and gradients, a whole schedule, what stays PEFT's."""

from __future__ import annotations

import copy
import pickle

import peft
import pytest
import torch
import transformers
from torch import nn

import pyfused
from pyfused.integrations.hf_peft import fuse, unfuse

TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
STEPS = 30
SCHEDULE = {"target_r": 3, "tinit": 5, "tfinal": 8, "deltaT": 2, "total_step": STEPS}


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


@pytest.fixture
def adalora_model(hf_model):
    """A transformers model with HF PEFT's AdaLoRA layers, and its inputs with labels."""

    def make(name: str, dtype: torch.dtype = torch.float32, **options):
        _, inputs, _ = hf_model("llama" if name == "gpt2" else name)
        torch.manual_seed(0)
        base = gpt2() if name == "gpt2" else hf_model(name)[0].unload()
        options = {"init_r": 6, "lora_alpha": 1.3, "init_lora_weights": False, "task_type": TASKS[name]} | options
        config = peft.AdaLoraConfig(fan_in_fan_out=name == "gpt2", **(SCHEDULE | options))
        inputs["labels"] = torch.tensor([0, 2]) if name == "bert" else inputs["input_ids"]
        if name == "t5":
            inputs["labels"] = inputs.pop("decoder_input_ids")
        return peft.get_peft_model(base.to(dtype), config).eval(), inputs

    return make


def run(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | grads


def train(model: nn.Module, inputs: dict, steps=range(STEPS)) -> list[float]:
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", TASKS)
def test_logits_and_gradients(adalora_model, name, calls):
    model, inputs = adalora_model(name)
    fused, eager, exact = copy.deepcopy(model), model, copy.deepcopy(model).double()
    report = fuse(fused)
    assert report.fused and not report.skipped and not report.notes
    got = run(fused, inputs)
    assert calls == {"lora_linear": len(report.fused)}
    expected, exact = run(eager, inputs), run(exact, inputs)
    assert got.keys() == expected.keys()
    for key, value in exact.items():
        errors = [(result[key].double() - value).norm() for result in (got, expected)]
        assert errors[0] <= 2 * errors[1] + 1e-5 * value.norm(), key


@pytest.mark.parametrize("name", TASKS)
def test_fp32_adapters_on_a_bf16_base(adalora_model, name):
    model, inputs = adalora_model(name, torch.bfloat16)
    fused, eager, exact = copy.deepcopy(model), model, run(copy.deepcopy(model).double(), inputs)
    fuse(fused)
    got, expected = run(fused, inputs), run(eager, inputs)
    assert got["logits"].dtype == torch.bfloat16
    assert got.keys() == expected.keys()
    for key, value in exact.items():
        errors = [(result[key].double() - value).norm() for result in (got, expected)]
        # ranknum, which HF PEFT trains on a 16-bit base, has one number whose terms cancel: rounding is all of it.
        assert "ranknum" in key or errors[0] <= 2 * errors[1] + 0.01 * value.norm(), key


@pytest.mark.parametrize("name", TASKS)
def test_a_whole_schedule(adalora_model, name, calls):
    model, inputs = adalora_model(name, init_lora_weights=True, lora_alpha=13)
    fused, eager = copy.deepcopy(model), model
    count = len(fuse(fused).fused)
    losses = [train(each, inputs) for each in (fused, eager)]
    assert calls["lora_linear"] == STEPS * count
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    patterns = [each.peft_config["default"].rank_pattern for each in (fused, eager)]
    assert patterns[0] == patterns[1] and sum(map(sum, patterns[0].values())) == 3 * len(patterns[0])
    for (key, got), expected in zip(fused.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4, msg=key)


def test_pruned_ranks_are_left_out_in_evaluation(adalora_model, monkeypatch):
    monkeypatch.setenv("PYFUSED_SHARED_INPUT", "0")  # layers compute alone, so each is seen
    model, inputs = adalora_model("llama", init_lora_weights=True)
    fuse(model)
    train(model, inputs)
    ranks = []
    op = pyfused.ops.lora_linear
    monkeypatch.setattr(pyfused.ops, "lora_linear", lambda *args: ranks.append(args[3].shape[0]) or op(*args))
    with torch.no_grad():
        first, second = (model(**inputs).logits for _ in range(2))
        left = [sum(kept) for kept in model.peft_config["default"].rank_pattern.values() if any(kept)]
        assert ranks == 2 * left
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        unfuse(model)
        assert not any("_pruned" in vars(module) for module in model.modules())
        for result in (first, second, *(other(**inputs).logits for other in others)):
            torch.testing.assert_close(result, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_what_stays_pefts(adalora_model, calls, tmp_path):
    model, inputs = adalora_model("llama")
    expected = model(**inputs).logits
    state = list(model.state_dict())
    count = len(fuse(model).fused)
    assert list(model.state_dict()) == state and len(fuse(model).fused) == count
    assert all(
        isinstance(layer, peft.tuners.adalora.SVDLinear) for layer in model.modules() if hasattr(layer, "lora_E")
    )
    with model.disable_adapter():
        model(**inputs)
    assert not calls
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
    assert not calls
    model.base_model.unmerge_adapter()
    other = peft.AdaLoraConfig(init_r=4, init_lora_weights=False, inference_mode=True, **SCHEDULE)
    model.add_adapter("second", other)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        both = model(**inputs).logits
    assert calls == {"lora_linear": count, "lora_delta": count}
    model.save_pretrained(tmp_path)
    unfuse(model)
    torch.testing.assert_close(both, model(**inputs).logits, rtol=1e-3, atol=1e-4)
    assert not any(type(module).__module__.startswith("pyfused") for module in model.modules())


def test_files_of_fused_models(adalora_model, hf_model, tmp_path):
    model, inputs = adalora_model("llama", init_lora_weights=True)
    fuse(model)
    train(model, inputs)
    model.save_pretrained(tmp_path)
    inputs.pop("labels")
    base = [adalora_model("llama")[0].unload() for _ in range(2)]
    loaded = peft.PeftModel.from_pretrained(base[0], tmp_path)
    fuse(loaded)  # layers of other ranks, of none perhaps
    ours = pyfused.PeftModel.from_pretrained(base[1], tmp_path)
    for other in (loaded, ours):
        torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_compiles(adalora_model):
    model, inputs = adalora_model("llama")
    fuse(model)
    expected = model(**inputs).logits
    layer = next(module for module in model.modules() if hasattr(module, "lora_E"))
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_convolutions_keep_pefts_forward():
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 1), "linear": nn.Linear(4, 5)})
    config = peft.AdaLoraConfig(target_modules=["conv", "linear"], **SCHEDULE)
    report = fuse(peft.get_peft_model(model, config))
    assert report.fused == ["base_model.model.linear"]
    assert report.skipped == {"base_model.model.conv": "AdaLoRA on a convolution (SVDConv2d)"}


def test_a_dropout_with_hooks_takes_pefts_forward(adalora_model, calls):
    model, inputs = adalora_model("llama", lora_dropout=0.1)
    for module in model.modules():
        if hasattr(module, "lora_E"):
            module.lora_dropout["default"].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="the dropout of adapter 'default' has hooks"):
        fuse(model)
    model(**inputs)
    assert not calls
