"""Training by sample with activation checkpointing: what is computed again has the adapters of its own forward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from helpers import run_in_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import pyfused

# Of each model: layers for LoRA, for AdaLoRA, for IA3 and which of those are feedforward.
TARGETS = {
    "llama": (["q_proj", "up_proj"], ["v_proj"], ["k_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn"], ["c_fc"], ["c_proj"], []),
    "bert": (["query", "intermediate.dense"], ["value"], ["key"], []),
    "t5": (["q", "wi"], ["o"], ["k", "wo"], ["wo"]),
}
# Forwards that come before all of their backwards; None: the active adapter.
CALLS = [
    ["lora", "dora", "__base__", "adalora", "ia3", "other", "lora5", "lora"],
    None,
    ["__base__", "lora5", "lora5", "other", "lora", "ia3", "adalora", "dora"],
    ["lora"] * 8,
]
reentrant_or_not = pytest.mark.parametrize("use_reentrant", [False, True])


def configs(name: str) -> dict[str, pyfused.PeftConfig]:
    lora, adalora, ia3, feedforward = TARGETS[name]
    of_lora = functools.partial(pyfused.LoraConfig, target_modules=lora, init_lora_weights=False)
    return {
        "lora": of_lora(r=4, lora_dropout=0.3),
        "lora5": of_lora(r=3, lora_alpha=5, lora_dropout=0.5),
        "dora": of_lora(r=2, use_dora=True, lora_dropout=0.4),
        "adalora": pyfused.AdaLoraConfig(
            init_r=5, target_r=3, total_step=10, lora_dropout=0.25, target_modules=adalora, orth_reg_weight=0.0
        ),
        "ia3": pyfused.IA3Config(target_modules=ia3, feedforward_modules=feedforward),
        "other": pyfused.BottleneckConfig.houlsby(reduction_factor=4, dropout=0.3),
    }


def add(base: nn.Module, configs: dict[str, pyfused.PeftConfig]) -> nn.Module:
    first, *others = configs
    torch.manual_seed(3)
    model = pyfused.get_peft_model(base, configs[first], first)
    for name in others:
        model.add_adapter(name, configs[name])
    model.set_requires_grad(list(configs))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) / 5)
    return model.train()


def random_ids(rows: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(1, 64, (rows, 6), generator=torch.Generator().manual_seed(seed))


def forward(model: nn.Module, names: list[str] | None, ids: Tensor | None = None, **options) -> Tensor:
    """A loss of one call."""
    ids = random_ids() if ids is None else ids
    options |= {} if names is None else {"adapter_names": names}
    result = model(ids, **options)
    result = result if isinstance(result, Tensor) else result[0]
    return (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def backward_of_all(model: nn.Module, **options) -> dict[str, Tensor]:
    """Losses and gradients by name."""
    torch.manual_seed(7)
    losses = [forward(model, names, **options) for names in CALLS]
    sum(losses).backward()
    return {"losses": torch.stack(losses).detach()} | gradients(model)


@reentrant_or_not
@pytest.mark.parametrize("name", TARGETS)
def test_transformers(build, name, use_reentrant):
    """Several forwards before their backwards, of all methods, with dropout."""
    is_t5 = name == "t5"  # which itself gives other bits under checkpointing
    model = add(build(name, torch.float64 if is_t5 else torch.float32), configs(name))
    options = {"decoder_input_ids": random_ids(seed=2)} if is_t5 else {}
    expected = backward_of_all(model, **options)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.testing.assert_close(backward_of_all(model, **options), expected, **({} if is_t5 else {"rtol": 0, "atol": 0}))


@reentrant_or_not
def test_together_is_apart(build, use_reentrant):
    """Each adapter as it is trained by itself on its own samples, without checkpointing."""
    model = add(build("llama", torch.float64), configs("llama"))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, names = random_ids(), CALLS[0]
    logits = model(ids).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4), dtype=logits.dtype)
    apart = {}
    for name in sorted(set(names) - {"__base__"}):
        model.set_adapter(name)
        chosen = [row for row, other in enumerate(names) if other == name]
        (model(ids[chosen]).logits * weights[chosen]).sum().backward()
        apart |= gradients(model)
    model.set_requires_grad(list(configs("llama")))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    (model(ids, adapter_names=names).logits * weights).sum().backward()
    torch.testing.assert_close(gradients(model), apart)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Own(nn.Module):
    """A model of the user's own, ``run`` puts the checkpoints in; the last block is run a second time."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.run = run
        self.double()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).requires_grad_()
        for block in (*self.blocks, self.blocks[-1]):
            x = self.run(block, x)
        return self.blocks[-1](x)


def nested(outer: bool, inner: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def within(block: nn.Module, x: Tensor) -> Tensor:
        return block(checkpoint(block, x, use_reentrant=inner))

    return lambda block, x: checkpoint(within, block, x, use_reentrant=outer)


def selective(block: nn.Module, x: Tensor) -> Tensor:
    context_fn = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.tanh.default])
    return checkpoint(block, x, use_reentrant=False, context_fn=context_fn)


def own_configs(dropout: bool = True) -> dict[str, pyfused.PeftConfig]:
    target = {"lora_dropout": 0.3 * dropout, "target_modules": ["q_proj", "v_proj"]}
    return {
        "lora": pyfused.LoraConfig(r=4, init_lora_weights=False, **target),
        "lora5": pyfused.LoraConfig(r=3, init_lora_weights=False, **target),
        "dora": pyfused.LoraConfig(r=2, use_dora=True, **target),
        "adalora": pyfused.AdaLoraConfig(init_r=3, target_r=2, total_step=9, orth_reg_weight=0.0, **target),
        "ia3": pyfused.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        "other": pyfused.LoraConfig(r=2, lora_bias=True, **target),
    }


CHECKPOINTS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
    "without early stop": functools.partial(checkpoint, use_reentrant=False, early_stop=False),
    "of some ops": selective,
    "reentrant in reentrant": nested(True, True),
    "reentrant in not reentrant": nested(False, True),
    "not reentrant in reentrant": nested(True, False),
    "not reentrant in not reentrant": nested(False, False),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_ones_own(kind):
    plain = (lambda block, x: block(block(x))) if " in " in kind else nn.Module.__call__
    expected = backward_of_all(add(Own(plain), own_configs()))
    torch.testing.assert_close(backward_of_all(add(Own(CHECKPOINTS[kind]), own_configs())), expected)


def test_without_the_state_of_random_numbers():
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    expected = backward_of_all(add(Own(), own_configs(dropout=False)))
    torch.testing.assert_close(backward_of_all(add(Own(run), own_configs(dropout=False))), expected)


@reentrant_or_not
def test_backwards_elsewhere(use_reentrant):
    """In another thread, in another order, and within calls that have other names."""
    model = add(Own(functools.partial(checkpoint, use_reentrant=use_reentrant)), own_configs(dropout=False))

    def backward(loss: Tensor, surroundings: list[str] | None) -> None:
        if surroundings is None:
            loss.backward()
            return
        with model.base_model.adapters_by_row(surroundings):
            loss.backward()

    expected = {}
    for place, names in enumerate(CALLS):
        forward(model, names).backward()
        expected[place] = gradients(model)
    for surroundings in (None, CALLS[2], None):
        losses = dict(enumerate(forward(model, names) for names in CALLS))
        for place in (2, 0, 3, 1):
            run_in_threads(backward, [(losses[place], surroundings)])
            torch.testing.assert_close(gradients(model), expected[place])


@reentrant_or_not
def test_threads(use_reentrant):
    """Each thread trains with names of its own; the gradients of all are summed."""
    model = add(Own(functools.partial(checkpoint, use_reentrant=use_reentrant)), own_configs(dropout=False))
    for names in CALLS * 3:
        forward(model, names).backward()
    expected = gradients(model)

    def run(names: list[str] | None) -> None:
        for _ in range(3):
            forward(model, names).backward()

    run_in_threads(run, ((names,) for names in CALLS))
    torch.testing.assert_close(gradients(model), expected)


def test_a_checkpoint_of_the_whole_call():
    """Names that are given within a checkpoint are given again."""
    model = add(Own(), own_configs())
    expected = backward_of_all(model)
    torch.manual_seed(7)
    losses = [checkpoint(forward, model, names, use_reentrant=False) for names in CALLS]
    sum(losses).backward()
    torch.testing.assert_close({"losses": torch.stack(losses).detach()} | gradients(model), expected)


@reentrant_or_not
def test_prompts(build, use_reentrant):
    """Virtual tokens beside other methods: they are in front of the text before the first layer."""
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    model = add(build("llama", torch.float64), configs("llama") | {"prompt": pyfused.PromptTuningConfig(**virtual)})
    calls = [["prompt", "lora", "__base__", "prompt"], ["other", "prompt", "ia3", "dora"]]

    def result() -> dict[str, Tensor]:
        torch.manual_seed(7)
        sum(forward(model, names, random_ids(4)) for names in calls).backward()
        return gradients(model)

    expected = result()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.testing.assert_close(result(), expected)


def test_prefixes_are_refused(build):
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    model = add(build("llama"), {"lora": configs("llama")["lora"], "prefix": pyfused.PrefixTuningConfig(**virtual)})
    model.gradient_checkpointing_enable()
    forward(model, ["lora", "__base__"], random_ids(2)).backward()
    assert gradients(model)
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        forward(model, ["prefix", "lora"], random_ids(2))
    with torch.no_grad():
        forward(model, ["prefix", "lora"], random_ids(2))


def test_compiled():
    """Tables are made where Dynamo has AdaLoRA's factors with sizes that are unknown to it, and torch's checkpoints are
    changed once, however often it comes by."""
    model = add(Own(), {name: own_configs(dropout=False)[name] for name in ("lora", "adalora")})
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for names in (["lora", "adalora"], ["adalora", "lora", "__base__"]):
        ids = random_ids(len(names))
        forward(model, names, ids).backward()
        expected = gradients(model)
        forward(compiled, names, ids).backward()
        torch.testing.assert_close(gradients(model), expected)
    assert not hasattr(torch.utils.checkpoint._CheckpointFrame.__init__.__wrapped__, "__wrapped__")
