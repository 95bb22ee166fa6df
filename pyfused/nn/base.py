"""What may be read out of a module and computed in its place, and what must be called."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, device, dtype, empty, float32, nn, strided
from torch.compiler import is_exporting, substitute_in_graph
from torch.nn import Linear

from .. import _library


def has_only_forward(*modules: nn.Module) -> bool:
    """True where calling each runs its class's ``forward`` and nothing else: no hooks, no ``forward`` of its own.

    Offloading (accelerate), sharding and quantisation libraries attach themselves in one of these ways. Hooks that are
    registered for all modules at once (``torch.nn.modules.module.register_module_forward_hook``) do not count: they are
    for profiling.
    """
    for module in modules:
        state = module.__dict__  # half the time of five attributes
        if (
            state["_forward_pre_hooks"]
            or state["_forward_hooks"]
            or state["_backward_pre_hooks"]
            or state["_backward_hooks"]
            or "forward" in state
        ):
            return False
    return True


if _library.autograd is not None:
    # The same in C++, which torch.compile traces as above.
    substitute_in_graph(_library.autograd.has_only_forward, skip_signature_check=True)(has_only_forward)
    has_only_forward = _library.autograd.has_only_forward


def _out_of_the_ordinary(*_: object) -> None:
    """Python has to look."""


# What LoraLinear._first_arguments finds in the usual layer, asked in C++ at once: a fifth of the time.
lora_arguments = _out_of_the_ordinary
if _library.autograd is not None:
    lora_arguments = _library.autograd.lora_arguments
    substitute_in_graph(lora_arguments, skip_signature_check=True)(_out_of_the_ordinary)


def is_plain_linear(module: nn.Module) -> bool:
    """True where calling ``module`` is ``F.linear(x, module.weight, module.bias)`` on plain tensors and nothing else.

    False for subclasses of ``nn.Linear`` (quantised layers, parametrisations), for anything attached to the module
    (:func:`has_only_forward`), and for a weight or bias that is no plain strided tensor (DTensor, quantised tensors).
    Such a base has to be called, and the adapter added to what it returns. Cheap enough for every call, and traceable.
    """
    return type(module) is Linear and has_only_forward(module) and _has_plain_parameters(module)


def is_plain_conv1d(module: nn.Module) -> bool:
    """:func:`is_plain_linear` for transformers' ``Conv1D``, whose weight is ``[in, out]``."""
    kind = type(module)
    named = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return named and has_only_forward(module) and _has_plain_parameters(module)


def plain_weights(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight ``[out, in]`` and bias of a plain linear layer or Conv1D, no copies; None for all others."""
    if is_plain_linear(module):
        return module._parameters["weight"], module._parameters["bias"]
    if is_plain_conv1d(module):
        return module._parameters["weight"].t(), module._parameters["bias"]
    return None


def _has_plain_parameters(module: nn.Module) -> bool:
    parameters = module._parameters
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if type(weight) in _PLAIN and weight.layout is strided:
        return bias is None or (type(bias) in _PLAIN and bias.layout is strided)
    return is_exporting() and all(tensor is None or _stands_for_plain(tensor) for tensor in (weight, bias))


def _stands_for_plain(tensor: Tensor) -> bool:
    """What torch.export puts in the place of a plain parameter while it traces; quantised ones stay what they are."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return type(tensor) in (FakeTensor, FunctionalTensor, *_PLAIN) and tensor.layout is strided


# A Tensor stands in for the Parameter under torch.func.functional_call and within FSDP1's forward.
_PLAIN = (nn.Parameter, Tensor)


def adapter_device(module: nn.Module) -> device | str | int:
    """Where the adapter of a module belongs: with its parameters, or where accelerate brings offloaded ones to.

    A module without parameters, such as dropout, is taken to be on the CPU.
    """
    parameter = next(module.parameters(), None)
    place = device("cpu") if parameter is None else parameter.device
    return getattr(getattr(module, "_hf_hook", None), "execution_device", place) if place.type == "meta" else place


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has taken the module's parameters away, and brings them for the time of a call."""
    return hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False))


def own_parameters(module: nn.Module) -> Mapping[str, Tensor | None]:
    """A module's parameters, without those of its children, to be read and not called: entries of an
    ``nn.ParameterDict``, or a weight that something else than the module's ``forward`` multiplies by.

    Those that accelerate has offloaded are brought as for a call of the module. They live as long as the caller holds
    them, so they are asked for in each forward.
    """
    if "_hf_hook" not in module.__dict__:
        return module._parameters
    from accelerate.utils import align_module_device

    with align_module_device(module):
        return dict(module._parameters)


def match_base(tensor: Tensor, layer: nn.Module, autocast_adapter_dtype: bool) -> Tensor:
    """A new adapter's values as they belong to ``layer``: on its device, rounded to its dtype.

    Args:
        autocast_adapter_dtype: hold what was rounded to a 16-bit (or 8-bit floating) dtype in float32.
    """
    tensor = tensor.to(adapter_device(layer), dtype=layer_dtype(layer))
    return tensor.to(adapter_dtype(tensor.dtype, autocast_adapter_dtype))


def copier(layer: nn.Module, autocast_adapter_dtype: bool) -> Callable[[Tensor], nn.Parameter]:
    """What makes :func:`frozen_copy` of tensors as :func:`match_base` would have them."""
    like = match_base(empty(0), layer, autocast_adapter_dtype)
    return lambda values: frozen_copy(values, like.device, like.dtype)


def frozen_copy(values: Tensor, device: device | str | int, dtype: dtype) -> nn.Parameter:
    """A tensor of a file as an adapter's own, which is not trained."""
    copied = empty(values.shape, dtype=dtype, device=device).copy_(values.detach())
    return nn.Parameter(copied, requires_grad=False)


def adapter_dtype(rounded_to: dtype, autocast_adapter_dtype: bool) -> dtype:
    """What holds an adapter's values that were rounded to a dtype, see :func:`match_base`."""
    return float32 if autocast_adapter_dtype and rounded_to.itemsize < 4 else rounded_to


def layer_dtype(layer: nn.Module) -> dtype | None:
    """The dtype that a layer computes in; None where that does not show."""
    # bitsandbytes' 4-bit weights are integers
    found = getattr(layer, "compute_dtype", layer.weight.dtype)
    return found if found is not None and found.is_floating_point else None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D, a linear layer with a transposed weight (GPT-2); known by name, to import nothing."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")
