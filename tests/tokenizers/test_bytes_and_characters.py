"""The two tokenizers that are Plait's own: bytes and characters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.config.errors import TokenizerError
from plait.tokenizers import StreamDecoder, load_tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.characters import CharactersTokenizer

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
CORPUS = "the quick brown fox — über 東京 🙂\n"


@FEW
@given(st.one_of(st.binary(max_size=60), st.text(st.characters(), max_size=40)))
def test_bytes_keep_everything(text: str | bytes) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    # Lone surrogates have no UTF-8 form: they are repaired before.
    raw = (
        text
        if isinstance(text, bytes)
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    )
    assert ids == list(raw)
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.decode(ids) == raw.decode("utf-8", "replace")
    assert sum(map(tokenizer.token_bytes, ids)) == len(raw)
    assert tokenizer.encode_array(text).tolist() == ids


def test_bytes_ids() -> None:
    tokenizer = BytesTokenizer()
    assert tokenizer.vocab_size == 260
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (256, 257, 258, 259)
    assert tokenizer.unk_id is None
    assert tokenizer.encode_array(b"\xff\x00").dtype == np.uint16
    assert tokenizer.encode("<|bos|>") == list(b"<|bos|>")
    assert tokenizer.token_bytes_table().tolist() == [1] * 256 + [0] * 4
    assert tokenizer.decode([256, 104, 105, 257]) == "hi"
    assert BytesTokenizer(("<|bos|>", "<|user|>")).special_tokens == {"<|bos|>": 256, "<|user|>": 257}


@pytest.mark.parametrize("wrong", [-1, 260, 10**9])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    tokenizer = BytesTokenizer()
    for read in (tokenizer.token_bytes, lambda i: tokenizer.decode([i]), StreamDecoder(tokenizer).push):
        with pytest.raises(TokenizerError, match=rf"{wrong} is outside the vocabulary 0 \.\. 259"):
            read(wrong)


@pytest.mark.parametrize("names", [("<|bos|>", "<|bos|>"), ("",)])
def test_special_tokens_must_be_different_names(names: tuple[str, ...]) -> None:
    with pytest.raises(TokenizerError, match="different and not empty"):
        BytesTokenizer(names)


@FEW
@given(st.binary(max_size=40))
def test_streaming_gives_the_text_and_never_half_a_character(data: bytes) -> None:
    tokenizer = BytesTokenizer()
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode(data)]
    assert "".join(parts) + decoder.finish() == data.decode("utf-8", "replace")


def test_streaming_holds_back_an_unfinished_character() -> None:
    decoder = StreamDecoder(BytesTokenizer())
    assert [decoder.push(i) for i in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]
    assert decoder.push(0xE2) == ""
    assert decoder.push(256) == ""  # a special token inside changes nothing
    assert decoder.push(0x82) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


def test_characters_come_from_the_corpus() -> None:
    tokenizer = CharactersTokenizer.train([CORPUS, CORPUS.encode()])
    ids = tokenizer.encode(CORPUS)
    assert tokenizer.decode(ids) == CORPUS
    assert sum(map(tokenizer.token_bytes, ids)) == len(CORPUS.encode())
    assert tokenizer.vocab_size == len(set(CORPUS)) + 5
    assert tokenizer.encode("Zq\U0010ffff") == [tokenizer.unk_id, tokenizer.encode("q")[0], tokenizer.unk_id]
    assert tokenizer.decode(tokenizer.encode("Zq")) == "\ufffdq"
    assert tokenizer.token_bytes(tokenizer.unk_id) == 0


def test_the_most_frequent_characters_are_kept() -> None:
    tokenizer = CharactersTokenizer.train(["aaabbc"], vocab_size=7)
    assert tokenizer.characters == "ab"
    assert tokenizer.encode("abc") == [5, 6, 0]
    with pytest.raises(TokenizerError, match="no room"):
        CharactersTokenizer.train(["aaabbc"], vocab_size=5)
    with pytest.raises(TokenizerError, match="empty"):
        CharactersTokenizer.train([""])


def test_characters_may_fold_case() -> None:
    tokenizer = CharactersTokenizer.train(["Ab"], lowercase=True)
    assert tokenizer.decode(tokenizer.encode("aBA")) == "aba"


@pytest.mark.parametrize(
    "tokenizer", [BytesTokenizer(("<|bos|>", "é")), CharactersTokenizer("aé🙂", lowercase=True)]
)
def test_saved_and_loaded(tokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "deep" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "deep" / "tokenizer")
    assert type(loaded) is type(tokenizer)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.encode("aé🙂A") == tokenizer.encode("aé🙂A")


def test_fingerprints_differ() -> None:
    tokenizers = [
        BytesTokenizer(),
        BytesTokenizer(("<|bos|>",)),
        CharactersTokenizer("ab"),
        CharactersTokenizer("ba"),
        CharactersTokenizer("ab", lowercase=True),
    ]
    assert len({tokenizer.fingerprint() for tokenizer in tokenizers}) == len(tokenizers)


def test_surrogates_are_repaired() -> None:
    for tokenizer in (BytesTokenizer(), CharactersTokenizer("a\ufffd🙂")):
        assert tokenizer.decode(tokenizer.encode("a\ud800\ud83d\ude42")) == "a\ufffd🙂"
