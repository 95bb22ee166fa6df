"""``fuse`` on HF PEFT's other forms of LoRA: Conv1D, embeddings, DoRA, lora_bias."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from lora_models import assert_close, drop_as_pyfused, logits
from torch import nn

from pyfused import ops
from pyfused.integrations.hf_peft import fuse, unfuse

GPT2, BERT = ["c_attn", "c_fc", "c_proj"], ["query", "dense"]
FORMS = {
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_padding": ("bert", {"target_modules": ["word_embeddings"]}),
    "dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "dora_bert": ("bert", {"target_modules": [*BERT, "word_embeddings"], "use_dora": True}),
    "dora_conv1d": ("gpt2", {"target_modules": GPT2, "use_dora": True}),
    "dora_t5": ("t5", {"target_modules": ["q", "v"], "use_dora": True}),
    "lora_bias": ("bert", {"target_modules": BERT, "lora_bias": True}),
    "lora_bias_conv1d": ("gpt2", {"target_modules": GPT2, "lora_bias": True}),
    "lora_bias_without_bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}),
}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
forms = pytest.mark.parametrize(("name", "options"), FORMS.values(), ids=FORMS)


@pytest.fixture
def form(hf_model):
    """A model with HF PEFT's adapter of this form, and its inputs."""

    def make(name: str, options: dict, dtype: torch.dtype = torch.float32, **more):
        model, inputs, _ = hf_model(name)
        config = {"r": 6, "lora_alpha": 13, "init_lora_weights": False, "fan_in_fan_out": name == "gpt2"}
        torch.manual_seed(0)
        return peft.get_peft_model(model.unload().to(dtype), peft.LoraConfig(**config | options | more)), inputs

    return make


@pytest.fixture
def no_peft(monkeypatch):
    """From now on HF PEFT's own formula of DoRA and its gather for embeddings are errors."""
    from peft.tuners.lora import dora, layer

    def fail(*args, **kwargs):
        raise AssertionError("HF PEFT's forward ran")

    monkeypatch.setattr(dora.DoraLinearLayer, "forward", fail)
    monkeypatch.setattr(dora.DoraEmbeddingLayer, "forward", fail)
    monkeypatch.setattr(layer.Embedding, "_embed", fail)


def run(model: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    result = logits(model, inputs)
    weights = torch.linspace(-1.0, 1.0, result.numel(), dtype=torch.float64).view(result.shape)
    (result.double() * weights).sum().backward()
    return {"logits": result.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@forms
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_logits_and_gradients(form, name, options, train, request):
    model, inputs = form(name, options)
    fused, eager = copy.deepcopy(model).train(train), model.train(train)
    report = fuse(fused)
    assert len(report.fused) == len(model.base_model.targeted_module_names) and not report.skipped and not report.notes
    expected = run(eager, inputs)
    request.getfixturevalue("no_peft")
    got = run(fused, inputs)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        # A query's bias and a key's, which attention does not see, have gradients that are noise.
        scale = 1e-4 if value.abs().max() > 1e-4 else 1.0
        assert_close(got[key], value, key, scale)


@forms
def test_fp32_adapters_on_a_bf16_base(form, name, options):
    model, inputs = form(name, options, torch.bfloat16)
    exact = logits(copy.deepcopy(model).double(), inputs)
    fused = copy.deepcopy(model)
    fuse(fused)
    got, expected = logits(fused, inputs), logits(model, inputs)
    assert got.dtype == expected.dtype == torch.bfloat16
    errors = [(result.double() - exact).abs().max() for result in (got, expected)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dropout_of_dora_is_pefts(form, name):
    """The mask apart, which HF PEFT is lent."""
    model, inputs = form(name, {**FORMS["dora" if name == "llama" else "dora_conv1d"][1], "lora_dropout": 0.3})
    fused, eager = copy.deepcopy(model).train(), model.train()
    fuse(fused)
    drop_as_pyfused(eager)
    got, expected = run(fused, inputs), run(eager, inputs)
    for key, value in expected.items():
        assert_close(got[key], value, key, 1e-3)


@forms
def test_three_steps(form, name, options):
    model, inputs = form(name, options)
    fused = copy.deepcopy(model)
    fuse(fused)
    for one in (model, fused):
        steps = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.01, momentum=0.9)
        for _ in range(3):
            steps.zero_grad()
            logits(one, inputs).square().mean().backward()
            steps.step()
    expected = dict(model.named_parameters())
    for key, parameter in fused.named_parameters():
        assert_close(parameter, expected[key], key, 1e-4)
    assert_close(logits(fused, inputs), logits(model, inputs), "logits", 1e-4)


@forms
def test_what_stays_pefts(form, name, options, tmp_path):
    model, inputs = form(name, options)
    fused = copy.deepcopy(model.eval())
    fuse(fused)
    for one in (model, fused):
        torch.manual_seed(4)
        other = {"target_modules": options["target_modules"], "init_lora_weights": False, "r": 4}
        one.add_adapter("other", peft.LoraConfig(**other, fan_in_fan_out=name == "gpt2"))
    assert list(fused.state_dict()) == list(model.state_dict())
    for names in (["default", "other"], ["other", "default"], ["other"], ["default"]):
        for one in (model, fused):
            one.base_model.set_adapter(names)
        assert_close(logits(fused, inputs), logits(model, inputs), str(names), 1e-4)
    with fused.disable_adapter(), model.disable_adapter():
        assert_close(logits(fused, inputs), logits(model, inputs))
    if name != "llama" or "lora_bias" not in options:
        before = logits(fused, inputs)
        fused.merge_adapter()
        assert_close(logits(fused, inputs), before, "merged", 1e-4)
        fused.unmerge_adapter()
        assert_close(logits(fused, inputs), before, "unmerged", 1e-4)
    unfuse(fused)
    assert not any(type(module).__module__.startswith("pyfused") for module in fused.modules())
    assert_close(logits(fused, inputs), logits(model, inputs))


def test_where_dora_keeps_pefts_forward(form):
    """A base that has to be called: its weight may not be what its output is made of."""
    model, inputs = form(*FORMS["dora"])
    fused = copy.deepcopy(model)
    for one in (model, fused):
        for layer in one.modules():
            if isinstance(layer, peft.tuners.lora.Linear):
                layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match="is DoRA and its base layer has to be called"):
        fuse(fused)
    fused = copy.deepcopy(model)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer._forward_hooks.clear()
    report = fuse(model)
    assert len(report.fused) == 1
    fused.base_model.model.model.layers[0].self_attn.q_proj.base_layer._forward_hooks.clear()
    assert_close(logits(model, inputs), logits(fused, inputs))


def test_a_mixed_batch_is_pefts(form):
    model, inputs = form("llama", FORMS["embedding"][1])
    fused = copy.deepcopy(model.eval())
    fuse(fused)
    names = {"adapter_names": ["default", "__base__"]}
    assert torch.equal(fused(**inputs, **names).logits, model.eval()(**inputs, **names).logits)


def test_compile_has_no_graph_breaks_for_dora(form):
    model, _ = form("llama", FORMS["dora"][1])
    fuse(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_one_op_for_a_layer_with_a_bias(form, monkeypatch):
    model, inputs = form("bert", FORMS["lora_bias"][1])
    count = len(fuse(model).fused)
    calls, op = [], ops.lora_linear
    monkeypatch.setattr(ops, "lora_linear", lambda *args: calls.append(1) or op(*args))
    logits(model, inputs)
    assert len(calls) == count


def test_dora_without_dropout_has_one_base_product(form, monkeypatch):
    model, inputs = form("llama", FORMS["dora"][1])
    count = len(fuse(model.train()).fused)
    calls, linear = [], torch.nn.functional.linear
    monkeypatch.setattr("pyfused.nn.dora.torch.nn.functional.linear", lambda *args: calls.append(1) or linear(*args))
    logits(model, inputs)
    plain = len(calls)
    calls.clear()
    unfuse(model)
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.Linear):
            layer.lora_dropout["default"] = nn.Dropout(0.1)
    fuse(model)
    logits(model, inputs)
    assert len(calls) == plain + count
