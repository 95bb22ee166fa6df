"""Drawn adapters of all methods, ranks and dtypes in one batch: logits, gradients and decoding by the error rule.

What is plain is HF PEFT with the sample's adapter alone, for bottlenecks a few lines of PyTorch, on the sample alone;
what is exact is the same in fp64.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import assert_error_rule
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from eager_adapters import NAME, eager_adapter  # noqa: E402

import pyfused  # noqa: E402

STEPS = 3  # tokens that are decoded
TEXTS = torch.randint(1, 64, (24, 5 + STEPS), generator=torch.Generator().manual_seed(1))
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEEDFORWARD = ("o_proj", "gate_proj", "down_proj")
TASK = {"task_type": "CAUSAL_LM"}
VIRTUAL = ("PromptTuningConfig", "PrefixTuningConfig")


@st.composite
def lora(draw: Any, **form: bool) -> dict[str, Any]:
    return form | {
        "target_modules": draw(st.lists(st.sampled_from(LINEARS), min_size=1, unique=True)),
        "r": draw(st.integers(1, 64)),
        "lora_alpha": draw(st.floats(1.0, 16.0)),
        "use_rslora": draw(st.booleans()),
    }


@st.composite
def adalora(draw: Any) -> dict[str, Any]:
    rank = draw(st.integers(2, 64))
    targets = draw(st.lists(st.sampled_from(LINEARS), min_size=1, unique=True))
    return {"target_modules": targets, "init_r": rank, "target_r": rank - 1, "total_step": 10} | TASK


@st.composite
def ia3(draw: Any) -> dict[str, Any]:
    targets = draw(st.lists(st.sampled_from(LINEARS), min_size=1, unique=True))
    # All adapters of a layer have to agree which side they scale.
    return {"target_modules": targets, "feedforward_modules": [name for name in targets if name in FEEDFORWARD]}


@st.composite
def bottleneck(draw: Any) -> dict[str, Any]:
    places = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return {
        "mh_adapter": places[0],
        "output_adapter": places[1],
        "is_parallel": draw(st.booleans()),
        "original_ln_before": draw(st.booleans()),
        "reduction_factor": draw(st.sampled_from([0.5, 1, 2, 8, 32])),
        # None with a kink: a rounding across it makes a gradient jump, in ours or in plain PyTorch's alone.
        "non_linearity": draw(st.sampled_from(["tanh", "gelu", "swish"])),
        "scaling": draw(st.floats(0.5, 4.0)),
    }


@st.composite
def prefix(draw: Any) -> dict[str, Any]:
    projection = {"prefix_projection": True, "encoder_hidden_size": draw(st.integers(1, 40))}
    return {"num_virtual_tokens": draw(st.integers(1, 6))} | draw(st.sampled_from([{}, projection])) | TASK


# Methods, and the forms of LoRA that are more than two matrices.
FORMS = {
    "lora": ("LoraConfig", lora()),
    "dora": ("LoraConfig", lora(use_dora=True)),
    "lora_bias": ("LoraConfig", lora(lora_bias=True)),
    "adalora": ("AdaLoraConfig", adalora()),
    "ia3": ("IA3Config", ia3()),
    "bottleneck": ("BottleneckConfig", bottleneck()),
    "prefix": ("PrefixTuningConfig", prefix()),
    "prompt": (
        "PromptTuningConfig",
        st.builds(dict, num_virtual_tokens=st.integers(1, 6), task_type=st.just("CAUSAL_LM")),
    ),
}


def adapters_of(form: str) -> st.SearchStrategy[tuple[str, dict]]:
    method, options = FORMS[form]
    return st.tuples(st.just(method), options)


ADAPTERS = st.sampled_from(list(FORMS)).flatmap(adapters_of)


class Row(NamedTuple):
    """A sample: the place of its adapter, -1 for none, its text, and how much of it is there before decoding."""

    adapter: int
    text: int
    length: int

    @property
    def name(self) -> str:
        return name_of(self.adapter)

    @property
    def ids(self) -> Tensor:
        return TEXTS[self.text, : self.length + STEPS]


def name_of(place: int) -> str:
    return "__base__" if place < 0 else f"a{place}"


@st.composite
def batches(draw: Any, form: str) -> tuple[list[tuple[str, dict]], list[Row]]:
    """Adapters of which one is of this form, and samples of which one at least is for it."""
    adapters = draw(st.lists(ADAPTERS, min_size=1, max_size=4))
    place = draw(st.integers(0, len(adapters)))
    adapters.insert(place, draw(adapters_of(form)))
    texts, lengths = st.integers(0, len(TEXTS) - 1), st.integers(1, TEXTS.shape[1] - STEPS)
    rows = draw(st.lists(st.builds(Row, st.integers(-1, len(adapters) - 1), texts, lengths), min_size=2, max_size=7))
    rows.insert(draw(st.integers(0, len(rows))), draw(st.builds(Row, st.just(place), texts, lengths)))
    return adapters, rows


@functools.cache
def base_of(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def mixed_model(adapters: list[tuple[str, dict]], dtype: torch.dtype, autocast_adapter_dtype: bool) -> nn.Module:
    base = copy.deepcopy(base_of(dtype))
    torch.manual_seed(1)  # so that a batch is the same whatever was drawn before it
    for place, (method, options) in enumerate(adapters):
        if method == "AdaLoraConfig":  # one alone may be in training
            options = options | {"inference_mode": any(method == each for each, _ in adapters[:place])}
        config, options = getattr(pyfused, method)(**options), {"autocast_adapter_dtype": autocast_adapter_dtype}
        if place == 0:
            model = pyfused.get_peft_model(base, config, name_of(0), **options)
        else:
            model.add_adapter(name_of(place), config, **options)
    generator = torch.Generator().manual_seed(2)
    for place in range(len(adapters)):
        for key, parameter in parameters_of(model, name_of(place)).items():
            if "ranknum" not in key:
                parameter.data += torch.randn(parameter.shape, generator=generator) / 5
    model.set_requires_grad([name_of(place) for place in range(len(adapters))])
    return model.eval()


def parameters_of(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's, by names that do not depend on its own and on what else is on the layers."""
    found = {f"{key}.": p for key, p in model.named_parameters() if f".{name}." in f"{key}."}
    short = (key.replace(f".{name}.", ".").replace("base_layer.", "").removeprefix("base_model.") for key in found)
    return dict(zip(short, found.values(), strict=True))


def plain_model(
    model: nn.Module, adapters: list[tuple[str, dict]], place: int, dtype: torch.dtype, autocast_adapter_dtype: bool
) -> nn.Module:
    """The base model with one of the mixed model's adapters, none of pyfused in it."""
    base = copy.deepcopy(base_of(dtype))
    if place < 0:
        return base
    plain = eager_adapter(base, *adapters[place], autocast_adapter_dtype)
    ours, copies = parameters_of(model, name_of(place)), parameters_of(plain, NAME)
    assert {key: (p.shape, p.dtype) for key, p in copies.items()} == {k: (p.shape, p.dtype) for k, p in ours.items()}
    for key, parameter in copies.items():
        parameter.data.copy_(ours[key].data)
    return plain.eval()


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask."""
    longest = max(map(len, rows))
    pads = [(longest - len(row), 0) if side == "left" else (0, longest - len(row)) for row in rows]
    ids = torch.stack([nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
    ones = [nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)]
    return ids, torch.stack(ones)


def of_text(model: nn.Module, row: Row, between: int) -> Tensor:
    """Logits of a sample alone, with so many padded places in front."""
    ids = nn.functional.pad(row.ids, (between, 0))[None]
    mask = (torch.arange(ids.shape[1]) >= between).long()[None]
    return model(input_ids=ids, attention_mask=mask).logits[0, -len(row.ids) :]


def check(
    adapters: list[tuple[str, dict]], rows: list[Row], side: str, dtype: torch.dtype, autocast_adapter_dtype: bool
) -> None:
    model, names = mixed_model(adapters, dtype, autocast_adapter_dtype), [row.name for row in rows]
    ids, mask = padded([row.ids for row in rows], side)
    weights = torch.randn(*ids.shape, 64, generator=torch.Generator().manual_seed(3)) * mask[..., None]
    with torch.no_grad():
        inferred = model(ids, attention_mask=mask, adapter_names=names).logits[:, -ids.shape[1] :]
    trained = model(ids, attention_mask=mask, adapter_names=names).logits[:, -ids.shape[1] :]
    if trained.requires_grad:
        (trained * weights).sum().backward()
    decoded = decode(model, rows, dtype, adapter_names=names)
    for place in sorted({row.adapter for row in rows}):
        plain, exact = (plain_model(model, adapters, place, dtype, autocast_adapter_dtype) for _ in range(2))
        exact.double()
        virtual = place >= 0 and adapters[place][0] in VIRTUAL
        parts, gradients = {"inference": [], "training": [], "decoding": []}, []
        # How far plain is off is a matter of luck in one text: it counts how far it is in any of some more.
        for texts in TEXTS.split(6):
            both = [each(input_ids=texts).logits[:, -texts.shape[1] :].flatten(0, 1) for each in (plain, exact)]
            for found in parts.values():
                found.append((both[0], *both))
            if place >= 0:
                both = gradients_of_sum(both, (plain, exact))
                gradients.append((both[0], *both))
        sums = [0.0, 0.0]
        for number, row in enumerate(rows):
            if row.adapter != place:
                continue
            seen = mask[number].bool()
            between = ids.shape[1] - len(row.ids) if virtual and side == "left" else 0
            both = [of_text(each, row, between) for each in (plain, exact)]
            sums = [total + (logits * weights[number, seen]).sum() for total, logits in zip(sums, both, strict=True)]
            parts["inference"].append((inferred[number, seen], *both))
            parts["training"].append((trained[number, seen], *both))
            steps = slice(row.length - 1, row.length - 1 + STEPS)
            with torch.no_grad():
                both = [of_text(each, row, 0)[steps] for each in (plain, exact)]
                if not virtual:  # in generate HF PEFT repeats prompts and loses prefixes
                    both[0] = decode(plain, [row], dtype)[0]
            parts["decoding"].append((decoded[number], *both))
        name = f"{name_of(place)} of {adapters}"
        for kind, found in parts.items():
            assert_error_rule(f"{kind}, {name}", *(torch.cat(each).detach() for each in zip(*found, strict=True)))
        if place >= 0:
            for total in sums:
                total.backward()
            gradients.append(tuple(map(gradients_of, (model, plain, exact), (name_of(place), NAME, NAME))))
            joined = [in_units(each[2], each) for each in gradients]
            assert_error_rule(f"gradients, {name}", *(torch.cat(each) for each in zip(*joined, strict=True)))


def gradients_of_sum(logits: list[Tensor], models: tuple[nn.Module, nn.Module]) -> list[dict[str, Tensor]]:
    """Of a sum with random weights, in each of two models, which have none afterwards."""
    weights = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(5))
    found = []
    for each, model in zip(logits, models, strict=True):
        (each * weights).sum().backward()
        found.append(gradients_of(model, NAME))
        model.zero_grad()
    return found


def gradients_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    found = {key: p.grad for key, p in parameters_of(model, name).items() if p.grad is not None}
    return {key: grad for key, grad in found.items() if "ranknum" not in key}  # HF PEFT asks for its, and has no use


def in_units(exact: dict[str, Tensor], gradients: tuple[dict[str, Tensor], ...]) -> list[Tensor]:
    """All of an adapter's gradients as one tensor, each in units of its largest number in fp64.

    But for those whose terms cancel, as a bias on keys has: a hundredth of the adapter's largest number is a unit, too.
    """
    sizes = {key: grad.abs().max().item() for key, grad in exact.items()}
    units = {key: max(size, max(sizes.values()) / 100) for key, size in sizes.items()}
    assert all(each.keys() == units.keys() for each in gradients)
    return [torch.cat([each[key].flatten() / unit for key, unit in units.items()]) for each in gradients]


def decode(model: nn.Module, rows: list[Row], dtype: torch.dtype, **options: Any) -> Tensor:
    """Logits of each step ``[samples, steps, vocabulary]`` where the tokens are those of the texts."""
    ids, mask = padded([row.ids[: row.length] for row in rows], "left")
    then = torch.stack([row.ids[row.length :] for row in rows])
    steps = iter(then.t())

    def force(seen: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, next(steps)[:, None], 0.0)

    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=transformers.LogitsProcessorList([force]),
        max_new_tokens=STEPS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert torch.equal(out.sequences[:, -STEPS:], then)
    return torch.stack(out.logits, dim=1).to(dtype)  # generation has made it fp32


def drawn(examples: int) -> Callable:
    # Not shrunk: that makes hundreds of models.
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


CASES = {
    "data": st.data(),
    "side": st.sampled_from(["left", "right"]),
    "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    "autocast_adapter_dtype": st.booleans(),
}


@pytest.mark.parametrize("form", FORMS)
@drawn(4)
@given(**CASES)
def test_drawn_adapters(form, data, side, dtype, autocast_adapter_dtype):
    check(*data.draw(batches(form)), side, dtype, autocast_adapter_dtype)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # 50 models in 16 bits, for which a processor without AVX-512 has no fast products
@pytest.mark.parametrize("form", FORMS)
@drawn(50)
@given(**CASES)
def test_many_drawn_adapters(form, data, side, dtype, autocast_adapter_dtype):
    check(*data.draw(batches(form)), side, dtype, autocast_adapter_dtype)
