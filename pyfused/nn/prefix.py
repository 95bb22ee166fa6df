"""Prefix tuning: trained keys and values in front of those of every layer (Li and Liang 2021)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import own_parameters
from .shared_rows import share_rows


class PrefixEncoder(nn.Module):
    """The keys and values of n virtual tokens in each of a model's layers.

    State dict: ``embedding.weight``, and ``transform.*`` with a projection; float32 whatever the model's dtype is.

    Args:
        num_virtual_tokens: n.
        num_layers: layers of the model, L.
        token_dim: all heads of a key together, D; a multiple of ``num_attention_heads``.
        num_attention_heads: heads of a key, H.
        prefix_projection: make the prefix of an embedding [n, D] by a two-layer network with tanh (equation 3 of the
            paper) instead of training it itself.
        encoder_hidden_size: width of that network's hidden layer; None: D.
        zero: keys and values of zeros to start with.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        num_layers: int,
        token_dim: int,
        num_attention_heads: int,
        *,
        prefix_projection: bool = False,
        encoder_hidden_size: int | None = None,
        zero: bool = False,
    ) -> None:
        super().__init__()
        if token_dim % num_attention_heads:
            raise ValueError(
                f"token_dim must be a multiple of num_attention_heads = {num_attention_heads}, got {token_dim}"
            )
        self.num_virtual_tokens, self.num_layers = num_virtual_tokens, num_layers
        self.num_attention_heads, self.head_dim = num_attention_heads, token_dim // num_attention_heads
        width = num_layers * 2 * token_dim
        options = {"dtype": torch.float32}
        self.transform: nn.Sequential | None = None
        if prefix_projection:
            hidden = encoder_hidden_size or token_dim
            self.embedding = nn.Embedding(num_virtual_tokens, token_dim, **options)
            self.transform = nn.Sequential(
                nn.Linear(token_dim, hidden, **options), nn.Tanh(), nn.Linear(hidden, width, **options)
            )
            if zero:
                nn.init.zeros_(self.transform[-1].weight)
                nn.init.zeros_(self.transform[-1].bias)
        else:
            self.embedding = nn.Embedding(num_virtual_tokens, width, **options)
            if zero:
                nn.init.zeros_(self.embedding.weight)
        self._kept: tuple[Any, Tensor, list[Tensor]] | None = None

    def prompt(self) -> Tensor:
        """What the file holds: keys and values of all layers as rows of the virtual tokens, [n, L * 2 * D]."""
        weight = own_parameters(self.embedding)["weight"]
        return weight if self.transform is None else self.transform(weight)

    @torch.no_grad()
    def prompt_of(self, state_dict: dict[str, Tensor]) -> Tensor:
        """:meth:`prompt` for other values of the parameters; no module is called, which may be sharded (FSDP2)."""
        weight = state_dict["embedding.weight"]
        if self.transform is None:
            return weight
        first, second = ((state_dict[f"transform.{i}.weight"], state_dict[f"transform.{i}.bias"]) for i in (0, 2))
        return F.linear(torch.tanh(F.linear(weight, *first)), *second)

    def forward(self, dtype: torch.dtype, rows: int) -> list[Tensor]:
        """Key, value, key, value ... for a batch: 2 L tensors [rows, H, n, D / H] in ``dtype``, views that rows share.

        Those of a prefix that needs no gradient are kept, and made anew where a parameter has changed since, by its
        version and place in memory. (Writing through ``parameter.data`` changes neither; nothing is kept where the
        prefix is read as it is, without projection and cast.)
        """
        state = self._state(dtype)
        if state is None:
            return self._for_rows(self.prompt(), dtype, rows)
        if self._kept is None or self._kept[0] != state:
            # Aliases, which keep the memory: nothing new can come to lie at its address while it is compared.
            self._kept = (state, self.prompt().to(dtype), [parameter.detach() for parameter in self.parameters()])
        return self._for_rows(self._kept[1], dtype, rows)

    def _for_rows(self, prompt: Tensor, dtype: torch.dtype, rows: int) -> list[Tensor]:
        return keys_and_values(prompt, self.num_layers, self.num_attention_heads, dtype, rows)

    def _state(self, dtype: torch.dtype) -> Any:
        """What the kept keys and values depend on; None where nothing is to be kept."""
        parameters = list(self.parameters())
        if (self.transform is None and self.embedding.weight.dtype == dtype) or torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return None
        if any(type(p) is not nn.Parameter or p.is_inference() or p.is_meta for p in parameters):
            return None
        if torch.is_autocast_enabled(parameters[0].device.type):  # it may round what the projection computes
            return None
        versions = tuple((p._version, p.data_ptr(), p.device, p.dtype) for p in parameters)
        return dtype, torch.is_inference_mode_enabled(), versions

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.num_virtual_tokens}, num_layers={self.num_layers}"


def keys_and_values(prompt: Tensor, layers: int, heads: int, dtype: torch.dtype, rows: int) -> list[Tensor]:
    """Key, value, key, value ... as [rows, heads, n, width of a head], of a prefix [n, layers * 2 * D]."""
    by_layer = prompt.view(prompt.shape[0], 2 * layers, heads, -1).permute(1, 2, 0, 3)
    return [share_rows(tensor, dtype, rows) for tensor in by_layer.unbind(0)]
