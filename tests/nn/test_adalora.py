"""``AdaLoraLinear`` as a module: the formula, which op runs, pruned ranks in evaluation and training, copies."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE
from lora_layers import NOT_PLAIN, Widening, assert_near, count_calls
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pyfused import ops
from pyfused.nn import AdaLoraLinear

BASES = {"linear": lambda: nn.Linear(24, 20), "conv1d": lambda: Conv1D(20, 24)}


def make(base: nn.Module | None = None, **options) -> AdaLoraLinear:
    base = nn.Linear(24, 20) if base is None else base
    return AdaLoraLinear(base, **({"init_r": 6, "lora_alpha": 13, "init_lora_weights": False} | options))


def expected(layer: AdaLoraLinear, x: Tensor, *names: str) -> Tensor:
    """The formula in fp64, without dropout."""
    weight = layer.weight.double()
    y = F.linear(x.double(), weight.T if isinstance(layer.base_layer, Conv1D) else weight)
    y = y if layer.bias is None else y + layer.bias.double()
    for name in names:
        a, b, e = (parameters[name].double() for parameters in (layer.lora_A, layer.lora_B, layer.lora_E))
        y = y + x.double() @ (a * e).T @ b.T * layer.scaling[name] / (layer.ranknum[name].double() + 1e-5)
    return y


@pytest.fixture
def calls(monkeypatch):
    return count_calls(monkeypatch)


@pytest.fixture
def ranks(monkeypatch) -> list[int]:
    """The rank of every call of an op."""
    seen: list[int] = []

    def recorded(op, place):
        def call(*args, **kwargs):
            seen.append(args[place].shape[0])
            return op(*args, **kwargs)

        return call

    monkeypatch.setattr(ops, "lora_linear", recorded(ops.lora_linear, 3))
    monkeypatch.setattr(ops, "lora_delta", recorded(ops.lora_delta, 2))
    return seen


def zero(layer: AdaLoraLinear, *pruned: int, name: str = "default") -> list[bool]:
    """E of these ranks is set to 0; which the others are."""
    with torch.no_grad():
        layer.lora_E[name][list(pruned)] = 0.0
    return [rank not in pruned for rank in range(layer.r[name])]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_formula_and_trainable_parameters(calls, base, training):
    layer, x = make(BASES[base]()).train(training), torch.randn(2, 5, 24)
    y = layer(x)
    assert_near(y, expected(layer, x, "default"))
    y.sum().backward()
    with_gradient = [name for name, parameter in layer.named_parameters() if parameter.grad is not None]
    assert with_gradient == ["lora_A.default", "lora_B.default", "lora_E.default"]
    assert calls == {"lora_linear": 1}
    with torch.no_grad():
        torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_those_of_the_formula(base):
    layer, x = make(BASES[base]()).double(), torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    weights = torch.randn(7, 20, dtype=torch.float64)
    got = torch.autograd.grad((layer(x) * weights).sum(), parameters)
    exact = torch.autograd.grad((expected(layer, x, "default") * weights).sum(), parameters)
    for one, other in zip(got, exact, strict=True):
        assert_near(one, other)


def test_starts_as_nothing():
    layer, x = make(init_lora_weights=True), torch.randn(5, 24)
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    assert layer.ranknum["default"].item() == 6.0 and not layer.ranknum["default"].requires_grad
    assert make(lora_alpha=0).scaling == {"default": 6.0}


@pytest.mark.parametrize("base", NOT_PLAIN)
def test_bases_that_have_to_be_called(calls, base):
    layer, x = make(NOT_PLAIN[base]()), torch.randn(5, 24)
    assert_near(layer(x).as_subclass(Tensor), expected(layer, x, "default").as_subclass(Tensor))
    assert calls == {"lora_delta": 1}


def test_a_base_that_widens():
    layer, x = make(Widening(24, 20)), torch.randn(5, 24, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.float32
    assert_near(layer(x), expected(layer, x, "default"))


def test_several_adapters(calls):
    layer, x = make(), torch.randn(5, 24)
    layer.add_adapter("second", init_r=3, init_lora_weights=False)
    assert layer.r == {"default": 6, "second": 3} and not layer.lora_E["second"].requires_grad
    layer.set_adapter(["second", "default"])
    assert_near(layer(x), expected(layer, x, "default", "second"))
    layer(x).sum().backward()
    assert all(entry.grad is not None for name in ("lora_A", "lora_E") for entry in getattr(layer, name).values())
    assert all(not ranknum.requires_grad for ranknum in layer.ranknum.values())
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    layer.delete_adapter("second")
    assert_near(layer(x), expected(layer, x, "default"))
    assert calls == {"lora_linear": 3, "lora_delta": 2}


@pytest.mark.parametrize("base", BASES)
def test_merging(calls, base):
    layer, x = make(BASES[base]()), torch.randn(5, 24)
    layer.add_adapter("second", init_r=3, init_lora_weights=False)
    exact, before = expected(layer, x, "default", "second"), layer.weight.clone()
    layer.merge(adapter_names=["default", "second"])
    y = layer(x)
    assert not calls
    layer.unmerge()
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.weight, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_dtypes(dtype, autocast_adapter_dtype):
    layer = make(nn.Linear(24, 20).to(dtype), autocast_adapter_dtype=autocast_adapter_dtype)
    for name in layer.containers:
        parameter = getattr(layer, name)["default"]
        assert parameter.dtype == (torch.float32 if autocast_adapter_dtype else dtype)
        assert torch.equal(parameter.to(dtype).to(parameter.dtype), parameter), "rounded to the base's dtype"
    x = torch.randn(5, 24, dtype=dtype)
    for model in (layer, layer.eval()):
        with torch.no_grad():
            y = model(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected(layer, x, "default"), rtol=2e-2, atol=5e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(5, 24))


def test_autocast():
    layer, x = make(), torch.randn(5, 24)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected(layer, x, "default"), rtol=3e-2, atol=5e-2)


def test_dropout_drops_in_training_only():
    layer, x = make(lora_dropout=0.5), torch.randn(400, 24)
    mean = torch.stack([layer(x) for _ in range(50)]).double().mean(0)
    delta = expected(layer, x, "default") - expected(layer, x)
    assert not torch.equal(layer(x), layer(x))
    assert (mean - expected(layer, x, "default")).norm() < 0.2 * delta.norm()
    assert_near(layer.eval()(x), expected(layer, x, "default"))


def test_a_dropout_with_hooks_is_called():
    layer, x, called = make(lora_dropout=0.5).eval(), torch.randn(5, 24), []
    layer.lora_dropout["default"].register_forward_hook(lambda *args: called.append(1))
    assert_near(layer(x), expected(layer, x, "default"))
    assert called == [1]


class TestPrunedRanks:
    """Ranks whose E is 0."""

    def test_evaluation_leaves_them_out(self, ranks):
        layer, x = make().eval(), torch.randn(5, 24)
        zero(layer, 1, 4)
        with torch.no_grad():
            for _ in range(2):
                assert_near(layer(x), expected(layer, x, "default"))
        layer.requires_grad_(False)
        assert_near(layer(x), expected(layer, x, "default"))
        assert ranks == [4, 4, 4]

    def test_none_is_left(self, ranks):
        layer, x = make().eval().requires_grad_(False), torch.randn(5, 24)
        zero(layer, *range(6))
        assert torch.equal(layer(x), layer.base_layer(x)) and not ranks

    def test_training_computes_them(self, ranks):
        layer, x = make(), torch.randn(5, 24)
        zero(layer, 1, 4)
        with torch.no_grad():  # as reentrant checkpointing does in training
            layer(x)
        layer(x).sum().backward()
        layer.eval()(x)  # with gradients
        assert ranks == [6, 6, 6]
        assert layer.lora_E["default"].grad.abs().min() > 0.0

    @pytest.mark.parametrize("change", ["lora_A", "lora_B", "lora_E", "ranknum", "scaling", "data", "dtype"])
    def test_a_change_is_seen(self, change):
        layer, x = make().eval().requires_grad_(False), torch.randn(5, 24)
        zero(layer, 1, 4)
        layer(x)
        if change == "scaling":
            layer.scaling["default"] *= 2
        elif change == "data":
            layer.lora_A["default"].data = torch.randn(6, 24)
        elif change == "dtype":
            layer.to(torch.bfloat16).to(torch.float32)
        else:
            parameter = getattr(layer, change)["default"]
            parameter.copy_(torch.randn_like(parameter).abs() + 1.0)
        assert_near(layer(x), expected(layer, x, "default"))

    def test_changes_behind_autograds_back_are_seen_at_eval(self):
        layer, x = make().eval().requires_grad_(False), torch.randn(5, 24)
        layer(x)
        layer.lora_A["default"].data.mul_(3.0)
        layer.eval()
        assert_near(layer(x), expected(layer, x, "default"))

    def test_inference_mode(self):
        layer, x = make().eval(), torch.randn(5, 24)
        zero(layer, 2)
        with torch.inference_mode():
            assert_near(layer(x), expected(layer, x, "default"))
            inner = make().eval()
            assert_near(inner(x), expected(inner, x, "default"))

    @pytest.mark.parametrize("pruned", [(1, 4), (), tuple(range(6))], ids=["some", "none", "all"])
    def test_pruned_for_good(self, ranks, pruned):
        layer, x = make(), torch.randn(5, 24, requires_grad=True)
        layer.prune("default", zero(layer, *pruned))
        y = layer(x)
        assert_near(y, expected(layer, x, "default"))
        y.sum().backward()
        left = 6 - len(pruned)
        assert ranks == [max(left, 1)]
        for name, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            grad = getattr(layer, name)["default"].grad
            assert grad.index_select(dim, torch.tensor(pruned, dtype=torch.int64)).abs().sum() == 0.0
            assert left == 0 or grad.abs().sum() > 0.0
        layer.prune("default", None)
        layer(x)
        assert ranks[-1] == 6

    def test_removing_them(self):
        layer, x = make().eval(), torch.randn(5, 24)
        kept, y = zero(layer, 0, 3, 5), layer(x)
        layer.prune("default", kept)
        layer.keep_ranks("default", kept)
        assert layer.ranks == {"default": [False, True, True, False, True, False]}
        assert layer.r == {"default": 3} and layer.ranknum["default"].item() == 6.0
        assert all(parameter.requires_grad for parameter in (layer.lora_A["default"], layer.lora_E["default"]))
        torch.testing.assert_close(layer(x), y)
        layer.keep_ranks("default", [False] * 3)
        assert torch.equal(layer(x), layer.base_layer(x))
        layer.merge()
        assert layer.ranks == {"default": [False] * 6}
        with pytest.raises(ValueError, match="kept must have 0 entries, one for each rank, got 2"):
            layer.keep_ranks("default", [True] * 2)

    def test_copies_and_pickles(self, ranks):
        layer, x = make().eval(), torch.randn(5, 24)
        layer.prune("default", zero(layer, 1))
        with torch.no_grad():
            y = layer(x)
            for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
                assert torch.equal(other(x), y)
                other.lora_A["default"].zero_()
                assert torch.equal(layer(x), y)
                assert_near(other(x), expected(other, x, "default"))
                other.train()(x)
        assert set(ranks) == {5}


@pytest.mark.parametrize("mode", ["train", "pruned", "eval"])
def test_compiles(mode):
    layer, x = make(), torch.randn(5, 24)
    layer.add_adapter("second", init_r=3, init_lora_weights=False)
    layer.set_adapter(["default", "second"])
    kept = zero(layer, 1, 2)
    if mode == "pruned":
        layer.prune("default", kept)
    compiled = torch.compile(layer.train(mode != "eval"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_initial_ranks_without_any():
    layer, x = make(init_r=0), torch.randn(5, 24)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()(torch.randn(2, 24)).sum().backward()


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda: make(nn.Conv2d(1, 1, 1)), TypeError, "linear must be an nn.Linear or .*Conv1D, got Conv2d"),
        (lambda: make(init_r=-1), ValueError, "init_r must be at least 0, got -1"),
        (lambda: make(init_r=2.0), TypeError, "init_r must be an integer, got 2.0"),
        (lambda: make(ranks=[True]), ValueError, r"ranks must be None or init_r = 6 bools, got \[True\]"),
        (lambda: make(lora_alpha="8"), TypeError, "lora_alpha must be a number, got '8'"),
        (lambda: make(lora_dropout=1.0), ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        (lambda: make(adapter_name="a.b"), ValueError, "adapter_name must not .* hold a dot"),
        (lambda: make().add_adapter("default"), ValueError, "already has an adapter 'default'"),
    ],
)
def test_errors(function, error, message):
    with pytest.raises(error, match=message):
        function()
