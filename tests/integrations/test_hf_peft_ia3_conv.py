"""``fuse`` on HF PEFT's IA3 layers on convolutions."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import Tensor, nn

from pyfused import ops
from pyfused.integrations.hf_peft import fuse, unfuse

by_kind = pytest.mark.parametrize("kind", [nn.Conv2d, nn.Conv3d], ids=["2d", "3d"])


@pytest.fixture
def scaled(monkeypatch) -> list[int]:
    """The dimension of each call of the op."""
    dims: list[int] = []
    op = ops.ia3_scale

    def call(x, scale, dim=-1):
        dims.append(dim)
        return op(x, scale, dim)

    monkeypatch.setattr(ops, "ia3_scale", call)
    return dims


class Net(nn.Module):
    """A convolution scaled behind, and one in groups scaled before."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.up = kind(3, 8, 3, padding=1)
        self.down = kind(8, 6, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def config(*targets: str) -> peft.IA3Config:
    options = {"feedforward_modules": [name for name in targets if name == "down"], "init_ia3_weights": False}
    return peft.IA3Config(target_modules=list(targets), **options)


def pair(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The same model twice, fused and as PEFT made it."""
    torch.manual_seed(0)
    eager = peft.get_peft_model(Net(kind).to(dtype), config("up", "down"))
    fused = copy.deepcopy(eager)
    report = fuse(fused)
    assert len(report.fused) == 2 and not report.skipped
    assert all("it is called" in note for note in report.notes.values())
    return fused, eager


def x_for(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, *[5] * (2 if kind is nn.Conv2d else 3), generator=generator).to(dtype)


def run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of the vectors."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).view(y.shape)
    (y.double() * weights).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@by_kind
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "one sample"])
def test_results_and_gradients(kind, layout, scaled):
    fused, eager = pair(kind)
    x = x_for(kind)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last if kind is nn.Conv2d else torch.channels_last_3d)
    x = x[0] if layout == "one sample" else x
    got, expected = run(fused, x), run(eager, x)
    # PEFT's first layer makes a batch of one sample
    assert scaled == [-3 if kind is nn.Conv2d else -4] * (1 if layout == "one sample" else 2)
    assert len(got) == len(expected) == 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@by_kind
def test_fp32_vectors_on_a_bf16_base(kind, scaled):
    fused, eager = pair(kind, torch.bfloat16)
    x = x_for(kind, torch.bfloat16)
    exact = run(copy.deepcopy(eager).double(), x.double())
    got, expected = run(fused, x), run(eager, x)
    assert len(scaled) == 2 and got[0].dtype == torch.bfloat16
    for one, other, value in zip(got, expected, exact, strict=True):
        assert one.dtype == other.dtype
        errors = [(result.double() - value).norm() for result in (one, other)]
        assert errors[0] <= 2 * errors[1] + 0.01 * value.norm()


def test_autocast_gives_the_dtype_of_x(scaled):
    fused, eager = pair(nn.Conv2d)
    x = x_for(nn.Conv2d)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fused(x), eager(x)
    assert len(scaled) == 2 and got.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)


@by_kind
def test_what_stays_pefts(kind, scaled, tmp_path):
    fused, eager = pair(kind)
    x = x_for(kind)
    for model in (fused, eager):
        torch.manual_seed(2)
        model.add_adapter("second", config("up"))
        model.base_model.set_adapter(["default", "second"])
    for one, other in zip(run(fused, x), run(eager, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(scaled) == 2
    both = fused(x)
    scaled.clear()
    with fused.disable_adapter(), eager.disable_adapter():
        assert torch.equal(fused(x), eager(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unmerging may be inexact
        fused.base_model.merge_adapter()
        torch.testing.assert_close(fused(x), both, rtol=1e-4, atol=1e-4)
        assert scaled == []
        fused.base_model.unmerge_adapter()
    torch.testing.assert_close(fused(x), both, rtol=1e-4, atol=1e-4)
    assert len(scaled) == 2
    fused.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(Net(kind), tmp_path)
    assert torch.equal(again.base_model.model.up.ia3_l["default"], eager.base_model.model.up.ia3_l["default"])
    assert list(fused.state_dict()) == list(eager.state_dict())
    unfuse(fused)
    assert not any(type(module).__module__.startswith("pyfused") for module in fused.modules())
    torch.testing.assert_close(fused(x), both, rtol=1e-4, atol=1e-4)
    assert len(scaled) == 2


@pytest.mark.parametrize("size", [(2, 4, 5, 5), (5, 5)], ids=["channels", "dimensions"])
def test_an_x_that_does_not_fit_is_refused_as_by_hf_peft(size):
    messages = []
    for model in pair(nn.Conv2d):
        with pytest.raises(RuntimeError) as error:
            model(torch.randn(size))
        messages.append(str(error.value))
    assert messages[0] == messages[1]
