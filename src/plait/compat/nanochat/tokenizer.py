"""nanochat's tokenizer calls over Plait's tokenizers and chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from plait.compat.nanochat.common import get_base_dir
from plait.config.errors import TokenizerError, nearest
from plait.tokenizers.base import Tokenizer
from plait.tokenizers.chat import NANOCHAT_SPECIAL_TOKENS, ChatTemplate
from plait.tokenizers.nanochat import read_tokenizer
from plait.tokenizers.train import train_subwords


class RustBPETokenizer:
    """A tokenizer with the tokens of conversations; ``tokenizer`` is Plait's own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train_from_iterator(cls, text_iterator: Iterable[str], vocab_size: int) -> RustBPETokenizer:
        """A BPE trained on texts, to ``vocab_size`` ids with the nine special tokens, which come last."""
        return cls(
            train_subwords("bpe", text_iterator, vocab_size, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
        )

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path, *, allow_pickle: bool = False) -> RustBPETokenizer:
        """The tokenizer of a folder; a tokenizer.pkl, which can hide code, only if it is allowed."""
        return cls(read_tokenizer(tokenizer_dir, allow_pickle=allow_pickle))

    def get_vocab_size(self) -> int:
        """The number of ids."""
        return self.tokenizer.vocab_size

    def get_special_tokens(self) -> set[str]:
        """The names of the special tokens."""
        return set(self.tokenizer.special_tokens)

    def id_to_token(self, id: int) -> str:
        """The text of one id, or the name of a special token."""
        for name, special in self.tokenizer.special_tokens.items():
            if special == id:
                return name
        return self.tokenizer.decode([id])

    def encode_special(self, text: str) -> int:
        """The id of a special token; TokenizerError if it has no such token."""
        known = self.tokenizer.special_tokens
        if text not in known:
            raise TokenizerError(
                f"{text!r} is no special token{nearest(text, known)}; there are {', '.join(known)}"
            )
        return known[text]

    def get_bos_token_id(self) -> int:
        """The id that begins a document."""
        if self.tokenizer.bos_id is None:
            raise TokenizerError("this tokenizer has no <|bos|>")
        return self.tokenizer.bos_id

    def encode(
        self, text: str | Sequence[str], prepend: int | str | None = None, append: int | str | None = None
    ) -> Any:
        """The ids of a text, or a list of them for a list of texts; a special token may stand before and after."""
        before = [] if prepend is None else [self._special(prepend)]
        after = [] if append is None else [self._special(append)]
        if isinstance(text, str):
            return [*before, *self.tokenizer.encode(text), *after]
        return [[*before, *ids, *after] for ids in self.tokenizer.encode_batch(text)]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """``encode``."""
        return self.encode(*arguments, **options)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens show by their names."""
        specials = {special: name for name, special in self.tokenizer.special_tokens.items()}
        text = ""
        run: list[int] = []
        for token in ids:
            if token in specials:
                text += self.tokenizer.decode(run) + specials[token]
                run = []
            else:
                run.append(token)
        return text + self.tokenizer.decode(run)

    def save(self, tokenizer_dir: str | Path) -> None:
        """Write it into a folder, as tokenizer.json."""
        self.tokenizer.save(tokenizer_dir)

    def render_conversation(
        self, conversation: Mapping[str, Any], max_tokens: int = 2048
    ) -> tuple[list[int], list[int]]:
        """(ids, mask) of a conversation, cut to ``max_tokens``: 1 what the assistant says, 0 what it reads."""
        return tuple(self._template().render(conversation, max_tokens))  # type: ignore[return-value]

    def render_for_completion(self, conversation: Mapping[str, Any]) -> list[int]:
        """The ids up to where the assistant begins to speak."""
        return self._template().render_for_completion(conversation)

    def visualize_tokenization(self, ids: Sequence[int], mask: Sequence[int]) -> str:
        """Each token's text, green where the mask is 1 and red where it is 0, for a terminal."""
        from rich.console import Console

        shown = Text()
        for token, learnt in zip(ids, mask, strict=True):
            shown.append(self.decode([token]), "green" if learnt else "red").append("|", "dim")
        console = Console(force_terminal=True, width=10**6)
        with console.capture() as capture:
            console.print(shown, end="")
        return capture.get()

    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer)

    def _special(self, token: int | str) -> int:
        return self.encode_special(token) if isinstance(token, str) else token


def get_tokenizer(*, allow_pickle: bool = False) -> RustBPETokenizer:
    """The tokenizer in nanochat's folder."""
    return RustBPETokenizer.from_directory(get_base_dir() / "tokenizer", allow_pickle=allow_pickle)


def get_token_bytes(device: torch.device | str = "cpu") -> Tensor:
    """(V,) int32: the bytes of text that each id of that tokenizer stands for; 0 for special tokens."""
    return torch.from_numpy(get_tokenizer().tokenizer.token_bytes_table()).to(device)
