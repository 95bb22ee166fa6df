"""Bad arguments: the public op names the argument, what it expects and what it got; raw ops refuse and never crash."""

from __future__ import annotations

import re

import pytest
import torch
from bottleneck_cases import TENSORS, make_case
from helpers import DEVICE, seed_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfused.ops import bottleneck

# x [4, 7], w_down [3, 7], w_up [7, 3]
M, D, H = 4, 7, 3
RAW = torch.ops.pyfused
FLOATS = "must be float32, bfloat16, float16 or float64"

# (argument, bad value, exception, what the message says)
BAD = [
    ("x", None, TypeError, "x must be a tensor, got NoneType"),
    ("x", torch.ones(M, D, dtype=torch.int64), TypeError, f"x {FLOATS}, got torch.int64"),
    ("x", torch.tensor(1.0), ValueError, r"x must have shape \[..., D\], got a scalar"),
    ("x", torch.ones(M, D + 1), ValueError, rf"w_down must have shape \[H, {D + 1}\] .*got \[{H}, {D}\]"),
    ("residual", torch.ones(M, D + 1), ValueError, rf"residual must have shape \[{M}, {D}\], got \[{M}, {D + 1}\]"),
    ("residual", torch.ones(M, D).bfloat16(), TypeError, "residual must have x's dtype torch.float32"),
    ("residual", 1.0, TypeError, "residual must be a tensor, got float"),
    ("w_down", None, TypeError, "w_down must be a tensor, got NoneType"),
    ("w_down", torch.ones(0, D), ValueError, r"w_down must have shape \[H, 7\] with H >= 1"),
    ("w_down", torch.ones(D), ValueError, r"w_down must have shape"),
    ("w_down", torch.ones(H, D).double(), TypeError, "w_down must not be float64 where x is not"),
    ("w_down", torch.ones(H, D, device="meta"), TypeError, f"w_down must be on x's device {DEVICE}, got meta"),
    ("w_up", torch.ones(H, D), ValueError, rf"w_up must have shape \[{D}, {H}\], got \[{H}, {D}\]"),
    ("w_up", torch.ones(D, H, dtype=torch.bool), TypeError, f"w_up {FLOATS}, got torch.bool"),
    ("b_down", torch.ones(D), ValueError, rf"b_down must have shape \[{H}\], got \[{D}\]"),
    ("b_up", torch.ones(H), ValueError, rf"b_up must have shape \[{D}\], got \[{H}\]"),
    ("b_up", 0.0, TypeError, "b_up must be a tensor, got float"),
    ("activation", "softmax", ValueError, "activation must be one of linear, relu, .*got 'softmax'"),
    ("activation", torch.relu, TypeError, "activation must be a string"),
    ("scale", None, TypeError, r"scale must be a float or a tensor \[1\] or \[7\], got NoneType"),
    ("scale", torch.ones(2), ValueError, r"scale must be a float or have shape \[1\] or \[7\], got \[2\]"),
    ("scale", torch.ones(1, dtype=torch.int64), TypeError, "scale must be a float or a floating tensor"),
    ("scale", torch.ones(1, device="meta"), TypeError, f"scale must be on x's device {DEVICE}, got meta"),
    ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("dropout_p", None, TypeError, "dropout_p must be a float, got NoneType"),
    ("seed", 3, TypeError, "seed must be an int64 tensor with one element or None, got int"),
    ("seed", torch.tensor([3, 4]), ValueError, r"seed must have one element, got \[2\]"),
]


@pytest.mark.parametrize("seeded", [True, False], ids=["seeded", "seedless"])
@pytest.mark.parametrize("name, value, error, message", BAD)
def test_bad_argument(name, value, error, message, seeded):
    """Native checks and Python's, which run where a seed is given, say the same."""
    case = make_case(M, D, H, residual="other")
    good = {field: getattr(case, field) for field in TENSORS} | {"dropout_p": 0.1, "training": True}
    if seeded:
        good["seed"] = case.seed
    with pytest.raises(error, match=f"bottleneck: {message}" if "activation" not in message else message):
        bottleneck(**(good | {name: value}))


def raw_arguments(op: str) -> dict:
    case = make_case(M, D, H, residual="other", scale="channels")
    weights = {name: getattr(case, name) for name in ("w_down", "b_down", "w_up", "b_up")}
    rest = {"scale_vector": case.scale, "activation": 5, "scale": 1.0, "dropout_p": 0.1, "seed": case.seed}
    if op == "_bottleneck_forward":
        return {"x": case.x, "residual": case.residual} | weights | rest
    return {"grad_y": case.grad_y, "x": case.x} | weights | {"z": torch.randn(M, H)} | rest | {"needs": 127}


RAW_OPS = ["_bottleneck_forward", "_bottleneck_backward"]


@pytest.mark.parametrize("op", RAW_OPS)
def test_raw_ops_refuse_what_is_unsafe(op):
    """Called directly, without the public op's checks: RuntimeError that names the argument."""
    good = raw_arguments(op)
    getattr(RAW, op)(**good)
    for name, value in good.items():
        if not isinstance(value, torch.Tensor):
            continue
        bad = {
            "short": value[..., :-1],
            "long": torch.cat([value, value], -1),
            "scalar": torch.zeros((), dtype=value.dtype),
            "more dimensions": value[None, None].expand(2, 2, *value.shape),
            "integers": value.to(torch.int32),
            "complex": value.to(torch.complex64),
        }
        if name == "seed":
            bad = {"two": seed_tensor(1).repeat(2), "none": seed_tensor(1)[:0], "integers": bad["integers"]}
        if name in ("residual", "z"):
            bad["fewer rows"] = value[:-1]
        for what, tensor in bad.items():
            if name in ("x", "grad_y") and what == "more dimensions":
                tensor = tensor[..., :-1]
            with pytest.raises(RuntimeError, match=name):
                getattr(RAW, op)(**(good | {name: tensor}))
                pytest.fail(f"{op} took {name}: {what}")


@pytest.mark.parametrize("op", RAW_OPS)
@pytest.mark.parametrize("field, value", [("dropout_p", 1.0), ("dropout_p", float("nan")), ("activation", 7)])
def test_raw_ops_refuse_bad_numbers(op, field, value):
    with pytest.raises(RuntimeError, match=re.escape(field)):
        getattr(RAW, op)(**(raw_arguments(op) | {field: value}))


@pytest.mark.parametrize("op", RAW_OPS)
def test_raw_ops_refuse_a_missing_seed(op):
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor"):
        getattr(RAW, op)(**(raw_arguments(op) | {"seed": None}))


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64]


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any small tensor: dtype, shape, strides (0 and overlapping too), now and then another device or layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.sampled_from([0, 1, 2, M, D, H, 64]), max_size=3))
    kind = draw(st.sampled_from(["contiguous", "transposed", "expanded", "strided", "meta", "sparse", "no storage"]))
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "expanded":
        return torch.ones((), dtype=dtype).expand(shape)
    if kind == "strided":
        return torch.ones([2 * size for size in shape], dtype=dtype)[tuple(slice(None, None, 2) for _ in shape)]
    tensor = torch.ones(shape, dtype=dtype)
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "no storage":
        tensor.untyped_storage().resize_(0)
        return tensor
    return tensor.transpose(0, -1) if kind == "transposed" and tensor.dim() else tensor


@pytest.mark.parametrize("op", RAW_OPS)
def test_raw_ops_survive_anything(op):
    """A few arguments replaced by arbitrary ones: a result or an exception, never a crash."""
    good = raw_arguments(op)
    replaced = {
        name: st.one_of(tensors(), st.none()) for name, value in good.items() if isinstance(value, torch.Tensor)
    }
    replaced |= {"scale": st.floats(), "dropout_p": st.floats(), "activation": st.integers(-(2**63), 2**63 - 1)}
    if "needs" in good:
        replaced["needs"] = st.integers(-(2**63), 2**63 - 1)
    strategy = st.lists(st.sampled_from(sorted(replaced)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: replaced[name] for name in names})
    )

    @settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def fuzz(changes):
        try:
            getattr(RAW, op)(**(good | changes))
        except Exception:
            pass

    fuzz()
