"""Finding, refusing and atomically saving tokenizers; SentencePiece with and without its package."""

from __future__ import annotations

import builtins
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plait.config.data import TokenizerConfig
from plait.config.errors import TokenizerError
from plait.tokenizers import StreamDecoder, load_tokenizer, train_tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.characters import CharactersTokenizer
from plait.tokenizers.files import new_folder, write_file

TEXTS = [
    "hello world, hello there, hello again and again\n",
    "über 東京 naïve fox jumps over the lazy dog\n",
] * 20


def test_bytes_is_the_default() -> None:
    assert load_tokenizer(TokenizerConfig()).fingerprint() == BytesTokenizer().fingerprint()
    extra = load_tokenizer(TokenizerConfig(special_tokens=["<|user|>", "<|bos|>"]))
    assert extra.special_tokens["<|user|>"] == 260
    assert extra.vocab_size == 261
    assert train_tokenizer(TokenizerConfig(), iter([])).vocab_size == 260


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (TokenizerConfig(type="bpe"), "plait tokenizer train"),
        (TokenizerConfig(vocab_size=300), "are 260, got 300"),
        (TokenizerConfig(lowercase=True), "lowercase"),
        (TokenizerConfig(type="bpe", path="/nowhere/at/all"), "no tokenizer at /nowhere/at/all"),
    ],
)
def test_configs_that_cannot_be_loaded(config: TokenizerConfig, words: str) -> None:
    with pytest.raises(TokenizerError, match=words):
        load_tokenizer(config)


def test_the_type_must_be_the_files(tmp_path: Path) -> None:
    CharactersTokenizer("ab").save(tmp_path)
    with pytest.raises(TokenizerError, match=r"is bpe, but .* holds a characters tokenizer"):
        load_tokenizer(TokenizerConfig(type="bpe", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("other.txt", "x", "holds no tokenizer"),
        ("plait_tokenizer.json", "{", "cannot be read"),
        ("plait_tokenizer.json", "[]", "none of bytes, characters"),
        ("plait_tokenizer.json", '{"type": "byte"}', "did you mean 'bytes'"),
        ("plait_tokenizer.json", '{"type": "bytes", "size": 3}', "is not a bytes tokenizer"),
        ("plait_tokenizer.json", '{"type": "characters", "characters": 3}', "is not a characters tokenizer"),
        ("tokenizer.json", '{"version": "1.0", "mod', "not a readable tokenizer.json"),
        ("tokenizer.json", "[]", "not a readable tokenizer.json"),
        ("tokenizer.model", "junk", "not a readable SentencePiece model"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_later_kind_replaces_an_earlier_one(tmp_path: Path) -> None:
    BytesTokenizer().save(tmp_path)
    train_tokenizer(TokenizerConfig(type="bpe", vocab_size=300), TEXTS).save(tmp_path)
    assert load_tokenizer(tmp_path).type == "bpe"
    BytesTokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).type == "bytes"


def test_a_full_disk_leaves_the_old_tokenizer(tmp_path: Path, monkeypatch) -> None:
    BytesTokenizer(("<|bos|>",)).save(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TokenizerError, match="No space left on device"):
        CharactersTokenizer("ab").save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["plait_tokenizer.json"]
    assert load_tokenizer(tmp_path).vocab_size == 257


def test_folders_are_whole_or_absent(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("ours")
        assert not (tmp_path / "a").exists()
        write_file(tmp_path / "a" / "x", b"theirs")
    assert (tmp_path / "a" / "x").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_this_floor_does_not_import_torch_or_sentencepiece() -> None:
    folder = Path(str(sys.modules["plait.tokenizers"].__file__)).parent
    names = [path.stem for path in folder.glob("*.py")]
    assert len(names) > 5
    imports = "; ".join(f"import plait.tokenizers.{name}" for name in names if name != "__init__")
    code = f"{imports}; import sys; print([n for n in ('torch', 'sentencepiece') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def sentencepiece_tokenizer():
    config = TokenizerConfig(type="sentencepiece", vocab_size=330, special_tokens=["<|user|>"])
    return train_tokenizer(config, TEXTS)


def test_sentencepiece(sentencepiece_tokenizer, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer
    for text in ("hello world", "  two  spaces ", "line\nline\n", "ψ🙂 unseen", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sum(map(tokenizer.token_bytes, ids)) == len(text.encode())
        decoder = StreamDecoder(tokenizer)
        assert "".join(map(decoder.push, ids)) + decoder.finish() == text
    assert {"<s>", "</s>", "<unk>", "<pad>", "<mask>", "<|user|>"} == set(tokenizer.special_tokens)
    assert (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id is not None
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode("<s><|user|></s>"))
    tokenizer.save(tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.model"):
        loaded = load_tokenizer(TokenizerConfig(type="sentencepiece", path=str(place)))
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.encode("hello 東") == tokenizer.encode("hello 東")


def test_sentencepiece_with_its_own_leading_space(tmp_path: Path) -> None:
    import sentencepiece

    prefix = str(tmp_path / "llama")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=prefix,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(prefix + ".model")
    ids = tokenizer.encode("hello world")
    theirs = sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")
    assert ids == theirs.encode("hello world")
    assert tokenizer.decode(ids) == theirs.decode(ids) == "hello world"


def test_absent_sentencepiece_says_what_to_install(
    sentencepiece_tokenizer, tmp_path: Path, monkeypatch
) -> None:
    sentencepiece_tokenizer.save(tmp_path)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TokenizerError, match=r"pip install 'plait\[hf\]'"):
        load_tokenizer(tmp_path)
