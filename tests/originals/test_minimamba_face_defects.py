"""Defects of MiniMamba's models that must not come back in their faces, numbered as in the survey of its defects."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.compat.minimamba import (
    InferenceParams,
    MambaClassificationConfig,
    MambaForCausalLM,
    MambaForSequenceClassification,
    MambaLMConfig,
)
from plait.config.errors import ConfigError
from plait.config.training import TrainingConfig
from plait.nn.roles import parameter_roles
from plait.training.optimizers import Optimizer
from tests.invariants import redraw, rms

SMALL: dict[str, Any] = {"d_model": 24, "n_layer": 2, "d_state": 6, "vocab_size": 51}


def language_model(**more: Any) -> MambaForCausalLM:
    model = MambaForCausalLM(MambaLMConfig(**SMALL, **more))
    redraw(model)
    return model


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(51, (rows, length), generator=torch.Generator().manual_seed(0))


def test_c2_a_base_config_can_be_spread_into_another() -> None:
    """There ``**base_config`` was a TypeError, though the document prints it."""
    config = MambaLMConfig(**SMALL)
    assert MambaLMConfig(**config) == config


def test_c3_cached_generation_runs_and_the_whole_prompt_counts() -> None:
    """There it crashed; any prompt after the first was cut to its last token, and the offset rose by one a call."""
    model, ids = language_model().eval(), ids_of(1, 9)
    params = InferenceParams()
    model(ids[:, :4], params)
    second = model(ids[:, 4:], params)
    assert params.seqlen_offset == 9 and second.shape[1] == 5
    assert rms(second, model(ids)[:, 4:]) < 1e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_c8_a_row_that_has_ended_stays_ended(use_cache: bool) -> None:
    """There it went on generating, and pad_token_id was of no effect."""
    model, ids = language_model().eval(), ids_of(6, 5)
    free = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use_cache)[:, 5:]
    end = int(free[0, 3])  # some row writes it early
    found = model.generate(
        ids, max_new_tokens=12, do_sample=False, eos_token_id=end, pad_token_id=7, use_cache=use_cache
    )[:, 5:]
    ended = 0
    for row, want in zip(found.tolist(), free.tolist(), strict=True):
        length = want.index(end) + 1 if end in want else len(want)
        ended += end in want
        assert row == (want[:length] + [7] * 12)[: len(row)]
    assert ended >= 1


def test_c8_temperature_zero_is_greedy_and_any_top_k_is_taken() -> None:
    """There it divided by zero, and raised for more than the vocabulary has."""
    model, ids = language_model().eval(), ids_of(2, 5)
    want = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids, max_new_tokens=1, temperature=0.0), want)
    assert model.generate(ids, max_new_tokens=3, top_k=10_000).shape == (2, 8)


def test_c8_generation_is_without_dropout_and_leaves_the_mode() -> None:
    model, ids = language_model(), ids_of(1, 5)
    for block in model.model.blocks:
        block.dropout.p = 0.9
    model.train()
    first = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(first, model.generate(ids, max_new_tokens=8, do_sample=False))
    assert all(module.training for module in model.modules())


def test_c9_the_vocabulary_is_a_field_of_classifiers() -> None:
    """There it was looked for and 32000 taken silently."""
    model = MambaForSequenceClassification(MambaClassificationConfig(**SMALL))
    assert model.embedding.vocab_size == 51
    labels = torch.tensor([1])
    assert model(ids_of(1, 4), labels=labels)["loss"].shape == ()


# What shows that a field is not ignored: a value of it, and what must then be so.
EFFECTS: dict[str, tuple[Any, Callable[[MambaForCausalLM], bool]]] = {
    "d_model": (32, lambda m: m.embedding.d_model == 32),
    "n_layer": (3, lambda m: len(m.backbone.layers) == 3),
    "d_state": (5, lambda m: m.backbone.layers[0].mixer.A_log.shape[1] == 5),
    "d_conv": (3, lambda m: m.backbone.layers[0].mixer.conv1d.kernel_size == (3,)),
    "expand": (3, lambda m: m.backbone.layers[0].mixer.d_inner == 72),
    "dt_rank": (7, lambda m: m.backbone.layers[0].mixer.dt_rank == 7),
    "dt_min": (0.09, lambda m: bool((_steps(m) > 0.0899).all())),
    "dt_max": (0.002, lambda m: bool((_steps(m) < 0.00201).all())),
    "dt_init": ("constant", lambda m: m.backbone.layers[0].mixer.dt_proj.weight.unique().numel() == 1),
    "dt_scale": (0.01, lambda m: bool((m.backbone.layers[0].mixer.dt_proj.weight.abs() < 0.01).all())),
    "dt_init_floor": (0.05, lambda m: bool((_steps(m) > 0.0499).all())),
    "conv_bias": (False, lambda m: m.backbone.layers[0].mixer.conv1d.bias is None),
    "bias": (True, lambda m: m.backbone.layers[0].mixer.in_proj.bias is not None),
    "norm_epsilon": (0.1, lambda m: m.backbone.norm.eps == 0.1),
    "rms_norm": (False, lambda m: isinstance(m.backbone.norm, torch.nn.LayerNorm)),
    "device": ("meta", lambda m: m.model.device.type == "meta"),
    "dtype": ("float64", lambda m: m.model.dtype == torch.float64),
    "vocab_size": (60, lambda m: m(ids_of(1, 2)).shape[-1] == 60),
    "pad_vocab_size_multiple": (100, lambda m: m.embedding.vocab_size == 100),
    "tie_embeddings": (False, lambda m: not m.lm_head.tie_weights),
}
ELSEWHERE = {"use_fast_path", "gradient_checkpointing"}  # tests/compat/test_minimamba_models.py


def _steps(model: MambaForCausalLM) -> Tensor:
    return torch.nn.functional.softplus(model.backbone.layers[1].mixer.dt_proj.bias)


@pytest.mark.parametrize("name", EFFECTS)
def test_c11_every_field_takes_effect(name: str) -> None:
    """There use_fast_path, device and dtype were of no effect, and gradient checkpointing was no field at all."""
    value, shows = EFFECTS[name]
    assert shows(MambaForCausalLM(MambaLMConfig(**{**SMALL, name: value})))
    assert not shows(MambaForCausalLM(MambaLMConfig(**SMALL)))


def test_c11_there_is_no_other_field() -> None:
    assert {field.name for field in fields(MambaLMConfig)} == set(EFFECTS) | ELSEWHERE
    with pytest.raises(ConfigError, match=r"no field 'use_fast_pth' \(did you mean 'use_fast_path'\?\)"):
        MambaLMConfig.from_dict(json.loads('{"use_fast_pth": true}'))


def test_c11_views_are_not_written_to() -> None:
    """There convolution states were changed in place while autograd held them."""
    model, ids = language_model(), ids_of(1, 6)
    params = InferenceParams()
    logits = model(ids, params)
    model(ids, params)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_c12_what_must_not_decay_does_not() -> None:
    """There weight decay took all parameters alike, A_log, D and the time steps' bias among them."""
    model = language_model(bias=True).model
    groups = Optimizer(model, TrainingConfig()).groups
    decayed = {name.split(".", 2)[-1] for name, group in groups.items() if group.weight_decay}
    assert decayed == {f"mixer.{n}.weight" for n in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    roles = parameter_roles(model)
    assert roles["blocks.0.mixer.A_log"].kind == "vector" and roles["blocks.0.mixer.A_log"].fp32
