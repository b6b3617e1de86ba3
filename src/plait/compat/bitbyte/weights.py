"""A model's weights under BitByte's names; the way back is ``plait.formats.bitbyte.from_state_dict``."""

from __future__ import annotations

import torch
from torch import Tensor

from plait.formats.native import weights
from plait.mixers.attention import Attention
from plait.models.model import Model

_MAMBA = {
    "A_log": "A_log",
    "D": "D",
    "conv1d.weight": "conv1d.weight",
    "conv1d.bias": "conv1d.bias",
    "in_proj.weight": "in_proj.weight",
    "dt_proj.weight": "delta_proj.weight",
    "dt_bias": "delta_proj.bias",
    "B_proj.weight": "B_proj.weight",
    "C_proj.weight": "C_proj.weight",
    "out_proj.weight": "out_proj.weight",
}


def to_theirs(model: Model) -> dict[str, Tensor]:
    """Every weight of a model of Blocks and MambaBlocks; what is joined here is parted, a tied output given twice."""
    ours = weights(model)
    table = ours["embedding.tokens.weight"]
    found = {"tok_emb.weight": table}
    for index, block in enumerate(model.blocks):
        prefix = f"blocks.{index}"
        found[f"{prefix}.n1.weight"] = ours[f"{prefix}.norm1.weight"]
        mixer = block.mixer
        if isinstance(mixer, Attention):
            widths = [mixer.n_head * mixer.headdim, *[mixer.n_kv_head * mixer.headdim] * 2]
            parts = ours[f"{prefix}.mixer.in_proj.weight"].split(widths)
            for name, part in zip("qkv", parts, strict=True):
                found[f"{prefix}.attn.{name}_proj.weight"] = part
            found[f"{prefix}.attn.o_proj.weight"] = ours[f"{prefix}.mixer.out_proj.weight"]
        else:
            for name, theirs in _MAMBA.items():
                found[f"{prefix}.ssm.{theirs}"] = ours[f"{prefix}.mixer.{name}"]
        found[f"{prefix}.n2.weight"] = ours[f"{prefix}.norm2.weight"]
        value, gate = ours[f"{prefix}.mlp.fc1.weight"].chunk(2)
        found[f"{prefix}.mlp.gate_up.weight"] = torch.cat([gate, value])  # ours has the gate last
        found[f"{prefix}.mlp.down.weight"] = ours[f"{prefix}.mlp.fc2.weight"]
    for name in ("weight", "bias"):
        if f"final_norm.{name}" in ours:
            found[f"norm_f.{name}"] = ours[f"final_norm.{name}"]
    return {**found, "lm_head.weight": table}
