"""Model Foundry's architectures side by side, and one of one's own through the one trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plait
from plait.compat.foundry.architectures import (
    MODEL_REGISTRY,
    BaseLanguageModel,
    BERTModel,
    GPT2Model,
    LSTMModel,
    MambaModel,
    ModelOutput,
    RNNLanguageModel,
    create_model_from_config,
    register_architecture,
)
from plait.compat.foundry.config import ExperimentConfig
from plait.compat.foundry.trainer import Trainer
from plait.config import table
from plait.config.errors import BuildError, CheckpointError, ConfigError
from plait.config.originals import foundry_schema
from plait.mixers.contract import Layout
from plait.mixers.mamba import Mamba
from tests.compat.foundry_models import (
    CLASSES,
    MAMBA,
    TRANSFORMER,
    V,
    architectures,
    drawn,
    experiment,
    make,
    shrunk,
    tokens,
)
from tests.invariants import redraw, rms


@pytest.fixture(autouse=True)
def _on_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- all architectures -----------------------------------------------------------------------------------------------


@architectures
@torch.no_grad()
def test_every_architecture_is_made_of_its_config(architecture: str) -> None:
    model = drawn(architecture)
    assert type(model) is CLASSES[architecture] and model.model_type == architecture
    assert model.supports_generation is (architecture != "bert")
    ids = tokens()
    output = model(ids, attention_mask=torch.ones_like(ids), labels=ids)
    if model.supports_generation:
        wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    else:
        wanted = F.cross_entropy(output.logits.flatten(0, 1), ids.flatten())
    assert abs(float(output.loss - wanted)) < 1e-5
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % V
    moved = rms(model(later).logits[:, :-1], output.logits[:, :-1])
    assert (moved == 0.0) is model.supports_generation, "what generates looks only back"


@architectures
def test_every_architecture_resizes_and_stays_tied(architecture: str) -> None:
    model = drawn(architecture)
    before = model.embedding.weight.detach().clone()
    tied = model.lm_head.weight is model.embedding.weight
    assert tied is (architecture in ("gpt2", "bert", "mamba"))
    with torch.no_grad():
        logits = model(tokens()).logits
        model.resize_token_embeddings(V)
        assert torch.equal(model(tokens()).logits, logits)
        for size in (V + 14, V - 20):
            model.resize_token_embeddings(size)
            kept = min(V, size)
            assert model.vocab_size == model.get_input_embeddings().num_embeddings == size
            assert torch.equal(model.embedding.weight[:kept], before[:kept])
            assert (model.lm_head.weight is model.embedding.weight) is tied
            ids = tokens(vocab=kept)
            wanted = drawn(architecture)(ids).logits
            assert rms(model(ids).logits[..., :kept], wanted[..., :kept]) < 1e-5
    ids = tokens(vocab=V - 20)
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (model.lm_head.weight is model.embedding.weight) is tied, "a step parts what was tied"
    assert not torch.equal(model.embedding.weight[: V - 20], before[: V - 20])


@architectures
@torch.no_grad()
def test_every_architecture_is_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    model, ids = drawn(architecture), tokens()
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model_type.txt").read_text() == architecture
    loaded = CLASSES[architecture].from_pretrained(tmp_path / "model")
    assert not loaded.training and loaded.model_type == architecture
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert torch.equal(plait.load(tmp_path / "model")(ids).logits, model(ids).logits)
    other = MambaModel if architecture != "mamba" else GPT2Model
    with pytest.raises(CheckpointError, match=f"this is a {architecture} model"):
        other.from_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match="vocab_size"):
        CLASSES[architecture].from_pretrained(tmp_path / "model", vocab_size=V)


def test_a_checkpoint_of_foundry_loads_as_its_class() -> None:
    fixtures = Path(__file__).parents[1] / "fixtures" / "foundry_transformers"
    model = GPT2Model.from_pretrained(fixtures / "gpt2")
    assert model.model_type == "gpt2" and model.vocab_size == 64


def test_constructors_of_the_other_architectures() -> None:
    assert GPT2Model(V, TRANSFORMER, max_sequence_length=16).config.embedding.max_positions == 16
    bert = BERTModel(V, TRANSFORMER, type_vocab_size=3)
    assert bert.config.embedding.token_types == 3
    types = torch.full((2, 10), 2)
    bert.eval()
    redraw(bert.model)
    with torch.no_grad():
        assert rms(bert(tokens(), token_type_ids=types).logits, bert(tokens()).logits) > 1e-3
    gru = RNNLanguageModel(V, 20, 24, 2, rnn_type="gru", bidirectional=True)
    assert (gru.model_type, gru.bidirectional, gru.supports_generation) == ("gru", True, False)
    assert (gru.embedding_size, gru.hidden_size, gru.num_layers) == (20, 24, 2)
    assert LSTMModel(V, 20, 24, 2).rnn_type == "lstm"
    with pytest.raises(ValueError, match="'lstm'"):
        LSTMModel(V, 20, 24, 2, rnn_type="gru")


def test_recurrent_networks_differ_in_their_gates() -> None:
    counts = [make(architecture).get_parameter_count() for architecture in ("lstm", "gru", "rnn")]
    gates = sum(24 * (d_in + 24) + 2 * 24 for d_in in (20, 24))
    around = V * 20 + V * 24 + V
    assert counts == [around + n * gates for n in (4, 3, 1)]


def test_gradient_checkpointing_changes_no_number() -> None:
    gradients = []
    for recompute in (False, True):
        model, ids = drawn(), tokens()
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(ids, labels=ids).loss.backward()
        gradients.append(model.embedding.weight.grad)
    assert torch.equal(*gradients)


@torch.no_grad()
def test_a_face_generates() -> None:
    model, ids = drawn(), tokens(1, 5)
    made = model.generate(ids, max_new_tokens=4, temperature=0)
    longer = torch.as_tensor(made).reshape(1, -1)
    full = model(longer).logits.argmax(-1)
    assert longer[0, 5:].tolist() == full[0, 4:-1].tolist()


# --- an architecture of one's own ------------------------------------------------------------------------------------


class MambaSSM(nn.Module):
    """Where the plan imports mamba_ssm's module: Plait's, which has the same weights."""

    def __init__(self, d_model: int, d_state: int, d_conv: int, expand: int) -> None:
        super().__init__()
        self.mixer = Mamba(Mamba.options_class(d_state=d_state, d_conv=d_conv, expand=expand), d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, Layout.dense(*x.shape[:2], device=x.device))[0]


class PlannedMamba(BaseLanguageModel):
    """The class that the plan draws: no norm before the layers, dropout of the whole stream, a tied output."""

    def __init__(
        self, vocab_size: int, d_model: int, n_layers: int, d_state: int = 16, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.layers = nn.ModuleList(MambaSSM(d_model, d_state, 4, 2) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        self.lm_head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = self.dropout(layer(x) + x)
        logits = self.lm_head(self.norm(x))
        loss = None
        if labels is not None:  # unshifted, as the plan has it; Plait does not ask for it
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return ModelOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def resize_token_embeddings(self, new_num_tokens: int) -> None:
        raise BuildError("not needed here")

    @property
    def model_type(self) -> str:
        return "planned"

    @property
    def supports_generation(self) -> bool:
        return True

    @classmethod
    def from_config(cls, config: ExperimentConfig) -> PlannedMamba:
        mamba = config.model.mamba
        assert mamba is not None
        return cls(config.tokenizer.vocab_size, mamba.d_model, mamba.n_layers, mamba.d_state, mamba.dropout)


class Wrong(PlannedMamba):
    """Gives logits of another vocabulary."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> ModelOutput:
        logits = super().forward(input_ids).logits
        assert logits is not None
        return ModelOutput(logits=logits[..., :-1])


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registered for the length of a test."""
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))
    registered = ("planned", "wrong")
    register_architecture("planned")(PlannedMamba)
    register_architecture("wrong")(Wrong)
    yield
    for name in registered:
        del MODEL_REGISTRY[name]
        del foundry_schema.OWN_ARCHITECTURES[name]


@pytest.mark.usefixtures("own")
def test_an_architecture_of_ones_own_trains_saves_resumes_and_generates(tmp_path: Path) -> None:
    config = shrunk(tmp_path, "mamba")
    config = config.replace(model={"architecture": "planned", "mamba": {**MAMBA, "dropout": 0.0}})
    assert isinstance(create_model_from_config(config), PlannedMamba)
    assert (config.model.layers, config.model.hidden_size, config.model.dropout) == (2, 24, 0.0)
    trainer = Trainer(config, tmp_path)
    result = trainer.train()
    model, tokenizer = trainer.model, trainer.tokenizer
    assert isinstance(model, PlannedMamba) and model.embedding.num_embeddings == tokenizer.vocab_size
    assert model.lm_head.weight is model.embedding.weight
    guessing = math.log(tokenizer.vocab_size)
    assert 0.02 < result.loss < 0.85 * guessing, "the loss is that of the next token, shifted once"

    longer = config.replace(training=config.training.replace(train_steps=33, resume_from_checkpoint=True))
    assert Trainer(longer, tmp_path).train().step == 33

    loaded = plait.load(result.run)
    ids = torch.tensor([tokenizer.encode("the quick brown fox")])
    inner: Any = loaded.blocks[0].mixer
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, inner.module.eval()(ids).logits)
        padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], 1)
        mask = torch.cat([torch.zeros(1, 5), torch.ones(1, ids.shape[1])], 1)
        assert rms(loaded(padded, attention_mask=mask).logits[:, 5:], loaded(ids).logits) < 1e-5
    parts = ids[:, :12].split([5, 7], 1)
    bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32)  # the middle one is empty
    with torch.no_grad():
        packed = loaded(torch.cat(parts, 1), cu_seqlens=bounds).logits
        assert rms(packed, torch.cat([loaded(part).logits for part in parts], 1)) < 1e-5
        assert loaded(ids[:, :0]).logits.shape == (1, 0, tokenizer.vocab_size)
    with pytest.warns(UserWarning, match="keeps no state"):
        text = loaded.generate("the quick ", max_new_tokens=8, temperature=0)
    assert isinstance(text, str) and len(text) >= 8
    with pytest.raises(BuildError, match="logits are the last layer's own"):
        loaded.resize_token_embeddings(3)


@pytest.mark.usefixtures("own")
def test_an_architecture_that_does_not_keep_to_the_vocabulary(tmp_path: Path) -> None:
    config = shrunk(tmp_path, "mamba").replace(model={"architecture": "wrong", "mamba": MAMBA})
    with pytest.raises(BuildError, match=r"Wrong was given ids .* and returned logits"):
        Trainer(config, tmp_path).train()


@pytest.mark.usefixtures("own")
def test_a_model_of_ones_own_saves_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = PlannedMamba(V, 16, 2).eval()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model_type.txt").read_text() == "planned"
    loaded = PlannedMamba.from_pretrained(tmp_path, vocab_size=V, d_model=16, n_layers=2)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    assert model.get_parameter_count() == sum(p.numel() for p in model.parameters())
    with pytest.raises(CheckpointError, match="another model"):
        PlannedMamba.from_pretrained(tmp_path, vocab_size=V, d_model=8, n_layers=2)


def test_an_incomplete_architecture_is_refused() -> None:
    class Half(BaseLanguageModel):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="from_config"):
        BaseLanguageModel.from_config(experiment())
    with pytest.raises(ConfigError, match="expected one of"):
        experiment("planned")


@torch.no_grad()
def test_a_head_without_an_output_map() -> None:
    values = {"d_model": 8, "n_layer": 1, "pattern": "lstm", "head": {"project": False, "tie": False}}
    model = plait.build({**values, "vocab_size": 8}).eval()
    redraw(model)
    output = model(tokens(vocab=8))
    assert torch.equal(output.logits, output.hidden) and model.parameter_counts()["head"] == 0
    with pytest.raises(BuildError, match="last layer is 8 wide and the vocabulary has 9 rows"):
        plait.build({**values, "vocab_size": 9})
