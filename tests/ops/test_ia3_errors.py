"""What IA3's ops refuse: public calls in terms of their arguments, raw calls before memory is touched."""

from __future__ import annotations

import pytest
import torch
from helpers import DEVICE
from ia3_cases import make_case

from pyfused.ops import ia3_linear, ia3_scale
from pyfused.reference import ia3 as reference

RAW = torch.ops.pyfused
N, K = 6, 7
LINEAR = [
    ("x", [1.0], TypeError, "x must be a tensor, got list"),
    ("x", torch.ones(5, K, dtype=torch.int64), TypeError, "x must be float32, .*got torch.int64"),
    ("x", torch.tensor(1.0), ValueError, r"x must have shape \[..., K\], got a scalar"),
    ("x", torch.ones(5, K + 1), ValueError, r"weight must have shape \[N, 8\] .*got \[6, 7\]"),
    ("x", torch.ones(5, K, dtype=torch.bfloat16), TypeError, "weight must have x's dtype torch.bfloat16"),
    ("weight", None, TypeError, "weight must be a tensor, got NoneType"),
    ("weight", torch.ones(N), ValueError, r"weight must have shape \[N, 7\] .*got \[6\]"),
    ("weight", torch.ones(N, K, device="meta"), TypeError, f"weight must be on x's device {DEVICE}, got meta"),
    ("bias", torch.ones(N + 1), ValueError, r"bias must have shape \[6\], got \[7\]"),
    ("bias", torch.ones(N, dtype=torch.float64), TypeError, "bias must have x's dtype"),
    ("scale", 2.0, TypeError, "scale must be a tensor, got float"),
    ("scale", torch.ones(K), ValueError, r"scale must have shape \[6\] on the output side, got \[7\]"),
    ("scale", torch.ones(N, 1), ValueError, r"scale must have shape \[6\] on the output side, got \[6, 1\]"),
    ("scale", torch.ones(N, dtype=torch.float64), TypeError, "scale can be float64 only with a float64 x"),
    ("scale", torch.ones(N, dtype=torch.int64), TypeError, "scale must be float32, .*got torch.int64"),
    ("scale", torch.ones(N, device="meta"), TypeError, f"scale must be on x's device {DEVICE}, got meta"),
    ("side", "both", ValueError, "side must be 'output' or 'input', got 'both'"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), LINEAR)
@pytest.mark.parametrize("grad", [True, False])
def test_linear(name, value, error, message, grad):
    case = make_case(5, N, K)
    arguments = {field: getattr(case, field) for field in ("x", "weight", "bias", "scale", "side")} | {name: value}
    if grad and name != "scale":
        arguments["scale"].requires_grad_()
    with pytest.raises(error, match=f"ia3_linear: {message}"):
        ia3_linear(**arguments)


@pytest.mark.parametrize(
    ("x", "scale", "dim", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), -1, ValueError, r"scale must have shape \[3\] \(x is \[2, 3\], dim -1\)"),
        (torch.ones(2, 3), torch.ones(3), 2, ValueError, r"dim must be in \[-2, 1\]"),
        (torch.ones(2, 3), torch.ones(3), "1", TypeError, "dim must be an integer, got '1'"),
        (torch.ones(2, 3), torch.ones(3, dtype=torch.float64), 1, TypeError, "scale can be float64 only with"),
        (torch.ones(2, 3), None, 1, TypeError, "scale must be a tensor, got NoneType"),
        (torch.ones(2, 3, dtype=torch.int32), torch.ones(3), 1, TypeError, "x must be float32"),
        (torch.tensor(1.0), torch.ones(1), -1, ValueError, "dim must be in"),
    ],
)
def test_scale(x, scale, dim, error, message):
    with pytest.raises(error, match=f"ia3_scale: {message}"):
        ia3_scale(x, scale, dim)


def backward(case, **changes):
    names = ("grad_y", "saved", "weight", "bias", "scale", "input_side", "needs")
    values = (case.grad_y, torch.ones(5, N), case.weight, case.bias, case.scale, False, 3)
    return RAW._ia3_linear_backward(*(dict(zip(names, values, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saved": None}, "saved must be given"),
        ({"saved": torch.ones(4, N)}, r"saved must have 5 rows of 6, got \[4, 6\]"),
        ({"saved": torch.ones(5, N, dtype=torch.float64)}, "saved must have grad_y's dtype"),
        ({"weight": None}, "weight must be given"),
        ({"weight": torch.ones(N + 1, K)}, r"weight must have shape \[6, 7\]"),
        ({"bias": torch.ones(N + 1)}, r"bias must have shape \[6\]"),
        ({"bias": torch.ones(N, dtype=torch.float64)}, "bias must have grad_y's dtype"),
        ({"scale": torch.ones(K)}, r"scale must have shape \[6\]"),
        ({"scale": torch.ones(N, 1)}, "scale must have one dimension"),
        ({"input_side": True}, r"scale must have shape \[7\]"),
    ],
)
def test_raw_backward(changes, message):
    with pytest.raises(RuntimeError, match=message):
        backward(make_case(5, N, K), **changes)


def test_freed_storage_is_refused():
    case = make_case(5, N, K)
    for name in ("x", "weight", "bias", "scale"):
        tensor = getattr(case, name).clone()
        tensor.untyped_storage().resize_(0)
        freed = case.replace(**{name: tensor})
        with pytest.raises(RuntimeError, match=f"{name} must have memory"):
            RAW._ia3_linear_forward(freed.x, freed.weight, freed.bias, freed.scale, False, True)


def test_raw_scale():
    x = torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError, match="dim must be a dimension of x, got 3"):
        RAW._ia3_scale_forward(x, torch.ones(3), 3)
    with pytest.raises(RuntimeError, match="scale must have x's size 4, got 3"):
        RAW._ia3_scale_forward(x, torch.ones(3), 2)
    with pytest.raises(RuntimeError, match="saved must have"):
        RAW._ia3_scale_backward(x, torch.ones(2, 4, 3), torch.ones(3), 1, 3)
    with pytest.raises(RuntimeError, match="saved must be given"):
        RAW._ia3_scale_backward(x, None, torch.ones(3), 1, 2)


@pytest.mark.parametrize("side", ["output", "input"])
def test_double_backward_is_refused(side):
    case = make_case(5, N, K, side=side)
    x, scale = case.x.requires_grad_(), case.scale.requires_grad_()
    for op, arguments in ((ia3_linear, (case.weight, case.bias, scale, side)), (ia3_scale, (torch.ones(K),))):
        with pytest.raises(RuntimeError, match=f"{op.__name__}: backward with create_graph=True.*reference.ia3"):
            torch.autograd.grad(op(x, *arguments).sum(), x, create_graph=True)
    y = reference.ia3_linear(x, case.weight, case.bias, scale, side)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    grad.square().sum().backward()
