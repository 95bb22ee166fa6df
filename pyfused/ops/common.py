"""What the ops share: which device has kernels, dropout, autocast, and errors that speak of the public arguments."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nested import nested_tensor_from_jagged
from torch.overrides import has_torch_function

from .. import _library

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The native ops check all that they are given, so a good call pays nothing for Python's checks: they run where a call
# failed, to say what was wrong in terms of the public arguments, and first where no native op would see the arguments.
CALL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)


def explain(check, *arguments) -> None:
    try:
        check(*arguments)
    except (TypeError, ValueError, IndexError) as clear:
        raise clear from None


def has_native(x: Tensor, on_cuda: bool = False) -> bool:
    """Whether the op is to run native kernels for x; ``on_cuda``: whether it has any for GPUs, as not every op does."""
    # Forward-mode differentiation (torch.func.jvp among it) would pass the native ops by: the reference has it.
    if x.is_cpu:
        kernels = _library.has_kernel("cpu")
    else:
        kernels = on_cuda and x.is_cuda and _library.has_kernel("cuda") and _library.runs_on_gpu(x.get_device())
    return kernels and forward_ad._current_level < 0


def takes_native_autograd(*tensors: Tensor | None) -> bool:
    """Whether a call may go to the op's C++ form with its gradient, and nothing in Python has to see what it does."""
    return (
        _library.autograd is not None
        and not is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not has_torch_function(tensors)
    )


def is_plain_call(x: Tensor, *tensors: Tensor | None) -> bool:
    """:func:`has_native` of an x on the CPU, :func:`takes_native_autograd` and no autocast, asked at once: after a
    product whose weight has filled the caches, what a small call costs is the Python that it goes through."""
    native = _library.autograd
    return native is not None and not is_compiling() and native.is_plain_call(x, *tensors)


def on_values(op: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, other: Tensor | None = None) -> Tensor:
    """``op(x, other)``, which works row by row, on jagged tensors: their rows are those of their values."""
    until = x._ragged_idx + 1
    if other is not None and other is not x and other.shape[:until] != x.shape[:until]:
        raise ValueError(f"jagged tensors must have the same rows, got {tuple(x.shape)} and {tuple(other.shape)}")
    values = x.values()
    y = op(values, values if other is x else None if other is None else other.values())
    known = x._maybe_min_seqlen, x._maybe_max_seqlen  # which would else be asked of the offsets, as of a GPU's result
    return nested_tensor_from_jagged(y, x.offsets(), x.lengths(), x._ragged_idx, *known)


def is_sparse(x) -> bool:
    """Whether x is a sparse tensor, or a nested one with strides, which linear layers take and no kernel knows."""
    return isinstance(x, Tensor) and x.layout is not torch.jagged and (x.layout is not torch.strided or x.is_nested)


def refuse_dropout(op: str, dropout_p: float, training: bool) -> None:
    if active_dropout(op, dropout_p, training) > 0.0:
        raise TypeError(f"{op}: dropout needs a strided or jagged x, got a sparse or nested one")


def allows_tf32(x: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether fp32 products of a call on a GPU may be TF32 products: torch's switch, ``torch.backends.cuda.matmul``."""
    return x.is_cuda and torch.float32 in (x.dtype, a.dtype, b.dtype) and _tf32_switch()


@torch.compiler.assume_constant_result  # torch.compile guards the switch, and compiles again where it was turned
def _tf32_switch() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def autocasts(x: Tensor) -> bool:
    # The meta device has no autocast, and asking it for one raises.
    return torch.is_autocast_enabled("cpu") if x.is_cpu else not x.is_meta and torch.is_autocast_enabled(x.device.type)


def without_autocast(x: Tensor):
    """The reference accumulates in fp32 by linear layers that autocast would round."""
    return torch.autocast(x.device.type, enabled=False) if autocasts(x) else nullcontext()


def autocast(tensor, dtype: torch.dtype):
    """What autocast does to an argument of ``F.linear``: fp64, and whatever is not a floating tensor, stays."""
    if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
        return tensor.to(dtype)
    return tensor


def refuse_double_backward(op: str, reference: str) -> None:
    """An error inside a backward that is to be differentiated; ``reference``: who can be."""
    # Gradients are recorded in a backward only under create_graph=True. Torch's once_differentiable would let through
    # what does not depend on a differentiable grad_y, and a gradient penalty would lose this layer's share in silence.
    if torch.is_grad_enabled() and not is_compiling():
        raise RuntimeError(
            f"{op}: backward with create_graph=True is not supported (the op has no second derivative); "
            f"{reference} has one"
        )


def check_one_device(first: Tensor, /, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != first.device:
            raise RuntimeError(
                f"pyfused: {name} must be on {first.device} like the other arguments, got {tensor.device}"
            )


def active_dropout(op: str, dropout_p: float, training: bool) -> float:
    if type(dropout_p) is not float or not 0.0 <= dropout_p < 1.0:  # no call for what is right, in every layer
        check_dropout(op, dropout_p)
        dropout_p = float(dropout_p)
    return dropout_p if training else 0.0


def draw_seed(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A seed from torch's generator of x's device, or from ``generator``."""
    if is_plain_call(x):
        return _library.autograd.draw_seed(x, generator)  # the same number, for a quarter of the time
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=x.device, generator=generator)


def seed_generator(x: Tensor) -> torch.Generator:
    """The generator that seeds for x are drawn from."""
    return torch.default_generator if x.is_cpu else torch.cuda.default_generators[x.device.index]


def can_know_seeds(x: Tensor) -> bool:
    """Whether :func:`draw_known_seed` can be called: a CUDA graph draws its seeds when it is replayed."""
    return x.is_cpu or not torch.cuda.is_current_stream_capturing()


def draw_known_seed(x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, object]:
    """A seed, and what tells it from others without waiting for the device.

    On the CPU that is the number. A GPU's generator counts on the host, so there it is what the seed is drawn from.
    """
    if x.is_cpu:
        seed = draw_seed(x, generator)
        return seed, seed.item()
    generator = generator or seed_generator(x)
    drawn_from = generator.initial_seed(), generator.get_offset()
    return draw_seed(x, generator), drawn_from


def current_stream(x: Tensor) -> int | None:
    """What work on x is enqueued on now; None on the CPU."""
    return torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None


def check_dropout(op: str, dropout_p) -> None:
    if not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{op}: dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")


def check_seed(op: str, x: Tensor, seed) -> None:
    if seed is None:
        return
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"{op}: seed must be an int64 tensor with one element or None, got {got}")
    if seed.numel() != 1:
        raise ValueError(f"{op}: seed must have one element, got {list(seed.shape)}")
    if seed.device != x.device:
        raise TypeError(f"{op}: seed must be on x's device {x.device}, got {seed.device}")


def check_floating(op: str, x: Tensor, /, **tensors: Tensor) -> None:
    """Floating tensors on x's device, float64 only with a float64 x."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != x.device:
            raise TypeError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64 and x.dtype != torch.float64:
            raise TypeError(f"{op}: {name} can be float64 only with a float64 x, got x of {x.dtype}")


def check_linear(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, n: int) -> None:
    """The frozen layer's ``[n, K]`` and ``[n]`` in x's dtype, on its device."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{op}: {name} must have x's dtype {x.dtype}, got {tensor.dtype}")
        if tensor.device != x.device:
            raise TypeError(f"{op}: {name} must be on x's device {x.device}, got {tensor.device}")
    expected = (n, x.shape[-1])
    if tuple(weight.shape) != expected:
        raise ValueError(f"{op}: weight must have shape {list(expected)}, got {list(weight.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"{op}: bias must have shape [{n}], got {list(bias.shape)}")
