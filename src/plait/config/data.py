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
    format: Literal["auto", "text", "jsonl", "parquet"] = Field(
        "auto", description="auto: by the file's ending"
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
