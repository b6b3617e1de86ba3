"""nanochat's tokenizer folder: ``tokenizer.pkl``, a pickled tiktoken Encoding, and ``token_bytes.pt``.

A pickle can run code when it is read. Here it is read only if the caller allows it, and then by a reader that knows
one class, a stand-in for the Encoding, and nothing else; tiktoken itself is not needed. Its ranks become a BPE of the
``tokenizers`` library that gives the same ids. nanochat's other form, a ``tokenizer.json``, is read like any other.
"""

from __future__ import annotations

import io
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Engine

from plait.config.errors import TokenizerError
from plait.tokenizers.base import HUGGINGFACE_FILE, Tokenizer
from plait.tokenizers.files import write_file
from plait.tokenizers.huggingface import HuggingFaceTokenizer
from plait.tokenizers.load import PICKLE_FILE, load_tokenizer
from plait.tokenizers.spelling import byte_alphabet
from plait.tokenizers.train import GPT2_PATTERN, split_and_spell

TOKEN_BYTES_FILE = "token_bytes.pt"
_ENCODING = ("tiktoken.core", "Encoding")
_STATE = {"name": str, "pat_str": str, "mergeable_ranks": dict, "special_tokens": dict}
_REPLACEMENT_BYTES = 3  # of U+FFFD in UTF-8, which nanochat of 2025 counted for bytes that are no text


def read_tokenizer(folder: str | Path, *, allow_pickle: bool = False) -> Tokenizer:
    """The tokenizer of a nanochat folder (or of ``tokenizer/`` in it), by its tokenizer.json or its tokenizer.pkl.

    ``allow_pickle``: whether the pickle may be opened at all. A token_bytes.pt beside it must be of this tokenizer;
    its numbers are not used: ours count every byte. TokenizerError for whatever does not fit.
    """
    path = Path(folder)
    if (path / "tokenizer").is_dir():
        path = path / "tokenizer"
    if (path / HUGGINGFACE_FILE).is_file():
        tokenizer = load_tokenizer(path / HUGGINGFACE_FILE)
    elif not (path / PICKLE_FILE).is_file():
        raise TokenizerError(
            f"{path} holds no nanochat tokenizer; looked for {HUGGINGFACE_FILE}, {PICKLE_FILE}"
        )
    elif not allow_pickle:
        raise TokenizerError(
            f"{path / PICKLE_FILE} is a pickle, which can hide code: it is read only with --allow-pickle (in Python "
            "allow_pickle=True), and then nothing but a tokenizer is taken out of it"
        )
    else:
        tokenizer = _read_pickle(path / PICKLE_FILE)
    if (path / TOKEN_BYTES_FILE).is_file():
        _check_token_bytes(path / TOKEN_BYTES_FILE, tokenizer)
    return tokenizer


class _Encoding:
    """Takes a pickled Encoding's state, of the right types, and does nothing."""

    state: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or state.keys() != _STATE.keys():
            raise pickle.UnpicklingError(
                "it names an encoding of the tiktoken package instead of holding one"
            )
        for key, kind in _STATE.items():
            if type(state[key]) is not kind:
                raise pickle.UnpicklingError(f"{key} is a {type(state[key]).__name__}, not a {kind.__name__}")
        self.state = state


class _Reader(pickle.Unpickler):
    """Knows the Encoding and no other global, so that a pickle can neither import nor call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) != _ENCODING:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")
        return _Encoding


def _read_pickle(path: Path) -> HuggingFaceTokenizer:
    try:
        encoding = _Reader(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # damaged pickles raise almost anything
        raise TokenizerError(f"{path} is no pickled tokenizer, and was not run: {error}") from error
    if not isinstance(encoding, _Encoding) or "state" not in vars(encoding):
        raise TokenizerError(f"{path} is no pickled tokenizer: it holds a {type(encoding).__name__}")
    state = encoding.state
    try:
        return from_ranks(state["mergeable_ranks"], state["pat_str"], state["special_tokens"])
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def from_ranks(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> HuggingFaceTokenizer:
    """The BPE that joins neighbours to the token of the lowest rank, within what ``pattern`` cuts.

    ranks: token -> id, all 256 single bytes among them, the ids in the order of merging. TokenizerError if the ids,
    with those of the special tokens, are not 0 .. n - 1, or if a token cannot come about by merging two others.
    """
    if not all(type(key) is bytes and type(value) is int for key, value in ranks.items()) or not all(
        type(key) is str and type(value) is int for key, value in special_tokens.items()
    ):
        raise TokenizerError("ranks are of bytes, special tokens of names, both whole numbers")
    if sorted([*ranks.values(), *special_tokens.values()]) != list(range(len(ranks) + len(special_tokens))):
        raise TokenizerError("the ids are not 0, 1, 2, ..., one for each token")
    if any(bytes((byte,)) not in ranks for byte in range(256)):
        raise TokenizerError("not every single byte is a token")
    alphabet = byte_alphabet()
    names = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            left, right = _halves(token, ranks)
            merges.append((names[left], names[right]))
    vocabulary = {**{names[token]: rank for token, rank in ranks.items()}, **special_tokens}
    if len(vocabulary) < len(ranks) + len(special_tokens):
        raise TokenizerError("a special token has the name of another token")
    try:
        engine = Engine(models.BPE(vocabulary, merges))
        engine.pre_tokenizer = split_and_spell(pattern)
        engine.decoder = decoders.ByteLevel()
        engine.add_special_tokens(
            [AddedToken(name, special=True, normalized=False) for name in special_tokens]
        )
    except Exception as error:  # the library raises bare Exception for what it cannot take, such as a pattern
        raise TokenizerError(
            f"the pattern {pattern!r} or a special token's name cannot be used: {error}"
        ) from error
    return HuggingFaceTokenizer(engine.to_str())


def _halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is merged from: what all merges of lower rank make of it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [ranks.get(left + right, ranks[token]) for left, right in pairwise(parts)]
        least = min(found)
        if least >= ranks[token]:
            raise TokenizerError(
                f"token {ranks[token]} ({token!r}) does not come about by merging two others"
            )
        at = found.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def _check_token_bytes(path: Path, tokenizer: Tokenizer) -> None:
    import torch

    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything for a file that is none of its own
        raise TokenizerError(f"{path} cannot be read as a tensor: {str(error).splitlines()[0]}") from error
    ours = tokenizer.token_bytes_table()
    if not isinstance(saved, torch.Tensor) or tuple(saved.shape) != ours.shape or saved.is_floating_point():
        raise TokenizerError(f"{path} does not hold one whole number for each of {len(ours)} tokens")
    for token in np.flatnonzero(saved.numpy() != ours):
        if int(saved[token]) != _counted_as_text(tokenizer, int(token)):
            raise TokenizerError(
                f"{path} is of another tokenizer: token {token} has {int(ours[token])} bytes, not {int(saved[token])}"
            )


def _counted_as_text(tokenizer: Tokenizer, token: int) -> int:
    """The bytes of a token decoded to a string, as nanochat of 2025 counted: wrong where they are no text."""
    return 0 if token in tokenizer.special_ids else len(tokenizer.decode([token]).encode())


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.pkl and token_bytes.pt as nanochat reads them, without tiktoken; ids stay what they are.

    TokenizerError for another tokenizer than a byte-level BPE with a bos token <|bos|>.
    """
    import torch

    ranks, pattern = to_ranks(tokenizer)
    if "<|bos|>" not in tokenizer.special_tokens:
        raise TokenizerError("nanochat needs a special token <|bos|>, which this tokenizer has not")
    state = {
        "name": "plait",
        "pat_str": pattern,
        "mergeable_ranks": ranks,
        "special_tokens": tokenizer.special_tokens,
    }
    # Protocol 3, the class by its name: Encoding.__new__(), then its __setstate__(state).
    protocol, stop = pickle.PROTO + b"\x03", pickle.STOP
    body = pickle.dumps(state, protocol=3).removeprefix(protocol).removesuffix(stop)
    make = pickle.GLOBAL + "{}\n{}\n".format(*_ENCODING).encode() + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    table = io.BytesIO()
    torch.save(torch.from_numpy(tokenizer.token_bytes_table()), table)
    try:
        write_file(Path(folder) / PICKLE_FILE, protocol + make + body + pickle.BUILD + stop)
        write_file(Path(folder) / TOKEN_BYTES_FILE, table.getvalue())
    except OSError as error:
        raise TokenizerError(f"cannot save the tokenizer to {folder}: {error.strerror or error}") from error


def to_ranks(tokenizer: Tokenizer) -> tuple[dict[bytes, int], str]:
    """The ranks (token -> id) and the pattern of a byte-level BPE; TokenizerError for any other tokenizer."""
    data = tokenizer.description().get("tokenizer", {}) if isinstance(tokenizer, HuggingFaceTokenizer) else {}
    pattern = _pattern(data.get("pre_tokenizer") or {})
    if tokenizer.type != "bpe" or pattern is None or data.get("normalizer") is not None:
        raise TokenizerError(
            f"nanochat's form holds a BPE on bytes with one splitting pattern and no normalizer; this {tokenizer.type} "
            "tokenizer is another"
        )
    ranks = {
        tokenizer.piece(token): token
        for token in range(tokenizer.vocab_size)
        if token not in tokenizer.special_ids
    }
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in data["model"]["merges"]]
    alphabet = byte_alphabet()
    for left, right in merges:  # tiktoken merges by rank alone: it must say the same as the list of merges
        bytes_of = [bytes(alphabet.index(character) for character in half) for half in (left, right)]
        if _halves(bytes_of[0] + bytes_of[1], ranks) != tuple(bytes_of):
            raise TokenizerError(
                f"the merge of {left!r} and {right!r} is not what the order of the tokens tells"
            )
    return ranks, pattern


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern of a pre-tokenizer that ``split_and_spell`` makes."""
    if pre_tokenizer.get("type") == "ByteLevel" and pre_tokenizer["use_regex"]:
        return None if pre_tokenizer["add_prefix_space"] else GPT2_PATTERN
    steps = pre_tokenizer.get("pretokenizers", [])
    if [step["type"] for step in steps] != ["Split", "ByteLevel"] or steps[0]["behavior"] != "Isolated":
        return None
    if steps[1]["use_regex"] or steps[1]["add_prefix_space"] or steps[0]["invert"]:
        return None
    pattern: str | None = steps[0]["pattern"].get("Regex")
    return pattern
