"""Blocks of a GPT: the base class, the factory, and the way to add a type of your own."""

from plait.compat.nanochat.blocks.base import BaseBlock
from plait.compat.nanochat.blocks.mamba_block import MambaBlock
from plait.compat.nanochat.blocks.mixer_block import MixerBlock
from plait.compat.nanochat.blocks.registry import create_block, register_block
from plait.compat.nanochat.blocks.transformer_block import TransformerBlock

__all__ = ["BaseBlock", "MambaBlock", "MixerBlock", "TransformerBlock", "create_block", "register_block"]
