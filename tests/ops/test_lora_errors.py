"""Bad arguments: public ops name the argument, what they expect and what they got; raw ops refuse and never crash."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import DEVICE, make_case, seed_tensor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyfused.ops import lora_delta, lora_linear

# x [4, 7], weight [6, 7], a [3, 7], b [6, 3]
M, N, K, R = 4, 6, 7, 3
RAW = torch.ops.pyfused


def arguments(op) -> dict:
    case = make_case(M, N, K, R)
    shared = {
        "x": case.x,
        "a": case.a,
        "b": case.b,
        "scale": 1.5,
        "dropout_p": 0.1,
        "training": True,
        "seed": case.seed,
    }
    return shared | ({"weight": case.weight, "bias": case.bias} if op is lora_linear else {"y": case.grad_y})


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


# (argument, bad value, exception, what the message says)
BAD = [
    ("x", None, TypeError, "x must be a tensor, got NoneType"),
    ("x", [[1.0] * K], TypeError, "x must be a tensor, got list"),
    (
        "x",
        torch.ones(M, K, dtype=torch.int64),
        TypeError,
        "x must be float32, bfloat16, float16 or float64, got torch.int64",
    ),
    ("x", torch.ones(M, K, dtype=torch.complex64), TypeError, "x must be float32, .*got torch.complex64"),
    ("x", torch.tensor(1.0), ValueError, r"x must have shape \[..., K\], got a scalar"),
    (
        "x",
        torch.ones(M, K + 1),
        ValueError,
        rf"a must have shape \[R, {K + 1}\] \(x is \[{M}, {K + 1}\]\), got \[{R}, {K}\]",
    ),
    ("a", None, TypeError, "a must be a tensor, got NoneType"),
    ("a", torch.ones(R, K, dtype=torch.bool), TypeError, "a must be float32, .*got torch.bool"),
    (
        "a",
        torch.ones(R, K, dtype=torch.float64),
        TypeError,
        "a can be float64 only with a float64 x, got x of torch.float32",
    ),
    ("a", meta(R, K), TypeError, f"a must be on x's device {DEVICE}, got meta"),
    ("a", torch.ones(0, K), ValueError, r"a must have shape \[R, K\] with R >= 1, got \[0, 7\]"),
    ("a", torch.ones(K), ValueError, rf"a must have shape \[R, {K}\].*got \[{K}\]"),
    ("a", torch.ones(1, R, K), ValueError, rf"a must have shape .*got \[1, {R}, {K}\]"),
    ("a", torch.ones(K, R), ValueError, rf"a must have shape .*got \[{K}, {R}\]"),
    ("b", None, TypeError, "b must be a tensor, got NoneType"),
    ("b", torch.ones(N, R, dtype=torch.int8), TypeError, "b must be float32, .*got torch.int8"),
    ("b", torch.ones(N, R, dtype=torch.float64), TypeError, "b can be float64 only with a float64 x"),
    ("b", meta(N, R), TypeError, f"b must be on x's device {DEVICE}, got meta"),
    (
        "b",
        torch.ones(N, R + 1),
        ValueError,
        rf"b must have shape \[N, {R}\] \(a is \[{R}, {K}\]\), got \[{N}, {R + 1}\]",
    ),
    ("b", torch.ones(N), ValueError, rf"b must have shape \[N, {R}\].*got \[{N}\]"),
    ("scale", None, TypeError, "scale must be a float or a tensor.*got NoneType"),
    ("scale", "1", TypeError, "scale must be a float or a tensor.*got str"),
    (
        "scale",
        torch.ones(R, dtype=torch.int64),
        TypeError,
        "scale must be a float or a floating tensor.*got torch.int64",
    ),
    ("scale", torch.ones(R, dtype=torch.float64), TypeError, "scale must be .*fits x.*got torch.float64"),
    ("scale", meta(R), TypeError, f"scale must be on x's device {DEVICE}, got meta"),
    ("scale", torch.ones(R + 1), ValueError, rf"scale must be a float or have shape \[{R}\], got \[{R + 1}\]"),
    ("scale", torch.tensor(1.0), ValueError, rf"scale must be a float or have shape \[{R}\], got \[\]"),
    ("dropout_p", None, TypeError, "dropout_p must be a float, got NoneType"),
    ("dropout_p", torch.tensor(0.5), TypeError, "dropout_p must be a float, got Tensor"),
    ("dropout_p", 1.0, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    ("dropout_p", -0.1, ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    ("dropout_p", float("nan"), ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    ("seed", 3, TypeError, "seed must be an int64 tensor with one element or None, got int"),
    (
        "seed",
        torch.tensor([3.0]),
        TypeError,
        "seed must be an int64 tensor with one element or None, got torch.float32",
    ),
    ("seed", torch.tensor([3, 4]), ValueError, r"seed must have one element, got \[2\]"),
    ("seed", torch.tensor([], dtype=torch.int64), ValueError, r"seed must have one element, got \[0\]"),
    (
        "seed",
        torch.zeros(1, dtype=torch.int64, device="meta"),
        TypeError,
        f"seed must be on x's device {DEVICE}, got meta",
    ),
]
BAD_BASE = [
    ("weight", None, TypeError, "weight must be a tensor, got NoneType"),
    (
        "weight",
        torch.ones(N, K, dtype=torch.bfloat16),
        TypeError,
        "weight must have x's dtype torch.float32, got torch.bfloat16",
    ),
    ("weight", meta(N, K), TypeError, f"weight must be on x's device {DEVICE}, got meta"),
    ("weight", torch.ones(K, N), ValueError, rf"weight must have shape \[{N}, {K}\], got \[{K}, {N}\]"),
    ("weight", torch.ones(N * K), ValueError, rf"weight must have shape \[{N}, {K}\], got \[{N * K}\]"),
    ("bias", 1.0, TypeError, "bias must be a tensor, got float"),
    (
        "bias",
        torch.ones(N, dtype=torch.float16),
        TypeError,
        "bias must have x's dtype torch.float32, got torch.float16",
    ),
    ("bias", meta(N), TypeError, f"bias must be on x's device {DEVICE}, got meta"),
    ("bias", torch.ones(N + 1), ValueError, rf"bias must have shape \[{N}\], got \[{N + 1}\]"),
    ("bias", torch.ones(1, N), ValueError, rf"bias must have shape \[{N}\], got \[1, {N}\]"),
]
BAD_OUTPUT = [
    ("y", None, TypeError, "y must be a tensor, got NoneType"),
    ("y", torch.ones(M, N, dtype=torch.float16), TypeError, "y must have x's dtype torch.float32, got torch.float16"),
    ("y", meta(M, N), TypeError, f"y must be on x's device {DEVICE}, got meta"),
    ("y", torch.ones(M, N + 1), ValueError, rf"y must have shape \[{M}, {N}\], got \[{M}, {N + 1}\]"),
    ("y", torch.ones(1, M, N), ValueError, rf"y must have shape \[{M}, {N}\], got \[1, {M}, {N}\]"),
    ("y", torch.ones(N), ValueError, rf"y must have shape \[{M}, {N}\], got \[{N}\]"),
]
CASES = [(lora_linear, *bad) for bad in BAD + BAD_BASE] + [(lora_delta, *bad) for bad in BAD + BAD_OUTPUT]


def case_id(value) -> str:
    if isinstance(value, torch.Tensor):
        device = "" if value.device == DEVICE else value.device
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{device}"
    if isinstance(value, str):
        return value if value.isidentifier() else "-"
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("op, name, value, exception, message", CASES, ids=case_id)
def test_public_ops_name_the_argument(op, name, value, exception, message):
    good = arguments(op)
    op(**good)
    with pytest.raises(exception, match=f"^{op.__name__}: {message}"):
        op(**(good | {name: value}))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("op", [lora_linear, lora_delta], ids=["linear", "delta"])
def test_errors_are_the_same_under_autocast(op, autocast):
    for name, value in (("x", None), ("x", torch.ones(M, K, dtype=torch.int64)), ("a", None), ("dropout_p", 2.0)):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            with pytest.raises((TypeError, ValueError), match=f"{op.__name__}: {name} must"):
                op(**(arguments(op) | {name: value}))


def test_a_tensor_of_another_layout_is_refused():
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        lora_linear(**(arguments(lora_linear) | {"x": torch.eye(K)[:M].to_sparse()}))


def test_memory_that_does_not_suffice_is_told_in_torchs_words():
    """Trainers look for these words, and try again with fewer rows."""
    words = r" out of memory\.|DefaultCPUAllocator: can't allocate memory"
    x, a, b = torch.zeros(1, 1).expand(2**40, 1), torch.zeros(R, 1), torch.zeros(64, R)
    with pytest.raises(RuntimeError, match=words):
        lora_linear(x, torch.zeros(64, 1), None, a, b, 1.0)
    many = 2**44  # of a copy of x
    x, a = torch.zeros(M, 1).expand(M, many), torch.zeros(R, 1).expand(R, many)
    with pytest.raises(RuntimeError, match=words):
        lora_delta(torch.zeros(M, N), x, a, torch.zeros(N, R), 1.0)


def raw_arguments(op: str) -> dict:
    """Good arguments of a raw op by name; 'seed' is needed, dropout is on."""
    case = make_case(M, N, K, R, vector=True)
    x, a, b, vector = case.x, case.a, case.b, case.scale
    s = RAW._lora_delta_forward(case.grad_y, x, a, b, vector, 1.0, 0.5, case.seed)[1]
    last = {"scale_vector": vector, "scale": 1.5, "dropout_p": 0.5, "seed": case.seed}
    return {
        "_lora_linear_forward": {"x": x, "weight": case.weight, "bias": case.bias, "a": a, "b": b} | last,
        "_lora_delta_forward": {"y": case.grad_y, "x": x, "a": a, "b": b} | last,
        "_lora_backward": {"grad_y": case.grad_y, "x": x, "weight": case.weight, "a": a, "b": b, "s": s}
        | last
        | {"needs": 31},
    }[op]


RAW_OPS = ["_lora_linear_forward", "_lora_delta_forward", "_lora_backward"]


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
            del bad["scalar"], bad["more dimensions"], bad["short"], bad["long"]
            bad |= {"two": seed_tensor(1).repeat(2), "none": seed_tensor(1)[:0]}
        if op == "_lora_linear_forward" and name == "x":
            del bad["more dimensions"]
        elif name in ("x", "y", "grad_y"):
            bad["fewer rows"] = value[:-1]
        for what, tensor in bad.items():
            with pytest.raises(RuntimeError, match=name):
                getattr(RAW, op)(**(good | {name: tensor}))
                pytest.fail(f"{op} took {name}: {what}")


@pytest.mark.parametrize("op", RAW_OPS)
@pytest.mark.parametrize("p", [1.0, 1.5, -0.5, float("nan"), float("inf")])
def test_raw_ops_refuse_a_bad_rate(op, p):
    with pytest.raises(RuntimeError, match=re.escape("dropout_p must be in [0, 1)")):
        getattr(RAW, op)(**(raw_arguments(op) | {"dropout_p": p}))


@pytest.mark.parametrize("op", RAW_OPS)
def test_raw_ops_refuse_a_missing_seed(op):
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor"):
        getattr(RAW, op)(**(raw_arguments(op) | {"seed": None}))


DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.bool,
    torch.complex64,
]
SIZES = st.sampled_from([0, 1, 2, R, M, N, K, 64])


@st.composite
def tensors(draw) -> torch.Tensor:
    """Any small tensor: dtype, shape, strides (0 and overlapping too), now and then another device or layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(SIZES, max_size=3))
    kind = draw(
        st.sampled_from(["contiguous", "transposed", "expanded", "strided", "meta", "sparse", "undefined storage"])
    )
    if kind == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == "expanded":
        return torch.ones((), dtype=dtype).expand(shape)
    if kind == "strided":
        return torch.ones([2 * size for size in shape], dtype=dtype)[tuple(slice(None, None, 2) for _ in shape)]
    tensor = torch.ones(shape, dtype=dtype)
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "undefined storage":
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
    replaced |= {"scale": st.floats(), "dropout_p": st.floats()}
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
