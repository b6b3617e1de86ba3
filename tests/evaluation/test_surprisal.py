"""Surprisals: against brute force, over exact regions; minimal pairs by the total."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from plait.config.data import TokenizerConfig
from plait.config.errors import ConfigError, DataError
from plait.evaluation.minimal_pairs import MinimalPair, accuracies, read_pairs, score_pairs
from plait.evaluation.surprisal import spans, surprisals
from plait.models import Model
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.load import train_tokenizer
from tests.inference.helpers import make_model

TEXTS = ["He thinks that he knows.", "Zwölf €", "the cat and the dog", "x"]
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": BytesTokenizer(),
    "bpe": train_tokenizer(TokenizerConfig(type="bpe", vocab_size=300), TEXTS * 20),
}


def made(name: str, preset: str = "hybrid") -> Model:
    model = make_model(preset, vocab_size=TOKENIZERS[name].vocab_size)
    model.tokenizer = TOKENIZERS[name]
    return model


def brute_force(model: Model, text: str) -> list[float]:
    """-log2 of each token's probability, one forward a token."""
    ids = model.tokenizer.encode(text)
    bits = []
    for at, token in enumerate(ids):
        before = torch.tensor([[model.tokenizer.bos_id, *ids[:at]]])
        bits.append(-float(model(before).logits[0, -1].double().log_softmax(-1)[token]) / math.log(2))
    return bits


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_costs_what_its_probability_says(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        for text, found in zip(TEXTS, surprisals(model, TEXTS), strict=True):
            want = brute_force(model, text)
            assert [t.bits for t in found.tokens] == pytest.approx(want, rel=1e-9)
            assert found.bits == pytest.approx(sum(want))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_token_of_a_region_is_lost(name: str) -> None:
    """The first words of the text count too, and nothing that is not text (Model Foundry lost two tokens)."""
    text = "he thinks that he knows."
    found = surprisals(made(name), [text])[0]
    he, rest = found.of("he"), found.region(2, len(text))
    assert he.bits > 0 and he.n_tokens == sum(t.begin < 2 for t in found.tokens)
    assert he.bits + rest.bits == pytest.approx(found.bits)
    assert found.region(0, len(text)).bits == pytest.approx(found.bits)
    second = found.of("he", occurrence=1)
    assert second.begin == text.index("he knows")
    assert second.exact and second.bits != he.bits


def test_a_region_inside_of_a_token_takes_it_whole_and_says_so() -> None:
    model = made("bpe")
    found = surprisals(model, ["the cat and the dog"])[0]
    token = next(t for t in found.tokens if t.end - t.begin >= 3)
    part = found.region(token.begin + 1, token.begin + 2)
    assert part.bits == token.bits and part.n_tokens == 1
    assert not part.exact
    assert found.region(token.begin, token.end).exact
    assert found.region(3, 3).bits == 0 and found.region(3, 3).n_tokens == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_context_is_read_and_not_counted(name: str) -> None:
    model = made(name)
    alone = surprisals(model, ["he knows."])[0]
    after = surprisals(model, ["he knows."], contexts=["He thinks that "])[0]
    whole = surprisals(model, ["He thinks that he knows."])[0]
    assert after.bits == pytest.approx(whole.region(15, 24).bits)
    assert abs(after.bits - alone.bits) > 1e-3  # what stands before matters
    assert after.tokens[0].begin == 0 and after.tokens[-1].end == 9


def test_characters_that_are_split_over_tokens() -> None:
    text = "a€b"
    places = spans(TOKENIZERS["bytes"], text, TOKENIZERS["bytes"].encode(text))
    assert places == [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)]
    assert surprisals(made("bytes"), [text])[0].of("€").n_tokens == 3


def test_hotspots_are_the_most_surprising() -> None:
    found = surprisals(made("bytes"), TEXTS[:1])[0]
    hot = found.hotspots(3)
    assert [t.bits for t in hot] == sorted((t.bits for t in found.tokens), reverse=True)[:3]


def test_what_is_not_there_is_told() -> None:
    model = made("bytes")
    found = surprisals(model, ["he"])[0]
    with pytest.raises(DataError, match="does not stand 1 times"):
        found.of("she")
    with pytest.raises(DataError, match="region 0:3 is not in the text"):
        found.region(0, 3)
    with pytest.raises(ConfigError, match="1 contexts were given for 2 texts"):
        surprisals(model, ["a", "b"], contexts=["c"])


def test_pairs_are_compared_by_the_total() -> None:
    """A long bad sentence of cheap tokens has the better mean and the worse total: the total decides."""
    model = made("bytes")
    pairs = [MinimalPair("he", "he" + " he" * 30, "long"), MinimalPair("x", "x", "tie")]
    scores = score_pairs(model, pairs)
    with torch.no_grad():
        assert scores[0].good_bits == pytest.approx(sum(brute_force(model, "he")))
    assert scores[0].points == 1.0
    assert scores[1].points == 0.5
    assert accuracies(scores) == {"long": 1.0, "tie": 0.5}


def test_a_model_that_tells_nothing_apart_scores_one_half() -> None:
    model = made("bytes")
    with torch.no_grad():
        model.get_parameter("head.unembedding.weight").zero_()
    pairs = [MinimalPair("abc", "abd", "a"), MinimalPair("xyz", "xzy", "a")]
    assert accuracies(score_pairs(model, pairs)) == {"a": 0.5}


def test_pairs_are_read_in_blimps_form(tmp_path: Path) -> None:
    path = tmp_path / "agreement.jsonl"
    rows = [
        {"sentence_good": "a", "sentence_bad": "b", "UID": "anaphor", "field": "syntax"},
        {"sentence_good": "c", "sentence_bad": "d"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_pairs(path) == [MinimalPair("a", "b", "anaphor"), MinimalPair("c", "d", "agreement")]
    for text, error in (
        ('{"sentence_good": "a"}', "line 1: expected an object"),
        ("", "holds no pairs"),
        ('{"sentence_good": "a", "sentence_bad": 3}', "must be text"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=error):
            read_pairs(path)
