"""A fused model and its unfused twin, for the fixture ``pair`` of tests/integrations: what one does, the other does."""

from __future__ import annotations

import torch


def both(pair, action) -> None:
    for model in pair:
        action(model)


def assert_same(pair, x: torch.Tensor, **kwargs) -> None:
    fused, eager = pair
    torch.testing.assert_close(fused(x, **kwargs), eager(x, **kwargs), rtol=1e-5, atol=1e-5)
