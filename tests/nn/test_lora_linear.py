"""The module alone: state dict, fused or not, adapters by name, merging, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from helpers import DEVICE
from lora_layers import NOT_PLAIN, assert_near, expected, make
from torch import nn

from pyfused.nn import LoraLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_forward_is_fused(calls, dtype, bias):
    layer = make(base=nn.Linear(24, 20, bias=bias, dtype=dtype))
    x = torch.randn(2, 5, 24, dtype=dtype)
    y = layer(x)
    assert calls == ["lora_linear"]
    assert y.dtype == dtype and y.shape == (2, 5, 20)
    assert_near(y, expected(layer, x, "default"))


def test_state_dict_and_flags():
    layer = make()
    assert {key: tuple(value.shape) for key, value in layer.state_dict().items()} == {
        "base_layer.weight": (20, 24),
        "base_layer.bias": (20,),
        "lora_A.default.weight": (6, 24),
        "lora_B.default.weight": (20, 6),
    }
    assert {name for name, parameter in layer.named_parameters() if parameter.requires_grad} == {
        "lora_A.default.weight",
        "lora_B.default.weight",
    }
    assert (layer.in_features, layer.out_features) == (24, 20)
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias


def test_gradients():
    layer, x = make(torch.float64), torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    layer(x).square().sum().backward()
    got = [x.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
    assert layer.weight.grad is None and layer.bias.grad is None
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    for grad, exact in zip(got, torch.autograd.grad(expected(layer, x, "default").square().sum(), leaves), strict=True):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_initialisation(init):
    layer = LoraLinear(nn.Linear(512, 20), r=64, init_lora_weights=init)
    assert not layer.lora_B["default"].weight.any()
    std = 1 / math.sqrt(3 * 512) if init is True else 1 / 64  # Kaiming with a = sqrt(5) is uniform in +-1/sqrt(in)
    assert layer.lora_A["default"].weight.std().item() == pytest.approx(std, rel=0.02)
    x = torch.randn(3, 512)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 13 / 6), (True, 13 / math.sqrt(6))])
def test_scaling(rslora, scaling):
    layer, x = make(use_rslora=rslora), torch.randn(3, 24)
    assert layer.scaling == {"default": scaling}
    assert_near(layer(x), expected(layer, x, "default"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_bases_have_fp32_adapters(dtype):
    assert make(dtype).lora_A["default"].weight.dtype == torch.float32
    layer = make(dtype, autocast_adapter_dtype=False)
    assert layer.lora_A["default"].weight.dtype == layer.lora_B["default"].weight.dtype == dtype
    x = torch.randn(3, 24, dtype=dtype)
    assert_near(layer(x), expected(layer, x, "default"))


def test_training_mode_is_the_base_layers():
    layer = make(base=nn.Linear(24, 20).eval(), lora_dropout=0.5)
    x = torch.ones(4, 24)
    assert torch.equal(layer(x), layer(x))
    layer.add_adapter("second", lora_dropout=0.5)
    assert not any(module.training for module in layer.modules())
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.lora_dropout["default"].p = 0.0  # what trl's disable_dropout_in_model does
    assert torch.equal(layer(x), layer(x))


def test_meta_device():
    layer = make(base=nn.Linear(24, 20, device="meta"))
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert layer(torch.empty(3, 24, device="meta")).shape == (3, 20)


def test_wrong_input_dtype_is_torchs_error(calls):
    layer = make()
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="shape"):
        layer(torch.randn(3, 23))


def test_autocast(calls):
    layer, x = make(), torch.randn(3, 24)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = layer(x)
        assert calls == ["lora_linear"]
        layer.base_layer.register_forward_hook(lambda *args: None)
        other = layer(x)
    assert y.dtype == other.dtype == torch.bfloat16 and calls[1:] == ["lora_delta"]
    assert_near(y, expected(layer, x, "default"))
    assert_near(other, expected(layer, x, "default"))


def test_functional_call():
    layer, x = make(), torch.randn(3, 24)
    other = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    got = torch.func.functional_call(layer, other, (x,))
    layer.load_state_dict(other)
    torch.testing.assert_close(got, layer(x))


# Adapters by name -----------------------------------------------------------------------------------------------------


def trainable(layer: LoraLinear) -> set[str]:
    return {name.split(".")[1] for name, parameter in layer.named_parameters() if parameter.requires_grad}


def test_switching(two, calls):
    x = torch.randn(4, 24)
    assert two.active_adapters == ["default"] and trainable(two) == {"default"}
    for names in (["default"], ["second"], ["default", "second"], ["second", "default"]):
        calls.clear()
        two.set_adapter(names)
        assert_near(two(x), expected(two, x, *names))
        assert calls == ["lora_linear", "lora_delta"][: len(names)]
        assert trainable(two) == set(names) and two.active_adapters == names
    two.set_adapter("second", inference_mode=True)
    assert_near(two(x), expected(two, x, "second"))
    assert trainable(two) == set()
    for names in ([], ["elsewhere"]):
        two.set_adapter(names)
        assert torch.equal(two(x), two.base_layer(x))
    two.set_adapter(["elsewhere", "second"])
    assert_near(two(x), expected(two, x, "second"))


def test_disabling(two):
    x = torch.randn(4, 24)
    two.enable_adapters(False)
    two.enable_adapters(False)
    two.set_adapter("second")
    assert torch.equal(two(x), two.base_layer(x)) and two.disable_adapters
    two.enable_adapters(True)
    assert_near(two(x), expected(two, x, "second"))


def test_deleting(two):
    x = torch.randn(4, 24)
    two.delete_adapter("default")
    assert two.active_adapters == ["second"] and trainable(two) == {"second"}
    assert_near(two(x), expected(two, x, "second"))
    assert not any("default" in key for key in two.state_dict())
    two.delete_adapter("second")
    assert two.active_adapters == [] and torch.equal(two(x), two.base_layer(x))
    two.delete_adapter("never there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(dtype, safe_merge):
    layer = make(dtype)
    layer.add_adapter("second", r=3, lora_alpha=7, init_lora_weights=False)
    layer.set_adapter(["default", "second"])
    weight, x = layer.weight.detach().clone(), torch.randn(4, 24, dtype=dtype)
    exact = expected(layer, x, "default", "second")
    layer.merge(safe_merge)
    assert layer.merged and layer.merged_adapters == ["default", "second"]
    assert_near(layer(x), exact) if dtype != torch.bfloat16 else torch.testing.assert_close(
        layer(x).double(), exact, rtol=0.02, atol=0.02 * exact.abs().max().item()
    )
    sums = weight.double() + layer.delta_weight("default").double() + layer.delta_weight("second").double()
    ulp = torch.finfo(dtype).eps * sums.abs().max().item()
    assert (layer.weight.double() - sums).abs().max() <= 2 * ulp
    layer.unmerge()
    assert not layer.merged
    assert (layer.weight.double() - weight.double()).abs().max() <= 4 * ulp


def test_merging_some(two):
    x = torch.randn(4, 24)
    two.merge(adapter_names=["second", "second", "elsewhere"])
    assert two.merged_adapters == ["second"]
    with pytest.raises(ValueError, match="'second' is merged"):
        two.delete_adapter("second")
    with pytest.warns(UserWarning, match="additionally merging default"):
        two.merge(adapter_names=["second", "default"])
    with pytest.warns(UserWarning, match="already merged"):
        two.merge()
    both = two(x)
    two.unmerge()
    assert_near(both, expected(two, x, "default", "second"))
    with pytest.warns(UserWarning, match="Already unmerged"):
        two.unmerge()
    with pytest.raises(TypeError, match="got the string 'second'"):
        two.merge(adapter_names="second")


def test_disabling_takes_merged_adapters_out(two):
    x = torch.randn(4, 24)
    base = two.base_layer(x)
    two.merge()
    merged = two(x)
    two.enable_adapters(False)
    torch.testing.assert_close(two(x), base)
    with pytest.raises(ValueError, match="adapters are disabled"):
        two.merge()
    two.enable_adapters(True)
    assert two.merged_adapters == ["default"]
    torch.testing.assert_close(two(x), merged)


def test_safe_merge_keeps_the_weight(two):
    two.lora_B["second"].weight.data[3, 1] = float("nan")
    before = two.weight.detach().clone()
    with pytest.raises(ValueError, match="adapter 'second' is not finite"):
        two.merge(safe_merge=True, adapter_names=["default", "second"])
    assert torch.equal(two.weight, before) and not two.merged


@pytest.mark.parametrize("kind", ["parametrized", "weight_subclass"])
def test_weights_that_cannot_be_merged_into(kind):
    layer = make(base=NOT_PLAIN[kind]())
    with pytest.raises(NotImplementedError, match="merge: the base weight must be a plain floating-point tensor"):
        layer.merge()


def test_copies_are_independent(two):
    other, x = copy.deepcopy(two), torch.randn(4, 24)
    other.set_adapter("second")
    assert_near(two(x), expected(two, x, "default"))
    assert_near(other(x), expected(two, x, "second"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": -1}, ValueError, "r must be at least 1, got -1"),
        ({"r": 1.5}, TypeError, "r must be an integer, got 1.5"),
        ({"lora_dropout": 1}, ValueError, r"lora_dropout must be in \[0, 1\), got 1"),
        ({"lora_dropout": -0.5}, ValueError, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_alpha": None}, TypeError, "lora_alpha must be a number, got None"),
        ({"use_dora": True, "lora_bias": True}, ValueError, "lora_bias: DoRA has none"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, ValueError, "lora_bias needs .*got 'gaussian'"),
        ({"init_lora_weights": "pissa_niter_4", "r": 30}, ValueError, "'pissa_niter_4' needs r of at most .*got r=30"),
        ({"init_lora_weights": "loftq"}, NotImplementedError, "'loftq' is not built"),
        ({"init_lora_weights": "Gauss"}, ValueError, "got 'Gauss'"),
        ({"adapter_name": "a.b"}, ValueError, "got 'a.b'"),
        ({"adapter_name": "values"}, ValueError, "got 'values'"),
        ({"adapter_name": 1}, TypeError, "must be a string, got int"),
    ],
)
def test_wrong_arguments(options, error, message):
    linear = nn.Linear(3, 3)
    with pytest.raises(error, match=message):
        LoraLinear(linear, **options)
    assert all(parameter.requires_grad for parameter in linear.parameters())
    layer = make()
    keys = list(layer.state_dict())
    name = options.pop("adapter_name", "other")
    with pytest.raises(error, match=message):
        layer.add_adapter(name, **options)
    assert list(layer.state_dict()) == keys and list(layer.r) == ["default"]


def test_wrong_modules():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Embedding"):
        LoraLinear(nn.Embedding(3, 3))
    with pytest.raises(ValueError, match="already has an adapter 'default'"):
        make().add_adapter("default")


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_compile_without_graph_breaks(p):
    layer, x = make(lora_dropout=p).train(), torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (layer, compiled):
        torch.manual_seed(1)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), [p for p in layer.parameters() if p.requires_grad])))
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)


def test_no_warnings_on_the_usual_path():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make(lora_dropout=0.1)
        layer(torch.randn(3, 24)).sum().backward()
        layer.merge()
        layer.unmerge()
