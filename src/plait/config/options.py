"""The base class of a mixer's options; each mixer's file has ``class Options(MixerOptions)`` at its head."""

from __future__ import annotations

from plait.config.section import Section


class Options(Section):
    """The options of a kind of mixer: typed fields with defaults; unknown names are errors.

    No field may have the name of a block option (norm, residual, mlp, dropout, linear).
    """
