"""Train the tokenizer of nanochat's folder: a BPE with the tokens of conversations.

python -m plait.compat.nanochat.scripts.tok_train --data=path/to/text --vocab_size=65536
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from pydantic import Field

from plait.compat.nanochat.common import get_base_dir, run_script
from plait.compat.nanochat.configurator import read_command_line
from plait.compat.nanochat.tokenizer import RustBPETokenizer
from plait.config.section import Section
from plait.data.documents import read_documents
from plait.tokenizers.base import to_text


class TokTrain(Section):
    """The settings, under nanochat's names."""

    data: str | None = Field(
        None, description="text: a file, a folder, a glob; None: base_data in nanochat's folder"
    )
    max_chars: int = Field(10_000_000_000, gt=0, description="characters to train on at most")
    doc_cap: int = Field(10_000, gt=0, description="characters of a document at most")
    vocab_size: int = Field(65536, gt=0, description="ids, the nine special tokens among them")


def main(words: Sequence[str]) -> int:
    """Train it and save it; the exit status."""
    given = TokTrain.model_validate(read_command_line(words, TokTrain).settings)
    tokenizer = RustBPETokenizer.train_from_iterator(texts(given), given.vocab_size)
    folder = get_base_dir() / "tokenizer"
    tokenizer.save(folder)
    print(f"{tokenizer.get_vocab_size()} tokens, saved in {folder}")
    return 0


def texts(given: TokTrain) -> Iterator[str]:
    """The documents, each cut to ``doc_cap``, ``max_chars`` together; of nanochat's own data not the last file."""
    own = given.data is None
    spec = str(get_base_dir() / "base_data") if given.data is None else given.data
    seen = room = 0
    split = {"split": "train", "validation_split": "last_file"} if own else {}
    for document in read_documents(spec, **split):  # type: ignore[arg-type]
        room = room if document.continues else given.doc_cap
        text = to_text(document.text)[: min(room, given.max_chars - seen)]
        seen, room = seen + len(text), room - len(text)
        yield text
        if seen >= given.max_chars:
            return


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
