"""One of the processes of test_distributed.py: ``python distributed_worker.py RANK WORLD_SIZE FOLDER``.

For each mode and method, trains a small Llama with an adapter for a few steps on its share of the batch, and leaves the
losses and the adapter in FOLDER. With one process it is what the others are compared with.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import pyfused

MODES = ("ddp", "fsdp", "fsdp-leaves")
STEPS = 3
_CONFIGS = {
    "lora": {"r": 3, "lora_alpha": 13, "target_modules": "all-linear", "init_lora_weights": False},
    # ranks are pruned in the second step
    "adalora": {
        **{"init_r": 4, "target_r": 2, "lora_alpha": 13, "task_type": "CAUSAL_LM", "target_modules": "all-linear"},
        **{"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": STEPS},
    },
    "ia3": {"init_ia3_weights": False},
    "bottleneck": {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"},
    "prefix": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
    "projected prefix": {
        **{"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 16},
    },
    "prompt": {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3},
}
_CLASSES = {
    "lora": pyfused.LoraConfig,
    "adalora": pyfused.AdaLoraConfig,
    "ia3": pyfused.IA3Config,
    "bottleneck": pyfused.BottleneckConfig,
    "prefix": pyfused.PrefixTuningConfig,
    "projected prefix": pyfused.PrefixTuningConfig,
    "prompt": pyfused.PromptTuningConfig,
}
METHODS = tuple(_CLASSES)


def make(method: str) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return pyfused.get_peft_model(transformers.LlamaForCausalLM(config), _CLASSES[method](**_CONFIGS[method]))


def wrap(model: nn.Module, mode: str) -> nn.Module:
    """The model as ``mode`` spreads it over the processes."""
    if mode == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if mode == "fsdp-leaves":  # every linear layer for itself, those of the adapters too
        for module in list(model.modules()):
            if type(module) is nn.Linear:
                fully_shard(module)
    if mode.startswith("fsdp"):
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def train(model: nn.Module, share: Tensor, allocate: Callable[[int], None]) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, foreach=False)
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=share, labels=share).loss
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean, dist.ReduceOp.SUM)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def check_saved_in_shards(model: nn.Module, mode: str, method: str, folder: Path) -> None:
    """``torch.distributed.checkpoint``: what each process holds of it, into a new model."""
    expected = whole_state(model)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    other = wrap(make(method), mode)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    got = whole_state(other)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def run(rank: int, world_size: int, folder: Path, mode: str, method: str) -> None:
    batch = torch.randint(1, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    model = make(method)
    spread = wrap(model, mode)
    allocate = model.update_and_allocate if method == "adalora" else lambda step: None
    losses = train(spread, batch.chunk(world_size)[rank], allocate)
    state = whole_state(model)  # all processes take part
    if world_size > 1:
        check_saved_in_shards(spread, mode, method, folder / f"shards-{mode}-{method}")
    if rank == 0:
        adapter = pyfused.get_peft_model_state_dict(model, state)
        torch.save({"losses": losses, "adapter": adapter}, folder / f"{mode}-{method}.pt")


def main(rank: int, world_size: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for method in METHODS:
        for mode in MODES if world_size > 1 else ("alone",):
            run(rank, world_size, folder, mode, method)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
