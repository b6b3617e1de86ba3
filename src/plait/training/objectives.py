"""What is learnt: how rows become batches, and what a batch's loss is. One small class an objective.

The loss is always the model's own: labels are unshifted ids, shifted once inside of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.config.errors import TrainingError
from plait.config.schema import Config
from plait.data.batch import Batch
from plait.data.classification import Examples, Padder
from plait.data.conversations import ConversationRows, Conversations, open_conversations
from plait.data.loader import Collate, evaluation_batches, without_targets
from plait.data.masking import MaskedRows
from plait.data.packing import Packer, Rows, Samples
from plait.data.prepare import open_data
from plait.data.shards import TokenShards
from plait.mixers.layout import Layout
from plait.models.loss import IGNORE, next_token_targets
from plait.models.output import Output
from plait.tokenizers.base import Tokenizer


class Objective(ABC):
    """A strategy: samples of a shard, their collation, the loss, what evaluation counts."""

    head: ClassVar[str]  # the kind of head the model must have
    per_byte: ClassVar[bool] = True  # whether a loss in bits per byte means anything

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        self.data = config.data
        self.training = config.training
        self.model = config.model
        self.tokenizer = tokenizer
        if config.model.head.kind != self.head:
            raise TrainingError(
                f"training.objective {config.training.objective} needs a model with a {self.head} head, and this "
                f"one's is {config.model.head.kind}: set --model.head.kind={self.head}"
            )

    def open(self) -> tuple[TokenShards, TokenShards | None]:
        """The training data that the config names, and what is held out of it."""
        return open_data(self.data, self.tokenizer)

    @abstractmethod
    def samples(self, shards: TokenShards) -> Samples:
        """The rows to train on."""

    @property
    @abstractmethod
    def collate(self) -> Collate:
        """Rows to a batch."""

    @abstractmethod
    def evaluation(self, shards: TokenShards, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """Batches of at most ``rows`` rows over held-out data, equally many on every process."""

    def run(self, forward: nn.Module, batch: Batch) -> Output:
        """The model on a batch; ``loss_sum`` is in nats over ``batch.n_targets`` targets."""
        out: Output = forward(**batch.inputs())
        return out

    def targets(self, batch: Batch) -> Tensor:
        """The ids that the loss is over, flat; -100 where there is none."""
        return batch.labels.flatten()

    def correct(self, out: Output, batch: Batch) -> Tensor | None:
        """How many predictions are right, where that is counted."""
        return None


class CausalLM(Objective):
    """Predict the next token of the same document."""

    head = "lm"

    def samples(self, shards: TokenShards) -> Samples:
        """Rows of ``data.sequence_length`` tokens."""
        return _rows(self, shards, self.data.sequence_length)

    @property
    def collate(self) -> Collate:
        """Packed, or dense where documents are joined."""
        return Packer(self.data.sequence_length, separate=self.data.documents == "separate")

    def evaluation(self, shards: TokenShards, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """Every held-out token but the first of each document once."""
        length = min(self.data.sequence_length, max(2, shards.n_tokens))
        return evaluation_batches(
            _rows(self, shards, length),
            rows,
            separate=self.data.documents == "separate",
            tokens=self.training.eval_tokens,
            rank=rank,
            world=world,
        )

    def targets(self, batch: Batch) -> Tensor:
        """As the model's loss sees them: shifted by the same function."""
        n_seq, length = batch.labels.shape
        if batch.cu_seqlens is None:
            return next_token_targets(
                batch.labels, Layout.dense(n_seq, length, device=batch.labels.device)
            ).flatten()
        layout = Layout.packed(batch.cu_seqlens, length, batch.max_len or length)
        return next_token_targets(batch.labels, layout).flatten()


class MaskedLM(Objective):
    """Predict hidden tokens from both sides (BERT, arXiv 1810.04805); see plait.data.masking."""

    head = "masked_lm"

    def samples(self, shards: TokenShards) -> Samples:
        """Rows with some tokens hidden, a pure function of the sample's number."""
        return self._masked(_rows(self, shards, self.data.sequence_length))

    @property
    def collate(self) -> Collate:
        """As for causal models, but the first token of a document is a target like any other."""
        return Packer(self.data.sequence_length, separate=self.data.documents == "separate", causal=False)

    def evaluation(self, shards: TokenShards, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """Held-out rows, hidden in the same places each time."""
        plain = _rows(self, shards, min(self.data.sequence_length, max(2, shards.n_tokens)))
        return evaluation_batches(
            plain,
            rows,
            masking=self._masked(plain),
            separate=self.data.documents == "separate",
            tokens=self.training.eval_tokens,
            rank=rank,
            world=world,
        )

    def _masked(self, rows: Rows) -> MaskedRows:
        return MaskedRows(rows, self.tokenizer, self.training.mlm_probability)


class Classification(Objective):
    """Predict the label of a whole text, or its number (``model.head.num_labels: 1``)."""

    head = "classification"
    per_byte = False

    def open(self) -> tuple[TokenShards, TokenShards | None]:
        """Documents with their labels."""
        return open_data(self.data, self.tokenizer, labels=True)

    def samples(self, shards: TokenShards) -> Samples:
        """Whole documents, cut to ``data.sequence_length``."""
        return self._examples(shards, shuffle=self.data.shuffle)

    @property
    def collate(self) -> Collate:
        """Padded on the right."""
        pad = self.tokenizer.pad_id
        return Padder(0 if pad is None else pad, self.model.head.num_labels == 1, self.data.sequence_length)

    def evaluation(self, shards: TokenShards, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """Every held-out text once, or as many as ``eval_tokens`` allows."""
        examples = self._examples(shards, shuffle=False)
        count = examples.count
        if self.training.eval_tokens is not None:
            count = min(count, max(1, self.training.eval_tokens // self.data.sequence_length))
        return _each_once(examples, count, rows, self.collate, rank, world)

    def correct(self, out: Output, batch: Batch) -> Tensor | None:
        """Right classes; None for a regression."""
        if self.model.head.num_labels == 1 or out.logits is None:
            return None
        return (out.logits.argmax(-1) == batch.labels).sum()

    def _examples(self, shards: TokenShards, shuffle: bool) -> Examples:
        examples = Examples(shards, self.data.sequence_length, seed=self.training.seed, shuffle=shuffle)
        examples.check_labels(self.model.head.num_labels)
        return examples


class Chat(CausalLM):
    """Predict what the assistant says in conversations; see plait.data.conversations."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        if config.data.documents != "separate":
            raise TrainingError(
                "data.documents: joined would let conversations see each other; chat needs separate"
            )

    def open(self) -> tuple[TokenShards, TokenShards | None]:
        """Conversations."""
        return open_conversations(self.data, self.tokenizer)

    def samples(self, shards: TokenShards) -> Samples:
        """Rows of whole conversations, of at most ``data.sequence_length`` tokens."""
        return self._rows(shards, shuffle=self.data.shuffle)

    def evaluation(self, shards: TokenShards, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """Every held-out conversation once, or as many as ``eval_tokens`` allows."""
        held_out = self._rows(shards, shuffle=False)
        count = held_out.count
        if self.training.eval_tokens is not None:
            count = min(count, max(1, self.training.eval_tokens // self.data.sequence_length))
        return _each_once(held_out, count, rows, self.collate, rank, world)

    def _rows(self, shards: TokenShards, shuffle: bool) -> ConversationRows:
        assert isinstance(shards, Conversations)
        return ConversationRows(shards, self.data.sequence_length, seed=self.training.seed, shuffle=shuffle)


OBJECTIVES: dict[str, type[Objective]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "classification": Classification,
    "chat": Chat,
}


def make_objective(config: Config, tokenizer: Tokenizer) -> Objective:
    """The objective a config names; TrainingError if the model's head does not fit it."""
    return OBJECTIVES[config.training.objective](config, tokenizer)


def target_bytes(objective: Objective, batch: Batch, token_bytes: Tensor) -> int:
    """Bytes of text that a batch's targets stand for; token_bytes (V,): those of each id."""
    if not objective.per_byte:
        return 0
    targets = objective.targets(batch)
    return int(token_bytes[targets[targets != IGNORE]].sum())


def _rows(objective: Objective, shards: TokenShards, length: int) -> Rows:
    return Rows(shards, length, seed=objective.training.seed, shuffle=objective.data.shuffle)


def _each_once(
    samples: Samples, count: int, rows: int, collate: Collate, rank: int, world: int
) -> Iterator[Batch]:
    """The first ``count`` samples in batches of ``rows``, of which each process gets its part."""
    for at in range(0, count, rows):
        group = range(at, min(at + rows, count))[rank::world]
        batch = collate([samples.sample(i) for i in group or range(at, at + 1)])
        yield batch if group else without_targets(batch)


def as_tensor(tokenizer: Tokenizer) -> Tensor:
    """token_bytes of every id, (V,) int64."""
    return torch.from_numpy(tokenizer.token_bytes_table()).long()
