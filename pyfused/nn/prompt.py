"""Prompt tuning: trained embeddings in front of those of the text (Lester et al. 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import adapter_device, own_parameters
from .modules_to_save import ModulesToSaveWrapper
from .shared_rows import share_rows, sum_rows


class PromptEmbedding(nn.Module):
    """A prompt P of trained embeddings: ``[P; E(ids)]`` is what the model gets in place of E(ids).

    State dict: ``embedding.weight``, float32 whatever the model's dtype is.

    Args:
        num_virtual_tokens: rows of the prompt, n.
        token_dim: width of the model's embeddings, D.
        num_transformer_submodules: 2 keeps n more rows, which nothing reads: HF PEFT's files of encoder-decoders have
            them.
    """

    def __init__(self, num_virtual_tokens: int, token_dim: int, num_transformer_submodules: int = 1) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.embedding = nn.Embedding(num_virtual_tokens * num_transformer_submodules, token_dim, dtype=torch.float32)

    @torch.no_grad()
    def init_from_tokens(self, ids: Tensor, word_embeddings: nn.Module) -> None:
        """Start from the embeddings of tokens.

        Args:
            ids: [rows of ``embedding``].
            word_embeddings: the model's input embeddings.
        """
        device = adapter_device(word_embeddings)
        self.embedding.weight.copy_(word_embeddings(ids.to(device)))

    def prompt(self) -> Tensor:
        """What the file holds: all rows, [n * num_transformer_submodules, D]."""
        return own_parameters(self.embedding)["weight"]

    def prompt_of(self, state_dict: dict[str, Tensor]) -> Tensor:
        """:meth:`prompt` for other values of the parameters."""
        return state_dict["embedding.weight"]

    def forward(
        self, input_ids: Tensor | None, word_embeddings: nn.Module, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """The embeddings of the prompt and of the text.

        They are written into one tensor: the rows of the text by ``word_embeddings`` itself, which is asked for n rows
        more, and those of the prompt over the latter.

        Args:
            input_ids: [B, L]; None where ``inputs_embeds`` are given.
            word_embeddings: the model's input embeddings; called, so that hooks, scaling and adapters on it act.
            inputs_embeds: [B, L, D], in place of ``input_ids``.

        Returns:
            [B, n + L, D], in the dtype of the text's embeddings.

        Raises:
            ValueError: not exactly one of ``input_ids`` and ``inputs_embeds``, or another width than the prompt's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids and inputs_embeds: exactly one of them must be given")
        prompt = self.prompt()[: self.num_virtual_tokens]
        if inputs_embeds is not None:
            self._check_width(inputs_embeds)
            leading = share_rows(prompt.to(inputs_embeds.device), inputs_embeds.dtype, inputs_embeds.shape[0])
            return torch.cat((leading, inputs_embeds), dim=1)
        joined = word_embeddings(self._with_slots(input_ids))
        self._check_width(joined)
        if joined.requires_grad and not _is_trained(word_embeddings):
            joined = joined.detach()  # transformers' enable_input_require_grads asks for it, and nobody reads it
        prompt = prompt.to(joined.device)
        if torch.compiler.is_compiling():  # the compiler writes both into one tensor by itself
            leading = share_rows(prompt, joined.dtype, joined.shape[0])
            return torch.cat((leading, joined[:, self.num_virtual_tokens :]), dim=1)
        return _WritePrompt.apply(prompt, joined)

    def _with_slots(self, input_ids: Tensor) -> Tensor:
        """[B, n + L]: the ids, and in the place of the prompt one that the row has anyway."""
        rows, length = input_ids.shape
        first = input_ids[:, :1] if length else input_ids.new_zeros(rows, 1)
        return torch.cat((first.expand(rows, self.num_virtual_tokens), input_ids), dim=1)

    def _check_width(self, embeddings: Tensor) -> None:
        width = self.embedding.weight.shape[1]
        if embeddings.shape[-1] != width:
            raise ValueError(f"token_dim: the prompt has {width} columns, the text's embeddings {embeddings.shape[-1]}")

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}"


class _WritePrompt(torch.autograd.Function):
    """Write a prompt [n, D] into the first n rows of each sequence of ``joined`` [B, n + L, D], in place."""

    @staticmethod
    def forward(ctx: Any, prompt: Tensor, joined: Tensor) -> Tensor:
        ctx.mark_dirty(joined)
        ctx.dtype, ctx.rows = prompt.dtype, prompt.shape[0]
        joined[:, : ctx.rows] = prompt
        return joined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        grad_prompt = grad_joined = None
        if ctx.needs_input_grad[0]:
            grad_prompt = sum_rows(grad[:, : ctx.rows], ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_joined = grad.clone()
            grad_joined[:, : ctx.rows] = 0
        return grad_prompt, grad_joined


def _is_trained(word_embeddings: nn.Module) -> bool:
    if isinstance(word_embeddings, ModulesToSaveWrapper):
        word_embeddings = word_embeddings.active_module()
    return any(parameter.requires_grad for parameter in word_embeddings.parameters())
