"""``fuse`` on models that HF PEFT has given a prompt or a prefix: the same numbers, and no copy for each row."""

from __future__ import annotations

import copy
import functools
import pickle

import peft
import pytest
import torch
import transformers
from helpers import ROWS_CHANGE_BITS
from prompt_cases import TASKS, N, build_case, gradients, inputs_of, loss_of
from torch import Tensor, nn

import pyfused

# Models that HF PEFT gives a prefix with this version of transformers.
PREFIXED = [name for name in TASKS if TASKS[name] in ("CAUSAL_LM", "SEQ_2_SEQ_LM") or name in ("bert", "llama_base")]
CASES = [("PromptTuningConfig", name) for name in TASKS] + [("PrefixTuningConfig", name) for name in PREFIXED]


def wrapped(config: str, name: str, base: nn.Module | None = None, **options) -> nn.Module:
    base = build_case(name) if base is None else base
    torch.manual_seed(3)
    return peft.get_peft_model(base, getattr(peft, config)(task_type=TASKS[name], num_virtual_tokens=N, **options))


@pytest.mark.parametrize(("config", "name"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_outputs_and_gradients(config, name, dtype):
    theirs, ours = (wrapped(config, name, build_case(name).to(dtype)) for _ in range(2))
    report = pyfused.fuse(ours)
    assert report.fused == ["prompt_encoder.default"] and not report.skipped
    inputs = inputs_of(name, labels=TASKS[name] != "TOKEN_CLS")
    expected, got = theirs(**inputs), ours(**inputs)
    for key, value in expected.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)
    loss_of(expected).backward()
    loss_of(got).backward()
    if dtype == torch.float32:
        torch.testing.assert_close(gradients(ours), gradients(theirs), rtol=1e-5, atol=1e-8)
    else:
        for key, value in gradients(theirs).items():
            torch.testing.assert_close(gradients(ours)[key], value, rtol=2e-2, atol=1e-2 * value.abs().max().item())


def test_rows_share_what_goes_into_the_model():
    for config in ("PromptTuningConfig", "PrefixTuningConfig"):
        model = wrapped(config, "llama")
        pyfused.fuse(model)
        weight = model.prompt_encoder["default"].embedding.weight
        prompt = model.get_prompt(4)
        tensors = [prompt] if isinstance(prompt, Tensor) else [layer.keys for layer in prompt.layers]
        for tensor in tensors:
            assert tensor.shape[0] == 4 and tensor.stride(0) == 0
            assert tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()


def test_projection_training_inference_and_switching(tmp_path):
    options = {"prefix_projection": True, "encoder_hidden_size": 9}
    theirs, ours = (wrapped("PrefixTuningConfig", "llama", **options) for _ in range(2))
    pyfused.fuse(ours)
    inputs = inputs_of("llama")
    # HF PEFT projects the prefix once for each sample
    same = functools.partial(torch.allclose, rtol=1e-6, atol=1e-6) if ROWS_CHANGE_BITS else torch.equal
    assert same(ours(**inputs).logits, theirs(**inputs).logits)
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build_case("llama"), tmp_path)
    expected = loaded(**inputs).logits
    pyfused.fuse(loaded)
    assert same(loaded(**inputs).logits, expected)
    for model in (theirs, ours):
        torch.manual_seed(4)
        model.add_adapter("other", peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
        model.set_adapter("other")
    assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(ours(**inputs).logits, theirs(**inputs).logits)


@pytest.mark.parametrize("config", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_generate_does_what_it_did(config):
    theirs, ours = (wrapped(config, "gpt2").eval() for _ in range(2))
    pyfused.fuse(ours)
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    ids = inputs_of("gpt2")["input_ids"]
    assert torch.equal(ours.generate(input_ids=ids, **options), theirs.generate(input_ids=ids, **options))


def test_invisible_and_taken_back():
    model = wrapped("PromptTuningConfig", "llama")
    kind, names, shown = type(model), list(model.state_dict()), repr(model)
    pyfused.fuse(model)
    assert isinstance(model, kind) and list(model.state_dict()) == names and repr(model) == shown
    assert pyfused.fuse(model).fused == ["prompt_encoder.default"]
    inputs = inputs_of("llama")
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).logits, expected)
    pyfused.unfuse(model)
    assert type(model) is kind


def test_hooks_on_the_encoder_run():
    model = wrapped("PrefixTuningConfig", "llama")
    calls = []
    pyfused.fuse(model)
    model.prompt_encoder["default"].register_forward_hook(lambda *args: calls.append(1))
    model(**inputs_of("llama"))
    assert calls == [1]


def test_what_stays_with_hf_peft():
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=8)
    model = peft.get_peft_model(build_case("llama"), config)
    with pytest.raises(
        ValueError, match=r"(?s)no virtual tokens that can be fused: .*P_TUNING is neither prompt nor prefix"
    ):
        pyfused.fuse(model)

    class Own(peft.PeftModelForCausalLM):
        pass

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    with pytest.raises(ValueError, match=r"model of the class .*Own"):
        pyfused.fuse(Own(build_case("llama"), config))


def test_sliding_windows():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["sliding_attention", "full_attention"]
    config = transformers.Gemma3TextConfig(
        **sizes, num_hidden_layers=2, head_dim=12, vocab_size=64, sliding_window=4, layer_types=kinds
    )
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(wrapped("PrefixTuningConfig", "llama", transformers.Gemma3ForCausalLM(config)))
    pyfused.fuse(models[1])
    first, second = (model(**inputs_of("llama")).logits for model in models)
    assert torch.equal(first, second)
