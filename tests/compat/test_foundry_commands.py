"""Model Foundry's YAML from end to end: as printed and shrunk by overrides, and by the verbs of ``model-foundry``."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

import plait
from plait.cli import main as plait_main
from plait.compat.foundry.cli import main as foundry_main
from plait.compat.foundry.config import load_experiment
from plait.compat.foundry.trainer import run_config
from plait.config.load import load_config

FIXTURES = Path(__file__).parents[1] / "fixtures"
PRINTED = FIXTURES / "foundry_configs"
WORDS = "the quick brown fox jumps over the lazy dog and sleeps under trees"
TEXT = "\n".join(f"{WORDS} {number}" for number in range(150))
SMALL = (
    "--model.d_model=16",
    "--model.n_layer=2",
    "--model.mamba.d_state=4",
    "--data.sequence_length=32",
    "--training.batch_tokens=128",
    "--training.log_every=1",
    "--training.device=cpu",
    "--tokenizer.vocab_size=300",
)


class Ran(NamedTuple):
    status: int
    out: str
    err: str


def ran(main: Any, *words: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Ran(status, out.getvalue(), err.getvalue())


def run_plait(*words: object) -> Ran:
    return ran(plait_main, *words)


def foundry(*words: object) -> Ran:
    return ran(foundry_main, *words)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "held.txt").write_text(f"{WORDS} held out. " * 20)


def lines(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.mark.parametrize("name", ["test_mamba_tiny", "mamba_medium"])
def test_the_printed_yaml_trains_saves_resumes_and_generates(name: str, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    config = shutil.copy(PRINTED / f"{name}.yaml", tmp_path / "configs")
    small = [*SMALL, "--training.steps=4", "--data.train=text.txt"]
    if name == "mamba_medium":  # four micro-batches of a quarter each, in bfloat16, as it says
        small.append("--training.micro_batch_tokens=32")
    trained = run_plait("train", config, *small)
    assert trained.status == 0, trained
    run = Path("runs") / name
    losses = [line["loss"] for line in lines(run, "train")]
    assert len(losses) == 4 and all(torch.isfinite(torch.tensor(losses)))
    saved = load_config(run / "config.yaml")
    printed = load_config(config, small)
    resolved = printed.replace(model=printed.model.replace(vocab_size=saved.model.vocab_size))
    assert saved == resolved, "what was saved is not what was asked for"
    assert saved.training.precision == ("bf16" if name == "mamba_medium" else "fp32")
    assert [layer.kind for layer in saved.model.layers()] == ["mamba", "mamba"]

    again = run_plait("train", config, *small, "--training.steps=6", "--resume")
    assert again.status == 0, again
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4, 5, 6]
    model = plait.load(run)
    assert [block.kind for block in model.blocks] == ["mamba", "mamba"]
    assert model.tokenizer.type == "sentencepiece"
    written = run_plait("generate", run, "the quick", "--max-new-tokens=5", "--seed=1")
    assert written.status == 0 and written.out.strip(), written


def experiment(tmp_path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "experiment_name": "small",
        "data": {
            "source_corpus": "text.txt",
            "training_corpus": "text.txt",
            "test_corpus": "held.txt",
            "batch_size": 4,
            "max_sequence_length": 32,
        },
        "tokenizer": {"output_dir": "tok", "vocab_size": 400, "tokenizer_type": "bpe"},
        "model": {
            "architecture": "mamba",
            "mamba": {"d_model": 16, "n_layers": 1, "d_state": 4, "dropout": 0.1},
        },
        "training": {
            "output_dir": "models/small",
            "learning_rate": 1e-2,
            "epochs": 2,
            "auto_generate_checkpoints": True,
            "first_epoch_checkpoints": 3,
            "min_checkpoint_interval": 1,
            "min_checkpoints_per_epoch": 3,
        },
        "logging": {"console_level": "WARNING", "log_metrics_every_n_steps": 1, "dir": "logs"},
        "random_seed": 5,
    }
    values |= changes
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_verbs_in_their_order(tmp_path: Path) -> None:
    config = experiment(tmp_path)
    before = foundry("validate-config", config)
    assert before.status == 0 and "tokenizer    tok: not there yet" in before.out
    assert "mamba, 1 layer\n" in before.out and "2 epochs" in before.out
    early = foundry("tokenize-dataset", config)
    assert early.status == 1 and "tok" in early.err

    assert foundry("train-tokenizer", config).status == 0
    tokenizer = plait.load_tokenizer("tok")
    assert tokenizer.type == "bpe" and tokenizer.decode(tokenizer.encode(WORDS)) == WORDS
    assert "not there yet" not in foundry("validate-config", config).out

    made = foundry("tokenize-dataset", config)
    assert (
        made.status == 0 and made.out.startswith("train: 1 document, ") and "\ntest: 1 document" in made.out
    )
    rows = int(foundry("preprocess-data", config).out.split()[1].replace(",", ""))
    tokens = len(tokenizer.encode(TEXT)) + 1
    assert rows == tokens // 32
    shard = next(Path(tmp_path, "cache").glob("tokens-*"))
    mark = shard / "mark"
    mark.touch()
    assert foundry("preprocess-data", config).status == 0 and mark.is_file()
    assert foundry("preprocess-data", config, "--force").status == 0 and shard.is_dir() and not mark.exists()

    steps = -(-2 * rows // 4)
    scheduled = foundry(
        "generate-checkpoints",
        config,
        "-o",
        "out.yaml",
        "--first-epoch=3",
        "--min-interval=1",
        "--min-per-epoch=3",
    )
    assert scheduled.status == 0
    schedule = yaml.safe_load(Path("out.yaml").read_text())["training"]["checkpoint_schedule"]
    end = -(-rows // 4)
    # three over the first epoch, its begin and end among them; later ones at powers of two after it; the last step
    assert {0, round(end / 2), end, end + 2, end + 4, end + 8, steps} <= set(schedule)
    assert yaml.safe_load(config.read_text())["training"].get("checkpoint_schedule") is None
    told = run_config(load_experiment("out.yaml")).training.checkpoint_schedule
    assert told.steps == schedule and not told.by_epoch
    rewritten = yaml.safe_load(Path("out.yaml").read_text())
    del rewritten["training"]["checkpoint_schedule"]
    assert rewritten == yaml.safe_load(config.read_text())

    trained = foundry("run", config)
    assert trained.status == 0, trained
    run = Path("models/small")
    losses = [line["loss"] for line in lines(run, "train")]
    assert len(losses) == steps and losses[-1] < 0.8 * losses[0]
    assert lines(run, "evaluation")[-1]["bits_per_byte"] < 8
    kept = sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir())
    assert kept == schedule, "the schedule of the config is what the run keeps"
    assert Path("logs/small/trainer.log").is_file()

    over = foundry("run", config)
    assert over.status == 1 and "already holds a run" in over.err and "Traceback" not in over.err
    longer = yaml.safe_load(config.read_text())
    longer["training"]["epochs"] = 3
    config.write_text(yaml.safe_dump(longer))
    assert foundry("run", config, "--resume").status == 0
    assert len(lines(run, "train")) == -(-3 * rows // 4)
    text = plait.load(run).generate("the quick", max_new_tokens=5, temperature=0)
    assert isinstance(text, str) and text


def test_global_options_change_the_config(tmp_path: Path) -> None:
    config = experiment(tmp_path, training={"train_steps": 1}, tokenizer={"tokenizer_type": "character"})
    done = foundry(
        "--log-dir", "there", "--log-level", "ERROR", "--experiment-name", "renamed", "run", config
    )
    assert done.status == 0, done
    assert Path("there/renamed/trainer.log").is_file() and Path("runs/renamed/config.yaml").is_file()
    assert load_config("runs/renamed/config.yaml").experiment_name == "renamed"


def test_the_ablations_are_not_taken_over(tmp_path: Path) -> None:
    assert "nothing is to be done" in foundry("preprocess", experiment(tmp_path)).out
    step = {"type": "remove_expletives", "input_path": "text.txt", "output_path": "changed.txt"}
    config = experiment(tmp_path, dataset_manipulation=[step])
    shown = foundry("preprocess", config, "--dry-run")
    assert shown.status == 0 and shown.out == "step 1: remove_expletives, text.txt -> changed.txt\n"
    refused = foundry("preprocess", config)
    assert refused.status == 1
    assert refused.err.count("\n") == 1 and "Plait does not change corpora" in refused.err


def test_info_names_what_there_is() -> None:
    shown = foundry("info").out
    for word in ("gpt2", "bert", "lstm", "gru", "rnn", "mamba", "run", "validate-config", "train-tokenizer"):
        assert word in shown
    for word in ("tokenize-dataset", "preprocess-data", "generate-checkpoints", "preprocess"):
        assert f"\n  {word} " in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("run", "missing.yaml"), "missing.yaml: there is no such file"),
        (("run",), "Missing argument"),
        (("walk", "x.yaml"), "No such command"),
        (("generate-checkpoints", "small.yaml", "--spacing", "cubic"), "--spacing"),
        (("validate-config", "broken.yaml"), "broken.yaml: model.mamba"),
        (("train-tokenizer", "printed.yaml"), "tokenizer.output_dir"),
        (("tokenize-dataset", "printed.yaml"), "data.training_corpus"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    experiment(tmp_path)
    (tmp_path / "broken.yaml").write_text("model: {architecture: mamba}")
    shutil.copy(PRINTED / "test_mamba_tiny.yaml", tmp_path / "printed.yaml")
    done = foundry(*words)
    assert done.status == 1 and message in done.err, done
    assert done.err.strip().splitlines()[-1].startswith("error: ") and "Traceback" not in done.err


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "plait.compat.foundry.cli", "validate-config", str(experiment(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0 and "is valid" in done.stdout, done
