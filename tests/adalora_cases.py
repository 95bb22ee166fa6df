"""AdaLoRA in a model as HF PEFT's example trains it, for its tests."""

from __future__ import annotations

import warnings

import torch
from torch import nn

FP32, BF16 = torch.float32, torch.bfloat16
MODELS = {"llama": "CAUSAL_LM", "bert_cls": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "gpt2": "CAUSAL_LM"}
STEPS = 30
# The scaling is no power of two; ranks are pruned from step 6 to step 22.
OPTIONS = {
    **{"init_r": 6, "target_r": 3, "lora_alpha": 13, "orth_reg_weight": 0.3},
    **{"tinit": 5, "tfinal": STEPS - 22, "deltaT": 2, "total_step": STEPS, "beta1": 0.8, "beta2": 0.9},
}


def wrap(library, base: nn.Module, **options) -> nn.Module:
    """Adapted by ``library``; seeds are the same for both libraries."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base, library.AdaLoraConfig(**(OPTIONS | options)))
    return model.eval()  # GPT-2 has dropout of its own


def pair_of(build, name: str, dtype: torch.dtype = FP32, **options) -> tuple[nn.Module, nn.Module]:
    """The same model twice: wrapped by HF PEFT, and by pyfused."""
    import peft

    import pyfused

    options = {"task_type": MODELS[name]} | options
    return tuple(wrap(library, build(name, dtype), **options) for library in (peft, pyfused))


def labelled(batch, name: str, seed: int = 1) -> dict:
    """A batch with labels; another one for each seed."""
    found = batch(name)
    generator = torch.Generator().manual_seed(seed)
    found["input_ids"] = torch.randint(1, 64, found["input_ids"].shape, generator=generator)
    labels = torch.randint(3, (2,), generator=generator) if name == "bert_cls" else found["input_ids"]
    return found | {"labels": found.get("decoder_input_ids", labels)}


def train(model: nn.Module, name: str, inputs, steps=range(STEPS), patterns: list | None = None) -> list[float]:
    """A run as HF PEFT's example of AdaLoRA has it; ``patterns`` collects the rank pattern after each step."""
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in steps:
        loss = model(**inputs(name, step)).loss
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
        if patterns is not None:
            patterns.append(pattern(model))
    return losses


def pattern(model: nn.Module) -> dict[str, list[bool]] | None:
    found = model.peft_config["default"].rank_pattern
    return found and {key.removesuffix(".default"): value for key, value in found.items()}


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    got, expected = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        if "ranknum" in name and tensor == 0:  # of a layer without ranks in a file, where it means nothing
            continue
        assert got[name].dtype == tensor.dtype and torch.equal(got[name], tensor), name
    # HF PEFT trains ranknum where it was cast, and never saves it.
    flags = [
        {name: parameter.requires_grad for name, parameter in model.named_parameters() if "ranknum" not in name}
        for model in (ours, theirs)
    ]
    assert flags[0] == flags[1]
    assert not any(parameter.requires_grad for name, parameter in ours.named_parameters() if "ranknum" in name)
