"""Layers that share their input on a GPU: one op, the bits of separate layers, and what only a GPU has.

PYFUSED_CUDA_TESTS_ON=cpu tries these tests themselves on the CPU, as far as they make sense there.
"""

from __future__ import annotations

import pytest
import torch
from cuda_calls import assert_nothing_waits, captured
from helpers import CUDA_DEVICE, needs_gpu
from torch import nn

from pyfused import LoraConfig, get_peft_model
from pyfused.nn import LoraLinear
from pyfused.ops.common import draw_known_seed, draw_seed, seed_generator

pytestmark = pytest.mark.cuda


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 96), nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def make(dropout, share=True):
    torch.manual_seed(0)
    config = LoraConfig(
        r=8, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False
    )
    model = get_peft_model(nn.Sequential(Attention()).to(CUDA_DEVICE, torch.bfloat16), config).train()
    if not share:
        for layer in model.modules():
            if isinstance(layer, LoraLinear):
                layer._shared_input = None
    return model


def step(model, x):
    torch.manual_seed(3)
    y = model(x)
    y.float().square().sum().backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return [y.detach(), *grads, draw_seed(x)]


def an_x():
    return torch.randn(40, 64, dtype=torch.bfloat16, device=CUDA_DEVICE)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_three_layers_are_one_op(dropout, group_sizes):
    """The bits of separate layers, and torch's generator moves as without groups."""
    x = an_x()
    model = make(dropout)
    for _ in range(3):
        got = step(model, x)
    assert group_sizes == [3] * 3
    for one, other in zip(got, step(make(dropout, share=False), x), strict=True):
        assert torch.equal(one, other)


def test_seeds_are_known_before_they_are_drawn():
    x = an_x()
    ahead = seed_generator(x).clone_state()
    foreseen = [draw_known_seed(x, ahead) for _ in range(2)]
    drawn = [draw_known_seed(x) for _ in range(3)]
    for (one, known), (other, told) in zip(foreseen, drawn, strict=False):
        assert torch.equal(one, other) and known == told
    assert len({told for _, told in drawn}) == 3
    torch.manual_seed(11)
    assert draw_known_seed(x)[1] not in {told for _, told in drawn}


@needs_gpu
def test_nothing_waits_for_the_gpu(group_sizes):
    model, x = make(0.3), an_x()
    assert_nothing_waits(lambda: model(x).sum().backward())
    assert group_sizes == [3, 3]


@needs_gpu
def test_another_stream_computes_alone(group_sizes):
    """What was enqueued on one stream is not there for another."""
    attention, x = make(0.0).get_base_model()[0], an_x()
    expected = attention.k_proj(x.clone())
    stream = torch.cuda.Stream(CUDA_DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        query = attention.q_proj(x)
    got = attention.k_proj(x).clone()
    torch.cuda.synchronize()
    assert torch.equal(got, expected) and query.requires_grad


@needs_gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cuda_graph(dropout, group_sizes):
    """Captured, layers with dropout compute alone: their seeds are drawn at each replay."""
    model, x = make(dropout), an_x()
    graph, (y,) = captured(lambda: [model(x)])
    assert group_sizes == ([3] if dropout else [3, 3])  # one call before the capture
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(y.detach().clone())
    assert torch.equal(*seen) == (dropout == 0.0)
