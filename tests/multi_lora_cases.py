"""Random batches over many adapters, and three ways to compute one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from helpers import DEVICE, eager_linear, seed_tensor
from torch import Tensor

from pyfused.ops import LoraTable
from pyfused.reference import multi_lora as reference


@dataclasses.dataclass(frozen=True)
class Batch:
    """Arguments of one ``multi_lora`` call for one y, and the gradient that flows into its result."""

    y: Tensor
    x: Tensor
    adapters: tuple
    index: Tensor
    segments: Tensor | None
    seeds: tuple[Tensor, ...]
    grad: Tensor

    @property
    def table(self) -> LoraTable:
        return LoraTable(self.adapters)

    @property
    def of_row(self) -> Tensor:
        """The adapter of each row."""
        return reference.rows_of_adapters(self.index, self.segments, self.x.shape[:-1].numel())

    def to(self, dtype: torch.dtype) -> Batch:
        adapters = tuple(
            None if entry is None else (entry[0].to(dtype), entry[1].to(dtype), *entry[2:]) for entry in self.adapters
        )
        return dataclasses.replace(
            self, y=self.y.to(dtype), x=self.x.to(dtype), adapters=adapters, grad=self.grad.to(dtype)
        )


def make_batch(
    lead: int | tuple[int, ...],
    n: int,
    k: int,
    ranks: Sequence[int],
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    *,
    segments: Sequence[int] | None = None,
    index: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Batch:
    """Rows drawn over the adapters and none; rank 0 stands for None in the table. ``segments``: their lengths."""
    generator = torch.Generator().manual_seed(7 + seed)
    lead = (lead,) if isinstance(lead, int) else lead

    def normal(*shape: int, to: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * std).to(DEVICE, to)

    def adapter(place: int, r: int):
        if r == 0:
            return None
        to = adapter_dtype or dtype
        return (
            normal(r, k, to=to, std=max(k, 1) ** -0.5),
            normal(n, r, to=to, std=r**-0.5),
            1.5 - 0.25 * place,
            dropout_p,
        )

    bounds = None if segments is None else torch.tensor([0, *segments], dtype=torch.int64).cumsum(0).to(DEVICE)
    if index is None:
        shape = lead if segments is None else (len(segments),)
        chosen = torch.randint(-1, len(ranks), shape, generator=generator, device="cpu").to(DEVICE)
    else:
        chosen = torch.tensor(index, dtype=torch.int64).to(DEVICE)
    return Batch(
        y=normal(*lead, n, to=dtype),
        x=normal(*lead, k, to=dtype),
        adapters=tuple(adapter(place, r) for place, r in enumerate(ranks)),
        index=chosen,
        segments=bounds,
        seeds=tuple(seed_tensor(1000 * seed + place).to(DEVICE) for place in range(len(ranks))),
        grad=normal(*lead, n, to=dtype),
    )


def evaluate(op, batch: Batch, training: bool = True) -> dict[str, Tensor]:
    """``out`` and the gradients of y, x and of the matrices of every adapter."""
    y, x = batch.y.detach().requires_grad_(), batch.x.detach().requires_grad_()
    adapters = [
        None if entry is None else (entry[0].detach().requires_grad_(), entry[1].detach().requires_grad_(), *entry[2:])
        for entry in batch.adapters
    ]
    names, leaves = ["grad_y", "grad_x"], [y, x]
    for place, entry in enumerate(adapters):
        if entry is not None:
            names += [f"grad_a{place}", f"grad_b{place}"]
            leaves += entry[:2]
    out = op(y, x, adapters, batch.index, batch.segments, training, batch.seeds)
    grads = torch.autograd.grad(out, leaves, batch.grad, allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]
    return {"out": out.detach()} | dict(zip(names, grads, strict=True))


def eager(y, x, adapters, index, segments, training, seeds) -> Tensor:
    """What one writes in PyTorch: a loop over adapters."""
    rows = x.shape[:-1].numel()
    of_row = reference.rows_of_adapters(index, segments, rows)
    out, x_rows = y.reshape(rows, y.shape[-1]), x.reshape(rows, x.shape[-1])
    zero = x.new_zeros((y.shape[-1], x.shape[-1]))
    for place, entry in enumerate(adapters):
        chosen = (of_row == place).nonzero().squeeze(1)
        if entry is None or chosen.numel() == 0:
            continue
        a, b, scale, p = entry
        delta = eager_linear(x_rows[chosen], zero, None, a, b, scale, p if training else 0.0, training, seeds[place])
        out = out.index_add(0, chosen, delta)
    return out.reshape(y.shape)
