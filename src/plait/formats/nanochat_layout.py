"""nanochat's GPTConfig and the names of its tensors, to ours and back.

Three forms: October 2025, told by nothing; the hybrid of that month, told by ``block_pattern``, with Mamba's tensors
under their own names; July 2026, told by ``window_pattern``. What October's and July's models are is said by the
presets nanochat and nanochat2026.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.config.errors import CheckpointError, ConfigError
from plait.config.explain import show
from plait.config.originals import nanochat2026
from plait.config.originals.nanochat import model_section
from plait.config.originals.nanochat2026 import short_window
from plait.config.schema import LayerConfig, ModelConfig
from plait.formats.foreign import Settings, Tensors
from plait.nn.mlp import mlp_width

SYSTEM = "nanochat"
_WINDOWS = "SSSL"


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a GPTConfig (or a checkpoint's meta, which holds one) says, as a model in our schema.

    A key left out has the default of nanochat's class. CheckpointError for one that is unknown or does not fit.
    """
    values = config.get("model_config", config)
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{SYSTEM}: model_config is {show(values)}, not names and values")
    given = Settings(values, SYSTEM)
    july = "window_pattern" in given
    gpt = {
        "sequence_len": given.count("sequence_len", 2048 if july else 1024),
        "vocab_size": given.count("vocab_size", 32768 if july else 50304),
        "n_layer": given.count("n_layer", 12),
        "n_head": given.count("n_head", 6),
        "n_kv_head": given.count("n_kv_head", 6),
        "n_embd": given.count("n_embd", 768),
    }
    if july:
        section = _section(nanochat2026.model_section, gpt, given.get("window_pattern"))
    else:
        hybrid = {
            "block_pattern": given.get("block_pattern"),
            "mamba_d_state": given.count("mamba_d_state", 16),
            "mamba_d_conv": given.count("mamba_d_conv", 4),
            "mamba_expand": given.number("mamba_expand", 2),
            "mamba_use_mlp": given.flag("mamba_use_mlp", False),
        }
        section = _section(model_section, gpt | hybrid)
    given.close()
    return section


def _section(make: Callable[..., dict[str, Any]], *given: Any) -> dict[str, Any]:
    try:
        return make(*given)
    except ConfigError as error:
        raise CheckpointError(f"{SYSTEM}: {error}") from None


def gpt_config(config: ModelConfig, sequence_len: int) -> dict[str, Any]:
    """The GPTConfig of a model of ours, in nanochat's order; without a Mamba layer it has stock nanochat's keys alone.

    ``sequence_len``, a tenth of the positions that nanochat can rotate, is not in our models, but July's windows tell
    it. CheckpointError with the first thing that nanochat cannot express.
    """
    layers = config.layers()
    attention = next((layer.options.model_dump() for layer in layers if layer.kind == "attention"), {})
    for index, layer in enumerate(layers):
        if layer.kind not in ("attention", "mamba"):
            raise CheckpointError(f"{SYSTEM} cannot express layer {index}: it has no {layer.kind}")
    mamba = next((layer for layer in layers if layer.kind == "mamba"), None)
    july = config.embedding.smear or config.backout
    if july and mamba is not None:
        raise CheckpointError(f"{SYSTEM} cannot express a Mamba layer beside smear or backout")
    n_head = attention.get("n_head") or max(1, config.d_model // 64)
    gpt: dict[str, Any] = {
        "sequence_len": sequence_len,
        "vocab_size": config.vocab_size,
        "n_layer": len(layers),
        "n_head": n_head,
        "n_kv_head": attention.get("n_kv_head") or n_head,
        "n_embd": config.d_model,
    }
    if july:
        windows = [layer.options.model_dump().get("window") for layer in layers]
        gpt["sequence_len"] = (windows[-1] or sequence_len + 1) - 1
        gpt["window_pattern"] = _letters(windows, gpt["sequence_len"])
    if mamba is not None:
        options = mamba.options.model_dump()
        gpt["block_pattern"] = ["M" if layer.kind == "mamba" else "T" for layer in layers]
        gpt |= {f"mamba_{name}": options[name] for name in ("d_state", "d_conv")}
        whole = float(options["expand"]).is_integer()
        gpt["mamba_expand"] = int(options["expand"]) if whole else options["expand"]
        gpt["mamba_use_mlp"] = mamba.block.mlp.kind != "none"
    _refuse_differences(config, ModelConfig.model_validate(model_config(gpt)))
    return gpt


def _letters(windows: Sequence[int | None], sequence_len: int) -> str:
    letters = "".join("S" if window == short_window(sequence_len) + 1 else "L" for window in windows)
    usual = _WINDOWS * len(letters)
    return _WINDOWS if letters[:-1] == usual[: len(letters) - 1] else letters


def _refuse_differences(ours: ModelConfig, theirs: ModelConfig) -> None:
    mine, known = dict(_facts(ours)), dict(_facts(theirs))
    for name, value in mine.items():
        if name not in known or known[name] != value:
            raise CheckpointError(
                f"{SYSTEM} cannot express {name} {show(value)}"
                + (f": its models have {show(known[name])}" if name in known else "")
            )


def _facts(config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Everything that a model computes with, by name, in one spelling; not how it was initialised."""
    for name in ("d_model", "vocab_size", "causal", "backout"):
        yield name, getattr(config, name)
    yield "rows of the embedding", _rows(config)
    yield from _leaves(
        "embedding", config.embedding.model_dump() | {"width": config.embedding.width or config.d_model}
    )
    yield from _leaves("final_norm", _norm(config.final_norm.model_dump() | {"place": "pre"}))
    yield from _leaves("head", config.head.model_dump())
    for index, layer in enumerate(config.layers()):
        options, block = layer.options.model_dump(), layer.block.model_dump()
        if layer.kind == "attention":
            n_head, n_kv_head, headdim = _heads(layer, config.d_model)
            options |= {"n_head": n_head, "n_kv_head": n_kv_head, "headdim": headdim}
            options |= {"causal": config.causal, "out_bias": bool(options["out_bias"] or options["bias"])}
        block["mlp"]["width"] = mlp_width(layer.block.mlp, config.d_model)
        block["norm"] = _norm(block["norm"])
        yield from _leaves(f"layer {index}:", options)
        yield from _leaves(f"layer {index}:", block)


def _norm(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"bias": bool(values["bias"])} if values["kind"] == "rms" else values


def _leaves(name: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(f"{name} {key}", value)
        else:
            yield f"{name} {key}", value


def _rows(config: ModelConfig) -> int:
    multiple = config.pad_vocab_size_multiple
    return -(-(config.vocab_size or 0) // multiple) * multiple


def _heads(layer: LayerConfig, d_model: int) -> tuple[int, int, int]:
    options = layer.options.model_dump()
    n_head = options["n_head"] or max(1, d_model // 64)
    return n_head, options["n_kv_head"] or n_head, options["headdim"] or d_model // n_head


Shaped = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Link:
    """Tensors of nanochat's that are, one after another, the same numbers as tensors of ours."""

    theirs: tuple[Shaped, ...]
    ours: tuple[Shaped, ...]


def links(config: ModelConfig) -> Iterator[Link]:
    """How the tensors of a model that ``model_config`` describes correspond, in the order of nanochat's state dict."""
    d, rows, layers = config.d_model, _rows(config), config.layers()
    numbers = range(len(layers))
    if config.backout:
        for name, ours in (("resid_lambdas", "scale"), ("x0_lambdas", "share")):
            parts = tuple((f"blocks.{i}.input_mix.{ours}", (1,)) for i in numbers)
            yield Link(((name, (len(layers),)),), parts)
        yield _same("smear_lambda", "smear.share", 1)
        yield _same("backout_lambda", "backout.share", 1)
    yield _same("transformer.wte.weight", "embedding.tokens.weight", rows, d)
    for index, layer in enumerate(layers):
        yield from _block(layer, f"transformer.h.{index}", f"blocks.{index}", d)
    yield _same("lm_head.weight", "head.unembedding.weight", rows, d)
    if config.backout:
        channels = config.embedding.smear_channels
        yield Link((("smear_gate.weight", (1, channels)),), (("smear.gate", (channels,)),))
    for index, layer in enumerate(layers):
        if layer.kind == "attention" and layer.options.model_dump()["value_embedding"]:
            _, n_kv_head, headdim = _heads(layer, d)
            ours = f"blocks.{index}.mixer.value_embedding.table.weight"
            yield _same(f"value_embeds.{index}.weight", ours, rows, n_kv_head * headdim)


def _block(layer: LayerConfig, theirs: str, ours: str, d: int) -> Iterator[Link]:
    if layer.kind == "mamba":
        yield from _mamba(layer.options.model_dump(), f"{theirs}.mixer", f"{ours}.mixer", d)
    else:
        n_head, n_kv_head, headdim = _heads(layer, d)
        sizes = {"c_q": n_head * headdim, "c_k": n_kv_head * headdim, "c_v": n_kv_head * headdim}
        yield Link(
            tuple((f"{theirs}.attn.{name}.weight", (size, d)) for name, size in sizes.items()),
            ((f"{ours}.mixer.in_proj.weight", (sum(sizes.values()), d)),),
        )
        yield _same(f"{theirs}.attn.c_proj.weight", f"{ours}.mixer.out_proj.weight", d, n_head * headdim)
        options = layer.options.model_dump()
        if options["value_embedding"]:
            gate = (n_kv_head, options["value_gate_channels"])
            yield _same(f"{theirs}.attn.ve_gate.weight", f"{ours}.mixer.value_embedding.gate", *gate)
    if layer.block.mlp.kind != "none":
        width = mlp_width(layer.block.mlp, d)
        yield _same(f"{theirs}.mlp.c_fc.weight", f"{ours}.mlp.fc1.weight", width, d)
        yield _same(f"{theirs}.mlp.c_proj.weight", f"{ours}.mlp.fc2.weight", d, width)


def _mamba(options: Mapping[str, Any], theirs: str, ours: str, d: int) -> Iterator[Link]:
    inner, states, rank = int(options["expand"] * d), options["d_state"], -(-d // 16)
    shapes: dict[str, tuple[int, ...]] = {
        "A_log": (inner, states),
        "D": (inner,),
        "in_proj.weight": (2 * inner, d),
        "conv1d.weight": (inner, 1, options["d_conv"]),
        "conv1d.bias": (inner,),
        "x_proj.weight": (rank + 2 * states, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (d, inner),
    }
    for name, shape in shapes.items():
        yield _same(f"{theirs}.{name}", f"{ours}.{name}", *shape)


def _same(theirs: str, ours: str, *shape: int) -> Link:
    return Link(((theirs, shape),), ((ours, shape),))


def to_ours(found: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """nanochat's tensors under our names, in float32; CheckpointError if one is missing, misshapen or left over."""
    made: dict[str, Tensor] = {}
    for link in links(config):
        made |= dealt([found.take(name, *shape).float() for name, shape in link.theirs], link.ours)
    found.close()
    return made


def to_theirs(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors under nanochat's names, in its order, in float32."""
    made: dict[str, Tensor] = {}
    for link in links(config):
        made |= dealt([tensors[name].detach().float().cpu() for name, _ in link.ours], link.theirs)
    return made


def dealt(tensors: Sequence[Tensor], among: Sequence[Shaped]) -> dict[str, Tensor]:
    """The numbers of some tensors, one after another, as tensors of other names and shapes."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    sizes = [torch.Size(shape).numel() for _, shape in among]
    parts = zip(among, flat.split(sizes), strict=True)
    return {name: part.reshape(shape).clone() for (name, shape), part in parts}
