"""Model Foundry's plan for Mamba, as its document prints it, under the changed import root; values, not shapes.

Registration, config classes, the Mamba model and its interface. Beside this file: all architectures and those of one's
own, collators and training, the commands and the printed YAML files from end to end.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plait.compat.foundry.architectures import (
    MODEL_REGISTRY,
    BaseLanguageModel,
    MambaModel,
    ModelOutput,
    create_model_from_config,
    get_registered_architectures,
    register_architecture,
)
from plait.compat.foundry.architectures.mamba import MAMBA_SSM_AVAILABLE
from plait.compat.foundry.config import MambaModelConfig, ModelConfig
from tests.compat.foundry_models import MAMBA, SECTIONS, V, drawn, experiment, make, tokens
from tests.invariants import rms

# --- registration and config -----------------------------------------------------------------------------------------


def test_mamba_is_registered() -> None:
    assert MODEL_REGISTRY["mamba"] is MambaModel
    assert sorted(get_registered_architectures()) == sorted(SECTIONS)


def test_registration_says_so_and_guards(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"'mamba' is already registered, as MambaModel"):
        register_architecture("mamba")(MambaModel)
    with pytest.raises(TypeError, match="must inherit from BaseLanguageModel"):
        register_architecture("linear")(nn.Linear)
    assert "linear" not in MODEL_REGISTRY
    caplog.set_level(logging.INFO)
    try:

        @register_architecture("another_mamba")
        class Another(MambaModel):
            pass

        assert "Registered architecture another_mamba: Another" in caplog.messages
    finally:
        MODEL_REGISTRY.pop("another_mamba", None)


def test_mamba_config_defaults_and_bounds() -> None:
    config = MambaModelConfig(d_model=768, n_layers=24)
    assert config.model_dump() == {
        "d_model": 768,
        "n_layers": 24,
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
        "dropout": 0.0,
    }
    for missing in ({"d_model": 8}, {"n_layers": 2}):
        with pytest.raises(ValueError):
            MambaModelConfig(**missing)
    good = {"d_model": 8, "n_layers": 2}
    for name in (*good, "d_state", "d_conv", "expand"):
        for wrong in (0, -1, 1.5):
            with pytest.raises(ValueError, match=name):
                MambaModelConfig(**{**good, name: wrong})
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout"):
            MambaModelConfig(**good, dropout=wrong)
    assert MambaModelConfig.model_fields["d_conv"].description == "Local convolution width"


def test_model_config_needs_the_section_of_its_architecture() -> None:
    with pytest.raises(ValueError, match="requires 'mamba' configuration"):
        ModelConfig(architecture="mamba")
    with pytest.raises(ValueError, match="requires 'transformer' configuration"):
        ModelConfig(architecture="gpt2", mamba=MAMBA)
    with pytest.raises(ValueError, match="expected one of gpt2, bert, lstm, rnn, gru, mamba"):
        ModelConfig(architecture="s4")
    config = ModelConfig(architecture="mamba", mamba=MAMBA)
    assert config.mamba == MambaModelConfig(**MAMBA)
    assert config.transformer is None and config.bert is None and config.rnn is None


# --- the Mamba model -------------------------------------------------------------------------------------------------


def test_mamba_is_made_of_the_config() -> None:
    model = MambaModel.from_config(experiment())
    assert isinstance(model, MambaModel) and isinstance(model, BaseLanguageModel)
    assert (model.vocab_size, model.d_model, model.n_layers) == (V, 24, 2)
    assert (model.d_state, model.d_conv, model.expand, model.dropout_prob) == (8, 4, 2, 0.1)
    assert isinstance(create_model_from_config(experiment()), MambaModel)
    with pytest.raises(ValueError, match="Expected 'mamba'"):
        MambaModel.from_config(experiment("gpt2"))


def test_mamba_constructor_as_printed() -> None:
    model = MambaModel(vocab_size=V, d_model=16, n_layers=3)
    assert (model.d_state, model.d_conv, model.expand, model.dropout_prob) == (16, 4, 2, 0.0)
    assert len(model.layers) == 3 and isinstance(model.norm, nn.LayerNorm)
    assert model.lm_head.weight is model.embedding.weight
    with pytest.raises(TypeError, match="d_stat"):
        MambaModel(vocab_size=V, d_model=16, n_layers=3, d_stat=4)  # type: ignore[call-arg]


def test_mamba_interface() -> None:
    model = make()
    assert model.model_type == "mamba" and model.supports_generation is True
    table_ = model.get_input_embeddings()
    assert isinstance(table_, nn.Embedding)
    assert (table_.num_embeddings, table_.embedding_dim) == (V, 24)


def test_mamba_counts_parameters_and_bytes() -> None:
    model = make()
    inner, rank, states, taps = 48, 2, 8, 4
    mixer = 2 * inner * 24 + inner * taps + inner + (rank + 2 * states) * inner + inner * rank + inner
    mixer += inner * states + inner + 24 * inner
    count = V * 24 + 2 * (2 * 24 + mixer) + 2 * 24
    assert model.get_parameter_count() == count
    assert model.get_memory_footprint() == {"parameters": 4 * count, "buffers": 0, "total": 4 * count}
    model.embedding.weight.requires_grad_(False)
    assert model.get_parameter_count() == count - V * 24


@torch.no_grad()
def test_mamba_forward_without_labels() -> None:
    model, ids = drawn(), tokens()
    output = model(ids)
    assert isinstance(output, ModelOutput) and output.loss is None and output.attentions is None
    assert output.logits.shape == (2, 10, V) and bool(torch.isfinite(output.logits).all())
    assert output["logits"] is output.logits and "loss" in output and "scores" not in output
    with pytest.raises(KeyError, match="scores"):
        output["scores"]
    # the logits are the last hidden states times the embedding, to which the output is tied
    assert rms(output.hidden_states @ model.embedding.weight.T, output.logits) < 1e-5


@torch.no_grad()
def test_mamba_loss_is_that_of_the_next_token() -> None:
    model, ids = drawn(), tokens()
    output = model(ids, labels=ids)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert output.loss.shape == () and abs(float(output.loss - wanted)) < 1e-5
    labels = ids.clone()
    labels[:, :4] = -100
    kept = F.cross_entropy(output.logits[:, 3:-1].flatten(0, 1), ids[:, 4:].flatten())
    assert abs(float(model(ids, labels=labels).loss - kept)) < 1e-5
    assert abs(float(kept - wanted)) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_mamba_mask_keeps_pads_out(side: str) -> None:
    model, ids = drawn(), tokens()
    mask = torch.ones_like(ids)
    mask[0, (slice(0, 3) if side == "left" else slice(7, None))] = 0
    real = mask.bool()
    masked = model(ids, attention_mask=mask).logits[0, real[0]]
    alone = model(ids[:1, real[0]]).logits[0]
    assert rms(masked, alone) < 1e-5
    if side == "left":
        assert rms(model(ids).logits[0, real[0]], alone) > 1e-3, "without a mask pads are text"


def test_mamba_backward_reaches_every_weight() -> None:
    model = drawn()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), name
        assert bool(torch.isfinite(parameter.grad).all()), name


@torch.no_grad()
def test_mamba_is_the_same_for_the_same_seed() -> None:
    ids = tokens()
    same, other = (make(seed=seed)(ids).logits for seed in (42, 43))
    torch.manual_seed(42)
    again = create_model_from_config(experiment())(ids).logits
    assert torch.equal(same, again) and not torch.equal(same, other)


@torch.no_grad()
def test_mamba_dropout_is_for_training() -> None:
    model, ids = drawn(), tokens()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert model.training and not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("rows", "length"), [(2, 1), (1, 10), (2, 256)], ids=["one token", "one row", "256 tokens"]
)
@torch.no_grad()
def test_mamba_at_other_sizes(rows: int, length: int) -> None:
    model, ids = drawn(), tokens(rows, length)
    output = model(ids, labels=ids)
    assert output.logits.shape == (rows, length, V)
    if length == 1:
        assert float(output.loss) == 0.0, "one token has no next one"
    else:
        wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert abs(float(output.loss - wanted)) < 1e-5
        rest = tokens(rows, length - 1, seed=9)
        changed = model(torch.cat([rest, ids[:, -1:]], 1)).logits  # the last token alone stays
        assert rms(changed[:, -1], output.logits[:, -1]) > 1e-3, "it remembers nothing"


def test_which_mamba_runs_makes_no_difference() -> None:
    """There is one module, on every device: the weights have the shapes of mamba-ssm's."""
    assert MAMBA_SSM_AVAILABLE is False
    mixer: Any = make().layers[0].mixer
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes["x_proj.weight"] == (2 + 2 * 8, 48) and shapes["dt_proj.weight"] == (48, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestMambaOnCuda:
    """The document's GPU tests: forward, backward, long sequences, a step of training, memory."""

    def test_mamba_forward_pass_cuda(self) -> None:
        model, ids = drawn(), tokens(2, 70)
        there = model.cuda()(ids.cuda()).logits
        assert there.is_cuda and rms(there.cpu(), drawn()(ids).logits) < 1e-3

    def test_mamba_backward_pass_cuda(self) -> None:
        ids = tokens(2, 70)
        gradients = []
        for device in ("cpu", "cuda"):
            model = drawn().to(device)
            model(ids.to(device), labels=ids.to(device)).loss.backward()
            gradients.append(model.embedding.weight.grad.cpu())
        assert rms(gradients[1], gradients[0]) < 1e-3

    def test_mamba_long_sequence_cuda(self) -> None:
        ids = tokens(1, 2048)
        with torch.no_grad():
            there = drawn().cuda()(ids.cuda()).logits
        assert bool(torch.isfinite(there).all())
        with torch.no_grad():
            assert rms(there.cpu(), drawn()(ids).logits) < 1e-3

    def test_mamba_training_step_cuda(self) -> None:
        model, ids = make().cuda(), tokens(4, 32).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for _ in range(40):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        assert losses[-1] < 0.7 * losses[0]

    def test_mamba_memory_cuda(self) -> None:
        """Activations grow with the length, not with its square."""
        model = make().cuda()

        def peak(length: int) -> int:
            ids = tokens(1, length).cuda()
            model(ids, labels=ids).loss.backward()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids, labels=ids).loss.backward()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before

        assert peak(8192) < 5 * peak(2048)
