"""Two gloo processes do what one does: same losses, and each resumes from the other's checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.errors import TrainingError
from plait.config.table import kinds
from plait.models.model import Model
from plait.training import train
from plait.training.distributed import World, choose_device, session, spread
from plait.training.metrics import read_metrics
from tests.training import runs
from tests.training.test_core import bundle

# No dropout: each process has random numbers of its own. Five rows in pieces of one: three pieces on one process,
# two and an empty one on the other. An embedding that is tied, and a scalar-free model, for FSDP.
COMMON = {"model": {"dropout": 0.0, "pattern": "attention lstm"}, "micro_batch_tokens": 32, "steps": 6}
# Muon needs whole matrices, and its second moments are whole on every process.
MUON = {
    "optimizer": "muon",
    "muon": {"parts": True, "precision": "fp32", "beta2": 0.9, "cautious": True, "equal_rows": True},
    "weight_decay": 0.5,
}
KINDS: dict[str, dict[str, Any]] = {
    "replicate": {"parallel": "replicate"},
    "shard": {"parallel": "shard", "sample_every": 3, "sample_tokens": 4},
    "shard_muon": {"parallel": "shard", **MUON},
}
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "replicate": ("one", {}),
    "shard": ("one", {}),
    "shard_muon": ("one_muon", MUON),
}


def core(folder: Path) -> dict[str, Any]:
    """One question a task, so that the second process has none and calls the model less often than the first."""
    return {"core_tasks": str(folder / "tasks"), "core_every": 3, "core_max_per_task": 1}


# One start for everything: importing torch twice is most of the time.
CHILD = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from plait.config.errors import CheckpointError
from plait.training import train
from tests.training import runs
from tests.training.test_distributed import COMMON, KINDS, core

folder, ports = Path(sys.argv[1]), iter(sys.argv[2:])
for name, options in KINDS.items():
    os.environ["MASTER_PORT"] = next(ports)
    often = {"checkpoint_every": 3, "eval_every": 3, **core(folder)}
    config = runs.load_config(runs.values(folder / name, **COMMON, **options, **often))
    result = train(config, quiet=True)
    assert torch.distributed.is_initialized() is False
    if name == "shard":
        assert type(result.model.embedding.tokens.weight.data).__name__ == "DTensor"
os.environ["MASTER_PORT"] = next(ports)
one = runs.load_config(runs.values(folder / "one", **COMMON, parallel="shard", out=str(folder / "from_one")))
train(one, resume=folder / "one" / "run" / "checkpoints" / "step-00000003", quiet=True)
os.environ["MASTER_PORT"] = next(ports)
if os.environ["RANK"] == "1":
    import plait.training.checkpoint as checkpoint
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")
    checkpoint.save_file = full
try:
    train(runs.load_config(runs.values(folder / "full", **COMMON)), quiet=True)
except CheckpointError as error:
    assert os.environ["RANK"] == "1" and "No space left" in str(error)
except Exception as error:
    assert os.environ["RANK"] == "0" and "No space left" in str(error), error
else:
    raise AssertionError("a full disk on one process must stop both")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same run by one process and by two, replicated and sharded."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("one", "one_muon", "full", *KINDS):
        runs.corpus(folder / name)
    bundle(folder)
    runs.run(folder / "one", **COMMON, checkpoint_every=3, eval_every=3, **core(folder))
    runs.run(folder / "one_muon", **COMMON, **MUON, checkpoint_every=3, eval_every=3, **core(folder))
    ports = [str(runs.free_port()) for _ in range(len(KINDS) + 2)]
    processes = [
        runs.spawn(
            CHILD,
            str(folder),
            *ports,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_have_the_losses_of_one(folder: Path, name: str) -> None:
    alone, _ = ALONE[name]
    one, two = (runs.losses(folder / which / "run") for which in (alone, name))
    assert list(one) == list(two) == [1, 2, 3, 4, 5, 6]
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-6), step
    evaluations = [runs.evaluations(folder / which / "run") for which in (alone, name)]
    assert list(evaluations[0]) == [3, 6]
    for step, bits in evaluations[0].items():
        assert evaluations[1][step] == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_two_processes_have_the_core_of_one(folder: Path, name: str) -> None:
    one, two = (
        [line for line in read_metrics(folder / which / "run") if line["kind"] == "core"]
        for which in (ALONE[name][0], name)
    )
    assert [line["step"] for line in one] == [3, 6] and one == two
    assert {task["items"] for task in one[0]["tasks"].values()} == {1}


@pytest.mark.parametrize("name", KINDS)
def test_one_process_goes_on_from_two(folder: Path, tmp_path: Path, name: str) -> None:
    checkpoint = folder / name / "run" / "checkpoints" / "step-00000003"
    alone, options = ALONE[name]
    config = runs.load_config(runs.values(folder / alone, **COMMON, **options, out=str(tmp_path / "run")))
    assert train(config, resume=checkpoint, quiet=True).step == 6
    one, rest = runs.losses(folder / alone / "run"), runs.losses(tmp_path / "run")
    assert list(rest) == [4, 5, 6]
    for step, loss in rest.items():
        assert loss == pytest.approx(one[step], rel=1e-6), step


def test_two_processes_go_on_from_one(folder: Path) -> None:
    one, rest = runs.losses(folder / "one" / "run"), runs.losses(folder / "from_one")
    assert list(rest) == [4, 5, 6]
    for step, loss in rest.items():
        assert loss == pytest.approx(one[step], rel=1e-6), step


def test_a_sharded_model_samples_and_is_saved_whole(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "shard" / "run" / "samples").iterdir()) == [
        "step-00000003.txt",
        "step-00000006.txt",
    ]
    checkpoint = folder / "shard" / "run" / "checkpoints" / "step-00000006" / "train"
    assert len(list(checkpoint.glob("rng-*"))) == len(list((checkpoint / "optimizer").iterdir())) == 2


def test_a_full_disk_on_one_process_leaves_nothing(folder: Path) -> None:
    assert list((folder / "full" / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_can_be_sharded(kind: str) -> None:
    """FSDP2 frees gathered weights by resizing their storage, which `.numpy()` on a parameter forbids for good."""
    model = Model(runs.load_config({"model": {"d_model": 32, "pattern": kind, "vocab_size": 9}}).model)
    ids = torch.randint(9, (1, 20))
    bounds = torch.tensor([0, 7, 20], dtype=torch.int32)
    model(ids, labels=ids, cu_seqlens=bounds, max_len=13).loss.backward()
    stuck = [name for name, p in model.named_parameters() if not p.untyped_storage().resizable()]
    assert not stuck, "an op took .numpy() of a parameter; np.from_dlpack does not mark it"
    assert all(p.dim() > 0 for p in model.parameters()), "FSDP2 shards no scalars"


def test_a_scalar_is_refused_by_name() -> None:
    model = torch.nn.Linear(2, 2)
    model.gain = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(TrainingError, match="gain is a scalar, which FSDP2 cannot shard"):
        spread(model, [], "shard", World(0, 2, torch.device("cpu")))


def test_one_process_starts_no_group() -> None:
    config = runs.load_config({"training": {"device": "cpu"}}).training
    with session(config) as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert not torch.distributed.is_initialized()
        assert world.sums([1.5, 2]) == [1.5, 2] and world.share("x") == "x" and world.first


@pytest.mark.parametrize(
    ("name", "words"),
    [("gpu", "no device"), ("cuda", "finds no CUDA"), ("mps", "finds no MPS")],
)
def test_a_device_that_is_not_there_is_refused(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(TrainingError, match=words):
        choose_device(name)


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    asked = pytest.raises(TrainingError, match="RANK is not; start several processes with torchrun")
    with asked, session(runs.load_config(None).training):
        raise AssertionError("not reached")
