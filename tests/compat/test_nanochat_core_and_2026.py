"""base_train on a folder of nanochat's with the tasks of CORE: October's settings and July's, trained and asked."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import plait
from plait.compat.nanochat.common import run_script
from plait.compat.nanochat.configurator import read_command_line
from plait.compat.nanochat.scripts import base_train, tok_train
from plait.config.load import load_config
from plait.formats.folders import list_checkpoints
from plait.formats.nanochat import read, write
from plait.training.metrics import read_metrics
from tests.training.test_core import WORDS, bundle

SMALL = [
    "--max_seq_len=32",
    "--device_batch_size=2",
    "--eval_tokens=64",
    "--device_type=cpu",
    "--sample_every=-1",
]
OCTOBER = ["--depth=1", "--total_batch_size=64", "--num_iterations=4", *SMALL]
JULY = ["--release=2026", "--depth=2", "--aspect-ratio=16", "--head-dim=32", "--total-batch-size=128", *SMALL]


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """nanochat's folder: two files of text and a tokenizer."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = random.Random(0)
    (tmp_path / "base_data").mkdir()
    for number in range(2):
        texts = [" ".join(rng.choices(WORDS, k=30)) for _ in range(20)]
        pq.write_table(pa.table({"text": texts}), tmp_path / "base_data" / f"shard_{number:05}.parquet")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert tok_train.main(["--vocab_size=290"]) == 0
    yield tmp_path


def core_lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if line["kind"] == "core"]


def test_core_is_evaluated_where_the_tasks_are(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert base_train.main([*OCTOBER, "--training.out=without"]) == 0
    shown = capfd.readouterr().out.splitlines()
    assert shown[0].startswith("Building model with config: ")
    assert shown[1] == f"CORE is not evaluated while training: there is no {base / 'eval_bundle'}"
    assert core_lines(base / "without") == []
    bundle(base).rename(base / "eval_bundle")
    # nanochat's default: every 2000 steps and at the end, 500 items a task
    assert base_train.main([*OCTOBER, "--training.out=default"]) == 0
    saved = load_config(base / "default" / "config.yaml").training
    assert (saved.core_tasks, saved.core_every, saved.core_max_per_task) == (
        str(base / "eval_bundle"),
        2000,
        500,
    )
    assert [line["step"] for line in core_lines(base / "default")] == [4]
    capfd.readouterr()
    words = [*OCTOBER, "--core_metric_every=3", "--core_metric_max_per_task=2", "--training.out=often"]
    assert base_train.main(words) == 0
    assert "step 3: CORE " in capfd.readouterr().err
    lines = core_lines(base / "often")
    assert [line["step"] for line in lines] == [3, 4]
    assert {task["items"] for line in lines for task in line["tasks"].values()} == {2}
    assert base_train.main([*OCTOBER, "--core_metric_every=-1", "--training.out=never"]) == 0
    assert core_lines(base / "never") == []


def test_core_that_was_asked_for_and_has_no_tasks_is_an_error(
    base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_script(lambda: base_train.main([*OCTOBER, "--core_metric_every=3"])) == 1
    assert f"error: {base / 'eval_bundle' / 'core.yaml'} cannot be read" in capfd.readouterr().err
    elsewhere = bundle(base)
    words = [*OCTOBER, "--core_metric_every=3", f"--training.core_tasks={elsewhere}"]
    assert base_train.main(words) == 0
    assert [line["step"] for line in core_lines(base / "base_checkpoints" / "d1")] == [3, 4]


def test_july_trains_saves_resumes_and_generates(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert base_train.main([*JULY, "--num-iterations=4", "--save-every=2"]) == 0
    first = capfd.readouterr().out.splitlines()[0]
    assert "'n_embd': 32" in first and "'windows': [129, 33]" in first and "'vocab_size': 290" in first
    run = base / "base_checkpoints" / "d2"
    assert [path.name for path in list_checkpoints(run)] == ["step-00000002", "step-00000004"]
    training = load_config(run / "config.yaml").training
    assert training.batch_tokens == 128 and training.muon_lr == pytest.approx(0.02 * (128 / 2**19) ** 0.5)
    losses = [line["loss"] for line in read_metrics(run) if line["kind"] == "train"]
    assert abs(losses[0] - 5.67) < 0.05 and losses[-1] < losses[0]  # ln 290
    assert base_train.main([*JULY, "--num-iterations=6", "--resume-from-step=2"]) == 0
    assert "resumed at step 2" in capfd.readouterr().err
    model = plait.load(run)
    assert model.config.backout and model.config.layers()[1].options.model_dump()["value_embedding"]
    assert isinstance(model.generate("quick", max_new_tokens=4), str)
    write(model, base / "theirs", step=6, sequence_len=32)
    meta = json.loads((base / "theirs" / "meta_000006.json").read_text())["model_config"]
    assert (meta["n_layer"], meta["n_embd"], meta["window_pattern"]) == (2, 32, "SSSL")
    assert read(base / "theirs" / "model_000006.pt")[0].config.d_model == 32


def test_the_release_may_stand_in_a_file(base: Path) -> None:
    (base / "july.py").write_text("release = 2026\ndepth = 2\naspect_ratio = 16\nhead_dim = 32\n")
    words = ["july.py", "--total_batch_size=64", "--num_iterations=1", *SMALL, "--training.out=file"]
    assert base_train.main(words) == 0
    assert load_config(base / "file" / "config.yaml").model.backout


def test_the_tokenizers_ids_are_counted(base: Path) -> None:
    """The output is among the parameters that the rule counts, so its size is that of the tokenizer there is."""
    line = read_command_line(["--release=2026", "--depth", "4"], base_train.Settings2026)
    found = base_train.run_config(line).training
    wanted, otherwise = (
        load_config({"release": 2026, "depth": 4, "vocab_size": ids}).training for ids in (290, 32768)
    )
    assert found.weight_decay == wanted.weight_decay != otherwise.weight_decay


def test_settings_of_july_need_its_release(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_script(lambda: base_train.main(["--depth=2", "--aspect-ratio=16"])) == 1
    assert "error: --aspect-ratio is a setting of July 2026: add --release=2026" in capfd.readouterr().err
    assert run_script(lambda: base_train.main(["--release=2026", "--block_pattern=T"])) == 1
    assert "there is no setting 'block_pattern'" in capfd.readouterr().err
