"""LoRA around a frozen embedding. State dict, initial weights and scaling are those of HF PEFT's layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .arguments import check_lora_arguments
from .base import adapter_device, own_parameters
from .by_row import rows_for
from .dora import check_dora_base
from .lora_layer import LoraLayer


class LoraEmbedding(LoraLayer):
    r"""A frozen ``nn.Embedding`` with LoRA adapters by name: :math:`y = base(ids) + \sum_i s_i A_i^T[ids] B_i^T`.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models". State dict: ``base_layer.*``,
    ``lora_embedding_A.<name>`` ``[r, num_embeddings]``, ``lora_embedding_B.<name>`` ``[embedding_dim, r]``, and with
    ``use_dora`` ``lora_magnitude_vector.<name>.weight`` ``[embedding_dim]``. The embedding's ``padding_idx``,
    ``max_norm``, ``scale_grad_by_freq`` and ``embed_scale`` hold for the adapter too; its gradient is always dense.

    Args:
        embedding: the layer to adapt; frozen by this call.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling ``lora_alpha / r``.
        lora_dropout: kept, and not applied: an embedding's input are numbers of tokens. As in HF PEFT.
        use_rslora: divide alpha by the square root of r.
        use_dora: a learned magnitude for each feature, see :class:`pyfused.nn.lora_layer.LoraLayer`.
        lora_bias: must be False.
        init_lora_weights: False: A and B normal, so that the adapter changes the output from the start; anything else:
            A zero, B normal.
        adapter_name: name of this first adapter, which is active.
        autocast_adapter_dtype: keep the adapter of a 16-bit layer in float32.

    Raises:
        TypeError: ``embedding`` is no ``nn.Embedding``, or an argument has the wrong type.
        ValueError: an argument is outside its range, or ``lora_bias``.
    """

    containers = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    follows_rows = True
    output_dim = 1
    _factors_in = nn.ParameterDict

    def __init__(
        self,
        embedding: nn.Embedding,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__(
            embedding,
            adapter_name,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            use_dora=use_dora,
            lora_bias=lora_bias,
            init_lora_weights=init_lora_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def features(cls, embedding: nn.Module) -> tuple[int, int]:
        """``num_embeddings, embedding_dim`` of a layer; TypeError for what this class cannot adapt."""
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"{cls.__name__}: embedding must be an nn.Embedding, got {type(embedding).__name__}")
        return embedding.num_embeddings, embedding.embedding_dim

    @classmethod
    def adapter_shapes(
        cls, embedding: nn.Module, r: int, use_dora: bool = False, lora_bias: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of an adapter's tensors on such a layer, by their names in its file."""
        count, dim = cls.features(embedding)
        shapes = {"lora_embedding_A": (r, count), "lora_embedding_B": (dim, r)}
        return shapes | ({"lora_magnitude_vector": (dim,)} if use_dora else {})

    def forward(self, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Integers ``[...]`` -> ``[..., embedding_dim]`` in the dtype of the base layer's output."""
        base = self._modules["base_layer"]
        y = base(ids, *args, **kwargs)
        if self._looks_for_rows:
            rows = rows_for(self)
            if rows is not None:
                if self._disabled:
                    return y
                return rows.replace(self, y, lambda name, i: self.add_adapters(y[i], ids[i], (name,)))
        return self.add_adapters(y, ids, self._in_forward)

    def add_adapters(self, y: Tensor, ids: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """The base layer's y with these adapters, one after the other."""
        base = self._modules["base_layer"]
        for name in adapter_names:
            a, b = self.matrices(name)
            y = ops.lora_embedding(y, ids, a, b, self.scaling[name], **gather_options(base))
            if name in self.lora_magnitude_vector:
                y = ops.ia3_scale(y, self.dora_factor(name))
        return y

    def matrices(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        return tuple(own_parameters(self._modules[name])[adapter_name] for name in self.containers[:2])

    # Adapters ---------------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add an adapter; it is neither active nor trainable until :meth:`set_adapter`. Arguments as for the class."""
        self._check_new(adapter_name)
        check_lora_arguments(r, lora_alpha, lora_dropout, use_dora, lora_bias, init_lora_weights)
        if lora_bias:
            raise ValueError("lora_bias: an embedding has no bias; leave embeddings out of target_modules")
        if use_dora:
            check_dora_base(self.base_layer)
        # The order of the draws is HF PEFT's.
        a, b = torch.randn(r, self.in_features), torch.randn(self.out_features, r)
        if init_lora_weights is not False:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        self._register(adapter_name, r, lora_alpha, lora_dropout, use_rslora)
        self.lora_embedding_A[adapter_name] = self._match(a, adapter_name, autocast_adapter_dtype)
        self.lora_embedding_B[adapter_name] = self._match(b, adapter_name, autocast_adapter_dtype)
        if use_dora:
            self._add_magnitude(adapter_name, autocast_adapter_dtype)
        self._update_forward()

    def _detached_factors(
        self, tensors: Mapping[str, Tensor], parameter: Callable[[Tensor], nn.Parameter]
    ) -> dict[str, Any]:
        return {name: parameter(tensors[name]) for name in ("lora_embedding_A", "lora_embedding_B")}

    def adapter_keys(self, adapter_name: str) -> dict[str, str]:
        keys = {name: f"{name}.{adapter_name}" for name in ("lora_embedding_A", "lora_embedding_B")}
        return keys | self._magnitude_key(adapter_name)


def gather_options(embedding: nn.Embedding) -> dict[str, Any]:
    """What ``ops.lora_embedding`` has to know of an embedding."""
    scale = getattr(embedding, "embed_scale", None)
    if isinstance(scale, (int, float)):
        scale = torch.tensor(scale, dtype=embedding.weight.dtype, device=adapter_device(embedding))
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")
    return {"embed_scale": scale, **{name: getattr(embedding, name) for name in names}}
