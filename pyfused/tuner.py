"""The adapters of one model: what :class:`pyfused.PeftModel` keeps at ``base_model``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .adapted import AdaptedLayers
from .adapter_names import is_by_row, prompts_of_call, use_adapters
from .config import PeftConfig
from .inject import Plan, apply, plan, replace_modules
from .merge import check_and_merge, tell_untied
from .methods import PromptLearningMethod, method_of
from .methods.prompt_learning import by_name
from .methods.prompts_by_row import preparing
from .nn import AdapterLayer, ModulesToSaveWrapper, PromptEncoders
from .nn.base import adapter_device
from .prepare import let_inputs_require_grad
from .rank_allocator import RankAllocator, resize_by_rank_pattern
from .weighted import add_weighted_adapter

if TYPE_CHECKING:
    from .detached import DetachedAdapter


class AdapterModel(nn.Module):
    """A model with adapters in it, by name. Attributes it does not have are the model's.

    Args:
        model: the base model; changed in place.
        plan: what :func:`pyfused.inject.plan` made of it and a configuration.
        adapter_name: of the first adapter, which is active.
        autocast_adapter_dtype: see :class:`pyfused.get_peft_model`.

    Attributes:
        model: the base model.
        prompt_encoder: the virtual tokens of adapters that have some, by adapter name.
        peft_config: configuration of each adapter.
        layers: the layers that have adapters.
        targeted_module_names: the names of the modules that they are around.
    """

    def __init__(self, model: nn.Module, plan: Plan, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super().__init__()
        self.model = model
        self.prompt_encoder = PromptEncoders()
        self.peft_config: dict[str, PeftConfig] = {}
        self._active_adapters = [adapter_name]
        self._disabled = False
        self.layers = AdaptedLayers(model)
        self._rank_allocator: RankAllocator | None = None
        self.inject(plan, adapter_name, autocast_adapter_dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        by_row, prompt = prompts_of_call(self), self._active_prompt()
        if by_row is not None:
            outputs = self.model(**by_row.forward_inputs(by_name(self.model, args, kwargs)))
        elif prompt is None:
            outputs = self.model(*args, **kwargs)
        else:
            method, config, encoder = prompt
            inputs = method.forward_inputs(self.model, config, encoder, by_name(self.model, args, kwargs))
            outputs = self.model(**inputs)
        allocator = self._rank_allocator
        return outputs if allocator is None else allocator.regularise(outputs, self.layers.of(allocator.adapter_name))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``generate`` with the active adapters."""
        if prompts_of_call(self) is not None:
            with preparing(self.model, lambda: prompts_of_call(self)):
                return self.model.generate(*args, **kwargs)
        prompt = self._active_prompt()
        if prompt is None:
            return self.model.generate(*args, **kwargs)
        method, config, encoder = prompt
        return method.generate(self.model, config, encoder, args, kwargs)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The model's arguments for one step of ``generate``, virtual tokens and all."""
        prepare, prompt = self.model.prepare_inputs_for_generation, self._active_prompt()
        if prompt is None:
            return prepare(input_ids, **kwargs)
        method, config, encoder = prompt
        return method.step_inputs(self.model, config, encoder, prepare, input_ids, **kwargs)

    def _active_prompt(self) -> tuple[PromptLearningMethod, PeftConfig, nn.Module] | None:
        name = self.prompt_encoder.active_adapter
        if name is None or is_by_row(self):
            return None
        config = self.peft_config[name]
        return method_of(config), config, self.prompt_encoder[name]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # while it is being made or unpickled
                raise
            return getattr(self.model, name)

    # Adapters ---------------------------------------------------------------------------------------------------------

    def plan(self, config: PeftConfig, adapter_name: str, loading: bool = False) -> Plan:
        """:func:`pyfused.inject.plan` for another adapter."""
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: Adapter with name {adapter_name!r} already exists")
        return plan(self.model, config, adapter_name, self.peft_config.values(), loading)

    def inject(self, plan: Plan, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Carry a plan out; the adapter is active where it is the first."""
        first = plan.targets and not self.layers
        encoder = None
        if isinstance(plan.method, PromptLearningMethod):  # made before anything is changed: it may not work out
            encoder = plan.method.new_encoder(self.model, plan.config, plan.loading)
        apply(self.model, plan, adapter_name, self._active_adapters, autocast_adapter_dtype)
        if encoder is not None:
            self.prompt_encoder.add_adapter(adapter_name, encoder.to(adapter_device(self.model)))
            if adapter_name in self._active_adapters:
                self.prompt_encoder.set_adapter(self._active_adapters, plan.config.inference_mode)
        if first:
            let_inputs_require_grad(self.model)
        self.peft_config[adapter_name] = plan.config
        self.layers = AdaptedLayers(self.model)
        if self._rank_allocator is None:
            self._rank_allocator = plan.method.rank_allocator(plan.config, adapter_name, self.layers.of(adapter_name))
        if self._disabled:
            self.enable_adapter_layers(False)

    def attach(self, adapter_name: str, adapter: DetachedAdapter) -> None:
        """Put in an adapter that was made beside the model, neither active nor trainable; no walk over the model.

        Raises:
            ValueError: the name is taken. The model is unchanged.
        """
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: Adapter with name {adapter_name!r} already exists")
        method = method_of(adapter.config)
        owners = [(self.layers.get(name, method.layer_type), part) for name, part in adapter.parts.items()]
        owners += [(self.wrappers[name], module) for name, module in adapter.modules.items()]
        done: list[AdapterLayer | ModulesToSaveWrapper] = []
        try:
            for owner, part in owners:
                done.append(owner)
                owner.attach(adapter_name, part)
            if adapter.encoder is not None:
                self.prompt_encoder.add_adapter(adapter_name, adapter.encoder)
        except BaseException:
            for owner in done:
                owner.delete_adapter(adapter_name)
            raise
        self.peft_config[adapter_name] = adapter.config

    @property
    def wrappers(self) -> dict[str, ModulesToSaveWrapper]:
        """The wrapped modules of ``modules_to_save`` by their names in ``model``."""
        return self.layers.wrappers

    def _switched(self) -> tuple[nn.Module, ...]:
        """Everything that has adapters by name."""
        return *self.layers, *self.wrappers.values(), self.prompt_encoder

    @property
    def targeted_module_names(self) -> list[str]:
        return self.layers.names

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The name of the active adapter, or the list of names where it is not exactly one."""
        return self._active_adapters[0] if len(self._active_adapters) == 1 else list(self._active_adapters)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones; several act together: those of one method in this order, those
        of several methods on one module from LoRA, nearest to it, over AdaLoRA and IA3 to bottlenecks.

        Merged adapters are unmerged first, with a warning. Active adapters are trainable unless ``inference_mode``, all
        others are frozen.

        Raises:
            ValueError: a name is not known, or two of them replace the same module (``modules_to_save``), or two of
                them have virtual tokens.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self.check_names(names)
        for path, wrapper in self.wrappers.items():
            if sum(name in wrapper.modules_to_save for name in names) > 1:
                raise ValueError(
                    f"adapter_name: only one of {names} can be active, each has its own {path} (modules_to_save)"
                )
        prompts = [name for name in names if name in self.prompt_encoder]
        if len(prompts) > 1:
            raise ValueError(f"adapter_name: only one of {prompts} can be active, each has virtual tokens of its own")
        if any(layer.merged_adapters for layer in self.layers):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.unmerge_adapter()
        for layer in self.layers:
            layer.set_adapter(names, inference_mode)
        for wrapper in self.wrappers.values():
            wrapper.set_adapter(next((name for name in names if name in wrapper.modules_to_save), None), inference_mode)
        self.prompt_encoder.set_adapter(names, inference_mode)
        self._active_adapters = names

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Thaw or freeze adapters without making them active."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_names(names)
        for module in self._switched():
            module.set_requires_grad(names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. Where it was the only active one, the first of the others by name becomes active.

        Raises:
            ValueError: no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(
                f"adapter_name: Adapter {adapter_name!r} does not exist, there are {sorted(self.peft_config)}"
            )
        if any(adapter_name in layer.merged_adapters for layer in self.layers):
            raise ValueError(f"Cannot delete adapter {adapter_name!r} while it is merged. Please unmerge it first.")
        was_active = adapter_name in self._active_adapters
        del self.peft_config[adapter_name]
        if self._rank_allocator is not None and self._rank_allocator.adapter_name == adapter_name:
            self._rank_allocator = None
        for module in self._switched():
            module.delete_adapter(adapter_name)
        if not was_active:
            return
        names = [name for name in self._active_adapters if name != adapter_name]
        if not names and self.peft_config:
            names = [min(self.peft_config)]
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {names[0]}.",
                stacklevel=3,
            )
        self.set_adapter(names)

    def enable_adapter_layers(self, enabled: bool = True) -> None:
        """Switch all adapters on (or off, see :meth:`disable_adapter_layers`)."""
        switched = self._switched()
        # What is merged is taken out from the outside in, and put back from the inside out.
        for module in reversed(switched) if enabled else switched:
            module.enable_adapters(enabled)
        self._disabled = not enabled

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off: the model gives what the base model gives. Merged adapters are out meanwhile."""
        biases = {self.peft_config[name].bias for name in self._active_adapters} - {"none"}
        if biases:
            warnings.warn(
                f"Careful, disabling adapter layers with bias configured to be {sorted(biases)} does not produce the "
                "same output as the base model would without adaption.",
                stacklevel=3,
            )
        self.enable_adapter_layers(False)

    def check_names(self, names: Sequence[str]) -> None:
        """ValueError where one of them is no adapter of the model."""
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"adapter_name: Adapter {name!r} not found, there are {sorted(self.peft_config)}")

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Add an adapter made of others, see :func:`pyfused.weighted.add_weighted_adapter`."""
        add_weighted_adapter(self, *args, **kwargs)

    # One adapter for each sample -------------------------------------------------------------------------------------

    @contextmanager
    def adapters_by_row(self, adapter_names: Sequence[str], copies: int = 1) -> Iterator[None]:
        """In this context, the model gives each sample its adapter, whichever adapters are active.

        Args:
            adapter_names: an adapter's name or "__base__" for each sample of the batch.
            copies: how often generation repeats each sample.

        Raises:
            TypeError: ``adapter_names`` is no list of names.
            ValueError: a name is not known, or an adapter is merged.
            NotImplementedError: an adapter is of a kind that is not applied by sample.
        """
        with use_adapters(self, adapter_names, copies):
            yield

    # Ranks that change in training (AdaLoRA) --------------------------------------------------------------------------

    @property
    def rankallocator(self) -> RankAllocator:
        """The budget of the AdaLoRA adapter that is trained; AttributeError where there is none."""
        if self._rank_allocator is None:
            raise AttributeError("rankallocator: the model has no AdaLoRA adapter that is trained")
        return self._rank_allocator

    @property
    def trainable_adapter_name(self) -> str:
        """The name of the AdaLoRA adapter that is trained; AttributeError where there is none."""
        return self.rankallocator.adapter_name

    @property
    def update_and_allocate(self) -> Callable[[int], None]:
        """``update_and_allocate(global_step)``: distribute AdaLoRA's ranks over the layers.

        To be called in every training step, counted from 0, after ``loss.backward()`` and before
        ``optimizer.zero_grad()``, with the optimizer's step before it or after it. AttributeError where no AdaLoRA
        adapter is trained; the call raises ValueError where there are no gradients.
        """
        return functools.partial(
            self.rankallocator.update_and_allocate, self.layers.of(self.rankallocator.adapter_name)
        )

    def resize_modules_by_rank_pattern(self, rank_pattern: Mapping[str, Any], adapter_name: str) -> None:
        """Remove pruned ranks of an AdaLoRA adapter: its parameters become smaller ones, unknown to an optimizer.

        Args:
            rank_pattern: for names of ``lora_E`` of layers, as in ``AdaLoraConfig.rank_pattern`` (with or without the
                adapter's name), which of the ranks stay: a list of bools or a bool tensor.

        Raises:
            TypeError, ValueError: a name or a value that does not fit. The model is unchanged.
        """
        self.check_names([adapter_name])
        resize_by_rank_pattern(self.layers.of(adapter_name), self.peft_config[adapter_name], rank_pattern, adapter_name)
        if self._rank_allocator is not None and self._rank_allocator.adapter_name == adapter_name:
            self._rank_allocator.reset_ipt()

    # Merging ----------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters into the base weights; :meth:`unmerge_adapter` takes them out again.

        Args:
            adapter_names: None for the active ones.
            safe_merge: first see that every merged weight is finite, so that a broken adapter changes nothing.

        Raises:
            TypeError: ``adapter_names`` is a string.
            AttributeError: an adapter has virtual tokens, and is no function of the base weights.
            ValueError: a name is not known, adapters are off, or a merged weight is not finite (``safe_merge``).
            NotImplementedError: a base weight is no plain floating-point tensor.
        """
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list of names or None, got the string {adapter_names!r}")
        names = self._active_adapters if adapter_names is None else list(adapter_names)
        self.check_names(names)
        for name in names:
            if name in self.prompt_encoder:  # AttributeError is what HF PEFT raises
                method = self.peft_config[name].peft_type.value
                raise AttributeError(f"merge_adapter: adapter {name!r} ({method}) has no base weights to go into")
        check_and_merge(self, names, safe_merge)

    def unmerge_adapter(self) -> None:
        """Take all merged adapters out of the base weights."""
        merged = [layer for layer in self.layers if layer.merged]  # the outer ones first
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=3)
        for layer in merged:
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with adapters merged into its weights and nothing of pyfused left in it.

        Modules of ``modules_to_save`` are replaced by the active adapter's copy. Arguments and errors as
        :meth:`merge_adapter`; ``progressbar`` is HF PEFT's, there is no bar.
        """
        self.merge_adapter(adapter_names, safe_merge)
        tied = list(dict.fromkeys(path for path, layer in self.layers.named() if layer.is_untied))
        model = self.unload()
        tell_untied(model, tied)
        return model

    def unload(self) -> nn.Module:
        """The base model without adapters; what is merged stays merged."""
        replaced: dict[nn.Module, nn.Module] = {layer: layer.get_base_layer() for layer in self.layers}
        replaced.update({wrapper: wrapper.active_module() for wrapper in self.wrappers.values()})
        replace_modules(self.model, replaced)
        for layer in self.layers:
            layer.release()
        self.layers = AdaptedLayers(self.model)
        self.prompt_encoder = PromptEncoders()
        self._rank_allocator = None
        self.peft_config.clear()
        self._active_adapters = []
        return self.model
