"""What AdaLoRA's layers compute with: the parameters as ``ops.lora_linear`` takes them, without the pruned ranks."""

from __future__ import annotations

import torch
from torch import Tensor

# a [R, K], b [N, R], scale [R]
Factors = tuple[Tensor, Tensor, Tensor]


def rank_scale(e: Tensor, ranknum: Tensor, scaling: float) -> Tensor:
    """Scale of each rank ``[R]``: ``e * scaling / (ranknum + 1e-5)``, as HF PEFT has it; e ``[R, 1]``, ranknum ``[1]``.

    ranknum, the rank that training began with, stays where ranks are pruned, so that those left act as before.
    """
    return e.view(-1) * (scaling / (ranknum + 1e-5))


def select_ranks(a: Tensor, b: Tensor, scale: Tensor, kept: Tensor) -> Factors:
    """The ranks of the indices ``kept`` (int64) alone, differentiable."""
    if kept.numel() == 0:
        # One rank that does nothing: autograd, and whoever waits for gradients of all parameters (DDP), still see them.
        return a[:1], b[:, :1], scale[:1] * 0.0
    return a.index_select(0, kept), b.index_select(1, kept), scale.index_select(0, kept)


def fold_scale(a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """a with the scale of each rank in it, in fp32 or more, and b: for an op that has one scale for an adapter."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.to(wide) * scale.to(wide).unsqueeze(1), b


class RankScale:
    """The scale of AdaLoRA's ranks, not yet computed: what it is made of, so that two calls can be compared.

    Args:
        e, ranknum, scaling: see :func:`rank_scale`.
        kept: indices of the ranks that are not left out; None: all.
        known: the factors, where they have been computed before.
    """

    def __init__(
        self, e: Tensor, ranknum: Tensor, scaling: float, kept: Tensor | None = None, known: Factors | None = None
    ) -> None:
        self.tensors, self.scaling, self.kept, self.known = (e, ranknum), scaling, kept, known

    def __eq__(self, other: object) -> bool:
        """Made of the same tensors, which may have changed in between."""
        return (
            isinstance(other, RankScale)
            and all(one is another for one, another in zip(self.tensors, other.tensors, strict=True))
            and self.scaling == other.scaling
            and self.kept is other.kept
            and self.known is other.known
        )

    __hash__ = None

    def factors(self, a: Tensor, b: Tensor) -> Factors:
        """What ``ops.lora_linear`` takes for the adapter's parameters a and b."""
        if self.known is not None:
            return self.known
        factors = (a, b, rank_scale(*self.tensors, self.scaling))
        return factors if self.kept is None else select_ranks(*factors, self.kept)


class PrunedFactors:
    """For evaluation: the factors of adapters without the ranks whose E is 0, kept until a parameter changes.

    Changes are told by version counters and addresses, so not those that pass autograd by (``parameter.data.mul_()``);
    the layer's ``train`` and ``eval`` forget everything. Copies and pickles of a layer start with nothing.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[list[Tensor], list[tuple], float, Factors | None]] = {}
        self._folded: dict[str, tuple[Factors, tuple[Tensor, Tensor]]] = {}

    def __deepcopy__(self, memo: dict) -> PrunedFactors:
        return PrunedFactors()

    def __reduce__(self) -> tuple:
        return PrunedFactors, ()

    def forget(self, adapter_name: str) -> None:
        self._found.pop(adapter_name, None)
        self._folded.pop(adapter_name, None)

    def clear(self) -> None:
        self._found.clear()
        self._folded.clear()

    def get(
        self, adapter_name: str, a: Tensor, b: Tensor, e: Tensor, ranknum: Tensor, scaling: float
    ) -> Factors | None:
        """What :func:`select_ranks` and :func:`rank_scale` give for the ranks that are not 0; None where all are."""
        parameters = (a, b, e, ranknum)
        state = [(tensor._version, tensor.data_ptr()) for tensor in parameters]
        found = self._found.get(adapter_name)
        if found is not None and found[1] == state and found[2] == scaling:
            return found[3]
        with torch.no_grad():
            # Aliases, which keep the memory: nothing new can come to lie at its address while it is compared.
            held = [tensor.detach() for tensor in parameters]
            scale, kept = rank_scale(*held[2:], scaling), e.detach().view(-1).nonzero().view(-1)
            factors = None
            if kept.numel() == e.numel():
                factors = (held[0], held[1], scale)
            elif kept.numel() > 0:
                factors = select_ranks(held[0], held[1], scale, kept)
        self._found[adapter_name] = (held, state, scaling, factors)
        return factors

    def folded(self, adapter_name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """:func:`fold_scale` of what :meth:`get` gave, kept as long."""
        known = self._folded.get(adapter_name)
        if known is None or known[0] is not factors:
            with torch.no_grad():
                known = self._folded[adapter_name] = factors, fold_scale(*factors)
        return known[1]


def evaluates(training: bool, x: Tensor, *parameters: Tensor) -> bool:
    """Whether pruned ranks can be left out: nobody asks for the gradients by which they could come back."""
    if training or torch.compiler.is_compiling() or any(parameter.is_inference() for parameter in parameters):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():  # what is left would be looked up at replay no more
        return False
    return not torch.is_grad_enabled() or not any(parameter.requires_grad for parameter in parameters)
