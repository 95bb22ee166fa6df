"""What a frozen model needs before it is trained: inputs that ask for gradients, quantised models made ready."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Quantisation methods whose other parameters keep their dtype.
_KEEP_DTYPES = ("gptq", "aqlm", "eetq", "torchao", "hqq")


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Make a quantised transformers model ready for training adapters on it, as HF PEFT's function of this name does.

    All parameters are frozen, 16-bit ones become float32 (not in models quantised by GPTQ, AQLM, EETQ, torchao or HQQ);
    a quantised model also gets gradient checkpointing.

    Args:
        model: changed in place.
        use_gradient_checkpointing: False leaves checkpointing as it is.
        gradient_checkpointing_kwargs: for ``model.gradient_checkpointing_enable``.

    Returns:
        ``model``.
    """
    method = "hqq" if getattr(model, "hqq_quantized", False) else getattr(model, "quantization_method", None)
    keep = method in _KEEP_DTYPES
    for parameter in model.parameters():
        parameter.requires_grad = False
        if not keep and parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    quantised = keep or getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    if quantised and use_gradient_checkpointing:
        options = dict(gradient_checkpointing_kwargs or {})
        if options.get("use_reentrant", True):
            _ask_for_gradients(model)
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
    return model


def let_inputs_require_grad(model: nn.Module) -> None:
    """Reentrant checkpointing gives no gradients inside unless its input asks for one, and the model is frozen."""
    if not _may_checkpoint(model):
        return
    if any(getattr(model, name, False) for name in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
        return  # prepare_model_for_kbit_training does it
    _ask_for_gradients(model)


def _may_checkpoint(model: nn.Module) -> bool:
    """Whether activation checkpointing is on, by either of transformers' names for it; True where that is not known."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(model, name):
            return getattr(model, name)
    return True


def _ask_for_gradients(model: nn.Module) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
