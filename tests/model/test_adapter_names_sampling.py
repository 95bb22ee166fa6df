"""Sampling and beam search with adapters of all methods in one batch, as if each sample's model were called alone.

What draws or searches is the same ``generate`` in both runs, from the same seed. In the run that is compared with, a
logits processor puts what each sample's adapter gives alone, without padding or a cache, in the place of every score.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

import pyfused


def _bottleneck(**options) -> pyfused.BottleneckConfig:
    return pyfused.BottleneckConfig(reduction_factor=4, non_linearity="gelu", **options)


def _prefix(**options) -> pyfused.PrefixTuningConfig:
    return pyfused.PrefixTuningConfig(task_type="CAUSAL_LM", **options)


CONFIGS = {
    "lora": pyfused.LoraConfig(r=4, lora_alpha=13, target_modules=["q_proj", "up_proj"]),
    "dora": pyfused.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "adalora": pyfused.AdaLoraConfig(
        init_r=6, target_r=4, total_step=10, target_modules=["v_proj"], orth_reg_weight=0.0
    ),
    "ia3": pyfused.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "houlsby": _bottleneck(),
    "parallel": _bottleneck(mh_adapter=False, is_parallel=True, scaling=3.0),
    "prompt": pyfused.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": _prefix(num_virtual_tokens=4),
    "projected": _prefix(num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8),
}
WITHOUT_VIRTUAL = ["ia3", "lora", "houlsby", "__base__", "adalora", "parallel", "dora", "ia3", "adalora"]
ALL = ["prompt", "ia3", "prefix", "houlsby", "__base__", "adalora", "projected", "lora", "parallel", "dora", "prompt"]
TOKENS = 5


@pytest.fixture
def model(build_trained) -> nn.Module:
    return build_trained(CONFIGS).eval()


class Alone:
    """The scores of each sample as its adapter alone gives them for the text so far."""

    def __init__(self, model: nn.Module, names: list[str], mask: Tensor, search: bool) -> None:
        self.model, self.names, self.mask, self.search = model, names, mask, search

    def __call__(self, seen: Tensor, scores: Tensor) -> Tensor:
        copies = len(seen) // len(self.names)
        found = [self._logits(row // copies, ids) for row, ids in enumerate(seen)]
        return torch.stack(found).log_softmax(-1) if self.search else torch.stack(found)

    def _logits(self, sample: int, ids: Tensor) -> Tensor:
        ids, name = ids[int((self.mask[sample] == 0).sum()) :][None], self.names[sample]
        if name == "__base__":
            with self.model.disable_adapter():
                return self.model(ids).logits[0, -1]
        self.model.set_adapter(name)
        return self.model(ids).logits[0, -1]


@pytest.mark.parametrize("names", [WITHOUT_VIRTUAL, ALL], ids=["layers", "virtual tokens too"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "num_beams": 2},
    ],
    ids=["samples", "several samples", "beams", "several beams", "sampled beams"],
)
@torch.no_grad()
def test_drawn_and_searched_as_alone(model, build, names, options):
    ids = torch.randint(3, 64, (len(names), 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1::2, :2] = 0  # on the left, as for generate
    options = options | {"max_new_tokens": TOKENS, "pad_token_id": 0, "eos_token_id": None}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    alone = LogitsProcessorList([Alone(model, names, mask, "num_beams" in options)])
    results = []
    for run, more in ((model, {"adapter_names": names}), (build("llama").eval(), {"logits_processor": alone})):
        torch.manual_seed(4)
        results.append(run.generate(input_ids=ids, attention_mask=mask, **options, **more))
    got, expected = results
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
    copies = options.get("num_return_sequences", 1)
    assert len(got.sequences) == copies * len(names) and got.sequences.shape[1] == 7 + TOKENS
    if options.get("do_sample"):  # another seed draws others
        torch.manual_seed(5)
        again = model.generate(input_ids=ids, attention_mask=mask, adapter_names=names, **options)
        assert not torch.equal(again.sequences, got.sequences)
