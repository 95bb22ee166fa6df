"""Bottleneck adapters in models: where they go, what they compute there, switching, files, refusals."""

from __future__ import annotations

import copy
import json
import pickle
import threading

import pytest
import torch
from bottleneck_cases import trained
from helpers import run_in_threads
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import pyfused  # noqa: E402
from pyfused import BottleneckConfig, PeftModel, get_peft_model  # noqa: E402
from pyfused.nn import BottleneckLayer  # noqa: E402

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _mini(cls, config_cls):
    return cls(config_cls(vocab_size=64, **_SIZES))


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    t = transformers
    if kind == "bert":
        return _mini(t.BertModel, t.BertConfig)
    if kind == "classifier":
        return t.BertForSequenceClassification(t.BertConfig(vocab_size=64, num_labels=3, **_SIZES))
    if kind == "roberta":
        return _mini(t.RobertaModel, t.RobertaConfig)
    if kind == "electra":
        return t.ElectraModel(t.ElectraConfig(vocab_size=64, embedding_size=32, **_SIZES))
    if kind == "gpt2":
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
        return t.T5ForConditionalGeneration(t.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    options = {"num_key_value_heads": 2, "head_dim": 8} if kind != "llama" else {}
    return getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(vocab_size=64, **_SIZES, **options))


KINDS = ["bert", "classifier", "roberta", "electra", "gpt2", "llama", "mistral", "qwen2", "qwen3", "t5"]
PRESETS = [BottleneckConfig.houlsby, BottleneckConfig.pfeiffer, BottleneckConfig.parallel]
by_name = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)


def run(model: nn.Module, rows: int = 2) -> Tensor:
    ids = torch.randint(3, 64, (rows, 9), generator=torch.Generator().manual_seed(1))
    labels = {"labels": ids} if model.config.model_type == "t5" else {}
    result = model(input_ids=ids, **labels)
    return result.last_hidden_state if "last_hidden_state" in result and not labels else result.logits


@by_name
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_trained_and_nothing_else(kind, preset):
    model = get_peft_model(base(kind), preset(reduction_factor=4, non_linearity="gelu")).eval()
    places = {"t5": 5}.get(kind, 2) * (2 if preset.__name__ == "houlsby" else 1)
    assert len(model.base_model.layers) == places
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 4 * places and all(".bottlenecks.default." in name for name in trainable)
    trained(model)
    run(model).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
        assert parameter.grad is None or parameter.grad.abs().sum() > 0, name


@by_name
@pytest.mark.parametrize("kind", KINDS)
def test_off_gone_copied_and_saved(kind, preset, tmp_path):
    plain = base(kind).eval()
    model = trained(get_peft_model(copy.deepcopy(plain), preset()))
    with torch.no_grad():
        expected, without = run(model), run(plain)
        assert (expected - without).abs().max() > 1e-3
        with model.disable_adapter():
            torch.testing.assert_close(run(model), without)
        torch.testing.assert_close(run(copy.deepcopy(model)), expected)
        torch.testing.assert_close(run(pickle.loads(pickle.dumps(model))), expected)
        model.save_pretrained(tmp_path / "peft")
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "peft")
        torch.testing.assert_close(run(again), expected)
        model.save_adapter(tmp_path / "hub")
        again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "hub", format="adapterhub")
        torch.testing.assert_close(run(again), expected)
        unloaded = model.unload()
        torch.testing.assert_close(run(unloaded), without)
    assert not any(isinstance(module, BottleneckLayer) for module in unloaded.modules())
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"


def test_formulas_in_bert():
    """The three presets' formulas, written out on one block's output."""
    plain = base("bert").eval()
    output = plain.encoder.layer[1].output
    inner, x = torch.randn(2, 9, 64), torch.randn(2, 9, 32)
    with torch.no_grad():
        h = output.dense(inner)
        for preset in PRESETS:
            model = trained(get_peft_model(copy.deepcopy(plain), preset()))
            layer = model.get_base_model().encoder.layer[1].output
            adapter, norm = layer.bottlenecks["default"], output.LayerNorm
            expected = {
                "houlsby": lambda a, n: n(h + a(h) + x),
                "pfeiffer": lambda a, n: n(a(n(h + x)) + h + x),
                "parallel": lambda a, n: n(h + a(x) + x),
            }[preset.__name__](adapter, norm)
            torch.testing.assert_close(layer(inner, x), expected)


@pytest.mark.parametrize("kind, inside", [("llama", "layers.1.mlp.base_layer.gate_proj"), ("gpt2", "h.1.mlp.c_fc")])
def test_concurrent_calls_have_each_their_residual_stream(kind, inside):
    """Two threads meet between the norm, where the stream comes by, and the adapter that reads it."""
    model = trained(get_peft_model(base(kind), BottleneckConfig.parallel(reduction_factor=4)))
    with torch.no_grad():
        expected = {rows: run(model, rows) for rows in (1, 3)}
    meeting = threading.Barrier(len(expected), timeout=60)
    results = {}

    def meet(*_) -> None:
        meeting.wait()

    def call(rows):
        with torch.no_grad():
            results[rows] = run(model, rows)

    model.get_base_model().base_model.get_submodule(inside).register_forward_pre_hook(meet)
    run_in_threads(call, ((rows,) for rows in expected))
    for rows, result in expected.items():
        torch.testing.assert_close(results[rows], result)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_whole_model_compiles_to_one_graph(kind):
    model = trained(get_peft_model(base(kind), BottleneckConfig.parallel(reduction_factor=4))).get_base_model()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_checkpointing_gives_the_same_gradients(kind):
    """A checkpoint recomputes the block, and the residual stream comes by again."""
    results = []
    for on in (False, True):
        torch.manual_seed(0)
        model = trained(get_peft_model(base(kind), BottleneckConfig.pfeiffer())).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if on:
            model.get_base_model().gradient_checkpointing_enable()
        run(model).square().sum().backward()
        results.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_nothing_of_the_stream_is_kept():
    model = get_peft_model(base("llama"), BottleneckConfig.pfeiffer())
    run(model)
    with model.disable_adapter():
        run(model)
    assert all(layer._x.x is None for layer in model.base_model.layers)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_several_adapters(kind):
    """Each has its own weights; active together, their terms are added."""
    model = trained(get_peft_model(base(kind), BottleneckConfig.houlsby(), "one"))
    model.add_adapter("two", BottleneckConfig.parallel(reduction_factor=4))
    model.set_adapter("two")
    trained(model)
    layer = list(model.base_model.layers)[-1]
    h, x = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    with torch.no_grad():
        one, two = layer.bottlenecks["one"](h), layer.bottlenecks["two"](x)
        for names, expected in ((["one"], h + one), (["two"], h + two), (["one", "two"], h + one + two)):
            model.set_adapter(names)
            torch.testing.assert_close(layer._adapt(h, x, None, names), expected)
        model.delete_adapter("one")
        assert model.active_adapters == ["two"]
        torch.testing.assert_close(layer._adapt(h, x, None, ["two"]), h + two)


def test_reduction_factors_and_layers_left_out():
    config = BottleneckConfig.pfeiffer(reduction_factor={"0": 4, "3": 32, "default": 8}, leave_out=[1])
    model = get_peft_model(base("t5"), config)
    sizes = {
        name: layer.bottlenecks["default"].adapter_up.in_features for name, layer in model.base_model.layers.named()
    }
    assert sizes == {
        "encoder.block.0.layer.1.dropout": 8,
        "decoder.block.0.layer.2.dropout": 4,  # layer 2: the decoder's numbers go on from the encoder's
        "decoder.block.1.layer.2.dropout": 1,
        "decoder.block.2.layer.2.dropout": 4,
    }


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(x)))


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_modules_by_name(parallel, tmp_path):
    """In any model: the module's output gets A(output), or A(input)."""
    config = BottleneckConfig(target_modules=["down"], is_parallel=parallel, reduction_factor=2)
    if parallel:
        with pytest.raises(ValueError, match=r"down.*12 outputs and 20 inputs"):
            get_peft_model(Plain(), config)
        config = BottleneckConfig(target_modules=["act"], is_parallel=True, reduction_factor=2)
        with pytest.raises(ValueError, match="a Tanh does not tell the width"):
            get_peft_model(Plain(), config)
        return
    plain = Plain()
    model = trained(get_peft_model(copy.deepcopy(plain), config))
    x = torch.randn(3, 12)
    h = plain.down(plain.act(plain.up(x)))
    expected = x + h + model.get_base_model().down.bottlenecks["default"](h)
    torch.testing.assert_close(model(x), expected)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(plain, tmp_path)(x), expected)
    with pytest.raises(ValueError, match="no place for target_modules"):
        model.save_adapter(tmp_path / "hub")


def test_a_parallel_adapter_by_name():
    """Around a whole feed-forward part, as in He et al. 2021."""
    plain = base("llama").eval()
    config = BottleneckConfig.parallel(target_modules=["mlp"])
    model = trained(get_peft_model(copy.deepcopy(plain), config))
    layer = model.get_base_model().model.layers[0].mlp
    x = torch.randn(2, 9, 32)
    expected = plain.model.layers[0].mlp(x) + layer.bottlenecks["default"](x)
    torch.testing.assert_close(layer(x), expected)


def test_heads_are_trained_with_it(tmp_path):
    config = BottleneckConfig.pfeiffer(task_type="SEQ_CLS")
    model = get_peft_model(base("classifier"), config)
    assert {"classifier"} == set(model.base_model.wrappers)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("classifier"), tmp_path)
    torch.testing.assert_close(run(again), run(model.eval()))


def test_16_bit_models_keep_fp32_adapters():
    model = get_peft_model(base("llama").bfloat16(), BottleneckConfig.houlsby())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert run(model).dtype == torch.bfloat16
    model = get_peft_model(base("llama").bfloat16(), BottleneckConfig.houlsby(), autocast_adapter_dtype=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
    run(model).float().sum().backward()


def test_generate_and_compile():
    model = trained(get_peft_model(base("llama"), BottleneckConfig.parallel()))
    ids = torch.randint(3, 64, (1, 5))
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape == (1, 8)
    compiled = torch.compile(model.get_base_model().model.layers[0].mlp.bottlenecks["default"], backend="aot_eager")
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(compiled(x, x), model.get_base_model().model.layers[0].mlp.bottlenecks["default"](x, x))


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        ("llama", {"residual_before_ln": "post_add"}, ValueError, "post_add.*needs a post-norm model"),
        ("llama", {"leave_out": [0, 1]}, ValueError, "leaves no place"),
        ("llama", {"reduction_factor": {"0": 4}}, ValueError, "reduction_factor names neither layer 1 nor 'default'"),
        ("llama", {"target_modules": ["nothing"]}, ValueError, "Target modules .*nothing.* not found"),
    ],
)
def test_what_does_not_fit_the_model(kind, options, error, message):
    model = base(kind)
    before = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, BottleneckConfig(**options))
    assert [name for name, _ in model.named_modules()] == before


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match="no places for bottleneck adapters known in models of type None"):
        get_peft_model(Plain(), BottleneckConfig())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"phm_layer": True}, NotImplementedError, "phm_layer is not built yet"),
        ({"inv_adapter": "nice"}, NotImplementedError, "inv_adapter is not built yet"),
        ({"cross_adapter": True}, NotImplementedError, "cross_adapter is not built yet"),
        ({"stochastic_depth": 0.1}, NotImplementedError, "stochastic_depth is not built yet"),
        ({"non_linearity": "softmax"}, ValueError, "activation must be one of"),
        ({"reduction_factor": 0}, ValueError, "reduction_factor must be a positive number"),
        ({"residual_before_ln": "never"}, ValueError, "residual_before_ln must be True, False or 'post_add'"),
        ({"leave_out": 3}, TypeError, "leave_out must be a list of integers"),
        ({"mh_adapter": False, "output_adapter": False}, ValueError, "both False"),
        ({"peft_type": "LORA"}, ValueError, "peft_type must be 'BOTTLENECK'"),
    ],
)
def test_bad_configurations(options, error, message):
    with pytest.raises(error, match=message):
        BottleneckConfig(**options)


def test_bottlenecks_cannot_be_merged():
    model = get_peft_model(base("llama"), BottleneckConfig())
    with pytest.raises(NotImplementedError, match="no function of its base layer's weights alone"):
        model.merge_adapter()


def test_adapterhub_folders_that_are_no_good(tmp_path):
    model = get_peft_model(base("llama"), BottleneckConfig.pfeiffer())
    model.save_adapter(tmp_path)
    weights, config = tmp_path / "adapter.safetensors", tmp_path / "adapter_config.json"

    def load(other: str = "llama") -> None:
        PeftModel.from_pretrained(base(other), tmp_path, format="adapterhub")

    with pytest.raises(ValueError, match="format must be 'peft' or 'adapterhub', got 'hub'"):
        PeftModel.from_pretrained(base("llama"), tmp_path, format="hub")
    with pytest.raises(ValueError, match="is no place for an adapter in this BertModel"):
        load("bert")
    good = config.read_text()
    for text, message in (
        ("{", "is damaged"),
        (good.replace('"dropout"', '"unheard_of"'), "fields that pyfused does not know: unheard_of"),
        (good.replace('"config": {', '"config": {"architecture": "lora",'), "only bottleneck adapters are read"),
        (good.replace('"reduction_factor": 16', '"reduction_factor": 8'), "must have shape"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            load()
    config.write_text(good)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged or cut short"):
        load()
    weights.unlink()
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle: write it anew"):
        load()


def test_adapterhub_files_are_for_bottlenecks(tmp_path):
    model = get_peft_model(base("llama"), pyfused.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="format='adapterhub' is for bottleneck adapters"):
        model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="format must be 'adapterhub', got 'peft'"):
        model.save_adapter(tmp_path, format="peft")


def test_a_second_adapter_from_adapterhub(tmp_path):
    model = trained(get_peft_model(base("gpt2"), BottleneckConfig.houlsby()))
    expected = run(model)
    model.save_adapter(tmp_path)
    model.load_adapter(tmp_path, "second", format="adapterhub")
    model.set_adapter("second")
    torch.testing.assert_close(run(model), expected)
