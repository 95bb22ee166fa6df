"""``AdapterPool`` over a folder with adapters of every method."""

from __future__ import annotations

import pytest
import torch
from pool_cases import CONFIGS, randomise_trained, run, save_alone, use
from torch import Tensor

import pyfused
from pyfused import AdapterPool

peft = pytest.importorskip("peft")

NAMES = list(CONFIGS)


@pytest.fixture
def alone(build, mixed, inputs):
    """The logits of an adapter in a model of its own, of the text's tokens."""

    def make(name: str) -> Tensor:
        model = build("llama").eval()
        if name != "__base__":
            model = pyfused.PeftModel.from_pretrained(model, mixed / name)
        with torch.no_grad():
            return model(**inputs).logits[:, -inputs["input_ids"].shape[1] :]

    return make


def test_every_method_in_one_batch(model, mixed, inputs, alone):
    """In a model that had none of their layers before, two rounds, so that each was in memory and went."""
    names = ["__base__", *NAMES, "lora"]
    length = inputs["input_ids"].shape[1]
    with AdapterPool(model, mixed, max_adapters=len(NAMES)) as pool:
        for _ in range(2):
            with pool.use(names) as given:
                rows = run(model, inputs, given)[:, -length:]
                again = run(model, inputs, given)[:, -length:]
            assert torch.equal(rows, again)
            for row, name in enumerate(names):
                torch.testing.assert_close(rows[row : row + 1], alone(name), rtol=1e-4, atol=1e-5, msg=name)
            assert pool.stats().adapters == len(NAMES)
            for name in NAMES:
                file = mixed / name / "adapter_config.json"
                file.write_text(file.read_text())
            pool.refresh()
            assert pool.stats().adapters == 0
    assert list(model.peft_config) == ["default"]


def test_gates_and_prompts_are_not_in_one_batch(model, mixed, inputs, build):
    """A gate averages over a sequence, and the others' prompts would count."""
    config = pyfused.BottleneckConfig(mh_adapter=True, output_adapter=True, reduction_factor=4, use_gating=True)
    save_alone(build("llama"), config, mixed / "gated", 1)
    with AdapterPool(model, mixed) as pool, pool.use(["gated", "prefix", "prompt"]) as names:
        rows = run(model, inputs, names[:2])
        with torch.no_grad():
            alone = pyfused.PeftModel.from_pretrained(build("llama"), mixed / "gated")(**inputs).logits
        torch.testing.assert_close(rows[:1], alone, rtol=1e-4, atol=1e-5)
        with pytest.raises(NotImplementedError, match=r"gates of \['gated@1'\].* prompts of \['prompt@3'\]"):
            run(model, inputs, names)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_tensors_are_those_of_load_adapter(wrap, mixed, name, autocast_adapter_dtype):
    model = wrap(pyfused, "llama", torch.bfloat16, target_modules=["q_proj"])
    state = torch.get_rng_state()
    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    with AdapterPool(model, mixed, **options) as pool:
        use(pool, name)
        pool.refresh()
        torch.set_rng_state(state)
        file = mixed / name / "adapter_config.json"
        file.write_text(file.read_text())
        pool.refresh()
        with pool.use([name]) as (given,):
            assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn for an adapter"
            model.load_adapter(mixed / name, "hand", **options)
            ours, hand = (pyfused.get_peft_model_state_dict(model, None, one) for one in (given, "hand"))
            assert list(ours) == list(hand)
            for key, tensor in hand.items():
                assert tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key])
                assert not ours[key].requires_grad
            own = {key: tensor for key, tensor in model.named_parameters() if f".{given}" in key}
            theirs = {key: tensor for key, tensor in model.named_parameters() if ".hand" in key}
            assert [key.replace(given, "hand") for key in own] == list(theirs)
            assert all(one.dtype == two.dtype for one, two in zip(own.values(), theirs.values(), strict=True))
            assert model.peft_config[given].to_dict() == model.peft_config["hand"].to_dict()
            assert pool.stats().bytes == sum(tensor.nbytes for tensor in own.values())


def test_generate(model, mixed, inputs, build):
    names = ["prefix", "__base__", "ia3", "prompt", "bottleneck", "adalora"]
    ids = inputs["input_ids"].repeat(len(names), 1)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with AdapterPool(model, mixed) as pool, pool.use(names) as given:
        tokens = model.generate(input_ids=ids, adapter_names=given, **options)
    for row, name in enumerate(names):
        other = build("llama").eval()
        if name != "__base__":
            other = pyfused.PeftModel.from_pretrained(other, mixed / name)
        expected = other.generate(input_ids=ids[:1], **options)
        assert torch.equal(tokens[row : row + 1], expected), name


@pytest.mark.parametrize("name", ["ia3", "adalora", "prompt", "prefix"])
def test_adapters_of_hf_peft(model, build, tmp_path, inputs, name):
    config = CONFIGS[name]()
    kind = getattr(peft, type(config).__name__)
    fields = {"ia3": ("target_modules", "feedforward_modules"), "adalora": ("init_r", "target_r", "total_step")}
    fields = fields.get(name, ("task_type", "num_virtual_tokens"))
    options = {field: getattr(config, field) for field in fields}
    theirs = peft.get_peft_model(build("llama"), kind(**options))
    randomise_trained(theirs, 3)
    theirs.save_pretrained(tmp_path / "all" / name)
    with AdapterPool(model, tmp_path / "all") as pool, pool.use([name]) as names, torch.no_grad():
        ours = run(model, inputs, names)
        torch.testing.assert_close(ours, theirs.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_classifiers_adapters(build, wrap, batch, tmp_path):
    """Post-norm places, with a head for each adapter."""
    configs = {
        "bottleneck": pyfused.BottleneckConfig(mh_adapter=True, output_adapter=True, reduction_factor=4),
        "pfeiffer": pyfused.BottleneckConfig(
            mh_adapter=False, output_adapter=True, original_ln_before=True, reduction_factor=4
        ),
        "ia3": pyfused.IA3Config(task_type="SEQ_CLS"),
    }
    for seed, (name, config) in enumerate(configs.items()):
        save_alone(build("bert_cls"), config, tmp_path / name, seed)
    model = wrap(pyfused, "bert_cls", target_modules=["query"]).eval()
    inputs = {key: value[:1].repeat(3, 1) for key, value in batch("bert_cls").items()}
    with AdapterPool(model, tmp_path) as pool, torch.no_grad():
        with pool.use(list(configs)) as names:
            mixed = model(**inputs, adapter_names=names).logits
        for row, name in enumerate(configs):
            alone = pyfused.PeftModel.from_pretrained(build("bert_cls"), tmp_path / name).eval()
            torch.testing.assert_close(mixed[row], alone(**inputs).logits[row], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_fails_alone(build, wrap, batch, inputs, tmp_path, unchanged):
    for name, feedforward in (("output", []), ("input", ["v_proj"])):
        config = pyfused.IA3Config(target_modules=["v_proj"], feedforward_modules=feedforward)
        save_alone(build("llama"), config, tmp_path / "llama" / name, 1)
    model = wrap(pyfused, "llama", target_modules=["q_proj"]).eval()
    with AdapterPool(model, tmp_path / "llama") as pool, pool.use(["output"]) as names:
        before = run(model, inputs, names)
        with unchanged(model), pytest.raises(ValueError, match=r"input/adapter_config.json: feedforward_modules"):
            use(pool, "input")
        assert torch.equal(run(model, inputs, names), before)
    prompt = pyfused.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    save_alone(build("bert"), prompt, tmp_path / "bert" / "prompt", 1)
    model = wrap(pyfused, "bert", target_modules=["query"]).eval()
    with AdapterPool(model, tmp_path / "bert") as pool, unchanged(model):
        with pytest.raises(NotImplementedError, match=r"prompt/adapter_config.json: .*'prompt' is for FEATURE_EXTR"):
            use(pool, "prompt")
