"""The same LoRA on the same classifier three ways, IA3 by pyfused, and the frozen model that they are measured against.

From one seed the three begin with the same adapters, bit for bit. Dropout is drawn by HF PEFT and the eager module from
torch's generator and by pyfused from a counter-based one, so the masks differ and with them the training by its noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import peft
import torch
from classifier import Classifier
from torch import Tensor, nn

import pyfused

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


def frozen(model: Classifier) -> nn.Module:
    """No adapter: the encoder as it is, under a trainable head."""
    model.encoder.requires_grad_(False)
    return model


def with_peft(model: Classifier) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))


def with_eager(model: Classifier) -> nn.Module:
    model.encoder.requires_grad_(False)
    targets = [name for name, _ in model.encoder.named_modules() if name.rpartition(".")[2] in LORA["target_modules"]]
    for name in targets:
        if isinstance(linear := model.encoder.get_submodule(name), nn.Linear):
            adapted = EagerLora(linear, LORA["r"], LORA["lora_alpha"], LORA["lora_dropout"])
            model.encoder.set_submodule(name, adapted)
    return model


def with_pyfused(model: Classifier) -> nn.Module:
    return pyfused.get_peft_model(model, pyfused.LoraConfig(**LORA))


def with_ia3(model: Classifier) -> nn.Module:
    return pyfused.get_peft_model(model, pyfused.IA3Config(**IA3))


FROZEN = "frozen"
IA3_WAY = "pyfused IA3"
WAYS: dict[str, Callable[[Classifier], nn.Module]] = {
    FROZEN: frozen,
    "HF PEFT": with_peft,
    "eager": with_eager,
    "pyfused": with_pyfused,
    IA3_WAY: with_ia3,
}
LORA_WAYS = ("HF PEFT", "eager", "pyfused")
# Who takes part in every so-manieth step only, which leaves the time to the comparison: the frozen model, which is but
# timed, and IA3, which so has a shorter training. Neither number divides that of the ways, else one would always have
# the same predecessor.
EVERY = {FROZEN: 3, IA3_WAY: 2}


def build(name: str, seed: int) -> nn.Module:
    """The classifier wrapped the way ``name``, ready for training.

    The gradient is carried down to the embeddings' output in each of the ways, the frozen model among them: so all have
    the same products with the frozen weights in forward and backward, and what differs is the adapters.

    Args:
        name: a key of ``WAYS``.
        seed: for the first values of head and adapters, and all that is drawn afterwards.
    """
    torch.manual_seed(seed)
    model = Classifier()
    model.encoder.embeddings.register_forward_hook(_require_grad)
    return WAYS[name](model).train()


def head_and_adapters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters: those of the classification head, and the adapters' (none in the frozen model)."""
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    head = [parameter for name, parameter in found if "classifier" in name]
    return head, [parameter for name, parameter in found if "classifier" not in name]


def _require_grad(module: nn.Module, args: tuple, output: Tensor) -> None:
    output.requires_grad_()
