"""BPE, WordPiece and unigram: trained, saved, loaded, exact to the byte; files of other makers' spelling."""

from __future__ import annotations

import argparse
import inspect
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from plait.config.data import TokenizerConfig
from plait.config.errors import TokenizerError
from plait.tokenizers import StreamDecoder, load_tokenizer, train_tokenizer
from plait.tokenizers.huggingface import HuggingFaceTokenizer

FEW = settings(max_examples=40, derandomize=True, deadline=None, database=None)
CORPUS = [
    "def encode(self, text):\n    return [self.ids[c] for c in text]\n",
    "The quick brown fox jumps over the lazy dog; über 東京 🙂 naïve.\n",
    "hello world, hello there, hello again\n",
] * 4 + inspect.getsource(argparse).split("\n\n")


def train(kind: str, size: int = 400, **more) -> HuggingFaceTokenizer:
    tokenizer = train_tokenizer(TokenizerConfig(type=kind, vocab_size=size, **more), iter(CORPUS))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


TRAINED = {kind: train(kind) for kind in ("bpe", "unigram", "wordpiece")}
LOSSLESS = [TRAINED["bpe"], TRAINED["unigram"]]


@FEW
@given(st.one_of(st.binary(max_size=60), st.text(st.characters(), max_size=40), st.sampled_from(CORPUS)))
def test_byte_level_keeps_everything(text: str | bytes) -> None:
    raw = (
        text
        if isinstance(text, bytes)
        else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    )
    for tokenizer in LOSSLESS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode_bytes(ids) == raw
        assert sum(map(tokenizer.token_bytes, ids)) == len(raw)
        assert tokenizer.special_ids.isdisjoint(ids)
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == raw.decode("utf-8", "replace")
        assert tokenizer.encode_batch([text, "b", b"\xff"]) == [
            ids,
            tokenizer.encode("b"),
            tokenizer.encode(b"\xff"),
        ]
        assert [a.tolist() for a in tokenizer.encode_arrays([text])] == [ids]


@pytest.mark.parametrize("tokenizer", LOSSLESS, ids=lambda t: t.type)
def test_bytes_of_tokens_that_are_no_text(tokenizer: HuggingFaceTokenizer) -> None:
    """Half a character decodes to U+FFFD, three bytes; the token itself is one."""
    ids = tokenizer.encode("ж")
    assert len(ids) == 2
    assert [tokenizer.token_bytes(i) for i in ids] == [1, 1]
    assert all(tokenizer.token_bytes(i) == 0 for i in tokenizer.special_tokens.values())


@pytest.mark.parametrize("kind", TRAINED)
def test_text_is_only_text(kind: str) -> None:
    tokenizer = TRAINED[kind]
    for name in tokenizer.special_tokens:
        ids = [i for i in tokenizer.encode(f"a{name}b") if i != tokenizer.unk_id]
        assert tokenizer.special_ids.isdisjoint(ids), name


@pytest.mark.parametrize("kind", TRAINED)
def test_training_uses_the_vocabulary(kind: str) -> None:
    tokenizer = TRAINED[kind]
    assert tokenizer.type == kind
    assert tokenizer.vocab_size <= 400
    assert len(tokenizer.encode(CORPUS[-1])) < len(CORPUS[-1]) / 1.3
    assert None not in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id)
    assert train(
        kind, special_tokens=["<|user|>"]
    ).special_tokens.keys() - tokenizer.special_tokens.keys() == {"<|user|>"}


def test_wordpiece() -> None:
    tokenizer = train("wordpiece", lowercase=True)
    assert tokenizer.decode(tokenizer.encode("Hello  world, QUICK fox.")) == "hello world, quick fox."
    assert tokenizer.decode(tokenizer.encode("hello world, hello")) == "hello world, hello"
    # Spaces are lost, so they belong to no token.
    assert sum(map(tokenizer.token_bytes, tokenizer.encode("hello world, hello"))) == len("helloworld,hello")
    assert tokenizer.encode("ψ") == [tokenizer.unk_id]
    decoder = StreamDecoder(tokenizer)
    for _ in range(2):  # the end of a text is the beginning of the next
        assert [decoder.push(i) for i in tokenizer.encode("a b. c")] == ["a", " b", ".", " c"]
        assert decoder.finish() == ""


@pytest.mark.parametrize("kind", TRAINED)
def test_saved_and_loaded(kind: str, tmp_path) -> None:
    tokenizer = TRAINED[kind]
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(TokenizerConfig(type=kind, path=str(tmp_path)))
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert loaded.special_tokens == tokenizer.special_tokens
    assert loaded.roles == tokenizer.roles
    assert loaded.encode(CORPUS[1]) == tokenizer.encode(CORPUS[1])
    assert load_tokenizer(tmp_path / "tokenizer.json").fingerprint() == tokenizer.fingerprint()
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    # The library reads the same ids out of the file.
    engine = Engine.from_file(str(tmp_path / "tokenizer.json"))
    assert engine.encode(CORPUS[1], add_special_tokens=False).ids == tokenizer.encode(CORPUS[1])
    other = train(kind, 390 if kind != "wordpiece" else 80)
    assert other.fingerprint() != tokenizer.fingerprint()


def test_transformers_opens_a_saved_folder(tmp_path) -> None:
    from transformers import AutoTokenizer

    TRAINED["bpe"].save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(CORPUS[1], add_special_tokens=False)["input_ids"] == TRAINED["bpe"].encode(CORPUS[1])
    assert (theirs.bos_token_id, theirs.pad_token_id) == (TRAINED["bpe"].bos_id, TRAINED["bpe"].pad_id)


def _metaspace() -> Engine:
    engine = Engine(models.Unigram())
    engine.pre_tokenizer = pre_tokenizers.Metaspace()
    engine.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    engine.train_from_iterator(CORPUS, trainer)
    return engine


def _llama() -> Engine:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for token in ["▁", "h", "i", "▁h", "▁hi", "▁▁", "t", "e", "r", "re", "here", "he", "a"]:
        vocabulary[token] = len(vocabulary)
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "▁"), ("r", "e"), ("h", "e"), ("he", "re")]
    engine = Engine(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    return engine


def _bert() -> Engine:
    vocabulary = {
        t: i
        for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hi", "##s", "there", ".", ","])
    }
    engine = Engine(models.WordPiece(vocabulary, unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return engine


@pytest.mark.parametrize(
    ("engine", "texts", "lossless"),
    [
        (_metaspace(), ["hello world", "the  fox, again"], True),
        (_llama(), ["hi here hi", " hi", "  hi  東", "hi\n", "🙂"], True),
        (_bert(), ["hi there.", "his, there."], False),
    ],
    ids=["metaspace", "byte fallback", "bert"],
)
def test_files_made_elsewhere_decode_as_the_library_decodes(
    engine: Engine, texts: list[str], lossless: bool
) -> None:
    tokenizer = HuggingFaceTokenizer(engine.to_str())
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == engine.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == engine.decode(ids) == text
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text
        if lossless:  # the space the encoder adds before the text is counted too
            assert sum(map(tokenizer.token_bytes, ids)) == len(text.encode()) + 1


def test_byte_fallback_keeps_bytes_that_are_no_text() -> None:
    tokenizer = HuggingFaceTokenizer(_llama().to_str())
    assert tokenizer.decode_bytes(tokenizer.encode(b"hi\xff\xfe")) == b"hi\xff\xfe"


def test_padding_and_truncation_in_the_file_do_nothing() -> None:
    engine = Engine.from_str(_bert().to_str())
    engine.enable_padding(length=16)
    engine.enable_truncation(2)
    tokenizer = HuggingFaceTokenizer(engine.to_str())
    assert len(tokenizer.encode("hi there hi there")) == 4
    assert tokenizer.fingerprint() == HuggingFaceTokenizer(_bert().to_str()).fingerprint()


def test_roles_come_from_the_config_beside_the_file(tmp_path) -> None:
    TRAINED["bpe"].save(tmp_path)
    config = {
        "bos_token": {"content": "<|eos|>"},
        "cls_token": "<|pad|>",
        "unk_token": "nothing",
        "pad_token": None,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_id == TRAINED["bpe"].eos_id
    assert loaded.pad_id == TRAINED["bpe"].pad_id
    assert loaded.unk_id is None
    assert loaded.fingerprint() != TRAINED["bpe"].fingerprint()


def test_what_cannot_be_read_exactly_is_refused() -> None:
    data = json.loads(_bert().to_str())
    data["decoder"] = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True}
    with pytest.raises(TokenizerError, match="CTC"):
        HuggingFaceTokenizer(json.dumps(data))
    data["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(TokenizerError, match="WordLevel"):
        HuggingFaceTokenizer(json.dumps(data))


@pytest.mark.parametrize("kind", TRAINED)
def test_training_on_nothing_or_on_too_little_room(kind: str) -> None:
    with pytest.raises(TokenizerError, match="empty"):
        train_tokenizer(TokenizerConfig(type=kind), [""])
    with pytest.raises(TokenizerError, match="too small"):
        train_tokenizer(TokenizerConfig(type=kind, vocab_size=5), CORPUS)


def test_errors_of_the_texts_pass_through() -> None:
    def broken():
        yield CORPUS[0]
        raise TokenizerError("the third file is unreadable")

    with pytest.raises(TokenizerError, match="third file"):
        train_tokenizer(TokenizerConfig(type="bpe", vocab_size=300), broken())
