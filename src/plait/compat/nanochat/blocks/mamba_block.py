"""The block of a selective state space."""

from __future__ import annotations

from plait.compat.nanochat.blocks.mixer_block import MixerBlock


class MambaBlock(MixerBlock):
    """x + mamba(norm(x)), then x + mlp(norm(x)) if ``mamba_use_mlp``; no positions.

    The mixer is Mamba-1 with the defaults of its authors: dt_rank n_embd / 16 rounded up, time steps log-uniform in
    (0.001, 0.1) and at least 1e-4, random dt weights of scale 1, a bias in the convolution and in no other map.
    """

    kind = "mamba"
