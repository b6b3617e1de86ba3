"""Bits per byte: of each byte once, whatever the tokenizer, beside the compressors."""

from __future__ import annotations

import lzma
import math
import zlib

import pytest
import torch

from plait.config.data import TokenizerConfig
from plait.config.errors import ConfigError
from plait.data.documents import Document
from plait.evaluation.bits_per_byte import bits_per_byte
from plait.evaluation.compressors import compressed_bits_per_byte
from plait.evaluation.score import Score
from plait.models import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.load import train_tokenizer
from tests.inference.helpers import make_model

TEXTS = ["Zwölf Boxkämpfer, ", "", "€" * 300, "a" * 700, "the cat and the dog and the cat " * 20]
BPE_CONFIG = TokenizerConfig(type="bpe", vocab_size=300)


def tokenizers() -> dict[str, Tokenizer]:
    return {"bytes": BytesTokenizer(), "bpe": train_tokenizer(BPE_CONFIG, TEXTS)}


def made(tokenizer: Tokenizer) -> Model:
    model = make_model("hybrid", vocab_size=tokenizer.vocab_size)
    model.tokenizer = tokenizer
    return model


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_every_byte_counts_once(name: str) -> None:
    tokenizer = tokenizers()[name]
    model, corpus = made(tokenizer), [*TEXTS, b"\xff\xfe not UTF-8"]
    n_bytes = sum(len(t if isinstance(t, bytes) else t.encode()) for t in corpus)
    ids = [tokenizer.encode(text) for text in corpus]
    score = bits_per_byte(model, corpus)
    assert score.n_bytes == n_bytes and score.n_targets == sum(map(len, ids))
    nats = 0.0
    for text in filter(None, ids):
        out = model(torch.tensor([[tokenizer.bos_id, *text]]), labels=torch.tensor([[-100, *text]]))
        nats += float(out.loss_sum.detach())
    assert score.nats == pytest.approx(nats, rel=1e-9)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / n_bytes)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_a_model_that_knows_nothing_pays_the_vocabulary(name: str) -> None:
    model = made(tokenizers()[name])
    with torch.no_grad():
        model.get_parameter("head.unembedding.weight").zero_()
    score = bits_per_byte(model, TEXTS, max_context=64)
    assert score.loss == pytest.approx(math.log(model.vocab_size))
    assert score.perplexity == pytest.approx(model.vocab_size)


def test_a_document_in_pieces_is_one_document() -> None:
    model = made(BytesTokenizer())
    pieces = [Document("a", b"one two"), Document("a", b" three", continues=True), Document("b", "four")]
    assert bits_per_byte(model, pieces) == bits_per_byte(model, ["one two three", "four"])
    assert bits_per_byte(model, pieces).nats != bits_per_byte(model, ["one two", " three", "four"]).nats


def test_unknown_characters_cost_but_do_not_count() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(type="characters"), ["abc"])
    assert tokenizer.unk_id is not None
    score = bits_per_byte(made(tokenizer), ["ab€"])
    assert (score.n_targets, score.n_bytes) == (3, 2)


def test_mistakes_are_named() -> None:
    model = make_model("hybrid")
    with pytest.raises(ConfigError, match="the model has none"):
        bits_per_byte(model, ["x"])
    with pytest.raises(ConfigError, match="260 ids, but the model a vocabulary of 61"):
        bits_per_byte(model, ["x"], tokenizer=BytesTokenizer())


def test_compressors_see_all_documents_joined() -> None:
    far = [
        bytes(torch.randint(256, (40_000,), generator=torch.Generator().manual_seed(i)).tolist())
        for i in (0, 1)
    ]
    texts: list[str | bytes] = ["äöü", *far, far[0]]
    data = "äöü".encode() + far[0] + far[1] + far[0]
    ours = compressed_bits_per_byte(texts)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    assert ours["gzip -9"] == 8 * (len(deflate.compress(data) + deflate.flush()) + 18) / len(data)
    assert ours["gzip -9"] > 8  # its window is too short for the repetition
    assert ours["xz -9e"] < 5.5
    assert ours["xz -9e"] <= 8 * len(lzma.compress(data)) / len(data)
    assert all(math.isnan(bits) for bits in compressed_bits_per_byte([]).values())


def test_scores_add_up() -> None:
    total = Score(3.0, 2, 4) + Score(1.0, 2, 4)
    assert total == Score(4.0, 4, 8) and total.loss == 1 and total.perplexity == math.e
    assert total.bits_per_byte == 0.5 / math.log(2)
    nothing = Score()
    assert all(math.isnan(x) for x in (nothing.loss, nothing.perplexity, nothing.bits_per_byte))
    assert Score(1e6, 1, 1).perplexity == math.inf and math.isnan(Score(1.0, 1).bits_per_byte)
