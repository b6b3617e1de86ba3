"""How many bytes a token of the tokenizer stands for, on some text; perhaps beside another tokenizer's.

python -m plait.compat.nanochat.scripts.tok_eval --data=path/to/text --against=path/to/another/tokenizer
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pydantic import Field

from plait.compat.nanochat.common import get_base_dir, run_script
from plait.compat.nanochat.configurator import read_command_line
from plait.compat.nanochat.tokenizer import get_tokenizer
from plait.config.errors import DataError, TokenizerError
from plait.config.section import Section
from plait.data.documents import read_documents
from plait.tokenizers import load_tokenizer
from plait.tokenizers.base import Tokenizer, to_text


class TokEval(Section):
    """The settings."""

    data: str | None = Field(None, description="text; None: the last file of base_data in nanochat's folder")
    against: str | None = Field(None, description="the folder of another tokenizer")
    max_chars: int = Field(10_000_000, gt=0, description="characters of the text at most")


def main(words: Sequence[str]) -> int:
    """Print bytes a token, and whether decoding gives the text back; the exit status."""
    given = TokEval.model_validate(read_command_line(words, TokEval).settings)
    texts = _texts(given)
    shown = {"nanochat": get_tokenizer().tokenizer}
    if given.against is not None:
        shown[given.against] = load_tokenizer(given.against)
    for name, tokenizer in shown.items():
        print(f"{name}: {tokenizer.vocab_size} ids, {bytes_a_token(tokenizer, texts):.3f} bytes a token")
    return 0


def bytes_a_token(tokenizer: Tokenizer, texts: Sequence[str]) -> float:
    """Bytes of the texts for each of their tokens; TokenizerError if decoding gives another text."""
    encoded = tokenizer.encode_batch(texts)
    for text, ids in zip(texts, encoded, strict=True):
        if tokenizer.decode(ids) != text:
            raise TokenizerError(f"the text {text[:40]!r} is not what its tokens decode to")
    return sum(len(text.encode()) for text in texts) / max(1, sum(map(len, encoded)))


def _texts(given: TokEval) -> list[str]:
    found: list[str] = []
    left = given.max_chars
    if given.data is None:
        spec = str(get_base_dir() / "base_data")
        documents = read_documents(spec, split="validation", validation_split="last_file")
    else:
        documents = read_documents(given.data)
    for document in documents:
        found.append(to_text(document.text)[:left])
        left -= len(found[-1])
        if left <= 0:
            break
    if not any(found):
        raise DataError("there is no text to measure on")
    return found


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
