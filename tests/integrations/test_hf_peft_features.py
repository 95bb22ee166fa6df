"""What HF PEFT does with a model, it does with a fused one: each feature runs on a fused model and its unfused twin."""

from __future__ import annotations

import copy
import io
import pickle

import peft
import pytest
import torch
from fused_pairs import assert_same, both
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from transformers.integrations import peft as transformers_peft

from pyfused import ops
from pyfused.integrations.hf_peft import fuse, unfuse

FUSED = {"lora_linear": 2}  # one forward of `two_linears`


def test_state_dict_and_tree_are_untouched(two_linears):
    model = two_linears()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    shown, kinds = repr(model), {name: type(module) for name, module in model.named_modules()}
    fuse(model)
    assert repr(model) == shown
    for name, module in model.named_modules():
        assert isinstance(module, kinds[name]) and type(module).__name__ == kinds[name].__name__
    after = model.state_dict()
    assert list(after) == list(before)
    for name, (pointer, old) in before.items():
        assert after[name].data_ptr() == pointer and torch.equal(after[name], old), name
    assert {name: id(module) for name, module in model.named_modules()} == modules


def test_unfuse_takes_everything_back(two_linears, x, calls):
    model = two_linears()
    layers = [model.base_model.model.up, model.base_model.model.down]
    expected = model(x)
    attributes = [set(vars(layer)) for layer in layers]
    fuse(model)
    assert all(type(layer) is not peft.tuners.lora.layer.Linear for layer in layers)
    model(x)
    assert calls == FUSED
    unfuse(model)
    assert all(type(layer) is peft.tuners.lora.layer.Linear for layer in layers)
    assert [set(vars(layer)) for layer in layers] == attributes
    assert torch.equal(model(x), expected) and calls == FUSED
    unfuse(model)


def test_fuse_twice_is_fuse_once(two_linears, x, calls):
    model = two_linears()
    first, second = fuse(model), fuse(model)
    assert first == second and len(first.fused) == 2
    model(x)
    assert calls == FUSED


def test_save_pretrained_writes_the_same_bytes(two_linears, tmp_path):
    model = two_linears()
    contents = []
    for step, action in enumerate((lambda model: None, fuse, unfuse)):
        action(model)
        model.save_pretrained(tmp_path / str(step))
        files = sorted(path.name for path in (tmp_path / str(step)).iterdir())
        contents.append({name: (tmp_path / str(step) / name).read_bytes() for name in files})
    assert "adapter_model.safetensors" in contents[0]
    assert contents[0] == contents[1] == contents[2]


def test_from_pretrained_then_fuse(two_linears, x, tmp_path, calls):
    model = two_linears()
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    fuse(loaded)
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert calls == FUSED
    loaded.load_adapter(tmp_path, "again", is_trainable=True)
    loaded.set_adapter("again")
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert calls["lora_linear"] == 4


def test_set_adapter(pair, x, calls):
    assert_same(pair, x)
    assert calls == FUSED
    both(pair, lambda model: model.set_adapter("second"))
    assert_same(pair, x)
    assert calls["lora_linear"] == 3, "the second adapter is in one of the two layers"
    both(pair, lambda model: model.set_adapter("default"))
    assert_same(pair, x)
    assert calls == {"lora_linear": 5}


@pytest.mark.parametrize("order", [["default", "second"], ["second", "default"]], ids="-".join)
def test_two_active_adapters(pair, order, x, calls):
    both(pair, lambda model: model.base_model.set_adapter(order))
    assert_same(pair, x)
    assert calls == {"lora_linear": 2, "lora_delta": 1}
    grads = []
    for model in pair:
        model(x).square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 6
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_disable_adapter(pair, x, calls):
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        assert torch.equal(pair[0](x), pair[1](x))
        assert not calls
    assert_same(pair, x)
    assert calls == FUSED


def test_merge_and_unmerge(pair, x, calls):
    both(pair, lambda model: model.merge_adapter())
    assert torch.equal(pair[0](x), pair[1](x)) and not calls
    both(pair, lambda model: model.unmerge_adapter())
    assert_same(pair, x)
    assert calls == FUSED


def test_disable_while_merged_unmerges(pair, x, calls):
    both(pair, lambda model: model.merge_adapter())
    with pair[0].disable_adapter(), pair[1].disable_adapter():
        assert torch.equal(pair[0](x), pair[1](x))
    assert_same(pair, x)
    assert calls == FUSED


def test_merge_and_unload(pair, x, calls):
    merged = [model.merge_and_unload() for model in pair]
    assert torch.equal(merged[0](x), merged[1](x)) and not calls
    assert {type(module) for module in merged[0].children()} == {nn.Linear}


def test_unload(pair, x):
    bases = [model.unload() for model in pair]
    assert torch.equal(bases[0](x), bases[1](x))
    assert {type(module) for module in bases[0].children()} == {nn.Linear}


def test_delete_adapter(pair, x, calls):
    both(pair, lambda model: model.set_adapter("second"))
    both(pair, lambda model: model.delete_adapter("default"))
    assert_same(pair, x)
    assert calls == {"lora_linear": 1}


def test_add_adapter_after_fuse(pair, lora_config, x, calls, twins):
    fused, eager = pair
    fused.add_adapter("third", lora_config(["up", "down"], r=4))
    eager.add_adapter("third", lora_config(["up", "down"], r=4))
    eager.load_state_dict(fused.state_dict())
    both(pair, lambda model: model.set_adapter("third"))
    assert_same(pair, x)
    assert calls == FUSED


def test_all_linear_finds_fused_layers(two_linears, lora_config):
    model = two_linears()
    fuse(model)
    model.add_adapter("second", lora_config("all-linear"))
    assert "second" in model.base_model.model.up.lora_A and "second" in model.base_model.model.down.lora_A


@pytest.mark.filterwarnings("ignore:aLoRA is currently only")
@pytest.mark.parametrize("options", [{"alora_invocation_tokens": [1, 2]}], ids=["alora"])
def test_adapter_of_another_kind_added_after_fuse(options, two_linears, lora_config, x, calls):
    """Such an adapter takes PEFT's forward while it is active, the plain one the op."""
    model = two_linears(targets=["up"])
    fuse(model)
    model.add_adapter("other", lora_config(["up"], **options))
    model.set_adapter("other")
    got = model(x)
    assert not calls
    unfuse(model)
    assert torch.equal(got, model(x))
    report = fuse(model)
    assert "'other'" in next(iter(report.notes.values()))
    model.set_adapter("default")
    model(x)
    assert calls == {"lora_linear": 1}


def test_mixed_batch(pair, x, calls):
    """One op for the adapters of a batch; PEFT's loop where one of them is more than A and B."""
    both(pair, lambda model: model.eval())
    names = ["default", "second", "__base__", "second", "default"]
    fused, eager = pair
    counts = dict.fromkeys(("multi_lora", "multi_lora_"), 0)

    def count(name: str, op):
        def call(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            patch.setattr(ops, name, count(name, getattr(ops, name)))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                torch.testing.assert_close(fused(x, adapter_names=names), eager(x, adapter_names=names))
        assert counts == {"multi_lora": 2, "multi_lora_": 2} and not calls
        results = []
        for model in pair:
            model.zero_grad()
            model.base_model.set_adapter(["default", "second"])
            model(x, adapter_names=names).square().sum().backward()
            results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert results[0] and results[0].keys() == results[1].keys()
        for name, grad in results[0].items():
            torch.testing.assert_close(grad, results[1][name], msg=name)
        both(pair, lambda model: model.base_model.set_adapter("default"))
        before = dict(counts)
        both(pair, lambda model: model.base_model.model.up.lora_A["second"].register_forward_hook(lambda *_: None))
        assert torch.equal(fused(x, adapter_names=names)[2], eager(x, adapter_names=names)[2])
        assert counts["multi_lora"] == before["multi_lora"] + 1  # the layer without the hook
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        fused(x, adapter_names=names[:2])
    fused.base_model.model.up._forward_pre_hooks.clear()  # PEFT leaves its hooks behind where the forward raised
    fused.base_model.model.down._forward_pre_hooks.clear()
    assert_same(pair, x)
    assert calls == FUSED


def test_scale_is_read_at_each_call(pair, x, calls):
    unscaled = pair[0](x)
    with rescale_adapter_scale(pair[0], 0.5), rescale_adapter_scale(pair[1], 0.5):
        assert_same(pair, x)
        assert not torch.allclose(pair[0](x), unscaled)
    both(pair, lambda model: model.base_model.model.up.set_scale("default", 3.0))
    assert_same(pair, x)
    assert calls["lora_linear"] == 8


def test_hotswap_with_tensor_scalings(two_linears, twins, x, tmp_path, calls):
    other = two_linears(r=4, lora_alpha=9)
    other.save_pretrained(tmp_path)
    pair = twins(two_linears())
    fuse(pair[0])
    both(pair, lambda model: prepare_model_for_compiled_hotswap(model, target_rank=8))
    assert isinstance(pair[0].base_model.model.up.scaling["default"], torch.Tensor)
    assert_same(pair, x)
    both(pair, lambda model: hotswap_adapter(model, tmp_path, adapter_name="default"))
    assert_same(pair, x)
    assert calls["lora_linear"] == 4


def test_input_casting_switched_off(two_linears, twins, calls):
    """Without PEFT's cast a bf16 input meets fp32 adapters; only PEFT's forward under autocast makes sense of that."""
    fused, eager = twins(two_linears(torch.bfloat16))
    fuse(fused)
    x = torch.randn(5, 20).bfloat16()
    with torch.autocast("cpu", torch.bfloat16), disable_input_dtype_casting(fused), disable_input_dtype_casting(eager):
        assert torch.equal(fused(x), eager(x)) and not calls


def test_injected_adapters(lora_config, two_linears, twins, x, calls):
    model = peft.inject_adapter_in_model(lora_config(["up", "down"]), two_linears().unload())
    pair = twins(model)
    assert fuse(pair[0]).fused == ["up", "down"]
    assert_same(pair, x)
    assert calls == FUSED


def test_transformers_add_adapter(hf_model, lora_config, twins, calls, monkeypatch):
    # transformers 5.24 asks for a peft that is later than the latest; what fuse meets is the same.
    monkeypatch.setattr(transformers_peft, "MIN_PEFT_VERSION", "0.18.0")
    model, inputs, _ = hf_model("llama")
    model = model.unload()
    model.add_adapter(lora_config(["q_proj", "v_proj"]))
    fused, eager = twins(model)
    assert len(fuse(fused).fused) == 4
    torch.testing.assert_close(fused(**inputs).logits, eager(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert calls == {"lora_linear": 4}
    fused.disable_adapters()
    fused(**inputs)
    assert calls == {"lora_linear": 4}


def test_generate(hf_model, twins, calls):
    model, inputs, layers = hf_model("llama")
    fused, eager = twins(model.eval())
    fuse(fused)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(**inputs, **options), eager.generate(**inputs, **options))
    assert calls["lora_linear"] >= 4 * layers and not calls["lora_delta"]


def test_deepcopy_is_independent(two_linears, x, calls):
    model = two_linears()
    fuse(model)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x)) and calls["lora_linear"] == 4
    before = model(x)
    with torch.no_grad():
        twin.base_model.model.up.lora_B["default"].weight.zero_()
    assert torch.equal(model(x), before) and not torch.equal(twin(x), before)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_whole_model_pickles(how, two_linears, x, calls):
    model = two_linears()
    fuse(model)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(model(x), loaded(x)) and calls["lora_linear"] == 4
