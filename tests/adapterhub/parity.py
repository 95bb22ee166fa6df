"""Bottleneck adapters of pyfused and of AdapterHub ``adapters`` side by side, in the environment that has the latter.

Run as a program by test_parity.py: ``parity.py MODEL PRESET``. Both libraries adapt the same small model; files go both
ways. An error ends the program.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from pathlib import Path

import adapters
import torch
from adapters import BnConfig, DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers import logging as transformers_logging

from pyfused import BottleneckConfig, PeftModel, get_peft_model

NAME = "task"
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=100, num_labels=3, **_SIZES))
    if kind == "bert-bare":
        return BertModel(BertConfig(vocab_size=100, **_SIZES))
    if kind == "roberta":
        return RobertaModel(RobertaConfig(vocab_size=100, **_SIZES))
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=100, **_SIZES))
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=100, decoder_start_token_id=0, **sizes))


_FLAGS = {
    "ln": {"ln_before": True, "ln_after": True, "non_linearity": "gelu", "reduction_factor": {"0": 4, "default": 8}},
    "learned": {"scaling": "learned", "non_linearity": "leakyrelu", "leave_out": [1]},
    "channel": {"scaling": "channel", "use_gating": True, "non_linearity": "tanh"},
    "plus": {"original_ln_after": False, "residual_before_ln": False, "original_ln_before": True, "scaling": "channel"},
    "post-add": {"residual_before_ln": "post_add", "original_ln_before": True},
}
# Flags that come together: norms, the residual's place, gates and learned scales, the activations' other names.
_MIXED = {
    "residual": {"ln_after": True, "adapter_residual_before_ln": True, "non_linearity": "gelu_new"},
    "gated": {
        **{"use_gating": True, "ln_before": True, "ln_after": True, "adapter_residual_before_ln": True},
        **{"scaling": "learned", "non_linearity": "leaky_relu"},
    },
    # y alone goes on, without the residual stream
    "alone": {"original_ln_after": False},
    "alone-before": {"original_ln_after": False, "original_ln_before": True, "use_gating": True},
}
_PARALLEL = {
    # AdapterHub's parallel adapter ignores adapter_residual_before_ln
    "parallel-ln": {
        **{"ln_before": True, "ln_after": True, "adapter_residual_before_ln": True, "mh_adapter": True},
        **{"scaling": "learned", "non_linearity": "silu"},
    },
    "parallel-gated": {
        **{"use_gating": True, "ln_after": True, "adapter_residual_before_ln": True},
        **{"scaling": "channel", "non_linearity": "linear"},
    },
    "parallel-plain": {"use_gating": True, "adapter_residual_before_ln": True, "non_linearity": "gelu_pytorch_tanh"},
    # ignored as well: where a sequential adapter has its residual
    "parallel-alone": {"original_ln_after": False, "original_ln_before": True, "residual_before_ln": "post_add"},
}
# AdapterHub's configuration and ours, of the same name or the same flags.
PRESETS = {
    "houlsby": (DoubleSeqBnConfig, BottleneckConfig.houlsby, {}),
    "pfeiffer": (SeqBnConfig, BottleneckConfig.pfeiffer, {}),
    "parallel": (ParBnConfig, BottleneckConfig.parallel, {}),
    **{name: (DoubleSeqBnConfig, BottleneckConfig.houlsby, flags) for name, flags in (_FLAGS | _MIXED).items()},
    **{name: (ParBnConfig, BottleneckConfig.parallel, flags) for name, flags in _PARALLEL.items()},
}
# A layer norm takes out what scales its whole input, so that in fp32 a scale's or gate's gradient is mostly rounding:
# these gradients are compared in fp64.
EXACT = {*_MIXED, *_PARALLEL}


def inputs(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 100, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask} | ({"labels": ids} if kind == "t5" else {})


def output(model: nn.Module, kind: str) -> Tensor:
    result = model(**inputs(kind))
    return result.last_hidden_state if kind in ("bert-bare", "roberta") else result.logits


def close(what: str, got: Tensor, expected: Tensor) -> None:
    """Largest difference over largest value: sums in another order."""
    error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    limit = 1e-9 if expected.dtype == torch.float64 else 2e-5
    assert got.shape == expected.shape and error <= limit, f"{what}: relative difference {error:.2e}"


def gradients(model: nn.Module, kind: str, marker: str) -> dict[str, Tensor]:
    """Gradients of the adapter's parameters, by what follows the marker's place in their names."""
    model.zero_grad()
    torch.manual_seed(2)
    result = output(model, kind)
    result.backward(torch.randn(result.shape).to(result.dtype))
    return {name: p.grad.clone() for name, p in model.named_parameters() if marker in name and p.grad is not None}


def main(kind: str, preset: str) -> None:
    theirs_class, ours_class, flags = PRESETS[preset]
    theirs = model_of(kind)
    ours = copy.deepcopy(theirs)
    adapters.init(theirs)
    config: BnConfig = theirs_class(**flags)
    theirs.add_adapter(NAME, config=config)
    theirs.train_adapter(NAME)
    theirs.eval()
    torch.manual_seed(3)
    with torch.no_grad():  # adapters of a trained size, so that a missing one shows
        for name, parameter in theirs.named_parameters():
            if f".adapters.{NAME}." in name:
                parameter.normal_(std=0.3)
    with tempfile.TemporaryDirectory() as folder:
        # AdapterHub cannot write a layer norm before the adapter as safetensors: its tensors share memory.
        if flags.get("ln_before"):
            save_their_tensors(theirs, Path(folder, "theirs"))
        else:
            theirs.save_adapter(f"{folder}/theirs", NAME, with_head=False, use_safetensors=True)
        ours_model = PeftModel.from_pretrained(copy.deepcopy(ours), f"{folder}/theirs", NAME, True, format="adapterhub")
        ours_model.eval()
        close("result", output(ours_model, kind), output(theirs, kind))

        ours_model.save_adapter(f"{folder}/ours", NAME)
        fresh = model_of(kind)
        adapters.init(fresh)
        fresh.load_adapter(f"{folder}/ours", with_head=False, use_safetensors=True, set_active=True)
        fresh.eval()
        assert torch.equal(output(fresh, kind), output(theirs, kind)), "AdapterHub reads other numbers than it wrote"
        loaded = fresh.adapters_config.get(NAME).to_dict()
        assert loaded == config.to_dict(), f"configuration: {loaded} != {config.to_dict()}"

    # our configuration makes the adapter that AdapterHub's makes: places, sizes, initial flow
    made = get_peft_model(copy.deepcopy(ours), ours_class(**flags), NAME)
    shapes = {name: p.shape for name, p in made.named_parameters() if p.requires_grad}
    assert shapes == {name: p.shape for name, p in ours_model.named_parameters() if p.requires_grad}
    with torch.no_grad(), made.disable_adapter():
        close("without the adapter", output(made.eval(), kind), output(ours.eval(), kind))

    if preset in EXACT:
        ours_model.double(), theirs.double()
    check_gradients(ours_model, theirs, kind)


def check_gradients(ours: PeftModel, theirs: nn.Module, kind: str) -> None:
    from pyfused.integrations.adapterhub import sites

    own, other = gradients(ours, kind, ".bottlenecks."), gradients(theirs, kind, f".adapters.{NAME}.")
    hubs = {site.name: site.hub for site in sites(ours.get_base_model())}
    compared = 0
    for name, grad in own.items():
        site, _, parameter = name.removeprefix("base_model.model.").partition(f".bottlenecks.{NAME}.")
        key = f"{hubs[site]}.adapters.{NAME}.{parameter}"
        # a layer norm before the adapter has two names there, and named_parameters gives the first
        close(name, grad, other[key if key in other else key.replace("adapter_down.0", "adapter_norm_before")])
        compared += 1
    assert compared > 0 and compared == sum(p.requires_grad for p in ours.parameters())


def save_their_tensors(model: nn.Module, folder: Path) -> None:
    import json

    import safetensors.torch

    model.save_adapter(str(folder), NAME, with_head=False)
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(kept, folder / "adapter.safetensors")
    json.loads((folder / "adapter_config.json").read_text())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    for case in sys.argv[1:]:
        main(*case.split("/"))
        print(case, "ok", flush=True)
