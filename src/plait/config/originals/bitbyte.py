"""BitByte's sizes and its trainer's flags, translated into our schema. It has no config files.

The forward pass is BitByte's: ternary maps with one scale each (one for x and z together, one for both halves of the
SwiGLU, one each for queries, keys and values), among them those to time steps, B and C; activations of 8 bits; RMS
norms; a LayerNorm at the end of a Mamba. Gradients pass every rounding, which BitByte's do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from plait.config.errors import ConfigError
from plait.config.recipes import read_recipe
from plait.config.section import Section

RECIPE = "bitbyte"  # what the flags do not say
BYTES = 256
Family = Literal["bitbyte", "mamba", "hybrid"]
# Words in the names of what was not taken over, and why.
STRANGERS = {
    "diffusion": "diffusion over bytes",
    "deq": "deep equilibrium models (DEQ)",
    "galore": "GaLore",
    "8bit": "8-bit Adam",
    "loglinear": "the log-linear state space",
}


class Sizes(Section):
    """The arguments of BitByte's models."""

    vocab_size: int = Field(BYTES, gt=0, description="ids: the bytes")
    n_layer: int = Field(24, gt=0, description="blocks")
    d_model: int = Field(1536, gt=0, description="width")
    d_ff: int = Field(4096, gt=0, description="hidden width of the SwiGLU")
    n_head: int = Field(24, gt=0, description="attention: heads of queries")
    n_kv_head: int | None = Field(None, gt=0, description="attention: heads of keys and values; null: n_head")
    rope_base: float = Field(10000.0, gt=0, description="attention: base of the rotations")
    d_state: int = Field(16, gt=0, description="Mamba: states of a channel")
    d_conv: int = Field(4, gt=0, description="Mamba: taps of the convolution")
    expand: int = Field(2, gt=0, description="Mamba: inner width as a multiple of d_model")
    act_quant: bool = Field(True, description="activations are rounded to 8 bits before each ternary map")


class Flags(Section):
    """The flags of BitByte's trainer that say something here."""

    data: str | None = Field(None, description="folder of shard_*.bin, raw bytes")
    out: str | None = Field(None, description="the run's folder")
    steps: int = Field(100000, gt=0, description="updates of the weights")
    log_every: int = Field(10, gt=0, description="steps between lines of the log")
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    model_family: Family = Field(
        "bitbyte", description="attention, Mamba, or Mamba below and attention above"
    )
    n_layer: int = Field(24, gt=0, description="blocks")
    d_model: int = Field(1536, gt=0, description="width")
    n_head: int = Field(24, gt=0, description="heads of the attention")
    d_ff: int = Field(4096, gt=0, description="hidden width of the SwiGLU")
    ddp: bool = Field(False, description="several processes, which torchrun starts")
    use_sdpa: bool = Field(True, description="attention by torch's fused function, as always")
    no_ckpt: bool = Field(False, description="keep all activations for backward")
    no_act_quant: bool = Field(False, description="activations are not rounded")
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    warmup_frac: float = Field(0.03, ge=0, lt=1, description="share of the run in which the rate goes up")
    wd: float = Field(0.1, ge=0, description="weight decay of matrices")
    grad_clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: any")
    batch_size: int = Field(1, gt=0, description="rows of a forward on one device")
    grad_accum: int = Field(8, gt=0, description="forwards of a step")
    seq_len: int | None = Field(None, gt=1, description="bytes a row throughout; null: 2048, 4096, then 8192")
    seq_len_cap: int | None = Field(None, gt=1, description="rows are never longer")
    resume: str | None = Field(None, description="go on: auto for this run's newest checkpoint, or a folder")
    no_opt_state: bool = Field(False, description="with resume: take the weights alone and begin anew")


def family_pattern(family: Family, n_layer: int) -> list[str]:
    """The kinds of the blocks: a hybrid's first half is Mamba, its second attention."""
    below = {"bitbyte": 0, "mamba": n_layer, "hybrid": n_layer // 2}[family]
    return ["mamba"] * below + ["attention"] * (n_layer - below)


def model_section(sizes: Sizes, pattern: Sequence[str]) -> dict[str, Any]:
    """The model in our schema; a LayerNorm at the end if all its blocks are Mamba."""
    linear = {
        "kind": "ternary",
        "activations": "int8" if sizes.act_quant else "none",
        "ste": "identity",
        "scale": "matrix",
    }
    rms = {"kind": "rms", "eps": 1e-6}
    attention = {
        "n_head": sizes.n_head,
        "n_kv_head": sizes.n_kv_head or sizes.n_head,
        "rope_base": sizes.rope_base,
        "linear": {**linear, "scale": "part"},  # queries, keys and values are matrices of their own
    }
    mamba = {
        "d_state": sizes.d_state,
        "d_conv": sizes.d_conv,
        "expand": sizes.expand,
        "dt_rank": "full",
        "projections": "separate",
    }
    used = {
        kind: section for kind, section in (("attention", attention), ("mamba", mamba)) if kind in pattern
    }
    return {
        "d_model": sizes.d_model,
        "n_layer": len(pattern),
        "pattern": list(pattern),
        "vocab_size": sizes.vocab_size,
        "norm": rms,
        "final_norm": rms if "attention" in pattern else {"kind": "layer", "eps": 1e-5},
        "linear": linear,
        "mlp": {"kind": "swiglu", "width": sizes.d_ff, "linear": linear},
        "head": {"kind": "lm", "tie": True},
        "init": {"embedding": sizes.d_model**-0.5},
        **used,
    }


def refuse_strangers(names: Sequence[str]) -> None:
    """ConfigError for a flag of what was not taken over, naming it."""
    for name in names:
        plain = name.lower().replace("_", "").replace("-", "")
        for word, what in STRANGERS.items():
            if word in plain:
                raise ConfigError(f"--{name}: {what} was not taken over from BitByte; leave it out")


def translate(values: Mapping[str, Any], processes: int = 1) -> dict[str, Any]:
    """The run that flags describe, in our schema, on so many processes; ConfigError names the flag that is wrong.

    The ids are the bytes and four special tokens, as in every run of Plait's.
    """
    given = Flags.model_validate(values)
    if not given.use_sdpa:
        raise ConfigError("attention has no other form than torch's fused one; leave it out", ("use_sdpa",))
    if given.no_opt_state and given.resume is None:
        raise ConfigError(
            "it goes with --resume, whose weights alone are taken then; a checkpoint always has the rest too",
            ("no_opt_state",),
        )
    recipe = read_recipe(RECIPE)
    longest = given.seq_len or recipe["data"]["sequence_length"]
    longest = min(longest, given.seq_len_cap or longest)
    sizes = Sizes(
        **{name: getattr(given, name) for name in ("n_layer", "d_model", "n_head", "d_ff")},
        act_quant=not given.no_act_quant,
    )
    model = model_section(sizes, family_pattern(given.model_family, given.n_layer))
    del model["vocab_size"]
    stages = [] if given.seq_len else recipe["training"]["sequence_length_schedule"]
    training = {
        **recipe["training"],
        "steps": given.steps,
        "batch_tokens": processes * given.grad_accum * given.batch_size * longest,
        "micro_batch_tokens": given.batch_size * longest,
        "lr": given.lr,
        "weight_decay": given.wd,
        "grad_clip": given.grad_clip or None,
        "warmup": given.warmup_frac,
        "log_every": given.log_every,
        "checkpoint_every": given.save_every,
        "sequence_length_schedule": stages,
        "activation_checkpointing": not given.no_ckpt,
        "out": given.out,
    }
    if given.no_opt_state:
        training["init_from"] = given.resume
    return {
        "experiment_name": given.model_family,
        "model": model,
        "tokenizer": {"type": "bytes"},
        "data": {
            "train": given.data,
            "format": "bytes",
            "documents": "joined",
            "sequence_length": longest,
            "validation_fraction": 0,
        },
        "training": training,
    }
