"""Another system's weights: its files read safely, its tensors taken one by one, its settings one by one.

What is missing, of another shape, unknown or left over is a CheckpointError that names it.
"""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from plait.config.errors import CheckpointError, ConfigError, nearest
from plait.config.schema import ModelConfig
from plait.formats.native import fill_weights, reason, unfilled_model
from plait.models.model import Model

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLES)
_WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before each name


class Tensors:
    """The tensors of a state dict; each is taken once, and ``close`` raises if any is left."""

    def __init__(self, tensors: Mapping[str, Any], system: str) -> None:
        self.system = system
        self._left = unwrapped(tensors)
        for name, tensor in self._left.items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{system}: {name} is no tensor; it is of type {type(tensor).__name__}")

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def has(self, prefix: str) -> bool:
        """Whether any tensor's name begins so."""
        return any(name.startswith(prefix) for name in self._left)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor that is there."""
        return tuple(self._get(name).shape)

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor of that name, which must have this shape and hold floating-point numbers."""
        tensor = self._get(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{self.system}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                f"but the configuration says floating-point numbers of shape {shape}"
            )
        return self._left.pop(name)

    def close(self) -> None:
        """CheckpointError naming the first tensor that nobody took."""
        if self._left:
            more = f" (and {len(self._left) - 1} more)" if len(self._left) > 1 else ""
            raise CheckpointError(
                f"{self.system}: the tensor {next(iter(self._left))}{more} has no place in the model that the "
                "configuration describes"
            )

    def _get(self, name: str) -> Tensor:
        if name not in self._left:
            raise CheckpointError(f"{self.system}: the tensor {name} is missing{nearest(name, self._left)}")
        return self._left[name]


class Settings:
    """The settings of a configuration; ``close`` raises if one is left that nobody asked for."""

    def __init__(self, values: Mapping[str, Any], system: str) -> None:
        self.system = system
        self._values = dict(values)
        self._asked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """A setting as it is; ``default`` if it is absent."""
        self._asked.add(name)
        return self._values.get(name, default)

    def count(self, name: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, value, "a positive integer")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(name, value, "a positive number")
        return value

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def ignore(self, *names: str) -> None:
        """Settings that change no number of the model."""
        self._asked.update(names)

    def close(self) -> None:
        """CheckpointError naming the first setting that nobody asked for."""
        for name in self._values:
            if name not in self._asked:
                raise CheckpointError(
                    f"{self.system}: the setting {name!r} is not known{nearest(name, self._asked)}"
                )

    def _wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        given = f"is {value!r}, not {wanted}" if name in self._values else f"is missing; it is {wanted}"
        return CheckpointError(f"{self.system}: the setting {name!r} {given}")


def make_model(config: Mapping[str, Any], weights: Mapping[str, Tensor], system: str) -> Model:
    """The model of a config in evaluation mode, holding copies of ``weights``, which have our names."""
    try:
        model = unfilled_model(ModelConfig.model_validate(config))
    except ConfigError as error:
        raise CheckpointError(f"{system}: {error}") from None
    fill_weights(model, weights, system)
    return model.eval()


def read_file(path: Path) -> Any:
    """What a .safetensors file (its tensors) or a pickled one (tensors and plain data, nothing that runs) holds."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix in PICKLES:
            # what argparse gives is plain data under another name, and trainers save it
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, or is damaged; save its state dict alone ({line})"
        ) from None
    raise CheckpointError(f"{path} is no file of weights; allowed: {', '.join(SUFFIXES)}")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no configuration: expected an object of names and values")
    return values


def find_one(folder: Path, suffixes: tuple[str, ...], what: str) -> Path:
    """The one file of a folder with such an ending; CheckpointError if there is none, or more than one."""
    found = sorted(p for p in folder.iterdir() if p.suffix in suffixes and p.is_file())
    if len(found) != 1:
        names = ", ".join(p.name for p in found) or "none"
        raise CheckpointError(
            f"{folder}: expected one file with {what} ({', '.join(suffixes)}), found {names}; name the file itself"
        )
    return found[0]


def unwrapped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same, without the prefix that a wrapper put before every name."""
    named = dict(tensors)
    again = True
    while again:
        again = False
        for wrapper in _WRAPPERS:
            if named and all(str(name).startswith(wrapper) for name in named):
                named = {name.removeprefix(wrapper): tensor for name, tensor in named.items()}
                again = True
    return named
