"""The same models by other packages, where installed: on a CPU transformers, on a GPU mamba_ssm.

Without mamba_ssm's kernels, transformers' Mamba-2 needs hundreds of gigabytes for the sizes of a GPU's tables.

Their widths, layers and vocabularies are ours; their steps do what ours do, with torch's own tools.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plait.bench.models import (
    CHECKED_LAYERS,
    CHECKED_VOCABULARY,
    TOLERANCE,
    exact_products,
    model_config,
    relative_error,
    require,
    split_name,
)
from plait.config.errors import BackendError
from plait.models.model import Model
from plait.training.precision import LossScaler, autocast

LONGEST_LOOP = 256
"""Tokens: transformers' Mamba without kernels of its own loops over time, at seconds a hundred tokens in training."""


class Prepared(NamedTuple):
    """A model that is ready to be trained."""

    step: Callable[[], float]  # makes one update, returns the loss before it
    laps: list[
        float
    ]  # seconds of every step so far from its begin to the end of backward, as the host sees them
    parameters: int
    ran: str  # kernels, or the package


def training_peers(
    name: str, ids: Tensor, device: torch.device, precision: str
) -> dict[str, Callable[[], Prepared]]:
    """What makes a training step of the model of a name on ids (B, T), by package; a step returns its loss."""
    family, _ = split_name(name)
    found: dict[str, Callable[[], Prepared]] = {}

    def made(
        build: Callable[[], nn.Module], loss: Callable[[nn.Module, Tensor], Tensor], ran: str
    ) -> Prepared:
        if family == "mamba" and ran == "transformers" and ids.shape[1] > LONGEST_LOOP:
            raise BackendError(f"transformers' loop over time is measured up to {LONGEST_LOOP} tokens")
        torch.manual_seed(0)
        model = build().to(device).train()
        laps: list[float] = []
        step = _training_step(model, lambda x: loss(model, x), ids, device, precision, laps)
        return Prepared(step, laps, sum(p.numel() for p in model.parameters()), ran)

    if device.type == "cpu" and find_spec("transformers") is not None:
        found["transformers"] = lambda: made(lambda: _transformers(name), _their_loss, "transformers")
    if device.type == "cuda" and find_spec("mamba_ssm") is not None and family != "transformer":
        found["mamba_ssm"] = lambda: made(
            lambda: _mamba_ssm(name, torch.float32), _loss_of_logits, "mamba_ssm"
        )
    return found


def decoding_peers(
    name: str, prompt: Tensor, dtype: torch.dtype
) -> dict[str, Callable[[], tuple[Callable[[int], object], int, str]]]:
    """What makes a function that writes so many tokens after the prompts (B, T), greedily, by package."""
    family, _ = split_name(name)
    device = prompt.device
    found: dict[str, Callable[[], tuple[Callable[[int], object], int, str]]] = {}

    def transformers() -> tuple[Callable[[int], object], int, str]:
        check_transformers(name)
        torch.manual_seed(0)
        model: Any = _transformers(name).to(device, dtype).eval()

        def write(count: int) -> object:
            mask = torch.ones_like(prompt)
            return model.generate(
                prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False
            )

        return write, sum(p.numel() for p in model.parameters()), "transformers"

    def mamba_ssm() -> tuple[Callable[[int], object], int, str]:
        torch.manual_seed(0)
        model: Any = _mamba_ssm(name, dtype).to(device).eval()

        def write(count: int) -> object:
            return model.generate(prompt, max_length=prompt.shape[1] + count, top_k=1, cg=True)

        return write, sum(p.numel() for p in model.parameters()), "mamba_ssm"

    if device.type == "cpu" and find_spec("transformers") is not None:
        found["transformers"] = transformers
    if device.type == "cuda" and find_spec("mamba_ssm") is not None and family != "transformer":
        found["mamba_ssm"] = mamba_ssm
    return found


def _training_step(
    model: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    device: torch.device,
    precision: str,
    laps: list[float],
) -> Callable[[], float]:
    """Forward, backward, clipping, fused AdamW, one look at the loss: what our step does."""
    kind: Any = precision
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    scaler = LossScaler(kind)

    def step() -> float:
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with autocast(kind, device):
            loss = loss_of(ids.to(device, non_blocking=True))
        (loss * scaler.scale).backward()
        laps.append(time.perf_counter() - begin)
        torch.nn.utils.clip_grad_norm_(model.parameters(), scaler.scale)
        optimizer.step()
        return float(loss.detach())

    return step


def _their_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return cast(Tensor, model(input_ids=ids, labels=ids, use_cache=False).loss)


def _loss_of_logits(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def check_transformers(name: str) -> float:
    """The error of ours against transformers' logits with the same weights, of a Mamba; PlaitError if too large.

    Two layers over a few words; a Transformer's weights lie otherwise there, and its row is not checked.
    """
    family, _ = split_name(name)
    if family == "transformer":
        return 0.0
    torch.manual_seed(0)
    ours = Model(model_config(name, layers=CHECKED_LAYERS, vocabulary=CHECKED_VOCABULARY)).eval()
    theirs: Any = _transformers(name, CHECKED_LAYERS, CHECKED_VOCABULARY).eval()
    weights = theirs.state_dict()
    for key, value in ours.state_dict().items():
        for mine, other in _THEIR_NAMES:
            key = key.replace(mine, other)
        weights[key].copy_(value)
    ids = torch.randint(CHECKED_VOCABULARY, (2, 20))
    with torch.no_grad(), exact_products():
        error = relative_error(ours(ids).logits, theirs(input_ids=ids).logits)
    require(f"{name}, the same weights in transformers", error, TOLERANCE)
    return error


_THEIR_NAMES = (
    ("embedding.tokens", "backbone.embeddings"),
    ("blocks.", "backbone.layers."),
    ("norm1", "norm"),
    ("final_norm", "backbone.norm_f"),
    ("head.unembedding", "lm_head"),
)


def _transformers(name: str, layers: int | None = None, vocabulary: int | None = None) -> nn.Module:
    package: Any = import_module("transformers")
    family, size = split_name(name)
    n_layer = layers or size.n_layer
    common = {
        "vocab_size": vocabulary or size.vocabulary,
        "hidden_size": size.d_model,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "mamba":
        config = package.MambaConfig(**common, num_hidden_layers=n_layer, state_size=16)
        return cast(nn.Module, package.MambaForCausalLM(config))
    if family == "mamba2":
        config = package.Mamba2Config(
            **common,
            num_hidden_layers=n_layer,
            state_size=128,
            head_dim=64,
            num_heads=2 * size.d_model // 64,
            n_groups=1,
        )
        return cast(nn.Module, package.Mamba2ForCausalLM(config))
    width = -(-8 * size.d_model // (3 * 64)) * 64
    config = package.LlamaConfig(
        **common,
        num_hidden_layers=n_layer // 2,
        num_attention_heads=max(1, size.d_model // 64),
        intermediate_size=width,
    )
    return cast(nn.Module, package.LlamaForCausalLM(config))


def _mamba_ssm(name: str, dtype: torch.dtype) -> nn.Module:
    family, size = split_name(name)
    config: Any = import_module("mamba_ssm.models.config_mamba").MambaConfig(
        d_model=size.d_model,
        n_layer=size.n_layer,
        vocab_size=size.vocabulary,
        ssm_cfg={"layer": "Mamba2" if family == "mamba2" else "Mamba1"},
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=16,
        tie_embeddings=True,
    )
    model: Any = import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel
    return cast(nn.Module, model(config, dtype=dtype))
