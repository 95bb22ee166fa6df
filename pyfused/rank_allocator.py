"""AdaLoRA's budget: which ranks of all layers stay, and the regularisation that keeps them comparable.

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", sections 3.1 to 3.3, as HF PEFT has
them. What is done for all layers at once are a few operations on lists of tensors, not a loop over the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .config import AdaLoraConfig
from .nn import AdaLoraLinear, AdapterLayer

_MATRICES = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """The budget of one adapter, which is trained.

    It holds no parameters: they are looked up in the layers at each call, so that a model may be moved, sharded or
    copied. Sharded parameters are gathered where all of them is needed, and all processes choose the same ranks.

    Args:
        layers: of the model by their names; those of other methods, or without this adapter, are passed over.
        config: the adapter's; ``rank_pattern`` is written to it, all else is read when it is needed.
        adapter_name: of the adapter.

    Attributes:
        init_bgt, target_bgt: numbers of ranks of all layers at the start and at the end.
    """

    def __init__(self, layers: Mapping[str, AdapterLayer], config: AdaLoraConfig, adapter_name: str) -> None:
        self.peft_config = config
        self.adapter_name = adapter_name
        own = self._own(layers)
        self.init_bgt = config.init_r * len(own)
        self.target_bgt = config.target_r * len(own)
        self.reset_ipt()

    def set_total_step(self, total_step: int) -> None:
        """Another length of the training than the configuration's."""
        self.peft_config.total_step = total_step
        self.peft_config.__post_init__()

    def reset_ipt(self) -> None:
        """Forget all importances."""
        self._importance: list[Tensor] = []
        self._uncertainty: list[Tensor] = []

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """How many ranks all layers have in ``step`` (eq. 12), and whether they are distributed in it."""
        config = self.peft_config
        final = config.total_step - config.tfinal
        if step <= config.tinit:
            return self.init_bgt, False
        if step > final:
            return self.target_bgt, True
        left = 1 - (step - config.tinit) / (final - config.tinit)
        return int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt), step % config.deltaT == 0

    @torch.no_grad()
    def update_and_allocate(self, layers: Mapping[str, AdapterLayer], global_step: int) -> None:
        """What a training step does after ``backward``, see :meth:`pyfused.tuner.AdapterModel.update_and_allocate`."""
        own = self._own(layers)
        final = self.peft_config.total_step - self.peft_config.tfinal
        pattern = self.peft_config.rank_pattern
        if global_step > final and pattern is not None:
            self._mask(own, [self._live(name, layer) for name, layer in own.items()], for_good=True)
            return
        if global_step < final or not self._importance:  # training may go on from a checkpoint at its last allocation
            self._update_importance(own)
        budget, allocate = self.budget_schedule(global_step)
        if global_step >= final:
            self._allocate(own, budget, for_good=True)
            self.reset_ipt()
        elif allocate:
            self._allocate(own, budget, for_good=False)

    def _own(self, layers: Mapping[str, AdapterLayer]) -> dict[str, AdaLoraLinear]:
        return _own_layers(layers, self.adapter_name)

    def _parameters(self, own: Mapping[str, AdaLoraLinear]) -> list[Tensor]:
        """A of all layers, then B, then E; sharded ones (FSDP2) as they are."""
        return [getattr(layer, matrix)[self.adapter_name] for matrix in _MATRICES for layer in own.values()]

    def _update_importance(self, own: Mapping[str, AdaLoraLinear]) -> None:
        """Eqs. 9 to 11, of each weight."""
        parameters = self._parameters(own)
        if all(parameter.grad is None for parameter in parameters):
            raise ValueError(
                "update_and_allocate: no parameter of the adapter has a gradient; it has to be called after "
                "loss.backward() and before optimizer.zero_grad()"
            )
        beta1, beta2 = self.peft_config.beta1, self.peft_config.beta2
        # A layer that the model did not call has no gradients, and is of no importance in this step.
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        now = torch._foreach_mul([_whole(each) for each in parameters], [_whole(each) for each in gradients])
        torch._foreach_abs_(now)
        if not self._importance:
            self._importance = [torch.zeros_like(tensor) for tensor in now]
            self._uncertainty = [torch.zeros_like(tensor) for tensor in now]
        torch._foreach_mul_(self._importance, beta1)
        torch._foreach_add_(self._importance, now, alpha=1 - beta1)
        torch._foreach_sub_(now, self._importance)
        torch._foreach_abs_(now)
        torch._foreach_mul_(self._uncertainty, beta2)
        torch._foreach_add_(self._uncertainty, now, alpha=1 - beta2)

    def _scores(self) -> Tensor:
        """Importance of each rank, layer after layer (eq. 8): E's, and the means of A's and B's."""
        scores = torch._foreach_mul(self._importance, self._uncertainty)
        count = len(scores) // 3
        a, b, e = scores[:count], scores[count : 2 * count], scores[2 * count :]
        means = [_row_means(a), _row_means([score.T for score in b])]
        device = e[0].device
        flat = [torch.cat([tensor.view(-1).to(device) for tensor in tensors]) for tensors in (e, *means)]
        return flat[0] + (flat[1] + flat[2])

    def _allocate(self, own: Mapping[str, AdaLoraLinear], budget: int, for_good: bool) -> None:
        scores = self._scores()
        surplus = scores.numel() - budget
        if surplus > 0:
            kept = ~(scores <= torch.kthvalue(scores, min(surplus, scores.numel())).values)
        else:
            kept = torch.ones_like(scores, dtype=torch.bool)
        ranks = [layer.r[self.adapter_name] for layer in own.values()]
        masks = _split(kept.tolist(), ranks)
        self.peft_config.rank_pattern = {
            f"{name}.lora_E": _within(own[name].ranks[self.adapter_name], mask)
            for name, mask in zip(own, masks, strict=True)
        }
        self._mask(own, masks, for_good)

    def _live(self, name: str, layer: AdaLoraLinear) -> list[bool]:
        """Which of the ranks that the layer has are left by the configuration's pattern."""
        ranks = layer.ranks[self.adapter_name]
        pattern = self.peft_config.rank_pattern.get(f"{name}.lora_E", ranks)
        if len(pattern) != len(ranks):
            raise ValueError(f"rank_pattern: {name} must have init_r = {len(ranks)} entries, got {len(pattern)}")
        return [kept for kept, there in zip(pattern, ranks, strict=True) if there]

    def _mask(self, own: Mapping[str, AdaLoraLinear], masks: list[list[bool]], for_good: bool) -> None:
        """E of ranks that are not left becomes 0."""
        e = [layer.lora_E[self.adapter_name] for layer in own.values()]
        groups: dict[tuple, list[int]] = {}
        for index, tensor in enumerate(e):
            groups.setdefault((tensor.device, tensor.dtype), []).append(index)
        for (device, _), members in groups.items():
            pruned = torch.tensor(
                [not kept for index in members for kept in masks[index]], dtype=torch.bool, device=device
            )
            tensors = [e[index] for index in members]
            values = torch.cat([_whole(tensor) for tensor in tensors]).masked_fill_(pruned.view(-1, 1), 0.0)
            _overwrite(tensors, list(values.split([tensor.shape[0] for tensor in tensors])))
        for layer, mask in zip(own.values(), masks, strict=True):
            layer.prune(self.adapter_name, mask if for_good else None)

    # Regularisation ---------------------------------------------------------------------------------------------------

    def regularise(self, outputs: Any, layers: Mapping[str, AdapterLayer]) -> Any:
        """Add the regularisation to ``outputs.loss``, where there is one and HF PEFT does: with a ``task_type``."""
        config = self.peft_config
        loss = getattr(outputs, "loss", None)
        if config.task_type is None or config.orth_reg_weight == 0.0 or not isinstance(loss, Tensor):
            return outputs
        penalty = self.orthogonality(layers)
        outputs.loss = loss + (config.orth_reg_weight * penalty).to(loss.device, loss.dtype)
        return outputs

    def orthogonality(self, layers: Mapping[str, AdapterLayer]) -> Tensor:
        """Mean over A and B of all layers of the Frobenius norms of ``A A^T - I`` and ``B^T B - I`` (eq. 4)."""
        parameters = [_whole(parameter) for parameter in self._parameters(self._own(layers))]
        count = len(parameters) // 3
        matrices = [*parameters[:count], *(b.T for b in parameters[count : 2 * count])]
        groups: dict[tuple, list[Tensor]] = {}
        for matrix in matrices:
            groups.setdefault((matrix.device, matrix.dtype, matrix.shape), []).append(matrix)
        total: Tensor | float = 0.0
        for (device, dtype, _), members in groups.items():
            with torch.autocast(device.type, enabled=False):
                stacked = torch.stack(members).to(torch.promote_types(dtype, torch.float32))
                gram = stacked @ stacked.mT
                identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=device)
                norms = torch.linalg.vector_norm(gram - identity, dim=(1, 2))
            total = norms.sum().to(matrices[0].device) + total
        return total / len(matrices)


def resize_by_rank_pattern(
    layers: Mapping[str, AdapterLayer], config: AdaLoraConfig, rank_pattern: Mapping[str, Any], adapter_name: str
) -> None:
    """See :meth:`pyfused.tuner.AdapterModel.resize_modules_by_rank_pattern`."""
    own = _own_layers(layers, adapter_name)
    masks: dict[str, Tensor] = {}
    for key, ranks in rank_pattern.items():
        name = key.removesuffix(f".{adapter_name}").removesuffix(".lora_E")
        if name not in own:
            raise ValueError(f"rank_pattern: {key!r} names no layer with an AdaLoRA adapter {adapter_name!r}")
        if not isinstance(ranks, (list, Tensor)):
            raise TypeError(f"rank_pattern must map to lists of bools or to tensors, got {type(ranks).__name__}")
        mask = torch.as_tensor(ranks, device="cpu").view(-1)
        rows = own[name].r[adapter_name]
        if (mask.dtype != torch.bool and mask.numel() > 0) or mask.numel() != rows:
            raise ValueError(f"rank_pattern: {key!r} must have {rows} bools, got {mask.numel()} of {mask.dtype}")
        masks[name] = mask.bool()
    for name, mask in masks.items():
        own[name].keep_ranks(adapter_name, mask.tolist())
    left = {f"{name}.lora_E": list(own[name].ranks[adapter_name]) for name in masks}
    config.rank_pattern = (config.rank_pattern or {}) | left


def _own_layers(layers: Mapping[str, AdapterLayer], adapter_name: str) -> dict[str, AdaLoraLinear]:
    return {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, AdaLoraLinear) and layer.has_adapter(adapter_name)
    }


def _whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what all processes together hold of a DTensor, differentiable."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _overwrite(tensors: list[Tensor], values: list[Tensor]) -> None:
    """Each tensor with its whole value, which all processes have."""
    if not hasattr(tensors[0], "full_tensor"):
        torch._foreach_copy_(tensors, values)
        return
    from torch.distributed.tensor import distribute_tensor

    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))


def _row_means(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The means of the rows of each matrix; of those of one width at once."""
    groups: dict[tuple, list[int]] = {}
    for index, matrix in enumerate(matrices):
        groups.setdefault((matrix.device, matrix.dtype, matrix.shape[1]), []).append(index)
    means: list[Tensor] = [torch.empty(0)] * len(matrices)
    for members in groups.values():
        rows = [matrices[index].shape[0] for index in members]
        together = torch.cat([matrices[index] for index in members]).mean(1)
        for index, mean in zip(members, together.split(rows), strict=True):
            means[index] = mean
    return means


def _split(values: list[bool], sizes: Sequence[int]) -> list[list[bool]]:
    ends = itertools.accumulate(sizes)
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _within(ranks: Sequence[bool], kept: Sequence[bool]) -> list[bool]:
    """Which are kept of all that ``ranks`` speaks of; ``kept`` speaks of those that are there."""
    left = iter(kept)
    return [there and next(left) for there in ranks]
