"""Model Foundry's YAML loads as printed and says the same in our schema; what cannot be done is named."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import pytest

from plait.config.errors import ConfigError
from plait.config.load import config_yaml, load_config
from plait.config.originals import recognise, translate
from plait.config.recipes import preset_names, recipe_names
from plait.config.schema import Config

PRINTED = Path(__file__).parents[2] / "fixtures" / "foundry_configs"
MAMBA = {"d_model": 24, "n_layers": 3}
TRANSFORMER = {
    "layers": 2,
    "embedding_size": 24,
    "hidden_size": 24,
    "intermediate_hidden_size": 40,
    "attention_heads": 3,
    "activation_function": "gelu",
    "dropout": 0.2,
    "attention_dropout": 0.3,
}
RNN = {"embedding_size": 12, "hidden_size": 16, "num_layers": 2, "dropout": 0.1}


def run(architecture: str = "mamba", section: dict[str, Any] | None = None, **sections: Any) -> Config:
    """An experiment with these sections, loaded as ours."""
    return load_config(experiment(architecture, section, **sections))


def experiment(
    architecture: str = "mamba", section: dict[str, Any] | None = None, **sections: Any
) -> dict[str, Any]:
    name = {"mamba": "mamba", "gpt2": "transformer", "bert": "transformer"}.get(architecture, "rnn")
    usual = {"mamba": MAMBA, "transformer": TRANSFORMER, "rnn": RNN}[name]
    return {"model": {"architecture": architecture, name: usual if section is None else section}, **sections}


def kinds(config: Config) -> list[str]:
    return [layer.kind for layer in config.model.layers()]


def test_the_tiny_yaml_as_printed() -> None:
    config = load_config(PRINTED / "test_mamba_tiny.yaml")
    assert config.experiment_name == "test_mamba_tiny"
    assert config.run_folder == "runs/test_mamba_tiny"
    model, training = config.model, config.training
    assert kinds(config) == ["mamba"] * 4 and model.d_model == 256
    options = model.layers()[0].options.model_dump()
    assert {name: options[name] for name in ("d_state", "d_conv", "expand")} == {
        "d_state": 16,
        "d_conv": 4,
        "expand": 2,
    }
    block = model.layers()[0].block
    assert (block.norm.kind, block.norm.place, block.mlp.kind, block.residual.kind) == (
        "layer",
        "pre",
        "none",
        "add",
    )
    assert block.dropout == 0.1 and model.embedding.dropout == 0.0
    assert model.final_norm.kind == "layer" and model.head.tie and model.causal
    assert (training.objective, training.lr, training.grad_clip) == ("causal_lm", 1e-4, 1.0)
    assert (training.precision, training.seed, training.optimizer) == ("fp32", 42, "adamw")
    assert (training.schedule, training.warmup, training.min_lr_ratio) == ("linear", 0.1, 0.0)
    assert (training.betas, training.eps, training.weight_decay) == ((0.9, 0.999), 1e-8, 0.01)
    assert (config.tokenizer.type, config.tokenizer.vocab_size) == ("sentencepiece", 5000)
    assert config.data.validation_fraction == 0.0


def test_the_medium_yaml_as_printed() -> None:
    config = load_config(PRINTED / "mamba_medium.yaml")
    assert kinds(config) == ["mamba"] * 24 and config.model.d_model == 768 and config.model.dropout == 0.1
    assert config.data.sequence_length == 2048
    training = config.training
    assert training.micro_batch_tokens == 16 * 2048
    assert training.batch_tokens == 4 * 16 * 2048  # four accumulations: a step is an update of the weights
    assert (training.precision, training.grad_clip, training.lr) == ("bf16", 1.0, 1e-4)


@pytest.mark.parametrize("name", ["test_mamba_tiny", "mamba_medium"])
def test_what_they_become_runs_again(name: str, tmp_path: Path) -> None:
    config = load_config(PRINTED / f"{name}.yaml", ["--model.d_model=16", "--training.steps=3"])
    assert config.model.d_model == 16 and config.training.steps == 3 and config.training.epochs is None
    (tmp_path / "again.yaml").write_text(config_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("name", ["test_mamba_tiny", "mamba_medium"])
def test_the_shipped_files_are_the_printed_ones(name: str) -> None:
    with as_file(files("plait.compat.foundry") / "configs" / f"{name}.yaml") as shipped:
        assert load_config(shipped) == load_config(PRINTED / f"{name}.yaml")


def test_no_config_of_ours_is_taken_for_an_original() -> None:
    for name in (*recipe_names(), *preset_names()):
        assert recognise(load_config(name).to_dict()) is None
        assert translate(load_config(name).to_dict()) == load_config(name).to_dict()
    assert recognise({"model": {"architecture": "mamba"}}) == "foundry"
    assert recognise({"model": "architecture"}) is None


def test_every_other_field_does_what_it_says() -> None:
    config = run(
        experiment_name="all",
        random_seed=7,
        data={
            "source_corpus": "raw",
            "training_corpus": "text",
            "test_corpus": "held",
            "batch_size": 3,
            "max_sequence_length": 64,
        },
        tokenizer={"output_dir": "tok", "vocab_size": 300, "tokenizer_type": "bpe"},
        training={
            "output_dir": "models/all",
            "batch_size": 3,
            "learning_rate": 2e-4,
            "adam_beta1": 0.8,
            "adam_beta2": 0.95,
            "adam_epsilon": 1e-6,
            "warmup_steps": 5,
            "train_steps": 50,
            "epochs": 9,
            "objective": "masked_lm",
            "mlm_probability": 0.3,
            "gradient_accumulation_steps": 2,
            "use_tf32": False,
            "use_gradient_checkpointing": True,
            "checkpoint_schedule": [1, 5, 25],
            "auto_generate_checkpoints": True,
        },
        logging={"log_metrics_every_n_steps": 4, "wandb_project": "unused without use_wandb"},
        dataset_manipulation=[{"type": "lemmatize_verbs", "input_path": "raw", "output_path": "text"}],
    )
    data, training = config.data, config.training
    assert (data.train, data.validation, data.sequence_length) == ("text", "held", 64)
    assert (config.tokenizer.type, config.tokenizer.path, config.tokenizer.vocab_size) == ("bpe", "tok", 300)
    assert config.run_folder == "models/all" and training.seed == 7 and training.log_every == 4
    assert (training.batch_tokens, training.micro_batch_tokens) == (2 * 3 * 64, 3 * 64)
    assert (training.lr, training.betas, training.eps, training.grad_clip) == (2e-4, (0.8, 0.95), 1e-6, None)
    assert (training.warmup, training.steps, training.epochs) == (
        5,
        50,
        None,
    )  # the number of steps is what counts
    assert (training.objective, training.mlm_probability) == ("masked_lm", 0.3)
    assert config.model.head.kind == "masked_lm" and config.model.causal
    assert (training.tf32, training.activation_checkpointing) == (False, "block")
    assert training.checkpoint_schedule.steps == [1, 5, 25] and training.checkpoint_every == 0
    assert not training.checkpoint_schedule.by_epoch


def test_the_source_is_trained_on_where_nothing_else_is_named() -> None:
    assert run(data={"source_corpus": "raw"}).data.train == "raw"


def test_checkpoints_by_epochs() -> None:
    names = {
        "first_epoch_checkpoints": 7,
        "subsequent_epochs_spacing": "linear",
        "log_base": 3,
        "linear_interval": 40,
        "min_checkpoint_interval": 20,
        "min_checkpoints_per_epoch": 2,
    }
    training = run(training={"epochs": 4, "auto_generate_checkpoints": True, **names}).training
    schedule = training.checkpoint_schedule
    assert training.epochs == 4 and training.checkpoint_every == 0
    assert (schedule.first_epoch, schedule.later_epochs, schedule.base) == (7, "linear", 3)
    assert (schedule.interval, schedule.min_interval, schedule.min_per_epoch) == (40, 20, 2)
    assert schedule.spacing == "none" and not schedule.steps
    usual = run(training={"epochs": 4, "auto_generate_checkpoints": True}).training.checkpoint_schedule
    assert (usual.first_epoch, usual.later_epochs, usual.base) == (20, "log", 2)
    assert (usual.interval, usual.min_interval, usual.min_per_epoch) == (None, 100, 5)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_transformers(architecture: str) -> None:
    objective = "masked_lm" if architecture == "bert" else "causal_lm"
    section = {**TRANSFORMER, "activation_function": "GELU"}
    config = run(
        architecture,
        section,
        training={"objective": objective},
        data={"training_corpus": "t", "max_sequence_length": 77},
    )
    model = config.model
    assert kinds(config) == ["attention"] * 2 and model.vocab_size is None
    attention = model.layers()[0].options.model_dump()
    assert (attention["n_head"], attention["attn_dropout"], attention["rope"]) == (3, 0.3, False)
    assert (model.mlp.kind, model.mlp.width, model.mlp.bias) == ("gelu", 40, True)
    assert model.dropout == model.embedding.dropout == 0.2
    assert (model.embedding.position, model.embedding.max_positions) == ("learned", 77)
    assert model.causal == (architecture == "gpt2") and model.head.tie
    if architecture == "bert":
        assert (model.embedding.token_types, model.head.kind, model.norm.place) == (2, "masked_lm", "post")
        assert (model.head.transform, model.head.bias) == ("gelu", True)
        values = experiment("bert", training={"objective": "masked_lm"})
        values["model"]["bert"] = {"type_vocab_size": 5, "pooler_type": "first"}
        assert load_config(values).model.embedding.token_types == 5
    tanh = run(
        architecture, {**TRANSFORMER, "activation_function": "gelu_new"}, training={"objective": objective}
    )
    assert tanh.model.mlp.kind == "gelu_tanh"


@pytest.mark.parametrize("architecture", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("two_way", [False, True])
def test_recurrent(architecture: str, two_way: bool) -> None:
    objective = "masked_lm" if two_way else "causal_lm"
    config = run(architecture, {**RNN, "bidirectional": two_way}, training={"objective": objective})
    model = config.model
    assert kinds(config) == [architecture] * 2
    options = model.layers()[0].options.model_dump()
    assert (options["d_hidden"], options["bidirectional"]) == (16, two_way)
    assert model.embedding.width == 12 and model.dropout == 0.1
    assert (model.head.kind, model.head.tie, model.head.bias) == (
        "masked_lm" if two_way else "lm",
        False,
        True,
    )
    assert model.layers()[0].block.norm.kind == "none" and model.final_norm.kind == "none"


def test_characters_take_all_unless_told() -> None:
    assert run(tokenizer={"tokenizer_type": "character"}).tokenizer.vocab_size is None
    assert run(tokenizer={"tokenizer_type": "character", "vocab_size": 60}).tokenizer.vocab_size == 60


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        (
            "sentencepiece",
            {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        ),
        ("wordpiece", {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}),
    ],
)
def test_special_tokens_that_play_their_role_anyway(kind: str, tokens: dict[str, str]) -> None:
    config = run(tokenizer={"tokenizer_type": kind, "special_tokens": tokens})
    assert config.tokenizer.type == kind


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        experiment(data={"batch_size": 2}, training={"batch_size": 3}),
        r"data: batch_size is 2 under data and 3",
    ),
    ({"model": {"architecture": "mamba"}}, r"model\.mamba: .*requires 'mamba' configuration"),
    ({"model": {"architecture": "lstm", "mamba": MAMBA}}, r"model\.rnn: .*requires 'rnn' configuration"),
    ({"model": {"architecture": "gpt"}}, r"model\.architecture: .*gpt2.*did you mean 'gpt2'"),
    (experiment(section={"d_model": 0, "n_layers": 2}), r"model\.mamba\.d_model: .*greater than 0"),
    (experiment(section={"d_model": 8}), r"model\.mamba\.n_layers"),
    (experiment(section={**MAMBA, "dropout": 1.0}), r"model\.mamba\.dropout: .*less than 1"),
    (
        experiment(section={**MAMBA, "d_stat": 4}),
        r"model\.mamba\.d_stat: unknown key.*did you mean 'd_state'",
    ),
    (experiment(trainin={}), r"trainin: unknown key"),
    (experiment("bert"), r"training\.objective: .*masked_lm"),
    (experiment("lstm", {**RNN, "bidirectional": True}), r"training\.objective: .*masked_lm"),
    (experiment("gru", {**RNN, "rnn_type": "lstm"}), r"model\.rnn\.rnn_type: .*gru"),
    (
        experiment("gpt2", {**TRANSFORMER, "hidden_size": 48}),
        r"model\.transformer: embedding_size 24 and hidden_size 48",
    ),
    (
        experiment("gpt2", {**TRANSFORMER, "activation_function": "relu"}),
        r"activation_function: expected one of gelu",
    ),
    (experiment(logging={"use_wandb": True}), r"logging\.use_wandb: .*metrics\.jsonl"),
    (experiment(logging={"profile_performance": True}), r"logging\.profile_performance"),
    (experiment(logging={"log_memory_every_n_steps": 7}), r"logging\.log_memory_every_n_steps"),
    (experiment(logging={"log_detailed_metrics_every_n_steps": 7}), r"logging\.log_detailed"),
    (experiment(logging={"max_errors_to_track": 7}), r"logging\.max_errors_to_track"),
    (experiment(logging={"dir": "elsewhere"}), r"logging\.dir: .*compat\.foundry\.cli run"),
    (experiment(logging={"console_level": "LOUD"}), r"logging\.console_level: .*DEBUG"),
    (experiment(training={"resume_from_checkpoint": True}), r"training\.resume_from_checkpoint: .*--resume"),
    (experiment(training={"checkpointing_strategy": "log"}), r"training\.checkpointing_strategy"),
    (experiment(training={"warmup_ratio": 1.0}), r"training\.warmup_ratio"),
    (experiment(training={"objective": "masked_lm", "mlm_probability": 0.0}), r"training\.mlm_probability"),
    (
        experiment(tokenizer={"special_tokens": {"bos_token": "<begin>"}}),
        r"tokenizer\.special_tokens\.bos_token: .*<s>",
    ),
    (experiment(tokenizer={"tokenizer_type": "words"}), r"tokenizer\.tokenizer_type"),
    (
        experiment(
            dataset_manipulation=[{"type": "x", "input_path": "a", "output_path": "b"}],
            data={"source_corpus": "a"},
        ),
        r"dataset_manipulation: .*training_corpus",
    ),
    (
        {"model": {"architecture": "mamba", "mamba": MAMBA, "rnn": RNN}},
        r"model\.rnn: the architecture is mamba",
    ),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_is_wrong_or_not_there_is_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(values)
    assert "\n" not in str(caught.value)


def test_a_file_is_named_before_what_is_wrong_in_it(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text('model: {architecture: "mamba"}\n')
    with pytest.raises(ConfigError, match=r"broken\.yaml: model\.mamba"):
        load_config(path)
    path.write_text((PRINTED / "test_mamba_tiny.yaml").read_text())
    with pytest.raises(ConfigError, match=r"--model\.n_layers: .*did you mean"):
        load_config(path, ["--model.n_layers=2"])  # an override is in our own names
