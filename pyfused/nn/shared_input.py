"""Layers that read the same x compute together: query, key and value of an attention, gate and up of an MLP.

A model calls its projections one after the other and nothing tells the first that others will follow. But their names
do: layers of one parent that have such names are a group (:func:`share_inputs`). The first of them that is called with
an x computes the results of all by one ``ops.lora_linear_shared``, and the others take theirs when they are called.

**A result is taken only where the layer alone would compute the same bits now**: x is the same object in the same
version, parameters and settings are the same, grad mode, autocast and stream as well, and the dropout seed that the
layer draws, as it always does, is the one that was foreseen for it. Otherwise the layer computes alone. So a wrong
guess costs time and never changes a result, and torch's generator moves as if there were no groups. A guess that is
wrong twice in a row (cross-attention's query and key) is not made again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.common import (
    autocasts,
    can_know_seeds,
    current_stream,
    draw_known_seed,
    draw_seed,
    has_native,
    seed_generator,
)
from .adapter import layers_around
from .svd import RankScale

# weight, bias, a, b, scale, dropout_p, training: what ops.lora_linear takes between x and the seed; the scale of
# AdaLoRA's ranks is computed where it is used.
Arguments = tuple[Tensor, Tensor | None, Tensor, Tensor, float | RankScale, float, bool]

# Names of layers in one parent that get the same x, in the order in which models call them.
TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, OPT, BART, CLIP and most others
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5, MPNet
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa-v2
    ("to_q", "to_k", "to_v"),  # diffusers
    ("gate_proj", "up_proj"),  # Llama
    ("wi_0", "wi_1"),  # T5 v1.1
    ("w1", "w3"),  # Mixtral
)

# Results that a layer left over this often in a row are not computed for it any more.
MISSES = 2

# Elements of x from which a group pays: it costs some 40 us without and 80 us with gradients, on any x.
_MIN_ELEMENTS = 1 << 17

_hooks_on_saved_tensors = torch._C._autograd._top_saved_tensors_default_hooks


class Member(Protocol):
    """A layer of a group."""

    _shared_input: SharedInput | None

    def fused_arguments(self, x: Tensor) -> Arguments | None:
        """What ``forward(x)`` gives to ``ops.lora_linear`` if that one call is all it does; else None."""


class SharedInput:
    """A group of layers that may read the same x. Each thread has its own last call and its own wrong guesses.

    It does not keep its layers alive. A copy or pickle of a model has new groups, which its layers join as they are
    made (``__setstate__``).
    """

    def __init__(self) -> None:
        self._layers: list[ref] = []
        self._threads = threading.local()

    def __deepcopy__(self, memo: dict) -> SharedInput:
        return SharedInput()

    def __reduce__(self) -> tuple:
        return SharedInput, ()

    def add(self, layer: Member) -> None:
        self._layers.append(ref(layer))

    def misses(self, leader: Member) -> dict[int, int]:
        """How often in a row each layer, by its id, left over what ``leader`` computed for it in this thread."""
        return self._threads.__dict__.setdefault("misses", {}).setdefault(id(leader), {})

    def others(self, leader: Member) -> list[Member]:
        """Who may read the x that ``leader`` is called with; nobody if it did not join, as replicas do not
        (nn.DataParallel).
        """
        misses, layers = self.misses(leader), [reference() for reference in self._layers]
        if not any(layer is leader for layer in layers):
            return []
        return [
            layer
            for layer in layers
            if layer not in (None, leader) and layer._shared_input is self and misses.get(id(layer), 0) < MISSES
        ]

    def linear(self, layer: Member, x: Tensor, arguments: Arguments) -> Tensor:
        """``ops.lora_linear(x, *arguments)``, computed now or with the results of a layer before."""
        if not _can_share(x, arguments):
            return ops.lora_linear(x, *op_arguments(arguments))
        state = self._threads.__dict__
        call: _Call | None = state.get("call")
        if call is not None:
            if call.x() is x and call.leader() is not layer:
                return _follow(call, layer, x, arguments)
            call.close()
        state["call"] = None
        misses, members = self.misses(layer), []
        for other in self.others(layer):
            found = other.fused_arguments(x)
            if found is not None and _can_share(x, found):
                members.append((other, found))
        if not members:
            return ops.lora_linear(x, *op_arguments(arguments))
        seeds = _foresee_seeds(x, arguments, members)
        found = [arguments, *(found for _, found in members)]
        projections = [(*op_arguments(one), seed) for one, (seed, _) in zip(found, seeds, strict=True)]
        try:
            y, *results = ops.lora_linear_shared(x, projections)
        except (RuntimeError, TypeError, ValueError):
            # Another layer's parameters may be unusable until it is called (sharded, offloaded), and its errors are
            # its own.
            misses.update((id(other), MISSES) for other, _ in members)
            return ops.lora_linear(x, *op_arguments(arguments), seeds[0][0])
        known_seeds = [known for _, known in seeds[1:]]
        state["call"] = _Call(layer, x, y, members, known_seeds, results, misses)
        return y


def op_arguments(arguments: Arguments) -> tuple:
    """What ``ops.lora_linear`` takes between x and the seed."""
    if type(arguments[4]) is not RankScale:
        return arguments
    weight, bias, a, b, scale, *options = arguments
    return weight, bias, *scale.factors(a, b), *options


def _follow(call: _Call, layer: Member, x: Tensor, arguments: Arguments) -> Tensor:
    result = call.results.pop(id(layer), None)
    if result is None:
        return ops.lora_linear(x, *op_arguments(arguments))
    seed, known = draw_known_seed(x) if _drops(arguments) else (None, None)
    if call.state == _state(x) and call.mode == _mode(x) and result.is_of(arguments) and known == result.known_seed:
        call.misses.pop(id(layer), None)
        return result.y
    call.misses[id(layer)] = call.misses.get(id(layer), 0) + 1
    return ops.lora_linear(x, *op_arguments(arguments), seed)


class _Result:
    """What was computed for a layer, and from what."""

    def __init__(self, arguments: Arguments, known_seed: object, y: Tensor) -> None:
        self.arguments, self.known_seed, self.y = arguments, known_seed, y
        self.state = _state(*_tensors(arguments))

    def is_of(self, arguments: Arguments) -> bool:
        return (
            all(one is other for one, other in zip(arguments[:4], self.arguments[:4], strict=True))
            and arguments[4:] == self.arguments[4:]
            and _state(*_tensors(arguments)) == self.state
        )


class _Call:
    """What a layer computed for others along with its own result.

    Their results are dropped when the leader's own dies (or x, where no graph is built), so nothing outlives a forward
    that was left half-way, and no graph is kept that the leader's result does not keep as well. A model that drops the
    leader's result before it calls the next layer, as ``sigmoid(gate(x)) * up(x)`` does, gets nothing out of a group
    in training.
    """

    def __init__(
        self, leader: Member, x: Tensor, y: Tensor, members: list, known_seeds: list, results: list, misses: dict
    ) -> None:
        self.leader, self.x, self.state, self.mode = ref(leader), ref(x), _state(x), _mode(x)
        self.misses = misses
        self.results = results = {
            id(layer): _Result(arguments, known_seed, result)
            for (layer, arguments), known_seed, result in zip(members, known_seeds, results, strict=True)
        }
        # Not self in the callback: a cycle would keep the results until the garbage collector runs.
        self.anchor = ref(y if y.requires_grad else x, lambda _: _drop(results, misses))

    def close(self) -> None:
        _drop(self.results, self.misses)


def _drop(results: dict[int, _Result], misses: dict[int, int]) -> None:
    for key in list(results):
        if results.pop(key, None) is not None:  # the callback may come from autograd's thread
            misses[key] = misses.get(key, 0) + 1


def _can_share(x: Tensor, arguments: Arguments) -> bool:
    return (
        type(x) is Tensor
        and x.numel() >= _MIN_ELEMENTS
        and has_native(x, on_cuda=True)
        and (not _drops(arguments) or can_know_seeds(x))
        and type(arguments[4]) is not Tensor  # a scale that compares as a number
        and not arguments[0].requires_grad
        # Inference tensors have no version, so a change in place would pass unseen.
        and not x.is_inference()
        and not any(tensor is not None and tensor.is_inference() for tensor in _tensors(arguments))
        # Who counts saved tensors, as checkpointing without reentrant autograd does, must find as many in a second run.
        and (_hooks_on_saved_tensors(False) is None or not torch.is_grad_enabled())
    )


def _tensors(arguments: Arguments) -> tuple[Tensor | None, ...]:
    scale = arguments[4]
    return arguments[:4] if type(scale) is not RankScale else (*arguments[:4], *scale.tensors)


def _drops(arguments: Arguments) -> bool:
    return arguments[5] > 0.0 and arguments[6]


def _state(*tensors: Tensor | None) -> list[tuple[int, int, bool]]:
    """What tells whether tensors were changed; not where that was done behind autograd's back (``.data.mul_()``)."""
    return [(tensor._version, tensor.data_ptr(), tensor.requires_grad) for tensor in tensors if tensor is not None]


def _mode(x: Tensor) -> tuple:
    autocast = autocasts(x)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else None
    return torch.is_grad_enabled(), autocast, dtype, current_stream(x)


def _foresee_seeds(x: Tensor, arguments: Arguments, members: list) -> list[tuple[Tensor | None, object]]:
    """The leader's seed from torch's generator, and those that the followers will draw, from a copy of it; each with
    what it is known by.
    """
    seeds = [(draw_seed(x), None) if _drops(arguments) else (None, None)]
    ahead = None
    for _, found in members:
        if not _drops(found):
            seeds.append((None, None))
            continue
        ahead = ahead or seed_generator(x).clone_state()
        seeds.append(draw_known_seed(x, ahead))
    return seeds


def share_inputs(parents: Iterable[nn.Module], kinds: tuple[type[nn.Module], ...]) -> None:
    """Make groups of the layers of these classes whose names in one of ``parents`` say so; ``PYFUSED_SHARED_INPUT=0``
    makes none.
    """
    if os.environ.get("PYFUSED_SHARED_INPUT") == "0":
        return
    for parent in parents:
        for names in TOGETHER:
            found = (parent._modules.get(name) for name in names)
            # HF PEFT's layers, where they are fused, are none of ours
            around = (layer for child in found for layer in (child, *layers_around(child)))
            layers = [layer for layer in dict.fromkeys(around) if isinstance(layer, kinds)]
            groups = {layer._shared_input for layer in layers}
            if len(layers) < 2 or (len(groups) == 1 and None not in groups):
                continue
            group = SharedInput()
            for layer in layers:
                layer._shared_input = group
                group.add(layer)


def rejoin(layer: Member) -> None:
    """For a layer that was copied or unpickled: it joins the copy of its group."""
    if layer._shared_input is not None:
        layer._shared_input.add(layer)
