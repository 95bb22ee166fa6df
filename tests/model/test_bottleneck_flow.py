"""Bottleneck adapters in models: AdapterHub's flags for where h, the residual stream and the norms come in.

tests/adapterhub compares them with that library, where it is installed.
"""

from __future__ import annotations

import json

import pytest
import torch
from bottleneck_cases import trained
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from pyfused import BottleneckConfig, PeftModel, get_peft_model  # noqa: E402

_SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertModel(transformers.BertConfig(**_SIZES, intermediate_size=64)).eval()
    return transformers.LlamaModel(transformers.LlamaConfig(**_SIZES, intermediate_size=64)).eval()


def run(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(3, 21).view(2, 9)).last_hidden_state


def adapted(kind: str, config: BottleneckConfig) -> PeftModel:
    return trained(get_peft_model(base(kind), config))


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_parallel_adapter_adds_h_behind_its_norm(kind, tmp_path):
    """AdapterHub's never reads adapter_residual_before_ln; the flag stays in the file."""
    outputs = []
    for flag in (False, True):
        config = BottleneckConfig.parallel(ln_after=True, adapter_residual_before_ln=flag)
        model = adapted(kind, config)
        with torch.no_grad():
            outputs.append(run(model))
        model.save_adapter(tmp_path)
        saved = json.loads((tmp_path / "adapter_config.json").read_text())
        assert saved["config"]["adapter_residual_before_ln"] is flag
    assert torch.equal(*outputs)


_PARALLEL = {"is_parallel": True, "residual_before_ln": "post_add"}


@pytest.mark.parametrize("flags", [{}, {"original_ln_before": True}, _PARALLEL], ids=["h", "h-plus-x", "parallel"])
def test_without_original_ln_after_the_stream_ends_at_the_adapter(flags):
    model = adapted("llama", BottleneckConfig(mh_adapter=False, original_ln_after=False, **flags))
    block = model.get_base_model().layers[0]
    seen = {}
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    block.mlp.base_layer.register_forward_hook(lambda _, args, h: seen.update(h=h))
    block.register_forward_hook(lambda _, args, y: seen.update(y=y))
    with torch.no_grad():
        run(model)
        h, x = seen["h"], seen["x"]
        source = x if "is_parallel" in flags else h + x if flags else h
        expected = h + block.mlp.bottlenecks["default"](source)
    torch.testing.assert_close(seen["y"], expected, rtol=1e-5, atol=1e-5)


def test_the_stream_is_not_taken_off_in_16_bits():
    model = adapted("llama", BottleneckConfig(original_ln_after=False)).bfloat16()
    with pytest.raises(NotImplementedError, match=r"original_ln_after=False .*bfloat16"):
        run(model)
