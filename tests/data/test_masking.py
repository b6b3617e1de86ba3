"""Masked language modelling: 15 %, of which 80 / 10 / 10; never a special token; a pure function."""

from __future__ import annotations

import numpy as np
import pytest

from plait.config.errors import DataError
from plait.data import TokenShards, write_shards
from plait.data.batch import IGNORED
from plait.data.loader import Loader, evaluation_batches
from plait.data.masking import MaskedRows
from plait.data.packing import Packer, Rows
from plait.tokenizers.bytes import BytesTokenizer

BYTES = BytesTokenizer()


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> TokenShards:
    text = np.random.default_rng(0).integers(0, 256, (200, 500))
    documents = [[BYTES.bos_id, *row, BYTES.eos_id] for row in text.tolist()]
    return write_shards(tmp_path_factory.mktemp("shard"), documents, BYTES.vocab_size)


def test_rates(shard: TokenShards) -> None:
    rows = Rows(shard, 512)
    masked = MaskedRows(rows, BYTES)
    clean = np.concatenate([rows.sample(i).tokens for i in range(masked.count)])
    samples = [masked.sample(i) for i in range(masked.count)]
    shown, labels = (np.concatenate(part) for part in zip(*((s.tokens, s.labels) for s in samples)))
    special = np.isin(clean, list(BYTES.special_ids))
    chosen = labels != IGNORED
    assert special.sum() > 300
    assert not chosen[special].any()
    assert (labels[chosen] == clean[chosen]).all() and (shown[~chosen] == clean[~chosen]).all()
    assert abs(chosen[~special].mean() - 0.15) < 0.005
    is_mask, same = shown[chosen] == BYTES.mask_id, shown[chosen] == clean[chosen]
    assert abs(is_mask.mean() - 0.8) < 0.012
    assert abs(same.mean() - 0.1 - 0.1 / 256) < 0.01
    random = shown[chosen][~is_mask & ~same]
    assert abs(len(random) / chosen.sum() - 0.1) < 0.01
    assert not np.isin(random, list(BYTES.special_ids)).any()
    assert len(set(random.tolist())) > 240


def test_it_is_a_pure_function_of_seed_epoch_and_place(shard: TokenShards) -> None:
    one, two = MaskedRows(Rows(shard, 64), BYTES), MaskedRows(Rows(shard, 64), BYTES)
    two.sample(5)
    assert np.array_equal(one.sample(9).tokens, two.sample(9).tokens)
    assert np.array_equal(one.sample(9).labels, two.sample(9).labels)
    plain = Rows(shard, 64).sample(0)
    patterns = {one.mask(plain, epoch, place).labels.tobytes() for epoch in range(3) for place in range(3)}
    assert len(patterns) == 9
    other = MaskedRows(Rows(shard, 64, seed=1), BYTES)
    assert not np.array_equal(other.mask(plain, 0, 0).labels, one.mask(plain, 0, 0).labels)


def test_batches(shard: TokenShards) -> None:
    masked = MaskedRows(Rows(shard, 64), BYTES, 0.3)
    batch = next(Loader(masked, 4, Packer(64, causal=False)))
    assert batch.n_targets == int((batch.labels != IGNORED).sum()) > 30
    assert batch.labels.shape == batch.input_ids.shape == (1, 256)


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_masks_the_same_each_time(shard: TokenShards, world: int) -> None:
    def run() -> list[list[int]]:
        rows = Rows(shard, 100)
        return [
            batch.labels[0].tolist()
            for rank in range(world)
            for batch in evaluation_batches(
                rows, 3, masking=MaskedRows(rows, BYTES), tokens=1550, rank=rank, world=world
            )
        ]

    first = run()
    assert first == run()
    assert 150 < sum(label != IGNORED for batch in first for label in batch) < 320
    if world == 1:
        places = [tuple(i for i in range(100) if batch[i] != IGNORED) for batch in first[:5]]
        places += [tuple(i - 100 for i in range(100, 200) if batch[i] != IGNORED) for batch in first[:5]]
        assert len(set(places)) == 10  # each row has its own draw
        assert sum(map(len, first)) == 1550


def test_what_cannot_be_masked_is_refused(shard: TokenShards) -> None:
    with pytest.raises(DataError, match="has no mask token"):
        MaskedRows(Rows(shard, 64), BytesTokenizer(("<|bos|>",)))
    with pytest.raises(DataError, match="mlm_probability"):
        MaskedRows(Rows(shard, 64), BYTES, 0.0)
