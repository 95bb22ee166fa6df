"""The ways to adapt the classifier: the same LoRA three ways, every other method of pyfused, and no adapter at all.

From one seed the three begin with the same adapters, bit for bit. Dropout is drawn by HF PEFT and the eager module from
torch's generator and by pyfused from a counter-based one, so the masks differ and with them the training by its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import peft
import torch
from torch import Tensor, nn

import pyfused

from .classifier import Classifier

LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["query", "key", "value", "dense"],
    "modules_to_save": ["classifier"],
}
# The layers that IA3 adapts in BERT: its vectors scale keys and values, and what goes into the output layers.
IA3 = {
    "target_modules": ["key", "value", "output.dense"],
    "feedforward_modules": ["output.dense"],
    "modules_to_save": ["classifier"],
}
# LoRA's layers and rank to begin with; half of the ranks are left on average for the second half of the steps.
ADALORA = {key: value for key, value in LORA.items() if key != "r"} | {"init_r": 8, "target_r": 4, "orth_reg_weight": 0}
VIRTUAL_TOKENS = {"num_virtual_tokens": 8, "task_type": "FEATURE_EXTRACTION"}
SHORT = 1 / 6  # share of the steps


@dataclass(frozen=True)
class Way:
    """``wrap(model, steps)`` adapts a classifier that will be trained for so many steps; ``learning_rate`` is the
    adapters' at its peak; ``share`` of the steps is what it takes part in."""

    wrap: Callable[[Classifier, int], nn.Module]
    learning_rate: float = 0.0
    share: float = 1.0

    @property
    def is_short(self) -> bool:
        """Whether it takes part in some of the steps only. Its head then starts from the linear probe."""
        return self.share < 1.0

    def steps(self, of: int) -> int:
        """How many of so many steps it takes part in."""
        return math.floor(of * self.share + 1e-9)

    def takes_part(self, step: int) -> bool:
        """Whether ``step``, counted from 0, is one of its steps, which are spread evenly."""
        return self.steps(step + 1) > self.steps(step)


class EagerLora(nn.Module):
    """LoRA around a linear layer as one writes it in plain PyTorch (Hu et al. 2021, eq. 3)."""

    def __init__(self, base: nn.Linear, r: int, lora_alpha: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, r, bias=False)
        self.up = nn.Linear(r, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout)
        self.scaling = lora_alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * self.scaling


def frozen(model: Classifier, steps: int) -> nn.Module:
    """No adapter: the encoder as it is, under a trainable head."""
    model.encoder.requires_grad_(False)
    return model


def with_peft(model: Classifier, steps: int) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def with_eager(model: Classifier, steps: int) -> nn.Module:
    model.encoder.requires_grad_(False)
    targets = [name for name, _ in model.encoder.named_modules() if name.rpartition(".")[2] in LORA["target_modules"]]
    for name in targets:
        if isinstance(linear := model.encoder.get_submodule(name), nn.Linear):
            adapted = EagerLora(linear, LORA["r"], LORA["lora_alpha"], LORA["lora_dropout"])
            model.encoder.set_submodule(name, adapted)
    return model


def with_pyfused(config: Callable[[int], pyfused.PeftConfig]) -> Callable[[Classifier, int], nn.Module]:
    """``config(steps)`` on the classifier; virtual tokens on its encoder, whose arguments they change."""

    def wrap(model: Classifier, steps: int) -> nn.Module:
        chosen = config(steps)
        if not chosen.is_prompt_learning:
            return pyfused.get_peft_model(model, chosen)
        model.encoder = pyfused.get_peft_model(model.encoder, chosen)
        return model

    return wrap


FROZEN, HF_PEFT, EAGER, PYFUSED = "frozen", "LoRA, HF PEFT", "LoRA, eager", "LoRA, pyfused"
LORA_WAYS = (HF_PEFT, EAGER, PYFUSED)
LORA_LEARNING_RATE = 1.5e-3

# Every method of pyfused: a configuration for so many steps, the adapters' learning rate, its share of the steps. The
# rates were chosen by cross-validation over the training files; the test side had no part in it.
METHODS: dict[str, tuple[Callable[[int], pyfused.PeftConfig], float, float]] = {
    PYFUSED: (lambda steps: pyfused.LoraConfig(**LORA), LORA_LEARNING_RATE, 1.0),
    "AdaLoRA": (
        lambda steps: pyfused.AdaLoraConfig(**ADALORA, tinit=steps // 6, tfinal=steps // 2, total_step=steps),
        3e-3,
        SHORT,
    ),
    "IA3": (lambda steps: pyfused.IA3Config(**IA3), 3e-2, SHORT),
    "bottleneck": (lambda steps: pyfused.BottleneckConfig.pfeiffer(modules_to_save=["classifier"]), 3e-3, SHORT),
    "prefix tuning": (lambda steps: pyfused.PrefixTuningConfig(**VIRTUAL_TOKENS), 1e-2, SHORT),
    "prompt tuning": (lambda steps: pyfused.PromptTuningConfig(**VIRTUAL_TOKENS), 1e-2, SHORT),
}
WAYS: dict[str, Way] = {
    # It is timed and not trained.
    FROZEN: Way(frozen, share=SHORT),
    HF_PEFT: Way(with_peft, LORA_LEARNING_RATE),
    EAGER: Way(with_eager, LORA_LEARNING_RATE),
    **{name: Way(with_pyfused(config), *settings) for name, (config, *settings) in METHODS.items()},
}


def build(way: Way, seed: int, steps: int = 1, head: nn.Linear | None = None) -> nn.Module:
    """The classifier adapted this way, ready for training.

    The gradient is carried down to the embeddings' output in each of the ways, the frozen model among them: so all have
    the same products with the frozen weights in forward and backward, and what differs is the adapters.

    Args:
        way: one of ``WAYS``.
        seed: for the first values of head and adapters, and all that is drawn afterwards.
        steps: of its training.
        head: what the classification head starts from; None: from random values.
    """
    torch.manual_seed(seed)
    model = Classifier()
    if head is not None:
        model.classifier.load_state_dict(head.state_dict())
    model.encoder.embeddings.register_forward_hook(_require_grad)
    return way.wrap(model, steps).train()


def head_and_adapters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters: those of the classification head, and the adapters' (none in the frozen model)."""
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in found if "classifier" in name]
    return head, [parameter for name, parameter in found if "classifier" not in name]


def _require_grad(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_()
