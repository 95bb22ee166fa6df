"""How LoRA's matrices begin: HF PEFT's initialisations, which draw and decompose in the same order as there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# These put a part of the base weight into the adapter and take it out of the base.
_DECOMPOSITIONS = ("pissa", "olora")


def changes_base(init_lora_weights: bool | str) -> bool:
    """Whether an initialisation changes the base layer's weight, so that the adapted layer begins as the base was."""
    return isinstance(init_lora_weights, str) and init_lora_weights.lower().startswith(_DECOMPOSITIONS)


def initialise(a: nn.Module, b: nn.Module, init_lora_weights: bool | str, r: int) -> None:
    """True or "gaussian": A random, B zero. False: both as their modules were made."""
    if init_lora_weights is False:
        return
    if init_lora_weights is True:
        nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
    else:
        nn.init.normal_(a.weight, std=1 / r)
    for parameter in b.parameters():
        nn.init.zeros_(parameter)


@torch.no_grad()
def initialise_orthogonal(a: nn.Linear, b: nn.Linear) -> None:
    """A's rows and B's columns span orthogonal halves of the ranks' space, so that B A is 0 and both have gradients."""
    (r, in_features), out_features = a.weight.shape, b.weight.shape[0]
    q, _ = torch.linalg.qr(torch.randn(r, r))
    a.weight.copy_(torch.randn(in_features, r // 2).mm(q[0::2]).T / 10.0)
    b.weight.copy_(torch.randn(r // 2, out_features).T.mm(q[1::2]) / 10.0)


@torch.no_grad()
def decompose(weight: Tensor, r: int, scaling: float, init_lora_weights: str) -> tuple[Tensor, Tensor, Tensor]:
    """A ``[r, K]``, B ``[N, r]`` and what is left of a weight ``[N, K]``: ``weight = left + scaling * B A``.

    "pissa" (Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation"): the first r singular
    values; "pissa_niter_N": those of a randomised decomposition with N iterations. "olora" (Büyükakyüz 2024, "OLoRA:
    Orthonormal Low-Rank Adaptation"): the first r columns and rows of the QR decomposition. A and B are in fp32.
    """
    exact = weight.float()
    if init_lora_weights.lower() == "olora":
        q, upper = torch.linalg.qr(exact)
        b, a = q[:, :r].contiguous(), upper[:r].contiguous()
    else:
        if init_lora_weights == "pissa":
            u, s, vh = torch.linalg.svd(exact, full_matrices=False)
            u, s, vh = u[:, :r], s[:r] / scaling, vh[:r]
        else:
            u, s, v = torch.svd_lowrank(exact, r, niter=int(init_lora_weights.rpartition("_")[2]))
            s, vh = s / scaling, v.t()
        root = torch.diag(s.sqrt())
        a, b = root @ vh, u @ root
    return a, b, (exact - scaling * b @ a).to(weight.dtype)


def check_init_fits(init_lora_weights: bool | str, r: int, weight: Tensor) -> None:
    """TypeError or ValueError where a linear layer's weight or an adapter's rank does not allow an initialisation."""
    if init_lora_weights == "orthogonal" and r % 2:
        raise ValueError(f"init_lora_weights: 'orthogonal' needs an even rank, got r={r}")
    if not changes_base(init_lora_weights):
        return
    if type(weight) is not nn.Parameter or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"init_lora_weights: {init_lora_weights!r} needs a base weight in float32, float16 or bfloat16, got "
            f"{type(weight).__name__} of {weight.dtype}"
        )
    if r > min(weight.shape):
        raise ValueError(f"init_lora_weights: {init_lora_weights!r} needs r of at most {min(weight.shape)}, got r={r}")
