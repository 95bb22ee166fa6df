"""A model with adapters in what people put it into: checkpointing, optimizers, offloading, compiling, exporting."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import pyfused

_CONFIGS: dict[str, Callable[[], pyfused.PeftConfig]] = {
    "lora": lambda: pyfused.LoraConfig(
        r=4, lora_alpha=13, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False
    ),
    "ia3": lambda: pyfused.IA3Config(init_ia3_weights=False),
    "bottleneck": lambda: pyfused.BottleneckConfig.houlsby(reduction_factor=4, init_weights="mam_adapter"),
}
_VIRTUAL = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
# What is tested of LoRA, IA3 and bottlenecks in every model, and of the other methods in Llama.
_MORE_CONFIGS: dict[str, Callable[[], pyfused.PeftConfig]] = {
    "dora": lambda: pyfused.LoraConfig(
        r=4, lora_alpha=13, lora_dropout=0.1, use_dora=True, target_modules=["q_proj", "down_proj", "c_attn"]
    ),
    "adalora": lambda: pyfused.AdaLoraConfig(
        init_r=4, target_r=2, total_step=9, lora_alpha=3, lora_dropout=0.1, task_type="CAUSAL_LM"
    ),
    "prefix": lambda: pyfused.PrefixTuningConfig(**_VIRTUAL),
    "projected prefix": lambda: pyfused.PrefixTuningConfig(**_VIRTUAL, prefix_projection=True, encoder_hidden_size=9),
    "prompt": lambda: pyfused.PromptTuningConfig(**_VIRTUAL),
}
every_method = pytest.mark.parametrize("method", [*_CONFIGS, *_MORE_CONFIGS])


@pytest.fixture(params=_CONFIGS)
def method(request) -> str:
    return request.param


def _new_config(method: str) -> pyfused.PeftConfig:
    return (_CONFIGS | _MORE_CONFIGS)[method]()


@pytest.fixture
def make(build, method) -> Callable[[str], nn.Module]:
    def make(name: str = "llama") -> nn.Module:
        torch.manual_seed(1)
        model = pyfused.get_peft_model(build(name), _new_config(method))
        with torch.no_grad():  # no adapter does nothing at the start
            for parameter in _trained(model):
                parameter.add_(torch.randn(parameter.shape) / 20)
        return model

    return make


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, labels=inputs["input_ids"]).loss


def _take_over(model: nn.Module, source: nn.Module) -> None:
    """Give ``model`` the adapter of ``source``."""
    if getattr(source.peft_config["default"], "prefix_projection", False):  # files have what comes out of the network
        model.prompt_encoder.load_state_dict(source.prompt_encoder.state_dict())
    else:
        pyfused.set_peft_model_state_dict(model, pyfused.get_peft_model_state_dict(source))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method", [*_CONFIGS, "dora", "adalora", "prompt"]
)  # prefixes refuse it: test_prefix_tuning.py
def test_gradient_checkpointing(make, batch, name, use_reentrant):
    result = []
    for checkpointing in (False, True):
        model = make(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(2)  # the masks are drawn again in the second forward
        loss = _loss(model, batch(name))
        loss.backward()
        result.append([loss.detach(), *(parameter.grad for parameter in _trained(model))])
    for got, expected in zip(*result, strict=True):
        torch.testing.assert_close(got, expected)


@every_method
def test_a_training_goes_on_from_saved_states(make, batch, tmp_path):
    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
        losses = []
        for step in range(first, first + 3):
            torch.manual_seed(step)
            loss = _loss(model, batch("llama"))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model = make().train()
    optimizer = torch.optim.AdamW(_trained(model), lr=1e-2)
    steps(model, optimizer, 0)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = steps(model, optimizer, 3)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = make().train()
    resumed.load_state_dict(state["model"])
    optimizer = torch.optim.AdamW(_trained(resumed), lr=1e-2)
    optimizer.load_state_dict(state["optimizer"])
    assert steps(resumed, optimizer, 3) == expected


@every_method
def test_copies_are_independent(make, batch):
    model = make().eval()
    with torch.no_grad():
        expected = model(**batch("llama")).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            assert torch.equal(other(**batch("llama")).logits, expected)
        optimizer = torch.optim.SGD(_trained(other), lr=1.0)
        _loss(other, batch("llama")).backward()
        optimizer.step()
        with torch.no_grad():
            assert not torch.equal(other(**batch("llama")).logits, expected)
            assert torch.equal(model(**batch("llama")).logits, expected)
        assert all(parameter.grad is None for parameter in model.parameters())


@every_method
def test_to_another_dtype(make, batch):
    model = make().eval()
    expected = model(**batch("llama")).logits
    wide = copy.deepcopy(model).to(torch.float64)
    got = wide(**batch("llama")).logits
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), expected, rtol=1e-4, atol=1e-5)


@every_method
def test_autocast(make, batch):
    model = make().eval()
    expected = model(**batch("llama")).logits
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**batch("llama")).logits
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.08 * expected.abs().max().item())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("method", "name"),
    [*((method, name) for method in _CONFIGS for name in ("llama", "bert")), ("dora", "llama"), ("adalora", "llama")],
)
def test_compiles_without_graph_breaks(make, batch, name, training):
    torch.compiler.reset()
    model = make(name).train(training)
    inputs = batch(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (model, compiled):
        torch.manual_seed(3)
        y = call(**inputs)[0]
        grads.append([y.detach(), *torch.autograd.grad(y.square().sum(), _trained(model), allow_unused=True)])
    for got, expected in zip(*grads, strict=True):
        if got is None or expected is None:  # BERT's pooler has no part in y
            assert all(tensor is None or not tensor.any() for tensor in (got, expected))
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class _Logits(nn.Module):
    """Tensors in and out, as an exported program has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)[0]


def test_exported(make, batch, method, tmp_path):
    model = _Logits(make("bert").eval())
    inputs = batch("bert")
    with torch.no_grad():
        program = torch.export.export(model, (inputs["input_ids"], inputs["attention_mask"]))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        tensors = (inputs["input_ids"], inputs["attention_mask"])
        torch.testing.assert_close(loaded(*tensors), model(*tensors))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    op = {"lora": "_lora_linear_forward", "ia3": "_ia3_linear_forward", "bottleneck": "_bottleneck_forward"}[method]
    assert any(op in name for name in called), called


@pytest.mark.parametrize(
    "config",
    [
        pyfused.AdaLoraConfig(init_r=4, target_r=2, total_step=9, init_lora_weights=False, target_modules=["query"]),
        pyfused.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
        pyfused.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
        pyfused.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3, prefix_projection=True),
        pyfused.LoraConfig(use_dora=True, init_lora_weights=False, target_modules=["query", "word_embeddings"]),
    ],
    ids=["adalora", "prompt", "prefix", "projected prefix", "dora and embeddings"],
)
@pytest.mark.filterwarnings("ignore:orth_reg_weight")
def test_other_methods_are_exported(build, batch, config):
    torch.manual_seed(1)
    model = _Logits(pyfused.get_peft_model(build("bert"), config).eval())
    tensors = tuple(batch("bert")[name] for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        program = torch.export.export(model, tensors)
        torch.testing.assert_close(program.module()(*tensors), model(*tensors))


@every_method
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_by_accelerate(make, batch, build, tmp_path, method, place):
    """Base weights that hooks bring in while a module is called: the base layers are called, so that the hooks run."""
    expected = make().eval()
    base = _offloaded(build("llama"), tmp_path if place == "disk" else None)
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    torch.manual_seed(1)
    model = pyfused.get_peft_model(base, _new_config(method)).eval()
    _take_over(model, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch("llama")).logits, expected(**batch("llama")).logits)


def _offloaded(model: nn.Module, folder: Path | None = None) -> nn.Module:
    """To the CPU's memory, or to a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder is None:
            return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
        return model


@every_method
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_with_its_adapter(make, batch, tmp_path, method, place):
    """The adapter's weights, too, come for the time of a call, and for saving."""
    model, inputs = make(), batch("llama")
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        by_row = model(**inputs, adapter_names=["default", "__base__"]).logits
    saved = pyfused.get_peft_model_state_dict(model)
    _offloaded(model, tmp_path / "weights" if place == "disk" else None)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.save_pretrained(tmp_path / "adapter")
    loaded = safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[key], saved[key]) for key in saved)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, adapter_names=["default", "__base__"]).logits, by_row)
        torch.testing.assert_close(model(**inputs).logits, expected)
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_offloaded_with_adapters_on_embeddings(build, batch):
    config = pyfused.LoraConfig(target_modules=["embed_tokens", "v_proj"], init_lora_weights=False)
    model = pyfused.get_peft_model(build("llama"), config).eval()
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        torch.testing.assert_close(_offloaded(model)(**batch("llama")).logits, expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_that_change_offloaded_weights_are_refused(build, init):
    base = _offloaded(build("llama"))
    with pytest.raises(NotImplementedError, match=f"init_lora_weights: '{init}' is not built for offloaded weights"):
        pyfused.get_peft_model(base, pyfused.LoraConfig(target_modules=["q_proj"], init_lora_weights=init))
    assert not any(isinstance(module, pyfused.nn.AdapterLayer) for module in base.modules())


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "adalora"])
def test_merging_into_offloaded_weights_is_refused(make, batch, build, method):
    """It would change nothing that lasts: the weights come anew for each call."""
    source = make()
    model = pyfused.get_peft_model(_offloaded(build("llama")), _new_config(method)).eval()
    _take_over(model, source)
    with torch.no_grad():
        expected = model(**batch("llama")).logits
        for merge in (model.merge_adapter, model.merge_and_unload):
            for safe_merge in (False, True):
                with pytest.raises(NotImplementedError, match="has no values, it is on the meta device"):
                    merge(safe_merge=safe_merge)
                assert torch.equal(model(**batch("llama")).logits, expected)


@every_method
def test_device_map(make, batch, build, tmp_path, method):
    """A base model that transformers has placed, with hooks on its modules, and an adapter put into it afterwards."""
    expected = make().eval()
    build("llama").save_pretrained(tmp_path)
    placed = type(build("llama")).from_pretrained(tmp_path, device_map={"": "cpu"})
    torch.manual_seed(1)
    model = pyfused.get_peft_model(placed, _new_config(method)).eval()
    _take_over(model, expected)
    torch.testing.assert_close(model(**batch("llama")).logits, expected(**batch("llama")).logits)


@every_method
def test_accelerator(make, batch):
    model = make().train()
    optimizer = torch.optim.SGD(_trained(model), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    before = [parameter.detach().clone() for parameter in _trained(model)]
    accelerator.backward(_loss(prepared, batch("llama")))
    optimizer.step()
    assert not any(torch.equal(old, new) for old, new in zip(before, _trained(model), strict=True))
    assert accelerator.unwrap_model(prepared) is model
    adapter = pyfused.get_peft_model_state_dict(model, accelerator.get_state_dict(prepared))
    assert adapter.keys() == pyfused.get_peft_model_state_dict(model).keys()
