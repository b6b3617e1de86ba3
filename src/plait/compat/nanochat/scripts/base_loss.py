"""Bits per byte of a base model on both sides of the text, each document by itself.

python -m plait.compat.nanochat.scripts.base_loss --model_tag=d20 --data.train=path/to/text
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from plait.compat.nanochat.checkpoint_manager import load_model
from plait.compat.nanochat.common import get_base_dir, run_script
from plait.compat.nanochat.configurator import read_command_line
from plait.config.load import load_config
from plait.config.schema import DataConfig
from plait.config.section import Section
from plait.data.documents import Document, read_documents
from plait.evaluation.bits_per_byte import bits_per_byte
from plait.tokenizers.base import Tokenizer
from plait.training.distributed import choose_device


class BaseLoss(Section):
    """The settings, under nanochat's names."""

    model_tag: str | None = Field(None, description="which model; None: the largest")
    model_step: int | None = Field(None, description="its step; None: the last")
    device_type: str = Field("", description="cuda, cpu or mps; empty: the best there is")
    split_tokens: int = Field(20 * 524288, gt=0, description="tokens of each side at most")


def main(words: Sequence[str]) -> int:
    """Print them; the exit status."""
    line = read_command_line(words, BaseLoss)
    given = BaseLoss.model_validate(line.settings)
    own = {"train": str(get_base_dir() / "base_data"), "validation_split": "last_file"}
    data = load_config({"data": own}, line.overrides).data
    device = choose_device(given.device_type or "auto")
    model, tokenizer, _ = load_model("base", device, "eval", model_tag=given.model_tag, step=given.model_step)
    for side, name in (("train", "train"), ("validation", "val")):
        documents = _documents(data, side, tokenizer.tokenizer, given.split_tokens)  # type: ignore[arg-type]
        score = bits_per_byte(model.model, documents, tokenizer=tokenizer.tokenizer)
        print(f"{name} bpb: {score.bits_per_byte:.4f} ({score.n_targets} tokens, {score.n_bytes} bytes)")
    return 0


def _documents(
    data: DataConfig, side: Literal["train", "validation"], tokenizer: Tokenizer, most: int
) -> Iterator[Document]:
    """The documents of a side until ``most`` tokens of them have come."""
    assert data.train is not None
    spec, split = data.train, side
    whole = data.validation is not None
    if whole and side == "validation":
        assert data.validation is not None
        spec = data.validation
    documents = read_documents(
        spec,
        data.format,
        data.field,
        split="all" if whole else split,
        fraction=0.0 if whole else data.validation_fraction,
        separator=data.separator,
        validation_split="documents" if whole else data.validation_split,
    )
    for document in documents:
        if most <= 0:
            return
        yield document
        most -= len(tokenizer.encode(document.text))


if __name__ == "__main__":
    sys.exit(run_script(lambda: main(sys.argv[1:])))
