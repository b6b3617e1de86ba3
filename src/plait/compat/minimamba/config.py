"""MiniMamba's configurations; ``MambaLMConfig(vocab_size=32000, **base_config)`` takes over what a base says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Self

import torch

from plait.compat.minimamba.inference import InferenceParams
from plait.config.errors import ConfigError, nearest
from plait.config.load import read_config_file
from plait.config.originals.minimamba import DERIVED, MiniMamba, read
from plait.tokenizers.files import write_file

__all__ = [
    "BaseMambaConfig",
    "InferenceParams",
    "MambaClassificationConfig",
    "MambaConfig",
    "MambaLMConfig",
]


@dataclass
class BaseMambaConfig:
    """The layers, whatever they are for; every field takes effect. ConfigError for a value that makes no sense."""

    d_model: int = 768  # width
    n_layer: int = 12
    d_state: int = 16  # states of a channel
    d_conv: int = 4  # taps of the convolution
    expand: int | float = 2  # inner width as a multiple of d_model
    dt_rank: Literal["auto"] | int = "auto"  # auto: d_model / 16, rounded up
    dt_min: float = 0.001  # initial time steps, log-uniform between
    dt_max: float = 0.1
    dt_init: Literal["random", "constant"] = "random"  # weights to time steps
    dt_scale: float = 1.0  # of those weights
    dt_init_floor: float = 1e-4  # least initial time step
    conv_bias: bool = True
    bias: bool = False  # of the projections, and of a language model's output
    norm_epsilon: float = 1e-5
    rms_norm: bool = True  # False: LayerNorms
    use_fast_path: bool = True  # False: plain torch instead of the kernels of this machine
    device: torch.device | str | None = None  # of the weights; None: torch's default
    dtype: torch.dtype | str | None = None  # of the weights, but for those that must be float32
    gradient_checkpointing: bool = False  # recompute each layer in backward

    def __post_init__(self) -> None:
        self.checked()

    @property
    def d_inner(self) -> int:
        """The width inside of a layer."""
        return int(self.expand * self.d_model)

    def checked(self) -> MiniMamba:
        """The fields as they are now, validated."""
        # a subclass may have more of them, for a mixer of its own
        return read({name: value for name, value in self.to_dict().items() if name in MiniMamba.model_fields})

    def keys(self) -> list[str]:
        """The fields' names, so that ``**config`` hands them on."""
        return [field.name for field in fields(self)]

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(f"{type(self).__name__} has no field {name!r}{nearest(name, self.keys())}")
        return getattr(self, name)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values: device and dtype by their names."""
        values = {name: self[name] for name in self.keys()}
        for name in ("device", "dtype"):
            if values[name] is not None:
                values[name] = str(values[name]).removeprefix("torch.")
        return values

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """The config of such a dict; ConfigError for a key that is no field. What follows from others is left out."""
        names = [field.name for field in fields(cls)]
        given = {name: value for name, value in config_dict.items() if name not in DERIVED}
        for name in given:
            if name not in names:
                raise ConfigError(f"{cls.__name__} has no field {name!r}{nearest(name, names)}")
        return cls(**given)

    def to_json_string(self) -> str:
        """The fields as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def save_to_json(self, path: str | PathLike[str]) -> None:
        """Write them to a file, which ``plait train`` reads too."""
        write_file(Path(path), (self.to_json_string() + "\n").encode())

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> Self:
        """The config in such a file; ConfigError, with the file's name, for whatever is wrong in it."""
        values = read_config_file(Path(path))
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_json_file(cls, path: str | PathLike[str]) -> Self:
        """As ``from_json``."""
        return cls.from_json(path)


@dataclass
class MambaLMConfig(BaseMambaConfig):
    """A language model."""

    vocab_size: int = 32000
    pad_vocab_size_multiple: int = 8  # the table's rows are a multiple of it; logits are vocab_size wide
    tie_embeddings: bool = True

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding's table."""
        multiple = self.pad_vocab_size_multiple
        return -(-self.vocab_size // multiple) * multiple


@dataclass
class MambaClassificationConfig(BaseMambaConfig):
    """A classifier of sequences of token ids, or with one label a regression."""

    num_labels: int = 2
    pooling_strategy: Literal["last", "mean", "max"] = "last"
    dropout: float = 0.1
    vocab_size: int = 32000


MambaConfig = MambaLMConfig
