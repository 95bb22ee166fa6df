"""What prefix tuning computes and writes, and how often: one prefix a forward, one write a row, nothing stale; in
compiled and exported models too.
"""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from prompt_cases import TASKS, N, build_case, check_another_turn, inputs_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

import pyfused
from pyfused import PrefixTuningConfig, get_peft_model

PROJECTION = {"prefix_projection": True, "encoder_hidden_size": 9}


@pytest.fixture
def prefixed(build_task):
    def make(name: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
        torch.manual_seed(3)
        config = PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=N, **options)
        return get_peft_model(build_task(name).to(dtype), config)

    return make


class Writes(TorchDispatchMode):
    """What makes or writes tensors [rows, heads, length, width of a head] of the lengths that it is asked about."""

    def __init__(self, rows: int, heads: int, width: int, *lengths: int) -> None:
        super().__init__()
        self.shapes = [(rows, heads, length, width) for length in lengths]
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func._schema.is_mutable:  # into a cache of a fixed size
            self.ops += [str(func)] * sum(tuple(tensor.shape) in self.shapes for tensor in given)
        else:
            new = [tensor for tensor in made if tensor.untyped_storage().data_ptr() not in known]
            self.ops += [str(func)] * sum(tuple(tensor.shape) in self.shapes for tensor in new)
        return result


@pytest.mark.parametrize("name, heads, layers", [("llama", 2, 3), ("gpt2", 4, 2), ("bert", 4, 2), ("t5", 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["", "projection"])
def test_each_row_is_written_once(prefixed, name, heads, layers, dtype, options):
    """By the model's own update, which puts the text's keys and values behind the prefix."""
    ours = prefixed(name, dtype, **options)
    inputs = inputs_of(name, labels=False)
    length = 7
    if name == "t5":
        length = 6
        inputs["decoder_input_ids"] = torch.randint(1, 64, (2, length))
    for rows_of_training in (True, False):
        with torch.set_grad_enabled(rows_of_training), Writes(2, heads, 8, N, N + length) as writes:
            ours(**inputs)
        assert writes.ops == ["aten.cat.default"] * 2 * layers


@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["", "projection"])
def test_each_row_of_a_static_cache_is_written_once(prefixed, options):
    ours = prefixed("llama", **options)
    ids = inputs_of("llama")["input_ids"]
    with Writes(2, 2, 8, N) as writes:
        ours.generate(input_ids=ids, max_new_tokens=4, do_sample=False, cache_implementation="static")
    assert len(writes.ops) == 2 * 3


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_it_is_made_once(prefixed, name):
    ours = prefixed(name, **PROJECTION)
    encoder = ours.prompt_encoder["default"]
    asked, made = [], []
    encoder.register_forward_hook(lambda *_: asked.append(1))
    encoder.transform.register_forward_hook(lambda *_: made.append(1))
    inputs = inputs_of(name, labels=False)
    for calls in (1, 2):  # training: with every forward
        ours(**inputs)
        assert len(asked) == len(made) == calls
    with torch.no_grad():  # kept from here on
        ours(**inputs)
        ours(**inputs)
        assert (len(asked), len(made)) == (4, 3)
        if name != "bert":
            ours.generate(input_ids=inputs["input_ids"], max_new_tokens=5, do_sample=False, num_beams=2)
            assert (len(asked), len(made)) == (5, 3)


def _steps(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs).logits.square().mean().backward()
    optimizer.step()


CHANGES = {
    "step": _steps,
    "load_state_dict": lambda model, _: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "in inference mode": lambda model, _: [p.mul_(1.5) for p in model.prompt_encoder.parameters()],
    "moved": lambda model, _: model.to(torch.float64),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["cast", "projection"])
def test_what_is_kept_follows_the_parameters(prefixed, change, mode, options):
    ours = prefixed("llama", torch.bfloat16, **options).eval()
    inputs = inputs_of("llama", labels=False)
    with mode():
        first = ours(**inputs).logits
        assert torch.equal(ours(**inputs).logits, first)
    with torch.inference_mode(change == "in inference mode"):
        CHANGES[change](ours, inputs)
    with mode():
        got = ours(**inputs).logits
        fresh = copy.deepcopy(ours)
        assert fresh.prompt_encoder["default"]._kept is None
        assert torch.equal(got, fresh(**inputs).logits) and not torch.equal(got.to(first.dtype), first)


@pytest.mark.parametrize("how", ["load_adapter", "set_peft_model_state_dict"])
def test_what_is_kept_follows_a_file(prefixed, tmp_path, how):
    ours = prefixed("llama", torch.bfloat16).eval()
    other = prefixed("llama", torch.bfloat16).eval()
    nn.init.normal_(other.prompt_encoder["default"].embedding.weight)
    inputs = inputs_of("llama", labels=False)
    with torch.inference_mode():
        first, expected = ours(**inputs).logits, other(**inputs).logits
    if how == "load_adapter":
        other.save_pretrained(tmp_path)
        ours.load_adapter(tmp_path, "default")
    else:
        pyfused.set_peft_model_state_dict(ours, pyfused.get_peft_model_state_dict(other))
    with torch.inference_mode():
        assert torch.equal(ours(**inputs).logits, expected) and not torch.equal(first, expected)


def test_rows_share_the_prefix_until_the_model_writes_them(prefixed):
    ours = prefixed("llama")
    seen = []
    ours.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(layer.keys for layer in kwargs["cache"].layers), with_kwargs=True
    )
    ours(**inputs_of("llama"))
    weight = ours.prompt_encoder["default"].embedding.weight
    assert len(seen) == 3
    for keys in seen:
        assert keys.shape == (2, 2, N, 8) and keys.stride(0) == 0
        assert keys.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("window", [2, 5, 50])
@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@torch.no_grad()
def test_sliding_windows(name, window):
    """Shorter than the prefix, than prefix and text, longer; beside a cache that forgets nothing, and HF PEFT."""
    models = []
    for library in (peft, pyfused):
        torch.manual_seed(3)
        config = library.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
        models.append(library.get_peft_model(build_case(name, sliding_window=window), config).eval())
        models[-1].prompt_encoder["default"].embedding.weight.mul_(3)
    theirs, ours = models
    inputs = inputs_of(name, labels=False)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = ours(**inputs).logits
    torch.testing.assert_close(logits, theirs(**inputs).logits)
    cache, prefix = DynamicCache(), ours.prompt_encoder["default"](torch.float32, 2)
    for layer in range(3):
        cache.update(*prefix[2 * layer : 2 * layer + 2], layer)
    seen = {"attention_mask": torch.cat((mask.new_ones(2, N), mask), dim=1)}
    expected = ours.get_base_model()(input_ids=ids, **seen, cache=cache).logits
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()])

    inputs = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}  # padded on the left
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    whole = ours.generate(**inputs, **options, use_cache=False)
    for implementation in ("dynamic", "static"):
        got = ours.generate(**inputs, **options, cache_implementation=implementation)
        assert torch.equal(got.sequences, whole.sequences)
        torch.testing.assert_close(got.logits, whole.logits)


def test_generate_goes_on_from_a_cache_of_its_own(prefixed):
    check_another_turn(prefixed("llama").eval(), inputs_of("llama")["input_ids"])


def test_compiles_in_one_graph(prefixed):
    ours = prefixed("llama")
    inputs = inputs_of("llama")
    expected = ours(**inputs)
    got = torch.compile(ours, fullgraph=True, backend="aot_eager")(**inputs)
    torch.testing.assert_close(got.loss, expected.loss)


class _Logits(nn.Module):
    """Tensors in and out, as an exported program has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs, use_cache=False)[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [{}, PROJECTION], ids=["", "projection"])
def test_exported_for_any_number_of_rows(prefixed, name, options):
    model, inputs = _Logits(prefixed(name, **options).eval()), inputs_of(name, labels=False)
    more = {key: torch.cat((tensor, tensor.flip(0), tensor)) for key, tensor in inputs.items()}
    rows = {key: {0: torch.export.Dim("rows")} for key in inputs}
    with torch.no_grad():
        program = torch.export.export(model, (inputs,), dynamic_shapes=(rows,)).module()
        for given in (inputs, more):
            torch.testing.assert_close(program(given), model(given))
