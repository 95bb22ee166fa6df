"""What may be read out of a module and computed in its place, and what must be called."""

from __future__ import annotations

from torch import Tensor, nn, strided


def has_only_forward(module: nn.Module) -> bool:
    """True where calling ``module`` runs its class's ``forward`` and nothing else: no hooks, no ``forward`` of its own.

    Offloading (accelerate), sharding and quantisation libraries attach themselves in one of these ways. Hooks that are
    registered for all modules at once (``torch.nn.modules.module.register_module_forward_hook``) do not count: they are
    for profiling.
    """
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def is_plain_linear(module: nn.Module) -> bool:
    """True where calling ``module`` is ``F.linear(x, module.weight, module.bias)`` on plain tensors and nothing else.

    False for subclasses of ``nn.Linear`` (quantised layers, parametrisations), for anything attached to the module
    (:func:`has_only_forward`), and for a weight or bias that is no plain strided tensor (DTensor, quantised tensors).
    Such a base has to be called, and the adapter added to what it returns. Cheap enough for every call, and traceable.
    """
    if type(module) is not nn.Linear or not has_only_forward(module):
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return _is_plain(weight) and (bias is None or _is_plain(bias))


def _is_plain(parameter: Tensor | None) -> bool:
    # A Tensor stands in for the Parameter under torch.func.functional_call and within FSDP1's forward.
    return type(parameter) in (nn.Parameter, Tensor) and parameter.layout is strided
