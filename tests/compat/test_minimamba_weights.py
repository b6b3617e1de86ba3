"""MiniMamba's trained weights in Plait's models: the original's numbers, and what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from plait.compat.minimamba import (
    InferenceParams,
    MambaClassificationConfig,
    MambaForCausalLM,
    MambaForFeatureExtraction,
    MambaForSequenceClassification,
    MambaLMConfig,
)
from plait.config.errors import CheckpointError
from tests.compat.minimamba_models import (
    CASES,
    FEATURES,
    FIXTURES,
    LOGITS,
    LOSS,
    Shift,
    V,
    language_models,
    saved_values,
)

pytestmark = pytest.mark.usefixtures("own_table")


@language_models
def test_a_trained_language_model(case: str, caplog: pytest.LogCaptureFixture) -> None:
    config = MambaLMConfig.from_dict(CASES[case]["config"])
    model = MambaForCausalLM(config)
    with caplog.at_level(logging.WARNING):
        model.load_state_dict(load_file(FIXTURES / f"{case}_state_dict.safetensors"))
    assert "gate without SiLU" in caplog.text
    true = load_file(FIXTURES / f"{case}.safetensors")
    out = model(true["input_ids"], labels=true["labels"])
    assert (out["logits"] - true["logits"]).abs().max() <= LOGITS
    assert (out["loss"] - true["loss"]).abs() <= LOSS
    assert (model(true["input_ids_long"]) - true["logits_long"]).abs().max() <= LOGITS
    params = InferenceParams(max_batch_size=2)
    ids = true["input_ids"]
    parts = [model(ids[:, a:b], params) for a, b in ((0, 7), (7, 8), (8, ids.shape[1]))]
    assert (torch.cat(parts, 1) - true["logits"]).abs().max() <= LOGITS
    assert model.generate(ids, max_new_tokens=20, temperature=3.0).max() < V  # never the padded ids
    # it is saved under Plait's names and goes on as what it is
    again = MambaForCausalLM.from_original(load_file(FIXTURES / f"{case}_state_dict.safetensors"), config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids), model(ids)) and not again.training


def test_trained_weights_keep_device_dtype_and_checkpointing() -> None:
    given = {**CASES["lm"]["config"], "dtype": "bfloat16"}
    model = MambaForCausalLM(MambaLMConfig.from_dict(given))
    model.gradient_checkpointing_enable()
    model.load_state_dict(load_file(FIXTURES / "lm_state_dict.safetensors"))
    kept = {n for n, p in model.model.named_parameters() if p.dtype == torch.float32}
    assert "blocks.0.mixer.A_log" in kept and "blocks.0.mixer.in_proj.weight" not in kept
    assert model.training
    counts = [saved_values(m) for m in (model, MambaForCausalLM(MambaLMConfig.from_dict(given)))]
    assert counts[0] < 0.5 * counts[1]


def test_a_trained_classifier_and_features(tmp_path: Path) -> None:
    true = load_file(FIXTURES / "classification.safetensors")
    tensors = load_file(FIXTURES / "classification_state_dict.safetensors")
    for pooling in ("last", "mean", "max"):
        config = MambaClassificationConfig.from_dict(
            {**CASES["classification"]["config"], "pooling_strategy": pooling}
        )
        model = MambaForSequenceClassification.from_original(tensors, config)
        assert (model(true["input_ids"]) - true[f"logits_{pooling}"]).abs().max() <= LOGITS
        masked = model(true["input_ids"], attention_mask=true["attention_mask"])
        assert (masked - true[f"logits_{pooling}_masked"]).abs().max() <= LOGITS
    true = load_file(FIXTURES / "features.safetensors")
    save_file(load_file(FIXTURES / "features_state_dict.safetensors"), tmp_path / "model.safetensors")
    MambaLMConfig.from_dict(CASES["features"]["config"]).save_to_json(tmp_path / "config.json")

    class Features(MambaForFeatureExtraction):
        config_class = MambaLMConfig

    for path in (tmp_path, tmp_path / "model.safetensors"):  # the configuration lies beside the weights
        features = Features.from_original(path)
        assert (features(true["input_ids"]) - true["features_from_ids"]).abs().max() <= FEATURES
        found = features(true["input_embeddings"])
        assert (found - true["features_from_embeddings"]).abs().max() <= FEATURES


def test_weights_that_do_not_fit_are_refused() -> None:
    lm = load_file(FIXTURES / "lm_state_dict.safetensors")
    config = MambaLMConfig.from_dict(CASES["lm"]["config"])
    with pytest.raises(CheckpointError, match="a model for lm, which MambaForFeatureExtraction is not"):
        MambaForFeatureExtraction(config).load_state_dict(lm)
    with pytest.raises(CheckpointError, match=r"mixer\.D is missing"):
        MambaForCausalLM(config).load_state_dict({n: t for n, t in lm.items() if not n.endswith("0.mixer.D")})
    with pytest.raises(CheckpointError, match="without a mixer_cls"):
        MambaForCausalLM(config, mixer_cls=Shift).load_state_dict(lm)
    with pytest.raises(CheckpointError, match="its configuration are needed"):
        MambaForCausalLM.from_original(lm)
