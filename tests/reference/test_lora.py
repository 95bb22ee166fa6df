"""The reference against the formula written out, and its fp64 gradients against numerical ones."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_error_rule, eager_linear, evaluate, make_case, readable_id, seed_tensor

from pyfused.reference import lora as reference
from pyfused.reference.dropout import keep_mask, keep_scale


@pytest.mark.parametrize("vector", [False, True], ids=["float", "vector"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_formula(dropout_p, vector):
    case = make_case((2, 3), 4, 5, 2, torch.float64, vector=vector, dropout_p=dropout_p)
    keep = keep_mask(case.seed, 6, 5, dropout_p).view(2, 3, 5)
    x, a, b = case.x, case.a, case.b
    expected = torch.empty(2, 3, 4, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            dropped = [x[i, j, k].item() * keep_scale(dropout_p) if keep[i, j, k] else 0.0 for k in range(5)]
            for n in range(4):
                value = case.bias[n] + sum(x[i, j, k] * case.weight[n, k] for k in range(5))
                for r in range(2):
                    scale = case.scale[r] if vector else case.scale
                    value += scale * sum(dropped[k] * a[r, k] for k in range(5)) * b[n, r]
                expected[i, j, n] = value
    got = reference.lora_linear(x, case.weight, case.bias, a, b, case.scale, **case.options)
    torch.testing.assert_close(got, expected)


def test_gradients():
    case = make_case(5, 4, 6, 3, torch.float64, vector=True, dropout_p=0.3)
    names = ("x", "weight", "bias", "a", "b", "scale")
    assert torch.autograd.gradcheck(
        lambda *leaves: reference.lora_linear(*leaves, **case.options),
        [getattr(case, name).requires_grad_() for name in names],
    )


def test_dropout_only_in_training():
    case = make_case(5, 4, 6, 3)
    arguments = (case.x, case.weight, case.bias, case.a, case.b, case.scale)
    expected = reference.lora_linear(*arguments)
    assert torch.equal(reference.lora_linear(*arguments, 0.5, False, None), expected)
    assert not torch.equal(reference.lora_linear(*arguments, 0.5, True, seed_tensor(3)), expected)


def test_dropout_without_seed():
    case = make_case(5, 4, 6, 3)
    with pytest.raises(ValueError, match="seed"):
        reference.lora_linear(case.x, case.weight, None, case.a, case.b, 1.0, 0.5, True)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)], ids=readable_id)
def test_rounds_no_worse_than_eager(dtypes):
    case = make_case(33, 40, 50, 8, *dtypes, dropout_p=0.1)
    got, eager = evaluate(reference.lora_linear, case), evaluate(eager_linear, case)
    exact = evaluate(reference.lora_linear, case.to(torch.float64))
    for name, value in got.items():
        assert_error_rule(name, value, eager[name], exact[name])
