"""BitByte's Trainer."""

from plait.compat.bitbyte.training.trainer import Trainer

__all__ = ["Trainer"]
