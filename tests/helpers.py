"""What the op tests share: random cases, three ways to compute one, and the rule for how far apart they may be."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import threading
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyfused import _library
from pyfused.reference import lora as reference
from pyfused.reference.dropout import keep_mask, keep_scale

# Where these tests run, see conftest.py. The reference would serve a device without kernels, and prove nothing.
DEVICE = torch.get_default_device()
if not _library.has_kernel(DEVICE.type):
    raise RuntimeError(f"PYFUSED_TEST_DEVICE: this build of pyfused has no kernels for {DEVICE.type!r}")
_emulation = os.environ.get("PYFUSED_TEST_EMULATION")
EMULATED = _emulation is not None  # every number takes its time: tests of very many take fewer
if EMULATED:
    torch.ops.load_library(_emulation)  # after pyfused's own: of two kernels for one device the later counts
    if _library.autograd is not None:
        _library.autograd.call_cpu_kernels(False)
# Whose kernels run: the CPU's, or those of CUDA, on a GPU or emulated.
CUDA_KERNELS = DEVICE.type == "cuda" or EMULATED
# Whether base products in 16 bits are loops of our own, whose sums have another order than the vendor's.
OWN_NARROW_PRODUCTS = (
    not CUDA_KERNELS
    and DEVICE.type == "cpu"
    and _library._C.cpu_capability() in ("DEFAULT", "AVX2")
    and platform.machine() == "x86_64"
)
# Whether the bits of a row of torch's fp32 products depend on the rows beside it: MKL's without AVX-512.
ROWS_CHANGE_BITS = "AVX512" not in torch.backends.cpu.get_cpu_capability()
cpu_only = pytest.mark.skipif(DEVICE.type != "cpu", reason="about the CPU kernels or CPU memory")

# Where the tests marked "cuda" run: on the CPU they only try themselves.
CUDA_DEVICE = torch.device(os.environ.get("PYFUSED_CUDA_TESTS_ON", "cuda:0"))
# A level that is emulated: this machine's vendor has no products like those of a machine with that level.
EMULATED_LEVEL = _library._C.cpu_capability() in _library._C.build_info()["cpu_capabilities_emulated"]
cpu_kernels_only = pytest.mark.skipif(CUDA_KERNELS, reason="about the CPU kernels")
needs_gpu = pytest.mark.skipif(CUDA_DEVICE.type == "cpu", reason="needs a GPU, not a dry run on the CPU")

# A default device of torch's is a function mode, and what Python has to see is not done in C++.
native_autograd = pytest.mark.skipif(
    _library.autograd is None or "PYFUSED_TEST_DEVICE" in os.environ,
    reason="gradients are not in C++: pyfused was built with another torch, or PYFUSED_TEST_DEVICE is set",
)

NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# (dtype of x and the base, dtype of the adapter). fp32 adapters on a 16-bit base are HF PEFT's default.
DTYPE_PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
]

# A result that is held in fp32 or fp64 may, besides twice eager's own error, differ by this much of its largest value:
# sums of a thousand terms in another order.
_RELATIVE = {torch.float32: 1.3e-6, torch.float64: 1e-13}


def leaves_mask(dtype: torch.dtype, m: int, n: int, k: int, r: int) -> bool:
    """Whether LoRA's forward in C++ leaves dropout's mask to the backward: csrc/cpu/kernels/lora.cpp, lora_kernels."""
    in_tiles = m >= 64 and min(k, n) >= 32 and r <= 64
    return _library._C.cpu_capability() == "AMX" and dtype == torch.bfloat16 and in_tiles


TENSORS = ("x", "weight", "bias", "a", "b", "scale")


def readable_id(value: object) -> str | None:
    """pytest id: a dtype or a tuple of dtypes by its short name, a shape as 3x5; None leaves pytest its own."""
    if isinstance(value, torch.dtype):
        return NAMES[value]
    if isinstance(value, tuple) and value and all(isinstance(item, torch.dtype) for item in value):
        return "+".join(NAMES[item] for item in dict.fromkeys(value))
    if isinstance(value, tuple) and value and all(isinstance(item, int) for item in value):
        return "x".join(map(str, value))
    return None


def run_in_threads(work: Callable[..., object], arguments: Iterable[tuple]) -> None:
    """``work`` on each of these arguments, all at the same time; what one of them raises is raised here."""
    errors: list[BaseException] = []

    def run(*each: object) -> None:
        try:
            work(*each)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def seed_tensor(value: int) -> Tensor:
    return torch.tensor([value], dtype=torch.int64)


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one LoRA call and the gradient that flows into its result."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scale: float | Tensor
    dropout_p: float
    seed: Tensor
    grad_y: Tensor

    @property
    def options(self) -> dict[str, object]:
        return {"dropout_p": self.dropout_p, "training": True, "seed": self.seed}

    def replace(self, **changes: object) -> Case:
        return dataclasses.replace(self, **changes)

    def map(self, function: Callable[[Tensor], Tensor]) -> Case:
        """Every tensor replaced by what ``function`` makes of it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Case(**{name: function(v) if isinstance(v, Tensor) else v for name, v in fields.items()})

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in one dtype."""
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def on(self, device: torch.device | str) -> Case:
        """The same numbers on a device."""
        return self.map(lambda tensor: tensor.to(device))


def make_case(
    lead: int | tuple[int, ...],
    n: int,
    k: int,
    r: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    *,
    bias: bool = True,
    vector: bool = False,
    dropout_p: float = 0.0,
    seed: int = 0,
) -> Case:
    """Random case whose base product, delta and gradients all are of order one; the same numbers on every device."""
    generator = torch.Generator().manual_seed(1000 + seed)
    adapter_dtype = adapter_dtype or dtype
    lead = (lead,) if isinstance(lead, int) else lead

    def normal(*shape: int, to: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * std).to(DEVICE, to)

    return Case(
        x=normal(*lead, k, to=dtype),
        weight=normal(n, k, to=dtype, std=max(k, 1) ** -0.5),
        bias=normal(n, to=dtype) if bias else None,
        a=normal(r, k, to=adapter_dtype, std=max(k, 1) ** -0.5),
        b=normal(n, r, to=adapter_dtype, std=r**-0.5),
        scale=normal(r, to=adapter_dtype) + 1.0 if vector else 1.5,
        dropout_p=dropout_p,
        seed=seed_tensor(0x1234_5678_9ABC_DEF0 + seed),
        grad_y=normal(*lead, n, to=dtype),
    )


def eager_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float | Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
) -> Tensor:
    """What one writes without pyfused, with the same mask; each step rounds to the wider of x's and a's dtype."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, a.dtype), b.dtype)
    dropped = x.to(dtype)
    if dropout_p > 0.0:
        keep = keep_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], dropout_p).view(x.shape)
        dropped = dropped * keep * keep_scale(dropout_p)
    s = F.linear(dropped, a.to(dtype))
    if isinstance(scale, Tensor):
        delta = F.linear(s * scale.to(dtype), b.to(dtype))
    else:
        delta = F.linear(s, b.to(dtype)) * scale
    return (F.linear(x, weight, bias) + delta).to(x.dtype)


def evaluate(op: Callable[..., Tensor], case: Case, needs: Iterable[str] = ("x", "a", "b", "scale", "bias")) -> dict:
    """The result ``y`` and the gradients ``grad_<name>`` of what ``needs`` names (tensors only), strides kept."""
    arguments = {name: getattr(case, name) for name in TENSORS}
    leaves = {}
    for name in TENSORS:
        if isinstance(arguments[name], Tensor):
            arguments[name] = arguments[name].detach()
            if name in needs:
                leaves[name] = arguments[name].requires_grad_()
    y = op(**arguments, **case.options)
    grads = torch.autograd.grad(y, list(leaves.values()), case.grad_y) if leaves else ()
    return {"y": y.detach()} | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def ulp(value: float, dtype: torch.dtype) -> float:
    """Distance from ``value`` to the next larger number of ``dtype``."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** math.floor(math.log2(max(abs(value), info.tiny)))


def assert_error_rule(name: str, got: Tensor, eager: Tensor, exact: Tensor, ulps: int = 1) -> None:
    """``max|got - exact| <= 2 * max|eager - exact| + ulps ulp of max|exact|``, the rule of docs/design.md.

    ``exact`` is in fp64, ``eager`` is the plain computation in got's dtype. fp32 and fp64 results have more room than
    one ulp, see ``_RELATIVE``.
    """
    assert got.dtype == eager.dtype, f"{name}: dtype {got.dtype}, expected {eager.dtype}"
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    largest = exact.abs().max().item()
    error = (got.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    room = _RELATIVE[got.dtype] * largest if got.dtype in _RELATIVE else ulps * ulp(largest, got.dtype)
    # Written so that a NaN fails.
    assert error <= 2 * eager_error + room, (
        f"{name}: error {error:.3e} > 2 * eager's {eager_error:.3e} + {room:.3e} (largest value {largest:.3e})"
    )


def assert_matches_reference(op: Callable[..., Tensor], case: Case, needs: Iterable[str] = TENSORS) -> dict:
    """Result and gradients of ``op`` on ``case`` by the error rule; returns them."""
    needs = tuple(needs)
    got = evaluate(op, case, needs)
    exact = evaluate(reference.lora_linear, case.to(torch.float64), needs)
    eager = evaluate(eager_linear, case, needs)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_error_rule(name, value, eager[name], exact[name])
    return got


def delta_op(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, *rest: object, **options) -> Tensor:
    """``lora_linear`` put together from a plain base layer and ``lora_delta``."""
    from pyfused.ops import lora_delta

    return lora_delta(F.linear(x, weight, bias), x, a, b, *rest, **options)
