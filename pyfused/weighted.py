"""Adapters made of other adapters: ``add_weighted_adapter``."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import AdaLoraConfig, IA3Config, LoraConfig
from .nn import AdapterLayer, IA3Layer
from .nn.lora_init import changes_base

if TYPE_CHECKING:
    from .tuner import AdapterModel

# What HF PEFT has besides "svd", "linear" and "cat".
_NOT_BUILT = (
    *("ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)
# Tensors of one LoRA adapter in a layer: a [groups, r / groups, ...], b [out, r / groups, ...], and weight * scaling.
# Groups are a convolution's; elsewhere there is one.
_Factors = list[tuple[Tensor, Tensor, float]]


@torch.no_grad()
def add_weighted_adapter(
    tuner: AdapterModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str | None = None,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
) -> None:
    r"""Add an adapter that is the weighted sum :math:`\sum_i w_i \Delta_i` of others; frozen, and not active.

    For LoRA, :math:`\Delta_i = s_i B_i A_i`, and ``combination_type`` says how the sum gets its factors:

    * "svd", the default: the sum's first singular vectors, its best approximation of that rank. Each layer's sum is
      computed as a dense matrix and decomposed, in fp32.
    * "cat": all factors side by side; exact, and the ranks add up.
    * "linear": :math:`\sum_i \pm\sqrt{|w_i s_i|} A_i` and :math:`\sum_i \sqrt{|w_i s_i|} B_i`, which is the sum only
      where the adapters are alike; their ranks must be equal.

    For IA3 it is the weighted sum of the vectors. The layers are those that one of the adapters is in. A module of
    ``modules_to_save`` is taken over from the adapter that has it.

    Args:
        adapters: names of the adapters to combine; a single one is always combined by "linear".
        weights: one number for each, of any sign.
        adapter_name: of the new adapter. Where there is one of that name, nothing happens.
        svd_rank: rank of the result of "svd"; None for the largest rank of the adapters.
        svd_clamp: quantile in [0, 1] of the values in both factors at which "svd" clamps them; None: not.
        svd_full_matrices, svd_driver: of ``torch.linalg.svd``.

    Raises:
        ValueError: no such adapter, not one weight for each, methods, ranks or types of ``target_modules`` that do not
            go together, or two adapters with a copy each of one module (``modules_to_save``).
        NotImplementedError: a combination that is not built. In both cases the model is unchanged.
    """
    if adapter_name in tuner.peft_config:
        return
    names = list(adapters)
    weighted = _weighted(tuner, names, weights)
    first = tuner.peft_config[names[0]]
    changes: dict[str, Any] = {"target_modules": _union(tuner, names, "target_modules")}
    if isinstance(first, IA3Config):
        changes["feedforward_modules"] = _union(tuner, names, "feedforward_modules")
        combined = _combined(tuner, weighted, _sum_of_vectors)
    elif type(first) is LoraConfig:
        kind = "linear" if len(names) == 1 else combination_type or "svd"
        rank = _rank(tuner, names, kind, svd_rank)
        # Scalings go into the factors.
        changes |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        if changes_base(first.init_lora_weights):  # the base has given up its part already
            changes["init_lora_weights"] = True
        decompose = functools.partial(
            _decomposed, rank=rank, clamp=svd_clamp, full_matrices=svd_full_matrices, driver=svd_driver
        )
        combine = {"svd": decompose, "cat": _side_by_side, "linear": _summed}[kind]
        combined = _combined(tuner, weighted, lambda layer, found: combine(_factors(layer, found)))
    elif isinstance(first, AdaLoraConfig):
        raise TypeError("add_weighted_adapter: AdaLoRA's adapters cannot be combined; use LoRA")
    else:
        raise NotImplementedError(f"add_weighted_adapter: not built for {first.peft_type.value}")
    changes["modules_to_save"] = _modules_to_save(tuner, names)
    plan = tuner.plan(dataclasses.replace(first, **changes), adapter_name, loading=True)
    if {target.name for target in plan.targets} != combined.keys():  # fields of the first leave out or take in others
        changes |= _exactly(tuner, first, combined)
        plan = tuner.plan(dataclasses.replace(first, **changes), adapter_name, loading=True)
    tuner.inject(plan, adapter_name)
    for path, layer in tuner.layers.of(adapter_name).items():
        values = combined[path]
        for target, value in zip(_tensors(layer, adapter_name, len(values)), values, strict=True):
            target.zero_()
            target[tuple(slice(size) for size in value.shape)] = value
    for wrapper in tuner.wrappers.values():
        for name in names:
            if name in wrapper.modules_to_save:
                trained = wrapper.modules_to_save[name].state_dict()
                wrapper.modules_to_save[adapter_name].load_state_dict(trained)
    tuner.set_requires_grad(adapter_name, False)


# What is combined, and whether it can be ------------------------------------------------------------------------------


def _weighted(tuner: AdapterModel, names: list[str], weights: Sequence[float]) -> dict[str, float]:
    if not names:
        raise ValueError("adapters: must name at least one adapter")
    for name in names:
        if name not in tuner.peft_config:
            raise ValueError(f"adapters: Adapter {name} does not exist, there are {sorted(tuner.peft_config)}")
    if len(set(names)) != len(names):
        raise ValueError(f"adapters: must name each adapter once, got {names}")
    if len(weights) != len(names):
        raise ValueError(f"weights: must be one number for each of {len(names)} adapters, got {len(weights)}")
    methods = {tuner.peft_config[name].peft_type.value for name in names}
    if len(methods) > 1:
        raise ValueError(f"adapters: are of different methods, {' and '.join(sorted(methods))}")
    for path, wrapper in tuner.wrappers.items():
        if sum(name in wrapper.modules_to_save for name in names) > 1:
            raise ValueError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save: {path}"
            )
    return {name: float(weight) for name, weight in zip(names, weights, strict=True)}


def _rank(tuner: AdapterModel, names: list[str], kind: str, svd_rank: int | None) -> int:
    configs = [tuner.peft_config[name] for name in names]
    ranks = [max([config.r, *(config.rank_pattern or {}).values()]) for config in configs]
    if kind in _NOT_BUILT:
        raise NotImplementedError(f"combination_type: {kind!r} is not built; there are 'svd', 'cat' and 'linear'")
    if kind not in ("svd", "cat", "linear"):
        raise ValueError(f"Invalid combination_type: {kind!r}; there are 'svd', 'cat' and 'linear'")
    if kind == "linear" and len(set(ranks)) > 1:
        raise ValueError(
            f"All adapters must have the same r value when using combination_type linear, got {ranks} for {names}"
        )
    if svd_rank is not None and (not isinstance(svd_rank, int) or svd_rank < 1):
        raise ValueError(f"svd_rank must be a positive integer or None, got {svd_rank!r}")
    return {"linear": ranks[0], "cat": sum(ranks), "svd": svd_rank or max(ranks)}[kind]


def _union(tuner: AdapterModel, names: list[str], field: str) -> set[str] | str | None:
    values = [getattr(tuner.peft_config[name], field) for name in names]
    if len({type(value) for value in values}) > 1:
        raise ValueError(f"{field}: all adapters must name their modules as a regular expression, or all as a set")
    if isinstance(values[0], str):
        return "|".join(f"({value})" for value in values)
    return functools.reduce(operator.or_, map(set, values)) if values[0] is not None else None


def _exactly(tuner: AdapterModel, config: LoraConfig | IA3Config, paths: Collection[str]) -> dict[str, Any]:
    """Fields of ``config`` by which it names these layers and no others."""
    fields: dict[str, Any] = {"target_modules": set(paths), "exclude_modules": None}
    if isinstance(config, IA3Config):
        feedforward = {path for path in paths if tuner.layers.get(path, IA3Layer).is_feedforward}
        return fields | {"feedforward_modules": feedforward}
    return fields | {"layers_to_transform": None, "layers_pattern": None}


def _modules_to_save(tuner: AdapterModel, names: list[str]) -> list[str] | None:
    modules = [name for adapter in names for name in tuner.peft_config[adapter].modules_to_save or ()]
    return list(dict.fromkeys(modules)) or None


# The sums -------------------------------------------------------------------------------------------------------------


def _combined(
    tuner: AdapterModel,
    weighted: dict[str, float],
    combine: Callable[[AdapterLayer, dict[str, float]], tuple[Tensor, ...]],
) -> dict[str, tuple[Tensor, ...]]:
    """What ``combine`` gives for each layer that has some of the adapters."""
    found = {}
    for path, layer in tuner.layers.named():
        present = {name: weight for name, weight in weighted.items() if layer.has_adapter(name)}
        if present:
            found[path] = combine(layer, present)
    return found


def _sum_of_vectors(layer: AdapterLayer, weighted: dict[str, float]) -> tuple[Tensor]:
    return (sum(tensor * weight for name, weight in weighted.items() for tensor in _tensors(layer, name, 1)),)


def _factors(layer: AdapterLayer, weighted: dict[str, float]) -> _Factors:
    return [(*_tensors(layer, name, 2), weight * layer.scaling[name]) for name, weight in weighted.items()]


def _tensors(layer: AdapterLayer, name: str, count: int) -> tuple[Tensor, ...]:
    """An adapter's tensors; the first of a pair parted by the groups that its rows belong to."""
    tensors = layer.adapter_tensors(name)
    if len(tensors) != count:
        raise NotImplementedError(f"add_weighted_adapter: adapter {name!r} has {', '.join(tensors)}, which have no sum")
    first, *others = tensors.values()
    groups = getattr(layer.get_base_layer(), "groups", 1)
    return (first.unflatten(0, (groups, -1)) if others else first), *others


def _side_by_side(factors: _Factors) -> tuple[Tensor, Tensor]:
    return torch.cat([a * weight for a, _, weight in factors], dim=1), torch.cat([b for _, b, _ in factors], dim=1)


def _summed(factors: _Factors) -> tuple[Tensor, Tensor]:
    if len({a.shape for a, _, _ in factors}) > 1:
        raise ValueError("All adapters must have the same r value in every layer when using combination_type linear")
    total_a = sum(a.float() * math.copysign(math.sqrt(abs(weight)), weight) for a, _, weight in factors)
    total_b = sum(b.float() * math.sqrt(abs(weight)) for _, b, weight in factors)
    return total_a, total_b


def _decomposed(
    factors: _Factors, rank: int, clamp: float | None, full_matrices: bool, driver: str | None
) -> tuple[Tensor, Tensor]:
    a, b, _ = factors[0]
    if a.shape[0] > 1:
        raise NotImplementedError("combination_type: 'svd' is not built for a convolution with groups; there is 'cat'")
    # Convolutions: a has the kernel, b is 1 x 1.
    total = sum((b.float().flatten(1) @ a[0].float().flatten(1)) * weight for a, b, weight in factors)
    u, s, vh = torch.linalg.svd(total, full_matrices=full_matrices, driver=driver)
    total_b, total_a = u[:, :rank] * s[:rank], vh[:rank]
    if clamp is not None:
        limit = torch.quantile(torch.cat([total_b.flatten(), total_a.flatten()]), clamp)
        total_b, total_a = total_b.clamp(-limit, limit), total_a.clamp(-limit, limit)
    return total_a.reshape(1, -1, *a.shape[2:]), total_b.reshape(b.shape[0], -1, *b.shape[2:])
