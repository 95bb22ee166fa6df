"""What the tests of lora_linear_shared share: groups of projections of one x with gradients, and separate calls."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from helpers import make_case
from torch import Tensor

from pyfused.ops import Projection

# (N, R) of each projection of one x; rank None: no adapter.
GROUPS = {
    "one": [(20, 4)],
    "qkv": [(40, 8), (24, 8), (24, 8)],
    "ranks": [(40, 3), (129, 70), (1, 1), (17, 16)],
    "some": [(40, 8), (24, None), (30, 5)],
    "none": [(40, None), (24, None)],
}


def make_group(group, lead, k, dtype=torch.float32, adapter_dtype=None, dropout_p=0.1, **options):
    """x, projections and the gradients that flow into their results; every second scale is a vector."""
    cases = []
    for i, (n, r) in enumerate(group):
        vector = i % 2 == 1
        p = dropout_p * (i + 1) / 2
        cases.append((make_case(lead, n, k, r or 1, dtype, adapter_dtype, vector=vector, dropout_p=p, seed=i), r))
    x = cases[0][0].x
    projections = []
    for case, r in cases:
        p = Projection(case.weight, case.bias, case.a, case.b, case.scale, case.dropout_p, True, case.seed)
        projections.append(p if r is not None else Projection(case.weight, case.bias))
    return x, projections, [case.grad_y for case, _ in cases]


def separately(linear, x, projections):
    return tuple(F.linear(x, p.weight, p.bias) if p.a is None else linear(x, *p) for p in projections)


def map_tensors(function, projections):
    return [Projection(*(function(item) if isinstance(item, Tensor) else item for item in p)) for p in projections]


def run(op, x, projections, grad_y, dtype=None):
    """Results, x's gradient, and the gradients of all that a projection trains."""
    cast = (lambda t: t.to(dtype) if t.is_floating_point() else t) if dtype else (lambda t: t)
    x = cast(x.detach()).clone().requires_grad_()
    fresh, leaves = [], []
    for p in map_tensors(lambda t: cast(t.detach()).clone(), projections):
        trained = [t for t in (p.bias, p.a, p.b, p.scale) if isinstance(t, Tensor)]
        leaves += [t.requires_grad_() for t in trained]
        fresh.append(p)
    y = op(x, fresh)
    grads = torch.autograd.grad(y, [x, *leaves], [cast(g) for g in grad_y])
    return [t.detach() for t in y], grads[0], grads[1:]
