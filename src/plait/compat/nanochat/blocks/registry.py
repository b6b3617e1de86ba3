"""Names of block types: T and M, every kind of Plait's, and those that users register."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from plait.compat.nanochat.blocks.base import BaseBlock
from plait.compat.nanochat.blocks.mamba_block import MambaBlock
from plait.compat.nanochat.blocks.mixer_block import MixerBlock
from plait.compat.nanochat.blocks.transformer_block import TransformerBlock
from plait.compat.nanochat.gpt_config import GPTConfig
from plait.compat.nanochat.rotary import rotary_tables
from plait.config.errors import BuildError, ConfigError, nearest
from plait.config.originals.nanochat import WHOLE_BLOCKS
from plait.config.table import find_kind, kinds
from plait.mixers.adapter import register_module
from plait.models.block import Block

_OWN: dict[str, type[MixerBlock]] = {cls.kind: cls for cls in (TransformerBlock, MambaBlock)}
_REGISTERED: dict[str, type[BaseBlock]] = {}
B = TypeVar("B", bound=type[BaseBlock])


def register_block(name: str, aliases: Sequence[str] = ()) -> Callable[[B], B]:
    """Class decorator: a BaseBlock that ``block_pattern`` and ``create_block`` then know by ``name``.

    The block looks only back; nothing else of Plait has to be told, but each process that trains or loads a model
    with it registers it first (from Python, scripts.base_train.main trains). Registered again, the newest class counts.
    ConfigError if something else has the name.
    """

    def register(cls: B) -> B:
        if not (isinstance(cls, type) and issubclass(cls, BaseBlock)):
            raise ConfigError(f"register_block takes a subclass of BaseBlock; got {cls!r}")

        def build(values: Mapping[str, Any], d_model: int, layer_index: int) -> nn.Module:
            if not values:
                raise BuildError(
                    f"layer {layer_index}: the block type {name!r} is a whole block of a nanochat model; give it as "
                    "block_pattern of a GPTConfig or of a nanochat config"
                )
            return cls(GPTConfig(**values), layer_index)

        kind = register_module(name, build, call=_call, aliases=aliases)
        WHOLE_BLOCKS.add(kind)
        _REGISTERED[kind] = cls
        return cls

    return register


def create_block(block_type: str, config: Any, layer_idx: int) -> BaseBlock:
    """A new block of a type, T or transformer, M or mamba, ...; upper and lower case are alike.

    ConfigError, a ValueError, "Unknown block type", with the ones there are.
    """
    kind = find_kind(block_type) if isinstance(block_type, str) else None
    if kind is None:
        raise ConfigError(
            f"Unknown block type: {block_type!r}; there are T (transformer), M (mamba), {', '.join(kinds()[2:])}"
            f"{nearest(str(block_type), ('transformer', *kinds()))}"
        )
    if kind in _REGISTERED:
        return _REGISTERED[kind](config, layer_idx)
    cls = _OWN.get(kind)
    return MixerBlock(config, layer_idx, kind=kind) if cls is None else cls(config, layer_idx)


def block_of(block: Block, config: GPTConfig, layer_idx: int) -> BaseBlock:
    """A model's own block as a BaseBlock: the same weights."""
    if block.kind in _REGISTERED:
        module = block.mixer.module
        assert isinstance(module, BaseBlock)
        return module
    return _OWN.get(block.kind, MixerBlock)(config, layer_idx, kind=block.kind, block=block)


def _call(block: nn.Module, x: Tensor) -> Tensor:
    """A user's block on whole sequences, x (S, T, n_embd), with the context that nanochat gives."""
    assert isinstance(block, BaseBlock)
    headdim = block.config.n_embd // block.config.n_head
    result: Tensor = block(x, {"cos_sin": rotary_tables(x.shape[1], headdim, x.device), "kv_cache": None})
    return result
