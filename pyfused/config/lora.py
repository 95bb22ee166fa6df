"""LoRA's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..nn.arguments import check_lora_arguments
from .base import PeftConfig, PeftType, check_module_names, check_regex, strings


@dataclass
class LoraConfig(PeftConfig, method=PeftType.LORA):
    """LoRA (Hu et al. 2021) on linear layers, embeddings and convolutions.

    Attributes:
        r: rank.
        target_modules: which layers. Names, each of which matches whole or as the end of a layer's name after a dot; or
            one regular expression that matches the whole name; or "all-linear", every linear layer but the output
            layer. None: the usual ones of a known architecture.
        exclude_modules: layers to leave out, names or a regular expression like ``target_modules``.
        lora_alpha: numerator of the scaling ``lora_alpha / r``.
        lora_dropout: probability in [0, 1) of dropping an element of the adapter's input while training.
        fan_in_fan_out: True for transformers' ``Conv1D``, False for ``nn.Linear``; set to what it must be, with a
            warning.
        bias: "none", "all" (all biases of the model are trained and saved) or "lora_only" (those of adapted layers).
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        use_dora: DoRA (Liu et al. 2024): a learned magnitude for each output of the adapted layer.
        lora_bias: a learned bias on ``lora_B``; not with ``use_dora``, not on embeddings, and only with
            ``init_lora_weights`` True or False.
        modules_to_save: modules to train in full and save with the adapter, by the end of their names.
        init_lora_weights: True, False, "gaussian", "orthogonal", "olora", "pissa" or "pissa_niter_N", see
            :class:`pyfused.nn.LoraLinear`. olora and pissa change the base model's weights, again when the adapter is
            loaded; embeddings begin as with True.
        layers_to_transform: index or indices of the layers to adapt, for names in ``target_modules`` that are suffixes.
        layers_pattern: name, or names, of the list that ``layers_to_transform`` counts in, such as "layers".
        rank_pattern, alpha_pattern: other ranks or alphas for some layers: a regular expression that matches the end of
            the name, and the value.

    The other fields are HF PEFT's; they are at their defaults, or raise NotImplementedError.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict | None = None
    loftq_config: dict = field(default_factory=dict)
    eva_config: dict | None = None
    corda_config: dict | None = None
    lora_ga_config: dict | None = None
    use_dora: bool = False
    velora_config: dict | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict | None = None
    layer_replication: list | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict | None = None
    arrow_config: dict | None = None
    kasa_config: dict | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _NOT_BUILT:
            if getattr(self, name):
                raise NotImplementedError(f"LoraConfig: {name} is not built yet, got {getattr(self, name)!r}")
        init = True if self.weights_must_be_loaded else self.init_lora_weights
        if self.eva_config and not self.weights_must_be_loaded:
            raise NotImplementedError("LoraConfig: eva_config is not built yet")
        check_lora_arguments(self.r, self.lora_alpha, self.lora_dropout, self.use_dora, self.lora_bias, init)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', got {self.bias!r}")
        check_module_names(self)
        self._check_layers()
        self._check_patterns()

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        for index in layers if isinstance(layers, (list, tuple)) else () if layers is None else (layers,):
            if isinstance(index, bool) or not isinstance(index, int):
                raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {layers!r}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be used when target_modules is a str (a regular expression)")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern is given: layers_to_transform must also be specified")
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        for pattern in strings("layers_pattern", patterns):
            check_regex("layers_pattern", pattern)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name) or {}
            if not isinstance(patterns, dict):
                raise TypeError(f"{name} must be a dict from names to values, got {type(patterns).__name__}")
            setattr(self, name, dict(patterns))
            for key in patterns:
                check_regex(name, key)
        for key, rank in self.rank_pattern.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank <= 0:
                raise ValueError(f"rank_pattern must map to integers of at least 1, got {rank!r} for {key!r}")
        for key, alpha in self.alpha_pattern.items():
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
                raise TypeError(f"alpha_pattern must map to numbers, got {alpha!r} for {key!r}")

    @property
    def weights_must_be_loaded(self) -> bool:
        """The initialisation is not built, but it left the base alone: a file with all weights can be loaded."""
        return self.init_lora_weights in _INIT_OF_ADAPTER_ONLY


# Fields whose defaults are false and that change the result otherwise.
_NOT_BUILT = (
    "megatron_config",
    "trainable_token_indices",
    "loftq_config",
    "corda_config",
    "lora_ga_config",
    "velora_config",
    "alora_invocation_tokens",
    "use_qalora",
    "monteclora_config",
    "layer_replication",
    "target_parameters",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "ensure_weight_tying",
)
_INIT_OF_ADAPTER_ONLY = ("eva",)
