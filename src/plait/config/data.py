"""Text and tokens as data: which tokenizer, which files, how documents become sequences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from plait.config.errors import ConfigError
from plait.config.section import Section


class TokenizerConfig(Section):
    """How text becomes token ids."""

    type: Literal["bytes", "bpe", "wordpiece", "unigram", "characters", "sentencepiece"] = Field(
        "bytes",
        description="bytes need no training; the others are trained on the data or loaded from `path`",
    )
    path: str | None = Field(None, description="a trained tokenizer: its folder or file")
    vocab_size: int | None = Field(
        None, gt=0, description="ids to train for; null: 8192, or as the data has characters"
    )
    special_tokens: list[str] | None = Field(
        None, description="more of them, after the usual ones of the type"
    )
    chat: bool = Field(False, description="with the special tokens of conversations, as nanochat's")
    split: Literal["gpt2", "gpt4", "nanochat"] = Field(
        "gpt2",
        description="bpe, unigram: whose pattern cuts text before tokens are made of it; nanochat: GPT-4's, but "
        "numbers in twos, and special tokens last",
    )
    lowercase: bool = Field(False, description="lower the case of all text")


class DataConfig(Section):
    """Where text comes from, and how it is cut into sequences."""

    train: str | list[str] | None = Field(
        None, description="files, folders or globs to train on; stdlib: is Python's own source"
    )
    validation: str | list[str] | None = Field(None, description="files, folders or globs to evaluate on")
    validation_fraction: float = Field(
        0.01, ge=0, lt=1, description="without `validation`: share of the documents held out, chosen by hash"
    )
    validation_split: Literal["documents", "last_file"] = Field(
        "documents",
        description="without `validation`: hold out validation_fraction of the documents, or the last file",
    )
    format: Literal["auto", "text", "jsonl", "parquet", "bytes"] = Field(
        "auto",
        description="auto: by the file's ending; bytes (.bin): raw, one document or, with separator, many",
    )
    separator: int | None = Field(
        None, ge=0, le=255, description="bytes: the byte that ends a document; null: a file is one document"
    )
    field: str = Field("text", description="the key or column that holds the text")
    label_field: str = Field("label", description="classification: the key or column that holds the label")
    sequence_length: int = Field(1024, gt=0, description="T, tokens a row")
    documents: Literal["separate", "joined"] = Field(
        "separate", description="whether state and attention stop at a document's end"
    )
    add_eos: bool = Field(
        False, description="an end token after each document; each has a begin token anyway"
    )
    cache: str | None = Field(None, description="folder of token shards; null: in the user's cache folder")
    shuffle: bool = Field(True, description="the order of rows is drawn anew each epoch")

    @model_validator(mode="after")
    def _paths_given(self) -> DataConfig:
        for name in ("train", "validation"):
            value = getattr(self, name)
            if value is not None and (not value or (isinstance(value, list) and not all(value))):
                raise ConfigError("expected a path; an empty one was given", (name,))
        return self
