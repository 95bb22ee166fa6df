"""Configurations of the methods that learn virtual tokens: what they share, and prompt tuning's."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from .base import PeftConfig, PeftType, check_regex, member, strings


class PromptTuningInit(str, enum.Enum):
    """What a prompt starts from."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptLearningConfig(PeftConfig):
    """What prompt tuning and prefix tuning share. All sizes but the first are read from the model where they are None.

    Attributes:
        num_virtual_tokens: length of the prompt or prefix, at least 1.
        token_dim: width of one virtual token: of the input embeddings; for a prefix, of all heads of a key together.
        num_transformer_submodules: 2 for encoder-decoders, 1 for all others.
        num_attention_heads: of a key, so the number of key and value heads where that is smaller.
        num_layers: of the model.
        modules_to_save: modules to train in full and save with the adapter, by the end of their names.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _SIZES:
            value = getattr(self, name)
            if value is None and name != "num_virtual_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.num_transformer_submodules not in (None, 1, 2):
            raise ValueError(f"num_transformer_submodules must be 1 or 2, got {self.num_transformer_submodules}")
        if self.modules_to_save is not None:
            self.modules_to_save = strings("modules_to_save", self.modules_to_save)
            for name in self.modules_to_save:
                check_regex("modules_to_save", name)


_SIZES = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


@dataclass
class PromptTuningConfig(PromptLearningConfig, method=PeftType.PROMPT_TUNING):
    """Prompt tuning (Lester et al. 2021): trained embeddings in front of those of the text.

    Attributes:
        prompt_tuning_init: "RANDOM", normal numbers; "SAMPLE_VOCAB", the embeddings of random tokens; "TEXT", those of
            a text, cut or repeated to the length of the prompt.
        prompt_tuning_init_text: that text.
        tokenizer_name_or_path: local folder of its tokenizer, for transformers' ``AutoTokenizer``.
        tokenizer_kwargs: for ``AutoTokenizer.from_pretrained``; ``trust_remote_code`` is passed over.
    """

    prompt_tuning_init: PromptTuningInit | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt_tuning_init = member(PromptTuningInit, "prompt_tuning_init", self.prompt_tuning_init)
        if self.prompt_tuning_init is PromptTuningInit.TEXT:
            if not self.tokenizer_name_or_path:
                raise ValueError(
                    "tokenizer_name_or_path must be given where prompt_tuning_init='TEXT', got "
                    f"{self.tokenizer_name_or_path!r}"
                )
            if self.prompt_tuning_init_text is None:
                raise ValueError("prompt_tuning_init_text must be given where prompt_tuning_init='TEXT', got None")
        elif self.tokenizer_kwargs:
            raise ValueError(
                f"tokenizer_kwargs are for prompt_tuning_init='TEXT' only, got {self.prompt_tuning_init.value!r}"
            )


class PromptEncoderConfig:
    """The name of HF PEFT's configuration of P-tuning, for code that imports it; P-tuning is not built.

    Raises:
        NotImplementedError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "PromptEncoderConfig: P-tuning is not built; PromptTuningConfig and PrefixTuningConfig train virtual tokens"
        )
