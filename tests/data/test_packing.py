"""Rows and batches: pure functions of (seed, epoch, i), complete, exact at every document's bound."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.config.errors import DataError
from plait.data import TokenShards, write_shards
from plait.data.batch import IGNORED, power_of_two
from plait.data.loader import Loader, evaluation_batches
from plait.data.packing import Packer, Rows, Sample

BOS = 999
FEW = settings(max_examples=60, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> TokenShards:
    """Documents of many lengths, empty ones too; token k of the stream is unmistakable (bos aside)."""
    lengths = [3, 0, 1, 40, 7, 0, 0, 25, 90, 2, 13, 300, 5]
    documents, at = [], 0
    for length in lengths:
        documents.append([BOS, *range(at, at + length)])
        at += length
    return write_shards(tmp_path_factory.mktemp("shard"), documents, 1000)


def whole(shard: TokenShards) -> list[int]:
    return shard.read(0, shard.n_tokens).tolist()


def epoch_of(rows: Rows, epoch: int) -> list[Sample]:
    return [rows.sample(epoch * rows.count + i) for i in range(rows.count)]


@pytest.mark.parametrize("length", [2, 7, 16, 100, 499])
@pytest.mark.parametrize("shuffle", [True, False])
def test_no_token_twice_and_only_a_tail_left_out(shard: TokenShards, length: int, shuffle: bool) -> None:
    rows = Rows(shard, length, seed=3, shuffle=shuffle)
    assert rows.count == shard.n_tokens // length
    for epoch in range(3):
        samples = epoch_of(rows, epoch)
        seen = Counter(token for sample in samples for token in sample.tokens.tolist())
        assert max(count for token, count in seen.items() if token != BOS) == 1
        rest = Counter(whole(shard)) - seen
        assert sum(rest.values()) == shard.n_tokens % length < length
        assert not seen - Counter(whole(shard))


def test_without_shuffle_rows_are_in_order(shard: TokenShards) -> None:
    rows = Rows(shard, 16, seed=3, shuffle=False)
    for epoch in range(2):
        assert (
            np.concatenate([s.tokens for s in epoch_of(rows, epoch)]).tolist()
            == whole(shard)[: rows.count * 16]
        )


def test_a_document_begins_wherever_bos_stands(shard: TokenShards) -> None:
    for length in (2, 16, 100):
        rows = Rows(shard, length, seed=1)
        for epoch in range(3):
            for sample in epoch_of(rows, epoch):
                expected = [i for i, token in enumerate(sample.tokens.tolist()) if token == BOS and i > 0]
                assert sample.starts.tolist() == expected
                assert sample.tokens.shape == (length,) and sample.tokens.dtype == np.int64


def test_order_depends_on_seed_and_epoch_alone(shard: TokenShards) -> None:
    rows, again, other = Rows(shard, 16, seed=5), Rows(shard, 16, seed=5), Rows(shard, 16, seed=6)
    count = rows.count
    first = [rows.sample(i).tokens.tolist() for i in range(3 * count)]
    for i in (2 * count + 1, 7, 0, count, 3 * count - 1):  # asked for alone, in any order
        assert again.sample(i).tokens.tolist() == first[i]
    assert [other.sample(i).tokens.tolist() for i in range(count)] != first[:count]
    assert first[:count] != first[count : 2 * count]
    assert {tuple(row) for row in first[:count]} != {
        tuple(row) for row in first[count : 2 * count]
    }  # other cuts


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    rows = Rows(write_shards(tmp_path, [[BOS, *range(998)]], 1000), 10)
    orders = []
    for epoch in range(2):
        firsts = [
            int(sample.tokens[0] + 1) % 1000 for sample in epoch_of(rows, epoch)
        ]  # places in the stream
        assert {(first - rows.begin(epoch)) % 999 % 10 for first in firsts} == {0}
        orders.append([(first - rows.begin(epoch)) % 999 // 10 for first in firsts])
        assert sorted(orders[-1]) == list(range(99))
    assert sum(a == b for a, b in zip(*orders)) < 10


def test_too_little_data_says_how_much_there_is(shard: TokenShards) -> None:
    with pytest.raises(DataError, match=r"has 499 tokens, less than one row of data\.sequence_length 500"):
        Rows(shard, 500)
    with pytest.raises(DataError, match="nothing to predict"):
        Rows(shard, 1)


def check_packed(batch, rows: list[list[int]], length: int) -> None:
    """The sequences between the bounds are the rows, cut before every bos; no sequence has two documents."""
    flat = [token for row in rows for token in row]
    assert batch.input_ids.tolist() == [flat]
    assert batch.input_ids.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == len(flat) and bounds == sorted(bounds)
    expected, at = set(), 0
    for row in rows:
        expected |= {at, *(at + i for i, token in enumerate(row) if token == BOS)}
        at += len(row)
    assert {b for b in bounds if b < len(flat)} == expected
    longest = max(b - a for a, b in pairwise(bounds))
    assert longest <= batch.max_len <= length
    assert batch.n_targets == len(flat) - len(expected)


@FEW
@given(st.integers(2, 120), st.integers(1, 9), st.integers(0, 1000), st.booleans())
def test_packed_batches(length: int, n_rows: int, at: int, pad: bool) -> None:
    shard = PACKED[0]
    rows = Rows(shard, length)
    samples = [rows.sample(at + i) for i in range(n_rows)]
    batch = Packer(length, pad_sequences=pad)(samples)
    check_packed(batch, [sample.tokens.tolist() for sample in samples], length)
    n_seq = len(batch.cu_seqlens) - 1
    if pad:
        assert n_seq == power_of_two(n_seq)
        assert batch.max_len in (power_of_two(batch.max_len), length)
    else:
        assert (torch.diff(batch.cu_seqlens) > 0).all()
    assert torch.equal(batch.labels, batch.input_ids) and batch.labels is not batch.input_ids
    assert batch.n_tokens == n_rows * length
    assert set(batch.inputs()) == {"input_ids", "labels", "cu_seqlens", "max_len"}


PACKED: list[TokenShards] = []


@pytest.fixture(autouse=True, scope="module")
def _packed(shard: TokenShards):
    PACKED.append(shard)
    yield
    PACKED.clear()


def test_joined_batches_are_dense(shard: TokenShards) -> None:
    rows = Rows(shard, 16)
    batch = Packer(16, separate=False)([rows.sample(i) for i in range(4)])
    assert batch.input_ids.tolist() == [rows.sample(i).tokens.tolist() for i in range(4)]
    assert batch.n_targets == 4 * 15
    assert set(batch.inputs()) == {"input_ids", "labels"}
    bidirectional = Packer(16, separate=False, causal=False)([rows.sample(0)])
    assert bidirectional.n_targets == 16


def test_few_shapes_in_a_long_run(shard: TokenShards) -> None:
    loader = Loader(Rows(shard, 64), 4, Packer(64))
    shapes = Counter((len(b.cu_seqlens), b.max_len) for b, _ in zip(loader, range(200)))
    assert len(shapes) <= 6


def flat_rows(batches, length: int) -> list[list[int]]:
    return [row for batch in batches for row in batch.input_ids.reshape(-1, length).tolist()]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_global_batch_is_the_same_for_every_world_size(shard: TokenShards, world: int) -> None:
    rows = Rows(shard, 16, seed=2)
    expected = [rows.sample(i).tokens.tolist() for i in range(8 * 12)]
    loaders = [Loader(rows, 8, Packer(16), rank=rank, world=world) for rank in range(world)]
    for step in range(12):  # over the end of an epoch, which no batch divides
        batch: list[list[int] | None] = [None] * 8
        for rank, loader in enumerate(loaders):
            batch[rank::world] = flat_rows([next(loader)], 16)
        assert batch == expected[8 * step : 8 * step + 8]
        assert {loader.index for loader in loaders} == {8 * step + 8}
    assert rows.count % 8 and 2 * rows.count < 8 * 12


def test_one_integer_resumes(shard: TokenShards) -> None:
    rows = Rows(shard, 16)
    loader = Loader(rows, 5, Packer(16))
    stream = [next(loader) for _ in range(20)]
    for step in (0, 7, 19):
        resumed = next(Loader(Rows(shard, 16), 5, Packer(16), index=5 * step))
        assert torch.equal(resumed.input_ids, stream[step].input_ids)
        assert torch.equal(resumed.cu_seqlens, stream[step].cu_seqlens)
    loader.index = 10
    assert torch.equal(next(loader).input_ids, stream[2].input_ids)
    assert loader.epoch == 15 / rows.count


@pytest.mark.parametrize("micro", [None, 1, 2, 3, 100])
def test_micro_batches_are_the_batch_in_pieces(shard: TokenShards, micro: int | None) -> None:
    rows = Rows(shard, 16)
    pieces = Loader(rows, 8, Packer(16), rank=1, world=2).micro_batches(micro)
    assert flat_rows(pieces, 16) == [rows.sample(i).tokens.tolist() for i in (1, 3, 5, 7)]
    assert len(pieces) == -(-4 // min(4, micro or 4))


def test_every_process_needs_a_row(shard: TokenShards) -> None:
    with pytest.raises(DataError, match="a batch of 3 rows for process 0 of 4"):
        Loader(Rows(shard, 16), 3, Packer(16), world=4)


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize(
    ("length", "rows", "world"), [(16, 4, 1), (7, 3, 2), (499, 2, 1), (2, 50, 3), (100, 4, 3)]
)
def test_evaluation_predicts_every_token_once(
    shard: TokenShards, length: int, rows: int, world: int, separate: bool
) -> None:
    per_rank = [
        list(evaluation_batches(Rows(shard, length), rows, separate=separate, rank=rank, world=world))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in per_rank}) == 1
    predicted: Counter[int] = Counter()
    for batch in (batch for batches in per_rank for batch in batches):
        targets = batch.labels[0].clone()
        bounds = batch.cu_seqlens[:-1].long()
        targets[bounds[bounds < targets.numel()]] = IGNORED
        kept = targets[targets != IGNORED].tolist()
        assert len(kept) == batch.n_targets
        predicted.update(kept)
    expected = Counter(whole(shard))
    expected[BOS] = 0 if separate else expected[BOS] - 1  # the stream's very first token is never a target
    assert predicted == expected
    if world == 1:  # rows overlap by one token, and none is there for its overlap alone
        n_rows = -(-(shard.n_tokens - 1) // (length - 1))
        assert sum(batch.n_tokens for batch in per_rank[0]) == shard.n_tokens + n_rows - 1


def test_evaluation_may_stop_early(shard: TokenShards) -> None:
    batches = list(evaluation_batches(Rows(shard, 16), 4, tokens=100))
    assert sum(batch.n_tokens for batch in batches) == 100 + 6  # 6 tokens serve as context a second time
    assert batches[0].input_ids[0, :16].tolist() == whole(shard)[:16]
