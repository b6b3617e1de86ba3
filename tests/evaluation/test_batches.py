"""The loss over a trainer's batches: its sums, and the bytes of exactly the tokens that were predicted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.data.batch import Batch
from plait.evaluation.batches import evaluate
from plait.evaluation.score import Score
from plait.models import Model
from tests.inference.helpers import VOCAB, make_model

SIZES = torch.arange(VOCAB) % 5


def ids_of(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(1))


def labels_of(ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[0, 3] = labels[0, 20] = -100
    return labels


def by_hand(model: Model, rows: list[tuple[Tensor, Tensor]], *, shift: bool) -> Score:
    """Sequence after sequence, (ids, labels) each (T,)."""
    nats, n_targets, n_bytes = 0.0, 0, 0
    for ids, labels in rows:
        if len(ids) == 0:
            continue
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        pairs = zip(logits[:-1], labels[1:], strict=True) if shift else zip(logits, labels, strict=True)
        for predicted, label in pairs:
            if int(label) != -100:
                nats += float(F.cross_entropy(predicted[None], label[None]))
                n_targets += 1
                n_bytes += int(label) % 5
    return Score(nats, n_targets, n_bytes)


def same(ours: Score, theirs: Score) -> None:
    assert (ours.n_targets, ours.n_bytes) == (theirs.n_targets, theirs.n_bytes)
    assert ours.nats == pytest.approx(theirs.nats, rel=1e-6) and ours.n_targets > 0


@pytest.mark.parametrize("head", ["lm", "masked_lm"])
@pytest.mark.parametrize("form", ["dense", "packed", "padded"])
def test_the_sums_equal_those_of_each_sequence_by_hand(form: str, head: str) -> None:
    model = make_model("hybrid", head={"kind": head, "tie": False}, dropout=0.5).train()
    lengths = {"dense": [30, 30], "packed": [0, 25, 1, 0, 34, 0], "padded": [12, 30]}[form]
    if form == "packed":
        ids = ids_of(1, 60)
        labels = labels_of(ids)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        rows = list(zip(ids[0].split(lengths), labels[0].split(lengths), strict=True))
        batch = Batch(ids, labels, 60, 0, cu_seqlens=bounds, max_len=64)
    else:
        ids = ids_of(2, 30)
        labels = labels_of(ids)
        kept = torch.arange(30) >= 30 - torch.tensor(lengths)[:, None]  # pads on the left
        rows = [(i[k], x[k]) for i, x, k in zip(ids, labels, kept, strict=True)]
        batch = Batch(ids, labels, 60, 0, attention_mask=kept.long() if form == "padded" else None)
    ours = evaluate(model, [batch, batch], SIZES)
    assert all(m.training for m in model.modules())
    once = by_hand(model.eval(), rows, shift=head == "lm")
    same(ours, once + once)
    assert math.isnan(evaluate(model, [batch]).bits_per_byte) and evaluate(model, []) == Score()
