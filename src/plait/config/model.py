"""The model as data: embedding, a pattern of mixers in blocks, final norm, head.

Each kind of mixer may have a section under its name or an alias (``mamba2: {d_state: 64, mlp: none}``) with
options of the kind and of the block. A layer's values are the model's defaults, then its kind's section, then
its own entry of the pattern. ``preset`` lays all that is given on one of ``recipes/presets``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from plait.config.block import BlockConfig, LinearConfig, MLPConfig, NormConfig, ResidualConfig
from plait.config.errors import ConfigError
from plait.config.explain import show, unknown_key
from plait.config.init import InitConfig
from plait.config.options import Options
from plait.config.pattern import PatternEntry, is_single_name, parse_pattern
from plait.config.recipes import read_preset
from plait.config.section import Section, as_mapping
from plait.config.table import find_kind, kinds, options_class
from plait.config.text import plain
from plait.config.words import counted

DEFAULT_LAYERS = 6


class EmbeddingConfig(Section):
    """From token ids to vectors."""

    width: int | None = Field(None, gt=0, description="width of the vectors; null: d_model")
    scale: float | None = Field(None, gt=0, description="factor of the token vectors")
    norm: NormConfig = Field(default_factory=lambda: NormConfig(kind="none"), description="norm of the sum")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the sum")
    position: Literal["none", "learned"] = Field(
        "none", description="learned positions are added, or none are"
    )
    max_positions: int = Field(1024, gt=0, description="how many positions are learned")
    token_types: int = Field(0, ge=0, description="how many token types (segments) are added; 0: none")
    smear: bool = Field(
        False, description="add to each token's vector a gated, learned share of the previous token's"
    )
    smear_channels: int = Field(24, gt=0, description="smear: how many channels the gate looks at")


class HeadConfig(Section):
    """What stands on the last hidden states; shorthand: its kind."""

    kind: Literal["lm", "masked_lm", "classification", "features"] = Field(
        "lm", description="what it predicts"
    )
    project: bool = Field(
        True, description="LM: an output map; false: what the last layer gives are the logits themselves"
    )
    tie: bool = Field(True, description="LM: the embedding's weight is the output's")
    bias: bool = Field(False, description="LM: a bias for each token of the vocabulary")
    padded: bool = Field(
        False,
        description="LM: rows that only pad the vocabulary count in logits and loss; never in generation",
    )
    softcap: float | None = Field(None, gt=0, description="LM: logits become cap * tanh(logits / cap)")
    transform: Literal["none", "gelu", "gelu_tanh"] = Field(
        "none", description="LM: dense, activation and norm before the output (BERT)"
    )
    num_labels: int = Field(2, gt=0, description="classification: how many; 1 is a regression")
    pooling: Literal["first", "last", "mean", "max"] = Field(
        "last", description="classification: from many tokens to one vector"
    )
    pooler: bool = Field(False, description="classification: dense and tanh on that vector")
    dropout: float = Field(0.0, ge=0, lt=1, description="classification: dropout before the last map")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """A word to ``{"kind": word}``."""
        return {"kind": data} if isinstance(data, str) else data


@dataclass(frozen=True)
class LayerConfig:
    """One layer, fully resolved: the kind of its mixer, the mixer's options, the block around it."""

    kind: str
    options: Options
    block: BlockConfig


class ModelConfig(Section):
    """A model; besides the fields, a section for any kind of mixer."""

    model_config = ConfigDict(extra="allow")  # the sections of kinds; `normalise` refuses all other keys

    preset: str | None = Field(None, description="a model of recipes/presets that these values are laid on")
    d_model: int = Field(256, gt=0, description="D, the width of the residual stream")
    n_layer: int | None = Field(
        None, gt=0, description=f"layers; null: as the pattern says, else {DEFAULT_LAYERS}"
    )
    pattern: str | list[Any] | None = Field(
        None, description="the mixers, first to last; null: attention everywhere"
    )
    vocab_size: int | None = Field(None, gt=0, description="V; null: the tokenizer's")
    pad_vocab_size_multiple: int = Field(
        1, gt=0, description="the embedding's rows are rounded up to a multiple of it"
    )
    causal: bool = Field(True, description="no token sees a later one")
    norm: NormConfig = Field(default_factory=NormConfig, description="norm of the blocks")
    residual: ResidualConfig = Field(default_factory=ResidualConfig, description="residual of the blocks")
    mlp: MLPConfig = Field(default_factory=MLPConfig, description="MLP of the blocks")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of what each branch of a block adds")
    linear: LinearConfig = Field(default_factory=LinearConfig, description="linear maps of the blocks")
    embedding: EmbeddingConfig = Field(default_factory=EmbeddingConfig, description="from ids to vectors")
    final_norm: NormConfig = Field(
        default_factory=NormConfig, description="norm before the head; left out: as `norm`"
    )
    head: HeadConfig = Field(default_factory=HeadConfig, description="what the model predicts")
    backout: bool = Field(
        False, description="before the final norm, subtract a learned share of what the middle layer gave"
    )
    init: InitConfig = Field(default_factory=InitConfig, description="how weights begin")

    @classmethod
    def normalise(cls, data: Any) -> Any:
        """Names for aliases, the preset under the values, the final norm as the blocks' if left out."""
        if not isinstance(data, Mapping):
            return data
        values = _canonical_keys(data, cls)
        name = values.get("preset")
        if name is not None:
            values = _on_preset(name, values, cls)
        if "final_norm" not in values and "norm" in values:
            norm = NormConfig.normalise(values["norm"])
            if isinstance(norm, Mapping):
                values["final_norm"] = {key: value for key, value in norm.items() if key != "place"}
            elif isinstance(norm, NormConfig):
                values["final_norm"] = norm.replace(place="pre")
        return values

    @property
    def block(self) -> BlockConfig:
        """The block options that hold where neither a kind nor a layer says otherwise."""
        return BlockConfig(**{name: getattr(self, name) for name in BlockConfig.model_fields})

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """The sections of kinds, as given, by kind."""
        return dict(self.model_extra or {})

    def layers(self) -> tuple[LayerConfig, ...]:
        """All layers, first to last, resolved and validated; imports the mixers that are used."""
        done: dict[tuple[str, int | None], LayerConfig] = {}
        layers = []
        for entry in self._entries():
            key = (entry.kind, entry.item if entry.options else None)
            if key not in done:
                done[key] = self._layer(entry)
            layers.append(done[key])
        return tuple(layers)

    def _entries(self) -> list[PatternEntry]:
        pattern = self.pattern
        if pattern is None:
            return parse_pattern("attention") * (self.n_layer or DEFAULT_LAYERS)
        try:
            entries = parse_pattern(pattern)
        except ConfigError as error:
            raise error.below("pattern") from None
        if self.n_layer is None or self.n_layer == len(entries):
            return entries
        if is_single_name(pattern):
            return entries * self.n_layer
        raise ConfigError(
            f"n_layer is {self.n_layer} but the pattern {show(pattern)} has {counted(len(entries), 'layer')}; "
            "the two must match: change one, or leave n_layer out",
            ("n_layer",),
        )

    def _layer(self, entry: PatternEntry) -> LayerConfig:
        section = self.sections.get(entry.kind, {})
        try:
            options = options_class(entry.kind)
        except ConfigError as error:
            raise error.below(entry.kind) from None
        for key in (*section, *entry.options):
            if key not in options.model_fields and key not in BlockConfig.model_fields:
                allowed = (*options.model_fields, *BlockConfig.model_fields)
                raise unknown_key(str(key), allowed, (*_where(key, entry), str(key)))
        try:
            merged = BlockConfig.merge(BlockConfig.merge(self.block, section), entry.options)
            block = {key: value for key, value in merged.items() if key in BlockConfig.model_fields}
            own = {key: value for key, value in merged.items() if key not in block}
            return LayerConfig(entry.kind, options(**own), BlockConfig(**block))
        except ConfigError as error:
            place = error.path[0] if error.path else None
            raise error.below(*_where(place, entry)) from None

    @model_validator(mode="after")
    def _layers_are_valid(self) -> ModelConfig:
        self.layers()
        return self


def _where(key: Any, entry: PatternEntry) -> tuple[str | int, ...]:
    if key in entry.options and entry.item is not None:
        return ("pattern", entry.item)
    return (entry.kind,)


def _canonical_keys(data: Mapping[Any, Any], model: type[ModelConfig]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    given: dict[str, str] = {}
    for key, value in data.items():
        name, value = _canonical_key(str(key), value, model)
        if name in given:
            raise ConfigError(f"given twice, as {given[name]!r} and as {str(key)!r}; keep one", (name,))
        given[name] = str(key)
        values[name] = value
    return values


def _canonical_key(key: str, value: Any, model: type[ModelConfig]) -> tuple[str, Any]:
    if key == "block_pattern":
        return "pattern", plain(value)
    if key == "init_std":
        return "init", {"std": value}
    if key in model.model_fields:
        return key, plain(value) if key == "pattern" else value
    kind = find_kind(key)
    if kind is None:
        names = (*model.model_fields, *kinds())
        raise unknown_key(key, names, (key,))
    try:
        return kind, plain(as_mapping(value))
    except ConfigError as error:
        raise error.below(key) from None


def _on_preset(name: Any, values: dict[str, Any], model: type[ModelConfig]) -> dict[str, Any]:
    if not isinstance(name, str):
        raise ConfigError(f"expected the name of a preset; got {show(name)}", ("preset",))
    try:
        base = _canonical_keys(read_preset(name), model)
    except ConfigError as error:
        raise error.below("preset") from None
    if values.get("pattern") is not None and values.get("n_layer") is None:
        base.pop("n_layer", None)  # the number of layers belongs to the preset's own pattern
    merged = dict(base)
    for key, value in values.items():
        section = model.subsection(key) or (None if key in model.model_fields else BlockConfig)
        try:
            merged[key] = section.merge(base[key], value) if section and key in base else value
        except ConfigError as error:
            raise error.below(key) from None
    return merged
