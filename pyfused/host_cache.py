"""What adapters' files hold, and those of them that an :class:`pyfused.AdapterPool` keeps in host memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import WEIGHTS_NAME, read_adapter
from .config import CONFIG_NAME, PeftConfig
from .file_keys import in_model

# Of the tensors in one block, in bytes: what a GPU reads at once.
_ALIGNMENT = 16

Signature = tuple[tuple[int, int, int], ...]


def signature(folder: Path) -> Signature | None:
    """What tells an adapter's files from others in their place: inode, size, time of change; None: one is missing."""
    try:
        stats = [(folder / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter's files hold, for any number of adapters to be made of it: nothing of it is changed.

    Attributes:
        config: its configuration.
        tensors: on the CPU, by their keys in the model.
        signature: of the files.
        memory: [bytes] uint8, the one block that the tensors lie in; None where each has its own memory.
    """

    config: PeftConfig
    tensors: dict[str, Tensor]
    signature: Signature | None
    memory: Tensor | None = None

    @classmethod
    def read(cls, folder: Path) -> AdapterFiles:
        """
        Raises:
            ValueError, NotImplementedError: the files are missing or damaged, or of a method that is not built.
        """
        before = signature(folder)
        config = PeftConfig.from_pretrained(folder)
        config.inference_mode = True
        return cls(config, in_model(read_adapter(folder, mapped=False), config), before)

    def packed(self, pinned: bool) -> AdapterFiles:
        """The same in one block of memory, so that all tensors go to a GPU at once; in page-locked memory or not."""
        begins, size = {}, 0
        for key, tensor in self.tensors.items():
            begins[key] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        memory = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        tensors = {key: _view(memory, begins[key], tensor).copy_(tensor) for key, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, memory=memory)

    def on(self, gpu: torch.device | None) -> dict[str, Tensor]:
        """The tensors; on the GPU, in its current stream's order, where there is one and they are packed."""
        if gpu is None or self.memory is None:
            return self.tensors
        memory = self.memory.to(gpu, non_blocking=True)
        begins = {key: tensor.storage_offset() * tensor.itemsize for key, tensor in self.tensors.items()}
        return {key: _view(memory, begins[key], tensor) for key, tensor in self.tensors.items()}


def _view(memory: Tensor, begin: int, like: Tensor) -> Tensor:
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape)


class HostCache:
    """Files of at most so many adapters, of at most so many bytes together. Not thread-safe: the pool holds its lock.

    Those of adapters that are in the model count as well: their use is marked here, so that what leaves the model is
    among the last to leave host memory.

    Attributes:
        by_name: the least recently used first.
        bytes: of all.
    """

    def __init__(self, max_adapters: int, max_bytes: int | None) -> None:
        self.by_name: OrderedDict[str, AdapterFiles] = OrderedDict()
        self.bytes = 0
        self._max_adapters = max_adapters
        self._max_bytes = max_bytes

    @property
    def is_on(self) -> bool:
        return self._max_adapters > 0

    def get(self, name: str, now: Signature | None) -> AdapterFiles | None:
        """What was read of an adapter; None where that is not what the files, whose signature is ``now``, hold."""
        files = self.by_name.get(name)
        if files is not None and files.signature != now:
            self.drop([name])
            return None
        return files

    def put(self, name: str, files: AdapterFiles) -> None:
        """Keep packed files, and let the least recently used go for them; files that are too large are not kept."""
        self.drop([name])
        limit, size = self._max_bytes, files.memory.nbytes
        # Files that came while they were read have no signature, by which to see that they are still the same.
        if files.signature is None or (limit is not None and size > limit):
            return
        while len(self.by_name) >= self._max_adapters or (limit is not None and self.bytes + size > limit):
            self.drop([next(iter(self.by_name))])
        self.by_name[name] = files
        self.bytes += size

    def touch(self, names: Iterable[str]) -> None:
        """Mark a use."""
        for name in names:
            if name in self.by_name:
                self.by_name.move_to_end(name)

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            files = self.by_name.pop(name, None)
            if files is not None:
                self.bytes -= files.memory.nbytes
