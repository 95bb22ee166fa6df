"""LoRA around convolutions: against the dense kernel, dilation, groups, merging, what is refused."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from torch import nn

from pyfused.nn import LoraConv

CONVS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0)), (2, 4, 9, 8)),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, bias=False), (2, 4, 9, 8)),
    "conv2d_1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 9, 8)),
    "conv2d_unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 5, 4, 3)),
}
OPTIONS = {"lora": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}
convs = pytest.mark.parametrize(("conv", "shape"), CONVS.values(), ids=CONVS)


def make(conv: nn.Module, **options) -> LoraConv:
    return LoraConv(conv, **({"r": 4, "lora_alpha": 7, "init_lora_weights": False} | options))


def dense(layer: LoraConv) -> nn.Module:
    """The base with the adapted kernel, in fp64."""
    conv = copy.deepcopy(layer.base_layer).double()
    a, b = (matrix.detach().double() for matrix in layer.matrices("default"))
    kernel = conv.weight.data + layer.scaling["default"] * (b @ a).view(conv.weight.shape)
    if layer.lora_magnitude_vector:
        norm = kernel.flatten(1).norm(dim=1)
        factor = layer.lora_magnitude_vector["default"].weight.detach().flatten().double() / norm
        kernel = kernel * factor.view(-1, *[1] * (kernel.dim() - 1))
    conv.weight.data = kernel
    if layer.lora_B["default"].bias is not None:
        extra = layer.scaling["default"] * layer.lora_B["default"].bias.detach().double()
        conv.bias = nn.Parameter(extra if conv.bias is None else conv.bias + extra)
    return conv


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@convs
def test_forward(conv, shape, options):
    layer, x = make(conv(), **options), torch.randn(shape)
    if layer.lora_magnitude_vector:
        layer.lora_magnitude_vector["default"].weight.data *= 1.3
    torch.testing.assert_close(layer(x).double(), dense(layer)(x.double()), rtol=1e-4, atol=1e-5)
    shapes = LoraConv.adapter_shapes(layer.base_layer, 4, **options)
    assert {name: tuple(tensor.shape) for name, tensor in layer.adapter_tensors("default").items()} == shapes


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@convs
def test_merging(conv, shape, options):
    if options.get("lora_bias") and conv().bias is None:
        pytest.skip("an adapter's bias cannot be merged into a layer that has none: test_errors")
    layer, x = make(conv(), **options), torch.randn(shape)
    before, y = layer.weight.clone(), layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)
    layer.unmerge()
    torch.testing.assert_close(layer.weight, before)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)


def test_fp32_adapter_on_a_bf16_base():
    for options in OPTIONS.values():
        layer = make(nn.Conv2d(4, 6, 3).bfloat16(), **options)
        x = torch.randn(2, 4, 9, 8).bfloat16()
        assert {parameter.dtype for parameter in layer.parameters() if parameter.requires_grad} == {torch.float32}
        y = layer(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), dense(layer)(x.double()), rtol=0.02, atol=0.02)


def test_groups():
    layer = make(nn.Conv2d(4, 6, 3, groups=2))
    assert layer(torch.randn(2, 4, 5, 5)).shape == (2, 6, 3, 3)
    assert tuple(layer.lora_A["default"].weight.shape) == (4, 4, 3, 3)
    assert tuple(layer.lora_B["default"].weight.shape) == (6, 2, 1, 1)
    with pytest.raises(NotImplementedError, match="merge: not built for a convolution with groups"):
        layer.merge()


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_of_dora(p):
    layer, x = (
        make(nn.Conv2d(4, 6, 3).double(), use_dora=True, lora_dropout=p).double(),
        torch.randn(2, 4, 5, 5).double(),
    )
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    assert len(trained) == 3

    def grads(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y.square().sum(), trained)

    torch.manual_seed(3)
    got = grads(layer(x))
    torch.manual_seed(3)
    base, a, b = layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]
    dropped = nn.functional.dropout(x, p)
    norm = layer._weight_matrix(base.weight).detach() + layer.scaling["default"] * (
        b.weight.flatten(1) @ a.weight.flatten(1)
    )
    g = layer.lora_magnitude_vector["default"].weight / norm.norm(dim=1).detach().view(1, -1, 1, 1)
    product = nn.functional.conv2d(dropped, base.weight)
    y = base(x) + (g - 1) * product + g * layer.scaling["default"] * b(a(dropped))
    for grad, exact in zip(got, grads(y), strict=True):
        torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize(
    ("conv", "options", "error", "message"),
    [
        (lambda: nn.ConvTranspose2d(4, 6, 3), {}, TypeError, "conv must be an nn.Conv1d, Conv2d or Conv3d, got ConvTr"),
        (lambda: nn.Linear(4, 6), {}, TypeError, "got Linear"),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), {"r": 3}, ValueError, "r must be a multiple of the groups, 2, got 3"),
        (lambda: nn.Conv2d(4, 6, 3), {"init_lora_weights": "olora"}, ValueError, "for the convolution, got 'olora'"),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), {"use_dora": True}, NotImplementedError, "use_dora: .*groups=2"),
        (lambda: nn.Conv2d(4, 6, 3, padding_mode="reflect"), {"use_dora": True}, NotImplementedError, "'reflect'"),
    ],
)
def test_errors(conv, options, error, message):
    with pytest.raises(error, match=message):
        make(conv(), **options)
    with pytest.raises(RuntimeError, match="impossible to merge adapter 'default', which has lora_bias"):
        make(nn.Conv2d(4, 6, 3, bias=False), lora_bias=True).merge()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_offloaded(options, training):
    """By accelerate, with its adapter: weights are there while the module that holds them is called."""
    conv, shape = CONVS["conv2d"]
    model, x = nn.Sequential(make(conv(), lora_dropout=0.3, **options)).train(training), torch.randn(shape)
    torch.manual_seed(1)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected)
