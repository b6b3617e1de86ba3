"""Benchmarks of whole models at tiny shapes: rows have what they promise; what computes wrong is not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.bench import decode, models, peer_models, train
from plait.bench.models import Size, check, kernels, model_config, split_name
from plait.bench.ops import Shape, benchmark_ops
from plait.bench.timing import steady
from plait.cli import main
from plait.config.errors import DataError
from plait.models import Model
from plait.ops.dispatch import _loaded, attribute_of
from plait.ops.selective_scan import SELECTIVE_SCAN, selective_scan
from plait.ops.ssd import SSD

CPU = torch.device("cpu")
NAMES = [f"{family}-tiny" for family in models.FAMILIES]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.SIZES, "tiny", Size(64, 2, 200))
    monkeypatch.setitem(decode.LARGE, "cpu", 1 << 20)


@pytest.mark.parametrize("name", NAMES)
def test_a_training_row_has_what_it_promises(name: str) -> None:
    said: list[dict[str, Any]] = []
    result = train.benchmark_training(
        CPU, models=[name], sizes=[(2, 40)], seconds=0.01, peers=False, say=said.append
    )
    assert said == result.rows and len(said) == 1
    (row,) = said
    assert (row["model"], row["shape"], row["by"], row["precision"]) == (name, "B2 L40", "plait", "fp32")
    assert row["tokens_per_second"] == pytest.approx(80 / row["step_ms"] * 1000)
    assert row["parameters"] == sum(p.numel() for p in Model(model_config(name)).parameters())
    assert row["first_step_s"] > 0 and row["repeats"] >= 2 and abs(row["first_loss"] - 5.3) < 0.6
    assert row["backend"] == ("cpu torch" if name == "transformer-tiny" else "cpu")
    assert (
        row["kernels"]
        == {
            "mamba": "causal_conv1d_cpu gated_norm_cpu selective_scan_cpu",
            "mamba2": "causal_conv1d_cpu gated_norm_cpu ssd_cpu",
            "transformer": "add_norm_cpu aten:scaled_dot_product_flash_attention_for_cpu gated_norm_cpu",
        }[split_name(name)[0]]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_decoding_row_has_what_it_promises(name: str) -> None:
    result = decode.benchmark_decoding(
        CPU, models=[name], batches=[1, 3], prompt=9, tokens=3, peers=False, repeats=1
    )
    assert [row["shape"] for row in result.rows] == ["B1 after 9", "B3 after 9"]
    for row, batch in zip(result.rows, (1, 3), strict=True):
        assert row["tokens_per_second"] == pytest.approx(1000 * batch / row["step_ms"])
        assert (
            row["times_floor"] == pytest.approx(row["step_ms"] / row["floor_ms"]) and row["times_floor"] > 1
        )
        assert row["prompt_ms"] > 0 and "gated_norm_cpu" in row["kernels"] and row["times_plait"] == 1
        own = {"mamba": "selective_state_update_cpu", "mamba2": "ssd_update_cpu", "transformer": ""}
        assert own[split_name(name)[0]] in row["kernels"] and "norm_linear_cpu" in row["kernels"]


def test_the_least_a_step_reads() -> None:
    model = Model(model_config("mamba-tiny"))
    weights = 4 * sum(p.numel() for p in model.parameters())
    state = 2 * 4 * 128 * (16 + 3)  # two layers: h and the last three inputs of the convolution
    assert decode.bytes_of_step(model, 3, 50) == weights + 2 * 3 * state
    attention = Model(model_config("transformer-tiny"))
    weights = 4 * sum(p.numel() for p in attention.parameters())
    assert (
        decode.bytes_of_step(attention, 3, 50) == weights + 3 * 4 * 50 * 64 * 2
    )  # one layer: keys and values


def wrong(monkeypatch: pytest.MonkeyPatch, op: Any, factor: float) -> None:
    """The op's kernel on a CPU gives ``factor`` times its output in every second channel: a norm would hide more."""
    target = op.targets["cpu"]
    Model(model_config("mamba-tiny"))(torch.zeros(1, 2, dtype=torch.int64))  # loads what is replaced
    Model(model_config("mamba2-tiny"))(torch.zeros(1, 2, dtype=torch.int64))
    right: Callable[..., Any] = getattr(_loaded, attribute_of(target))

    def off(*args: Any, **options: Any) -> Any:
        y, *rest = right(*args, **options)
        factors = torch.ones(y.shape[-1]).index_fill(0, torch.arange(0, y.shape[-1], 2), factor)
        return (y * factors, *rest)

    monkeypatch.setattr(_loaded, attribute_of(target), off)


@pytest.mark.parametrize(("op", "name"), [(SELECTIVE_SCAN, "mamba-tiny"), (SSD, "mamba2-tiny")])
def test_a_backend_that_is_wrong_by_a_hundredth_is_not_timed(
    op: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(name, CPU, torch.bfloat16) < 1e-4
    wrong(monkeypatch, op, 1.01)
    done = train.benchmark_training(CPU, models=[name], sizes=[(1, 20)], peers=False)
    assert [row["failed"].partition(" exceeds")[2] for row in done.rows] == [" 0.001; not timed"]
    done = decode.benchmark_decoding(CPU, models=[name], peers=False)
    assert len(done.rows) == 1 and f"{name}, decoding: relative error 0.0" in done.rows[0]["failed"]


def test_what_fails_stops_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong(monkeypatch, SSD, 1.01)
    file = tmp_path / "rows.json"
    words = ["--device", "cpu", "--no-peers", "--json", str(file)]
    assert (
        main(["bench", "train", "mamba2-tiny", "mamba-tiny", "--size", "1x20", "--seconds", "0.01", *words])
        == 1
    )
    wrong_one, right_one = json.loads(file.read_text())["rows"]
    assert "step_ms" not in wrong_one and right_one["step_ms"] > 0
    assert "not timed" in capsys.readouterr().err
    assert (
        main(["bench", "decode", "mamba2-tiny", "mamba-tiny", "--prompt", "4", "--tokens", "2", *words]) == 1
    )
    wrong_one, right_one = json.loads(file.read_text())["rows"]
    assert "step_ms" not in wrong_one and right_one["step_ms"] > 0


def test_an_op_that_is_wrong_by_a_hundredth_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 20, {"D": 16, "N": 4})
    (row,) = benchmark_ops(
        ["selective_scan"], CPU, torch.float32, shapes=[shape], backends=["cpu"], seconds=0.01
    ).rows
    assert row["backend"] == "cpu" and row["forward_ms"] > 0
    wrong(monkeypatch, SELECTIVE_SCAN, 1.01)
    result = benchmark_ops(
        ["selective_scan"],
        CPU,
        torch.float32,
        shapes=[shape],
        backends=["cpu", "portable"],
        seconds=0.01,
    )
    by = {row["backend"]: row for row in result.rows}
    assert by["cpu"]["wrong"] and by["cpu"]["failed"].endswith("exceeds 1e-05; not timed")
    assert by["portable"]["forward_ms"] > 0


def test_an_op_is_timed_on_each_number_of_threads_and_torch_keeps_its_own() -> None:
    before = torch.get_num_threads()
    rows = benchmark_ops(
        ["selective_scan"],
        CPU,
        torch.float32,
        shapes=[Shape(1, 20, {"D": 16, "N": 4})],
        backends=["cpu", "portable"],
        threads=[2, 1],
        seconds=0.01,
    ).rows
    by_threads = [(row["threads"], row["backend"]) for row in rows]
    assert by_threads == [(2, "cpu"), (2, "portable"), (1, "cpu"), (1, "portable")]
    assert [row["forward_times"] == 1 for row in rows] == [True, False, True, False]
    assert rows[1]["both_times"] == rows[1]["both_ms"] / rows[0]["both_ms"]
    assert torch.get_num_threads() == before


def test_a_first_loss_far_from_guessing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    init = Model.__init__

    def loud(self: Model, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        with torch.no_grad():
            self.embedding.tokens.weight.mul_(100)

    monkeypatch.setattr(train, "check", lambda *args: 0.0)
    monkeypatch.setattr(Model, "__init__", loud)
    (row,) = train.benchmark_training(CPU, models=["mamba-tiny"], sizes=[(1, 20)], peers=False).rows
    assert "that of guessing is 5.298; not timed" in row["failed"] and "step_ms" not in row


def test_peers_stand_beside_us_or_say_why_not() -> None:
    pytest.importorskip("transformers")
    rows = train.benchmark_training(CPU, models=["transformer-tiny"], sizes=[(1, 20)], seconds=0.01).rows
    assert [row["by"] for row in rows] == ["plait", "transformers"]
    assert rows[0]["parameters"] == rows[1]["parameters"] and rows[1]["tokens_per_second"] > 0
    rows = train.benchmark_training(CPU, models=["mamba-tiny"], sizes=[(1, 257)], seconds=0.01).rows
    by = {row["by"]: row for row in rows}
    assert "up to 256 tokens" in by["transformers"]["failed"] and by["plait"]["step_ms"] > 0
    rows = decode.benchmark_decoding(
        CPU, models=["mamba2-tiny"], batches=[1], prompt=5, tokens=3, repeats=1
    ).rows
    assert [row["by"] for row in rows] == ["plait", "transformers"] and rows[1]["step_ms"] > 0
    assert rows[1]["times_plait"] == rows[1]["step_ms"] / rows[0]["step_ms"]


@pytest.mark.parametrize("name", ["mamba-tiny", "mamba2-tiny"])
def test_a_peer_that_computes_something_else_is_not_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    assert peer_models.check_transformers(name) < 1e-5
    names = tuple(pair for pair in peer_models._THEIR_NAMES if pair[0] != "norm1")
    monkeypatch.setattr(peer_models, "_THEIR_NAMES", names)
    with pytest.raises(KeyError):
        peer_models.check_transformers(name)  # a weight that the peer has not
    monkeypatch.undo()
    monkeypatch.setitem(models.SIZES, "tiny", Size(64, 2, 200))
    made = peer_models._transformers

    def other(*args: Any) -> Any:
        model = made(*args)
        model.backbone.layers[1].mixer.out_proj.register_forward_hook(lambda module, given, y: 1.01 * y)
        return model

    monkeypatch.setattr(peer_models, "_transformers", other)
    rows = decode.benchmark_decoding(CPU, models=[name], batches=[1], prompt=3, tokens=2, repeats=1).rows
    assert "the same weights in transformers: relative error" in rows[1]["failed"] and "step_ms" in rows[0]


def test_apart_every_row_is_a_command_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run here, for the size of the tests is not known elsewhere."""
    pytest.importorskip("transformers")
    ran: list[list[str]] = []
    real = subprocess.run

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if words[0] != sys.executable:  # git, asked for the commit
            return real(words, **options)
        assert words[1:3] == ["-m", "plait"]
        ran.append(words[3:])
        return subprocess.CompletedProcess(words, main(words[3:]), "", "error: it is broken")

    monkeypatch.setattr(train.subprocess, "run", run)
    rows = train.benchmark_training(
        CPU, models=["mamba2-tiny"], sizes=[(1, 20), (2, 9)], apart=True, seconds=0.01
    ).rows
    assert [(row["by"], row["shape"]) for row in rows] == [
        ("plait", "B1 L20"), ("transformers", "B1 L20"), ("plait", "B2 L9"), ("transformers", "B2 L9"),
    ]  # fmt: skip
    for row, n_tokens in zip(rows, (20, 20, 18, 18), strict=True):
        assert 0 < row["forward_backward_ms"] < row["step_ms"] and row["peak_gib"] is not None
        taken = row["forward_backward_ms"] / 1000
        assert row["forward_backward_tokens_per_second"] == pytest.approx(n_tokens / taken)
    assert len(ran) == 4
    monkeypatch.setattr(
        train.subprocess, "run", lambda words, **options: run([*words[:3], "bench", "nothing"])
    )
    (row,) = train.benchmark_training(
        CPU, models=["mamba2-tiny"], sizes=[(1, 20)], apart=True, peers=False
    ).rows
    assert row["failed"] == "error: it is broken"


def test_a_loss_that_is_not_the_portable_backends_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "check", lambda *args: 0.0)
    wrong(monkeypatch, SELECTIVE_SCAN, 1.2)
    (row,) = train.benchmark_training(CPU, models=["mamba-tiny"], sizes=[(1, 20)], peers=False).rows
    assert "the first loss: relative error" in row["failed"] and "step_ms" not in row


def test_kernels_tells_what_ran() -> None:
    x, dt, z = (torch.rand(1, 5, 16) for _ in range(3))
    A, B = -torch.rand(16, 4), torch.rand(1, 5, 4)
    assert kernels(lambda: selective_scan(x, dt, A, B, B, z=z)) == "selective_scan_cpu"
    assert kernels(lambda: selective_scan(x, dt, A, B, B, z=z, backend="portable")) == "torch"


def test_steady_counts_every_step() -> None:
    calls: list[int] = []
    timing = steady(lambda: calls.append(1), CPU, seconds=0.001)
    assert len(calls) == 3 + timing.n and timing.least <= timing.median <= timing.most


@pytest.mark.parametrize("name", ["mamba", "mamba-7b", "gpt-130m"])
def test_unknown_models_are_named(name: str) -> None:
    with pytest.raises(DataError, match="there are mamba-70m"):
        split_name(name)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results" / "train.json"
    words = ["train", "mamba2-tiny", "--device", "cpu", "--size", "1x24", "--seconds", "0.01", "--no-peers"]
    assert main(["bench", *words, "--json", str(file)]) == 0
    assert "mamba2-tiny" in capsys.readouterr().out
    written = json.loads(file.read_text())
    assert written["name"] == "train" and written["rows"][0]["tokens_per_second"] > 0
    assert {"cpu", "threads", "packages", "git"} <= set(written)
    words = ["decode", "mamba-tiny", "--device", "cpu", "--prompt", "5", "--tokens", "2", "--no-peers"]
    assert main(["bench", *words]) == 0
    assert "selective_scan_cpu" in capsys.readouterr().out
    words = ["ops", "ssd", "--shape", "B1,L9,H2,P4,N4", "--seconds", "0.01", "--device", "cpu"]
    assert main(["bench", *words]) == 0
    assert "portable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["train", "--size", "16"], "sequences x tokens"),
        (["train", "--precision", "int8"], "must be one of fp32"),
        (["ops", "attention"], "must be one of selective_scan"),
        (["ops", "ssd", "--shape", "L5"], "lacks B"),
        (["ops", "--shape", "B1,L5,N3"], "name it"),
        (["decode", "--dtype", "half"], "must be one of float32"),
        (["decode", "mamba-9b"], "there is no model"),
    ],
)
def test_mistakes_are_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words, "--device", "cpu"]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: ") and complaint in said[-1]
