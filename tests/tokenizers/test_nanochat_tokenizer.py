"""nanochat's tokenizer folder: the same ids as a plain reading of its ranks gives, every byte counted."""

from __future__ import annotations

import json
import pickle
import random
import re
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.data import TokenizerConfig
from plait.config.errors import TokenizerError
from plait.tokenizers import load_tokenizer, train_tokenizer
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.chat import NANOCHAT_SPECIAL_TOKENS, ChatTemplate
from plait.tokenizers.huggingface import HuggingFaceTokenizer
from plait.tokenizers.nanochat import from_ranks, read_tokenizer, to_ranks, write_tokenizer
from plait.tokenizers.train import SPLITS, train_subwords

PATTERN = r"\s+|[^\s]+"
CJK = "日".encode()
TOKENS = [
    b"th",
    b"the",
    b" t",
    b"in",
    b"ing",
    b"thing",
    b"aa",
    b"aaaa",
    CJK[:2],
    CJK,
    b"\xc3\xa9",
    b"\xff\xfe",
    b"yz",
    b"xy",  # later than its neighbour: of xyz, yz is joined first
    b"01",
    b"12",
]
RANKS = {**{bytes((i,)): i for i in range(256)}, **{token: 256 + i for i, token in enumerate(TOKENS)}}
SPECIALS = {name: len(RANKS) + i for i, name in enumerate(NANOCHAT_SPECIAL_TOKENS)}
STATE = {"name": "rustbpe", "pat_str": PATTERN, "mergeable_ranks": RANKS, "special_tokens": SPECIALS}
TEXTS = [
    "the thing is in the inn",
    "12345 67 890",
    "Don't! I'LL  see\r\n\n you",
    "日本 é café",
    "aaaaaaa aaa",
] * 4


def pickled(state: Any, protocol: int = 4, module: str = "tiktoken.core") -> bytes:
    """What pickle.dumps makes of a tiktoken Encoding: an object that gives its state, and takes it back."""

    class Encoding:
        def __getstate__(self) -> Any:
            return state

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("a pickled object was brought to life")

    Encoding.__module__, Encoding.__qualname__ = module, "Encoding"
    fakes = {name: types.ModuleType(name) for name in {module.partition(".")[0], module}}
    fakes[module].Encoding = Encoding  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for name, fake in fakes.items():
            patch.setitem(sys.modules, name, fake)
        return pickle.dumps(Encoding(), protocol)


def folder_of(path: Path, content: bytes | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.pkl").write_bytes(pickled(STATE) if content is None else content)
    return path


def merged(text: str, ranks: dict[bytes, int], pattern: str = PATTERN) -> list[int]:
    """Byte pair encoding in its plainest form: the pair of the lowest rank is joined, the leftmost first."""
    ids = []
    for piece in re.findall(pattern, text):
        parts = [bytes((byte,)) for byte in piece.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            if min(pairs) == len(ranks):
                break
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    pools = ["the thing in", "a", "日本é", " \n\t", "xyz0123", "🙂́"]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 40))) for _ in range(count)]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickle_becomes_the_same_tokenizer(tmp_path: Path, protocol: int) -> None:
    tokenizer = read_tokenizer(folder_of(tmp_path, pickled(STATE, protocol)), allow_pickle=True)
    assert tokenizer.type == "bpe" and tokenizer.vocab_size == len(RANKS) + len(SPECIALS)
    assert tokenizer.special_tokens == SPECIALS and tokenizer.bos_id == SPECIALS["<|bos|>"]
    for text in [*TEXTS, "xyz 0123 xyxyzz 012", *random_texts(300)]:
        ids = tokenizer.encode(text)
        assert ids == merged(text, RANKS)
        assert tokenizer.decode(ids) == text
    assert max(map(max, map(tokenizer.encode, TEXTS))) > 255  # merges were made
    ChatTemplate(tokenizer)


def test_the_folder_around_the_tokenizer_is_read_too(tmp_path: Path) -> None:
    folder_of(tmp_path / "tokenizer")
    direct = read_tokenizer(tmp_path / "tokenizer", allow_pickle=True)
    assert read_tokenizer(tmp_path, allow_pickle=True).fingerprint() == direct.fingerprint()


def test_saved_it_is_one_of_ours(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(folder_of(tmp_path / "theirs"), allow_pickle=True)
    tokenizer.save(tmp_path / "ours")
    ours = load_tokenizer(TokenizerConfig(type="bpe", path=str(tmp_path / "ours")))
    assert ours.fingerprint() == tokenizer.fingerprint()
    assert [ours.encode(text) for text in TEXTS] == [merged(text, RANKS) for text in TEXTS]


def test_a_pickle_is_not_opened_unless_it_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.pkl is a pickle.*--allow-pickle"):
        read_tokenizer(folder_of(tmp_path))
    with pytest.raises(TokenizerError, match=r"a nanochat tokenizer, a pickle.*plait tokenizer import"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="holds no nanochat tokenizer"):
        read_tokenizer(tmp_path / "elsewhere")


def test_every_token_counts_its_own_bytes(tmp_path: Path) -> None:
    tokenizer = read_tokenizer(folder_of(tmp_path), allow_pickle=True)
    table = tokenizer.token_bytes_table()
    assert [int(table[RANKS[token]]) for token in RANKS] == [len(token) for token in RANKS]
    assert all(table[token] == 0 for token in SPECIALS.values())
    for text in [*TEXTS, *random_texts(100)]:
        assert sum(int(table[token]) for token in tokenizer.encode(text)) == len(text.encode())


def token_bytes(**changed: int) -> torch.Tensor:
    """token_bytes.pt as nanochat of 2026 writes it, some of it changed."""
    table = torch.tensor([len(token) for token in RANKS] + [0] * len(SPECIALS), dtype=torch.int32)
    for name, value in changed.items():
        table[int(name.removeprefix("token_"))] = value
    return table


def test_the_table_of_bytes_must_be_of_this_tokenizer(tmp_path: Path) -> None:
    folder_of(tmp_path)
    # As nanochat of October 2025 wrote it: U+FFFD, three bytes, for a token that is no text by itself.
    no_text = {token: len(token.decode(errors="replace").encode()) for token in RANKS}
    wrong = {f"token_{RANKS[token]}": count for token, count in no_text.items()}
    assert sum(count != len(token) for token, count in no_text.items()) > 100
    for good in (token_bytes(), token_bytes(**wrong)):
        torch.save(good, tmp_path / "token_bytes.pt")
        tokenizer = read_tokenizer(tmp_path, allow_pickle=True)
        assert tokenizer.token_bytes_table().tolist() == token_bytes().tolist()
    for bad, message in (
        (token_bytes(token_65=2), "token 65 has 1 bytes, not 2"),
        (token_bytes(token_256=3), "token 256 has 2 bytes, not 3"),
        (token_bytes(token_275=1), "token 275 has 0 bytes, not 1"),
        (token_bytes()[:-1], "one whole number for each of 281 tokens"),
        (token_bytes().float(), "one whole number"),
        ({"a": token_bytes()}, "one whole number"),
    ):
        torch.save(bad, tmp_path / "token_bytes.pt")
        with pytest.raises(TokenizerError, match=message):
            read_tokenizer(tmp_path, allow_pickle=True)
    (tmp_path / "token_bytes.pt").write_bytes(b"nothing")
    with pytest.raises(TokenizerError, match=r"token_bytes\.pt cannot be read as a tensor"):
        read_tokenizer(tmp_path, allow_pickle=True)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("cl100k_base", "names an encoding of the tiktoken package"),
        ({**STATE, "more": 1}, "names an encoding"),
        ({**STATE, "pat_str": 3}, "pat_str is a int, not a str"),
        ({**STATE, "mergeable_ranks": list(RANKS)}, "mergeable_ranks is a list"),
        ({**STATE, "mergeable_ranks": {"a": 1}}, "ranks are of bytes"),
        ({**STATE, "mergeable_ranks": {**RANKS, b"zz": 5}}, "the ids are not 0, 1, 2"),
        ({**STATE, "mergeable_ranks": {k: v for k, v in RANKS.items() if v}}, "the ids are not 0"),
        (
            {**STATE, "mergeable_ranks": {(b"zz" if v == 65 else k): v for k, v in RANKS.items()}},
            "not every single byte",
        ),
        (
            {**STATE, "mergeable_ranks": {(b"xyz" if k == b"aaaa" else k): v for k, v in RANKS.items()}},
            "b'xyz'. does not come about by merging two others",
        ),
        ({**STATE, "special_tokens": {**SPECIALS, "a": SPECIALS["<|bos|>"]}}, "the ids are not 0"),
        (
            {**STATE, "special_tokens": {("a" if k == "<|bos|>" else k): v for k, v in SPECIALS.items()}},
            "a special token has the name of another token",
        ),
        ({**STATE, "pat_str": "(["}, r"the pattern '\(\[' or a special"),
    ],
)
def test_a_pickle_of_something_else_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(folder_of(tmp_path, pickled(state)), allow_pickle=True)


@pytest.mark.parametrize(
    "content", [b"", b"nothing", pickle.dumps({"a": 1}), pickle.dumps(7), pickled(STATE)[:-20]]
)
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TokenizerError, match="is no pickled tokenizer"):
        read_tokenizer(folder_of(tmp_path, content), allow_pickle=True)


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_written_for_nanochat_is_read_back(tmp_path: Path, split: str) -> None:
    """And is what pickle itself would have written: class, state, nothing else."""
    tokenizer = train_subwords("bpe", TEXTS, 300, NANOCHAT_SPECIAL_TOKENS, split=split)
    write_tokenizer(tokenizer, tmp_path)
    again = read_tokenizer(tmp_path, allow_pickle=True)
    for text in [*TEXTS, *random_texts(100)]:
        assert again.encode(text) == tokenizer.encode(text)
    assert again.special_tokens == tokenizer.special_tokens
    ranks, pattern = to_ranks(tokenizer)
    state = {"name": "plait", "pat_str": pattern, "mergeable_ranks": ranks}
    theirs = folder_of(tmp_path / "theirs", pickled({**state, "special_tokens": tokenizer.special_tokens}))
    assert read_tokenizer(theirs, allow_pickle=True).fingerprint() == again.fingerprint()
    table = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert table.dtype == torch.int32 and table.tolist() == tokenizer.token_bytes_table().tolist()


def test_only_a_byte_level_bpe_can_be_written_for_nanochat(tmp_path: Path) -> None:
    unigram = train_tokenizer(TokenizerConfig(type="unigram", vocab_size=300), TEXTS)
    lower = train_tokenizer(TokenizerConfig(type="bpe", vocab_size=300, lowercase=True), TEXTS)
    for tokenizer in (BytesTokenizer(), unigram, lower):
        with pytest.raises(TokenizerError, match="holds a BPE on bytes"):
            write_tokenizer(tokenizer, tmp_path)
    nameless = train_subwords("bpe", TEXTS, 300, ["[CLS]"])
    with pytest.raises(TokenizerError, match="needs a special token"):
        write_tokenizer(nameless, tmp_path)
    assert not list(tmp_path.iterdir())


def test_merges_that_the_order_of_tokens_does_not_tell_are_refused() -> None:
    tokenizer = from_ranks(RANKS, PATTERN, SPECIALS)
    data = tokenizer.description()["tokenizer"]
    merges = data["model"]["merges"]
    at = [tuple(merge) for merge in merges].index(("th", "e"))
    merges[at] = ["t", "he"]
    data["model"]["vocab"]["he"] = data["model"]["vocab"].pop("aaaa")
    merges[[tuple(merge) for merge in merges].index(("aa", "aa"))] = ["h", "e"]
    with pytest.raises(TokenizerError, match="is not what the order of the tokens tells"):
        to_ranks(HuggingFaceTokenizer(json.dumps(data)))


def test_the_split_is_nanochats() -> None:
    """Numbers in twos (GPT-4: threes; GPT-2: as they come), what follows an apostrophe whatever its case."""
    digits = ["1234567890 98765 43210"] * 30
    longest = {}
    for split in SPLITS:
        tokenizer = train_subwords("bpe", digits, 330, NANOCHAT_SPECIAL_TOKENS, split=split)
        pieces = [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
        longest[split] = max(len(re.findall(rb"\d", piece)) for piece in pieces)
    assert longest == {"gpt2": 10, "gpt4": 3, "nanochat": 2}
    cases = {
        "I'LL go\r\n\n": ["I", "'LL", " go", "\r\n\n"],
        "a  b!?\n": ["a", " ", " b", "!?\n"],
        "x123": ["x", "12", "3"],
    }
    for text, expected in cases.items():
        tokenizer = train_subwords("bpe", [text] * 20, 400, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
        assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == expected


def test_special_tokens_come_last_as_in_nanochat() -> None:
    tokenizer = train_subwords("bpe", TEXTS, 300, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
    size = tokenizer.vocab_size
    assert list(tokenizer.special_tokens.values()) == list(range(size - 9, size))
    assert tuple(tokenizer.special_tokens) == NANOCHAT_SPECIAL_TOKENS


def test_a_split_is_refused_where_it_means_nothing() -> None:
    for kind in ("bytes", "wordpiece", "characters"):
        with pytest.raises(TokenizerError, match=r"tokenizer\.split is for bpe and unigram"):
            train_tokenizer(TokenizerConfig(type=kind, split="nanochat"), TEXTS)  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match=r"'nanochta' is none of .*did you mean 'nanochat'"):
        train_subwords("bpe", TEXTS, 300, [], split="nanochta")


def test_a_tokenizer_json_of_nanochats_other_form_is_read(tmp_path: Path) -> None:
    """Made as nanochat's HuggingFaceTokenizer makes it: byte fallback set, specials first, no tokenizer_config.json."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    engine = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=False))
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS["nanochat"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(NANOCHAT_SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    engine.train_from_iterator(TEXTS, trainer)
    engine.save(str(tmp_path / "tokenizer.json"))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer.bos_id == 0
    for text in TEXTS:
        assert tokenizer.encode(text) == engine.encode(text).ids
        assert sum(map(tokenizer.token_bytes, tokenizer.encode(text))) == len(text.encode())
    ChatTemplate(tokenizer)
