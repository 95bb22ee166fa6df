"""What a call costs where the arithmetic is nothing: x [2, 64], weight [64, 64], fp32, one thread.

python benchmarks/bench_host_overhead.py

Microseconds without gradients and with them, forward and backward; each op with its gradient in C++ and in Python. The
latter is what runs where torch is not that of the build; the switch that forces it here costs under 0.1 us a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import harness
import records
import torch
import torch.nn.functional as F
from harness import Workload
from in_parts import measure_in_parts
from torch import Tensor, nn

from pyfused import _library, ops, reference
from pyfused.nn import Bottleneck, IA3Linear, LoraLinear

ROWS, WIDTH, RANK, BOTTLENECK = 2, 64, 8, 16
SCALE = 2.0
TOLERANCE = 1e-5
# Above nn.Linear, in microseconds: nn.LoraLinear without gradients and with them.
GOALS = {"infer": 3.0, "train": 12.0}
STAGES = {"infer": "forward", "train": "full"}

Call = Callable[[], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """``stage``: "infer" without gradients, "train" with them; ``table``: which calls, a name in TABLES."""

    stage: str
    table: str

    @property
    def label(self) -> str:
        return f"{self.stage} {self.table}"


@dataclass(frozen=True)
class Timed:
    """A call and what it is held against.

    Attributes:
        trained: what its backward differentiates besides x.
        expected: the same in plain PyTorch; None where it computes nothing, or drops what its seed says.
        stages: in which it is timed.
        takes_cpp: it is timed with its gradient in C++ and in Python.
    """

    name: str
    call: Call
    trained: tuple[Tensor, ...] = ()
    expected: Call | None = None
    stages: tuple[str, ...] = tuple(STAGES)
    takes_cpp: bool = True


@dataclass(frozen=True)
class Tensors:
    linear: nn.Linear
    x: Tensor
    grad_y: Tensor
    training: bool


def make_tensors(training: bool) -> Tensors:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    return Tensors(linear, torch.randn(ROWS, WIDTH).requires_grad_(), torch.randn(ROWS, WIDTH), training)


def make_adapter() -> tuple[nn.Parameter, nn.Parameter]:
    """a ``[R, K]`` and b ``[N, R]``."""
    return nn.Parameter(torch.randn(RANK, WIDTH) / 8), nn.Parameter(torch.randn(WIDTH, RANK) / 8)


class OneGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad_y):
        return grad_y


class ThreeGradients(torch.autograd.Function):
    """Allocates and saves what LoRA does."""

    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, weight, a, b, x.new_empty((x.shape[0], a.shape[0])))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad_y):
        _, _, a, b, _ = ctx.saved_tensors
        return grad_y, None, a, b


def bases(t: Tensors) -> list[Timed]:
    x, weight, bias = t.x, t.linear.weight, t.linear.bias
    functional = partial(F.linear, x, weight, bias)
    return [
        Timed("F.linear", functional, takes_cpp=False),
        Timed("nn.Linear", partial(t.linear, x), expected=functional, takes_cpp=False),
    ]


def lora_linear(t: Tensors) -> Timed:
    a, b = make_adapter()
    arguments = (t.x, t.linear.weight, t.linear.bias, a, b, SCALE)
    expected = partial(reference.lora.lora_linear, *arguments)
    return Timed("ops.lora_linear", partial(ops.lora_linear, *arguments), (a, b), expected)


def lora(t: Tensors) -> list[Timed]:
    """The op, what is above it and what is below."""
    x, weight, bias = t.x, t.linear.weight, t.linear.bias
    op = lora_linear(t)
    a, b = op.trained
    layer = LoraLinear(t.linear, r=RANK, lora_alpha=SCALE * RANK).train(t.training)
    dropping = LoraLinear(t.linear, r=RANK, lora_alpha=SCALE * RANK, lora_dropout=0.1).train(t.training)
    for each in (layer, dropping):
        each.lora_A["default"].weight, each.lora_B["default"].weight = a, b
    arguments = (x, weight, bias, a, b, None, SCALE, 0.0, None, False)
    raw_forward = torch.ops.pyfused._lora_linear_forward.default
    raw_backward = torch.ops.pyfused._lora_backward.default
    with torch.no_grad():
        s = raw_forward(*arguments)[1]
    need_x_a_b = 1 | 2 | 4  # as in csrc/common/needs.h
    backward = (t.grad_y, x, weight, a, b, s, None, SCALE, 0.0, None, need_x_a_b, False)
    grads = torch.autograd.grad(op.expected(), (x, a, b), t.grad_y)
    timed = [
        op,
        Timed("nn.LoraLinear", partial(layer, x), op.trained, op.expected),
        Timed("nn.LoraLinear, dropout 0.1", partial(dropping, x), op.trained, stages=("train",)),
        Timed("autograd.Function, one gradient", partial(OneGradient.apply, x), stages=("train",), takes_cpp=False),
        Timed(
            "autograd.Function, three gradients and what LoRA saves",
            partial(ThreeGradients.apply, x, weight, a, b),
            op.trained,
            stages=("train",),
            takes_cpp=False,
        ),
        Timed(
            "raw op, forward",
            partial(raw_forward, *arguments),
            expected=op.expected,
            stages=("infer",),
            takes_cpp=False,
        ),
        Timed(
            "raw op, backward",
            partial(raw_backward, *backward),
            expected=lambda: grads,
            stages=("infer",),
            takes_cpp=False,
        ),
    ]
    if _library.autograd is not None:
        alone = partial(_library.autograd.lora_linear, *arguments)
        timed.append(Timed("C++ without the Python of ops", alone, op.trained, op.expected, takes_cpp=False))
    return timed


def others(t: Tensors) -> list[Timed]:
    return [*ia3(t), *bottleneck(t), lora_linear(t), shared(t)]


def ia3(t: Tensors) -> list[Timed]:
    x, weight, bias = t.x, t.linear.weight, t.linear.bias
    vector = nn.Parameter(torch.randn(WIDTH))
    layer = IA3Linear(t.linear, is_feedforward=False).train(t.training)
    column = layer.ia3_l["default"] = nn.Parameter(vector.detach().view(-1, 1).clone())
    plain = reference.ia3
    return [
        *(
            Timed(
                f"ops.ia3_linear, {side} side",
                partial(ops.ia3_linear, x, weight, bias, vector, side),
                (vector,),
                partial(plain.ia3_linear, x, weight, bias, vector, side),
            )
            for side in ("output", "input")
        ),
        Timed("ops.ia3_scale", partial(ops.ia3_scale, x, vector), (vector,), partial(plain.ia3_scale, x, vector)),
        Timed(
            "nn.IA3Linear",
            partial(layer, x),
            (column,),
            lambda: plain.ia3_linear(x, weight, bias, column.view(-1), "output"),
        ),
    ]


def bottleneck(t: Tensors) -> list[Timed]:
    """Both biases, the residual is x."""
    x, layer = t.x, Bottleneck(WIDTH, BOTTLENECK).train(t.training)
    down, up = layer.adapter_down[0], layer.adapter_up
    parameters = (down.weight, down.bias, up.weight, up.bias)
    expected = partial(reference.bottleneck.bottleneck, x, x, *parameters)
    return [
        Timed("ops.bottleneck", partial(ops.bottleneck, x, x, *parameters), parameters, expected),
        Timed("nn.Bottleneck", partial(layer, x, x), parameters, expected),
    ]


def shared(t: Tensors) -> Timed:
    linears = [t.linear, *(nn.Linear(WIDTH, WIDTH).requires_grad_(False) for _ in range(2))]
    projections = [ops.Projection(linear.weight, linear.bias, *make_adapter(), SCALE) for linear in linears]
    trained = tuple(tensor for p in projections for tensor in (p.a, p.b))
    return Timed(
        "ops.lora_linear_shared, three projections",
        partial(ops.lora_linear_shared, t.x, projections),
        trained,
        lambda: tuple(reference.lora.lora_linear(t.x, *projection) for projection in projections),
    )


TABLES = {"lora": lora, "others": others}
CASES = [Case(stage, table) for table in TABLES for stage in STAGES]


def with_gradient_in_python(call: Call) -> Call:
    def run():
        native, _library.autograd = _library.autograd, None
        try:
            return call()
        finally:
            _library.autograd = native

    return run


def build(case: Case) -> dict[str, Workload]:
    """Verified workloads; F.linear is the first, to which ratios refer.

    Raises:
        RuntimeError: one of them computes something else than plain PyTorch.
    """
    t = make_tensors(case.stage == "train")
    workloads = {}
    for timed in (*bases(t), *TABLES[case.table](t)):
        if case.stage not in timed.stages:
            continue
        calls = {timed.name: timed.call}
        if timed.takes_cpp:
            calls = {f"{timed.name} (Python)": with_gradient_in_python(timed.call)}
            if _library.autograd is not None:
                calls[f"{timed.name} (C++)"] = timed.call
        for name, call in calls.items():
            workloads[name] = _workload(case, t, timed, call)
            if timed.expected is not None:
                wanted = _workload(case, t, timed, timed.expected).outputs()
                names = (f"result or gradient, number {place}" for place in range(len(wanted)))
                harness.check_outputs(case.label, name, names, workloads[name].outputs(), wanted, TOLERANCE)
    return workloads


def _workload(case: Case, t: Tensors, timed: Timed, call: Call) -> Workload:
    if case.stage == "infer":
        return Workload(call)
    several = timed.expected is not None and isinstance(timed.expected(), tuple)
    grad_y = (t.grad_y,) * 3 if several else t.grad_y
    return Workload(call, (t.x, *timed.trained), grad_y, (*t.linear.parameters(), *timed.trained))


def tables(rows: Iterable[Mapping[str, str]]) -> str:
    """The rows of a file as Markdown: for each call the minimum in microseconds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["mode"] == STAGES[row["stage"]]:
            by_call = found.setdefault(row["table"], {}).setdefault(row["provider"], {})
            by_call[row["stage"]] = float(row["min_us"])
    lines = []
    for by_call in found.values():
        lines += ["| | without grad | with grad, forward and backward |", "|---|---:|---:|"]
        for name, times in by_call.items():
            cells = (f"{times[stage]:.1f}" if stage in times else "" for stage in STAGES)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    for stage, goal in GOALS.items():
        times = {name: by_stage[stage] for name, by_stage in found.get("lora", {}).items() if stage in by_stage}
        layer = times.get("nn.LoraLinear (C++)", times.get("nn.LoraLinear (Python)"))
        if layer is not None:
            above = layer - times["nn.Linear"]
            verdict = "met" if above <= goal else "missed"
            lines.append(f"{stage}: nn.LoraLinear takes {above:.1f} us more than nn.Linear, goal {goal:g}: {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    path = measure_in_parts("host-overhead", __doc__, CASES, build, arguments)
    print(tables(records.read_csv(path)[1]))


if __name__ == "__main__":
    main()
