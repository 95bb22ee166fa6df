"""The same model wrapped by HF PEFT and by pyfused: names, initial weights, outputs, gradients, counts."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import pyfused

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODELS = {
    "plain": ["up", "head"],
    "llama": LLAMA,
    "bert_cls": ["query", "value", "dense"],
    "t5": ["q", "v", "wi", "wo"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
}


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def assert_same_flags(ours: nn.Module, theirs: nn.Module) -> None:
    got = {name: parameter.requires_grad for name, parameter in ours.named_parameters()}
    assert got == {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}


def assert_close(got: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor, what: str) -> None:
    """To 1e-5 of the largest value, where HF PEFT itself is that close to the exact result; else twice its error."""
    error, their_error = ((tensor - exact).abs().max().item() for tensor in (got, theirs))
    room = 1e-5 * exact.abs().max().item()
    assert error <= max(2 * their_error, room), f"{what}: error {error}, HF PEFT's is {their_error}, room {room}"


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    result = model(**inputs)
    return result if isinstance(result, torch.Tensor) else result.logits


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_initial_weights_are_the_same_numbers(pair, build, dtype, autocast, init):
    options = {"target_modules": LLAMA, "r": 6, "lora_alpha": 13, "init_lora_weights": init}
    models = []
    for library in (peft, pyfused):
        base = build("llama", dtype)
        torch.manual_seed(3)
        models.append(library.get_peft_model(base, library.LoraConfig(**options), autocast_adapter_dtype=autocast))
        models.append(torch.rand(1))
    theirs, their_next, ours, our_next = models
    assert_same_state(ours, theirs)
    assert_same_flags(ours, theirs)
    assert torch.equal(our_next, their_next), "the generator is not where HF PEFT leaves it"


@pytest.mark.parametrize(("name", "targets"), MODELS.items(), ids=MODELS)
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_outputs_and_gradients(pair, batch, fused_calls, name, targets, rslora):
    theirs, ours = pair(name, target_modules=targets, init_lora_weights=False, use_rslora=rslora)
    exact, inputs = copy.deepcopy(theirs).double(), batch(name)
    results = [output(model, inputs) for model in (ours, theirs)]
    assert fused_calls == {"lora_linear": len(ours.base_model.layers), "lora_delta": 0}
    results.append(
        output(exact, {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()})
    )
    assert_close(*results, "output")
    for result in results:
        (result.square().mean()).backward()
    for (parameter_name, got), expected, truth in zip(
        ours.named_parameters(), theirs.parameters(), exact.parameters(), strict=True
    ):
        assert (got.grad is None) == (expected.grad is None), parameter_name
        if got.grad is not None:
            assert_close(got.grad, expected.grad, truth.grad, f"gradient of {parameter_name}")


@pytest.mark.parametrize("name", ["llama", "t5", "bert_cls", "gpt2"])
def test_fp32_adapters_on_a_bf16_base(pair, batch, name):
    theirs, ours = pair(name, BF16, target_modules=MODELS[name], init_lora_weights=False)
    assert {parameter.dtype for parameter in ours.parameters() if parameter.requires_grad} == {FP32}
    results = [output(model, batch(name)) for model in (ours, theirs)]
    assert results[0].dtype == BF16
    exact = output(copy.deepcopy(theirs).double(), batch(name))
    errors = [(result.double() - exact).abs().max() for result in results]
    ulp = torch.finfo(BF16).eps * exact.abs().max()
    assert errors[0] <= 2 * errors[1] + ulp
    for result in results:
        result.float().square().sum().backward()
    expected = dict(theirs.named_parameters())
    for parameter_name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            grad = expected[parameter_name].grad.float()
            assert (parameter.grad - grad).norm() <= 0.02 * grad.norm(), parameter_name


@pytest.mark.parametrize("name", ["plain", "llama", "bert_cls", "t5", "gpt_neox", "gpt2"])
def test_printed_parameter_counts(pair, capsys, name):
    options = {"target_modules": "all-linear", "modules_to_save": ["head"]} if name == "plain" else {}
    theirs, ours = pair(name, **options)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    ours.print_trainable_parameters()
    expected, got = capsys.readouterr().out.splitlines()
    assert got == expected


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("inference_mode", [False, True])
def test_what_is_trainable(pair, bias, inference_mode):
    theirs, ours = pair(
        "bert_cls", target_modules=["query", "dense"], bias=bias, inference_mode=inference_mode, task_type="SEQ_CLS"
    )
    assert_same_state(ours, theirs)
    assert_same_flags(ours, theirs)


@pytest.mark.parametrize(
    ("name", "task", "head"),
    [
        ("bert_cls", "SEQ_CLS", "classifier"),
        ("roberta_cls", "SEQ_CLS", "classifier"),
        ("llama_cls", "SEQ_CLS", "score"),
        ("bert_tokens", "TOKEN_CLS", "classifier"),
        ("bert_qa", "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_task_heads_are_trained(pair, batch, name, task, head):
    theirs, ours = pair(name, task_type=task, init_lora_weights=False)
    assert_same_state(ours, theirs)
    assert_same_flags(ours, theirs)
    assert list(ours.base_model.wrappers) == [head]
    assert ours.modules_to_save == theirs.modules_to_save
    results = [model(**batch(name)) for model in (ours, theirs)]
    for key in {"logits", "start_logits", "end_logits"} & set(results[1]):
        got, expected = (result[key] for result in results)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_second_adapter(pair):
    models = pair("llama", target_modules=["q_proj"])
    for library, model in zip((peft, pyfused), models, strict=True):
        torch.manual_seed(4)
        model.add_adapter("other", library.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], bias="all"))
    theirs, ours = models
    assert_same_state(ours, theirs)
    assert_same_flags(ours, theirs)
    for name in ("other", "default"):
        for model in models:
            model.set_adapter(name)
        assert_same_flags(ours, theirs)
    assert ours.active_adapters == theirs.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("safe_merge", [False, True], ids=["merge", "safe_merge"])
def test_merged_weights_are_the_same_numbers(pair, name, dtype, safe_merge):
    """Those of HF PEFT's plain merge; its safe merge rounds the adapter's share first, ours does not."""
    theirs, ours = pair(name, dtype, target_modules=MODELS[name], init_lora_weights=False)
    theirs.merge_adapter()
    ours.merge_adapter(safe_merge=safe_merge)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        model.unmerge_adapter()
    assert_same_state(ours, theirs)
    assert_same_state(ours.merge_and_unload(safe_merge=safe_merge), theirs.merge_and_unload())


def test_several_active_adapters_are_summed(pair, batch):
    models = pair("llama", target_modules=LLAMA, init_lora_weights=False)
    for library, model in zip((peft, pyfused), models, strict=True):
        torch.manual_seed(4)
        config = library.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["other", "default"])
    theirs, ours = models
    assert ours.active_adapters == ["other", "default"]
    assert_same_flags(ours, theirs)
    torch.testing.assert_close(output(ours, batch("llama")), output(theirs, batch("llama")), rtol=1e-5, atol=1e-5)


def test_generate(pair, batch):
    models = pair("llama", target_modules=LLAMA, init_lora_weights=False, task_type="CAUSAL_LM")
    tokens = [model.generate(**batch("llama"), max_new_tokens=5, do_sample=False) for model in models]
    assert torch.equal(tokens[0], tokens[1])
    assert tokens[0].shape == (2, 12)


def test_autocast(pair, batch):
    theirs, ours = pair("llama", target_modules=LLAMA, init_lora_weights=False)
    with torch.autocast("cpu", dtype=BF16):
        got, expected = output(ours, batch("llama")), output(theirs, batch("llama"))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.02 * expected.abs().max().item())


def test_gradient_checkpointing(pair, batch):
    """Reentrant checkpointing passes gradients only where an input asks for one, which get_peft_model sees to."""
    grads = []
    for reentrant in (None, True, False):
        _, model = pair("llama", target_modules=LLAMA, init_lora_weights=False, lora_dropout=0.1)
        if reentrant is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(5)
        output(model, batch("llama")).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for other in grads[1:]:
        for got, expected in zip(other, grads[0], strict=True):
            torch.testing.assert_close(got, expected)


def test_checkpointing_that_is_on_before_wrapping(build, batch):
    base = build("llama")
    base.gradient_checkpointing_enable({"use_reentrant": True})
    model = pyfused.get_peft_model(base, pyfused.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns where no input of a checkpoint requires a gradient
        warnings.filterwarnings("ignore", category=FutureWarning)
        output(model, batch("llama")).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
