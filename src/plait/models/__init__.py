"""The one model, its blocks, heads and cache."""

from plait.models.cache import Cache
from plait.models.model import Model
from plait.models.output import Output

__all__ = ["Cache", "Model", "Output"]
