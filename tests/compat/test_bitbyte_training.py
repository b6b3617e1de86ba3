"""BitByte's Trainer and data over Plait's: from shards of bytes to trained weights, stopped and resumed."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from plait.compat.bitbyte.data import ByteShardDataset
from plait.compat.bitbyte.models import BitByteLM, ByteLM, HybridLM
from plait.compat.bitbyte.models.mamba_mlm import MambaMLM
from plait.compat.bitbyte.training.given import GivenScaler
from plait.compat.bitbyte.training.trainer import CURRICULUM, Trainer
from plait.config.errors import CheckpointError, DataError, TrainingError
from plait.formats.convert import convert
from tests.compat.bitbyte_models import FIXTURES, SMALL, adamw, batches, hybrid, plain_options

# ---- data


def test_rows_are_every_byte_once_an_epoch(tmp_path: Path) -> None:
    stream = np.random.default_rng(0).integers(256, size=3037, dtype=np.uint8).tobytes()
    for number, (begin, end) in enumerate(((0, 1000), (1000, 1037), (1037, 3037))):
        (tmp_path / f"shard_{number:05d}.bin").write_bytes(stream[begin:end])
    plain = ByteShardDataset(tmp_path, 64, shuffle=False)
    assert len(plain) == 47 and plain[0].dtype == torch.int64
    assert b"".join(bytes(plain[i].tolist()) for i in range(47)) == stream[: 47 * 64]
    drawn = ByteShardDataset(tmp_path, 64, seed=5, epochs=2)
    orders = []
    for epoch in range(2):
        places = [(stream + stream).index(bytes(drawn[47 * epoch + i].tolist())) for i in range(47)]
        covered = {(place + i) % 3037 for place in places for i in range(64)}
        assert len(covered) == 47 * 64  # no byte twice
        assert places != sorted(places)
        orders.append(places)
    assert orders[0] != orders[1] and {p % 64 for p in orders[0]} != {p % 64 for p in orders[1]}
    again = ByteShardDataset(tmp_path, 64, seed=5, epochs=2)
    assert all(torch.equal(drawn[i], again[i]) for i in (0, 46, 47, 93))
    assert not torch.equal(drawn[0], ByteShardDataset(tmp_path, 64, seed=6)[0])
    with pytest.raises(IndexError):
        drawn[94]


def test_processes_and_workers_share_rows_exactly(shards: Path) -> None:
    whole = ByteShardDataset(shards, 100)
    parts = [ByteShardDataset(shards, 100, rank=rank, world=3) for rank in range(3)]
    for place in range(len(parts[0])):
        for rank, part in enumerate(parts):
            assert torch.equal(part[place], whole[3 * place + rank])
    alone = list(DataLoader(whole, batch_size=4))
    with_workers = list(DataLoader(whole, batch_size=4, num_workers=2))
    assert len(alone) == len(with_workers) == 8
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers, strict=True))
    with pytest.raises(DataError, match=r"holds no shard_\*.bin: make some with plait data pack"):
        ByteShardDataset(shards.parent)
    with pytest.raises(DataError, match="rank 3 of 3"):
        ByteShardDataset(shards, 100, rank=3, world=3)


# ---- the trainer


def test_use_in_training_as_printed(shards: Path) -> None:
    model = MambaMLM(**SMALL, d_state=16, d_conv=4, expand=2, act_quant=True)
    optimizer = adamw(model, 1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    lines: list[str] = []
    trainer = Trainer(model, optimizer, scaler, steps=40, log_every=20, log=lines.append)
    loss = trainer.train(DataLoader(ByteShardDataset(shards, 64), batch_size=8))
    assert trainer.step == 40 and loss is not None and loss < 2.5  # ln 256 = 5.5
    assert len(lines) == 2 and lines[1].startswith("step 40/40: loss ") and "bits a byte" in lines[1]
    assert model.training


def test_a_step_is_what_torch_would_do() -> None:
    """One update over two batches: mean loss over all targets, clipped, at the rate of the schedule."""
    ours, theirs = hybrid(act_quant=False), hybrid(act_quant=False)
    trainer = Trainer(ours, adamw(ours), steps=10, grad_accum=2, grad_clip=0.5, log_every=0)
    data = [batches(1)[0], batches(1, 12)[0]]  # of different sizes: every byte counts the same
    trainer.config = trainer.config.replace(steps=1)
    loss = trainer.train(data)
    sums = [
        F.cross_entropy(theirs(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        for ids in data
    ]
    want = (sums[0] + sums[1]) / (2 * 32 + 2 * 11)
    assert loss == pytest.approx(want.item(), rel=1e-5)
    optimizer = adamw(theirs, 3e-3)
    want.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
    assert norm > 0.5
    optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_every_form_of_batch_means_the_same() -> None:
    ids = batches(1, 21)[0]
    losses = []
    pairs = (ids[:, :-1], ids[:, 1:])
    for item in (ids, {"input_ids": ids}, {"input_ids": ids, "labels": ids}, pairs, [ids]):
        model = hybrid()
        losses.append(Trainer(model, adamw(model), steps=1, log_every=0).train([item]))
    assert losses == pytest.approx([losses[0]] * 5, rel=1e-6)
    ignored = ids.masked_fill(torch.arange(21) % 2 == 0, -100)
    for item in ({"input_ids": ids, "labels": ignored}, (ids[:, :-1], ignored[:, 1:])):
        model = hybrid()
        want = F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ignored[:, 1:].flatten()).item()
        assert Trainer(model, adamw(model), steps=1, log_every=0).train([item]) == pytest.approx(
            want, rel=1e-5
        )
    for item in ({"ids": ids}, "text", (ids, ids, ids), ids[0], {"input_ids": ids, "labels": ids[:, 1:]}):
        with pytest.raises(DataError, match=r"a batch is ids \(B, T\)"):
            Trainer(model, adamw(model), steps=1).train([item])
    with pytest.raises(DataError, match="gave no batch"):
        Trainer(model, adamw(model), steps=3).train(iter([ids]))


def test_the_rate_warms_up_and_follows_a_cosine_to_a_tenth() -> None:
    model = nn.Embedding(256, 256)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 2.0}])
    rates: list[float] = []
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    Trainer(model, optimizer, steps=100, warmup_frac=0.1, log_every=0).train(batches(3, 5))
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    half = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[55] == pytest.approx(half)
    assert 0.2 < rates[-1] < 0.202 and rates[10:] == sorted(rates[10:], reverse=True)


class Lengths(nn.Module):
    """Remembers the shapes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, 256)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.seen.append(tuple(ids.shape))
        return self.table(ids)


def test_the_curriculum_cuts_rows_and_loses_no_byte() -> None:
    assert CURRICULUM == ((0.2, 2048), (0.5, 4096))
    model = Lengths()
    stages = ((0.2, 4), (0.5, 10))
    trainer = Trainer(model, adamw(model), steps=10, curriculum=stages, seq_len_cap=20, log_every=0)
    trainer.train(batches(1, 24))
    rows = [(2 * 6, 4)] * 2 + [(2 * 2, 10), (2, 4)] * 3 + [(2, 20), (2, 4)] * 5
    assert model.seen == rows
    # a last byte alone has nothing to predict
    model.seen.clear()
    Trainer(model, adamw(model), steps=1, curriculum=((0.5, 8),), log_every=0).train(batches(1, 25))
    assert model.seen == [(6, 8)]


def test_steps_that_are_not_finite_are_left_out_but_not_for_ever() -> None:
    model = hybrid()
    before = [p.clone() for p in model.parameters()]
    lines: list[str] = []
    trainer = Trainer(model, adamw(model), steps=6, max_skips=2, log_every=1, log=lines.append)
    broken = model.register_forward_hook(lambda _m, _i, y: y * math.nan)
    with pytest.raises(TrainingError, match="the loss is nan at step 3, after 2 steps that were left out"):
        trainer.train(batches(1))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [line.split(":")[1] for line in lines] == [" left out"] * 2
    broken.remove()
    assert trainer.train(batches(1)) is not None and trainer.step == 6 and trainer.skipped == 0


def test_float16_scales_its_loss_and_keeps_the_scale() -> None:
    model = hybrid()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    trainer = Trainer(model, adamw(model), scaler, steps=4, log_every=0)
    assert trainer.config.precision == "fp16" and trainer.scaler.scale == 2.0**60
    trainer.train(batches(2))
    saved = trainer.scaler.state_dict()
    assert set(saved) == set(torch.amp.GradScaler("cpu").state_dict())
    assert saved["scale"] < 2.0**60  # it overflowed, was halved, and no step was taken then
    other = torch.amp.GradScaler("cpu")
    other.load_state_dict(saved)
    again = GivenScaler(torch.amp.GradScaler("cpu"))
    again.load_state_dict(saved)
    assert again.scale == other.get_scale() == saved["scale"]
    with pytest.raises(TrainingError, match="the GradScaler says otherwise"):
        Trainer(model, adamw(model), torch.amp.GradScaler("cpu", growth_interval=5))
    assert GivenScaler(None).state_dict() == torch.amp.GradScaler("cpu", enabled=False).state_dict() == {}


@pytest.mark.parametrize("cls", [BitByteLM, MambaMLM, HybridLM])
def test_resumed_is_as_if_it_had_never_stopped(cls: type[ByteLM], tmp_path: Path) -> None:
    def start(**more: Any) -> tuple[ByteLM, Trainer]:
        torch.manual_seed(0)
        model = cls(**SMALL, **({} if cls is MambaMLM else {"n_head": 2}))
        options = {"steps": 8, "grad_accum": 2, "curriculum": ((0.5, 10),), "log_every": 0, **more}
        return model, Trainer(model, adamw(model), None, **options)

    model, trainer = start(out=tmp_path, save_every=4, args=argparse.Namespace(data="bytes", lr=3e-3))
    trainer.train(batches(5))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt_000004.pt", "ckpt_000008.pt"]
    again, other = start()
    assert other.resume(tmp_path / "ckpt_000004.pt") == 4
    other.train(batches(5))
    assert other.loss == trainer.loss
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    # the form is BitByte's, and what it says is the same model to others
    held = torch.load(tmp_path / "ckpt_000008.pt", weights_only=True)
    assert set(held) == {"step", "model", "opt", "scaler", "args", "model_family"}
    assert held["model_family"] == cls.family and held["args"]["data"] == "bytes" and held["scaler"] == {}
    converted = convert(tmp_path / "ckpt_000008.pt", tmp_path / "converted", "bitbyte")
    ids = batches(1)[0]
    torch.testing.assert_close(converted(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


def test_activations_that_are_not_rounded_stay_so(tmp_path: Path) -> None:
    model = MambaMLM(**SMALL, act_quant=False)
    Trainer(model, adamw(model)).save(tmp_path / "a.pt")
    converted = convert(tmp_path / "a.pt", tmp_path / "converted", "bitbyte")
    assert converted.config.linear.activations == "none"
    assert torch.load(tmp_path / "a.pt", weights_only=True)["args"]["no_act_quant"] is True


def test_a_checkpoint_of_bitbytes_own(tmp_path: Path) -> None:
    """Weights, step and optimizer as its trainer keeps them, the flags as a Namespace."""
    tensors = load_file(FIXTURES / "mambamlm_state_dict.safetensors")
    settings = json.loads((FIXTURES / "oracle.json").read_text())["cases"]["mambamlm"]["config"]
    model = MambaMLM(**settings)
    first = {n: nn.Parameter(t.clone()) for n, t in tensors.items() if n != "lm_head.weight"}
    optimizer = torch.optim.AdamW(first.values())  # in the order of its own names
    sum(p.sum() for p in first.values()).backward()
    optimizer.step()
    checkpoint = {
        "step": 700,
        "model": {f"module.{n}": t for n, t in tensors.items()},
        "opt": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(**settings, lr=3e-4),
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    trainer = Trainer(model, adamw(model), steps=701, log_every=0)
    with pytest.raises(CheckpointError, match=r"of other parameters.*opt_state=False"):
        trainer.resume(tmp_path / "ckpt.pt")
    assert trainer.step == 0
    assert trainer.resume(tmp_path / "ckpt.pt", opt_state=False) == 700
    true = load_file(FIXTURES / "mambamlm.safetensors")
    assert (model(true["input_ids"]) - true["logits_act_on"]).abs().max() < 2e-2
    assert trainer.train(batches(1)) is not None and trainer.step == 701


def test_what_cannot_be_resumed_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = hybrid()
    trainer = Trainer(model, adamw(model))
    trainer.save(tmp_path / "good.pt")
    held = torch.load(tmp_path / "good.pt", weights_only=True)
    cases: list[tuple[dict[str, Any], str]] = [
        ({k: v for k, v in held.items() if k != "model"}, "has no 'model'"),
        ({**held, "step": "3"}, "its step is '3'"),
        ({**held, "opt": None}, "has no optimizer's state"),
        ({**held, "model": BitByteLM(**SMALL, n_head=2).state_dict()}, "are of another family"),
        ({**held, "model": {**held["model"], "more": torch.zeros(2)}}, "the tensor more"),
    ]
    before = [p.clone() for p in model.parameters()]
    for checkpoint, message in cases:
        torch.save(checkpoint, tmp_path / "bad.pt")
        with pytest.raises(CheckpointError, match=message):
            trainer.resume(tmp_path / "bad.pt")
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="damaged"):
        trainer.resume(tmp_path / "bad.pt")
    torch.save({**held, "args": print}, tmp_path / "bad.pt")  # what would run code
    with pytest.raises(CheckpointError, match="holds more than tensors and plain data"):
        trainer.resume(tmp_path / "bad.pt")
    other = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match="the optimizer holds a parameter that the model has not"):
        Trainer(model, adamw(other))
    mine = nn.Embedding(256, 256)
    own = Trainer(mine, adamw(mine))
    with pytest.raises(CheckpointError, match="Missing key"):
        own.resume(tmp_path / "good.pt")


def test_several_processes_train_one_model(tmp_path: Path) -> None:
    """Two processes with half of each batch each, through DistributedDataParallel, equal one with all of it."""
    script = tmp_path / "ddp.py"
    script.write_text(
        "import torch, torch.distributed as dist\n"
        "from torch.nn.parallel import DistributedDataParallel\n"
        "from tests.compat.bitbyte_models import batches, hybrid, plain_options\n"
        "from plait.compat.bitbyte.training.trainer import Trainer\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo')\n"
        "model = DistributedDataParallel(hybrid())\n"
        "trainer = Trainer(model, **plain_options(model), out='.')\n"
        "rank = dist.get_rank()\n"
        "loss = trainer.train([ids[rank : rank + 1] for ids in batches(4)])\n"
        "print(f'loss {loss:.6f}') if rank == 0 else None\n"
        "dist.destroy_process_group()\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    model = hybrid()
    loss = Trainer(model, **plain_options(model)).train(batches(4))
    assert float(run.stdout.split("loss ")[1]) == pytest.approx(loss, rel=1e-5)
    held = torch.load(tmp_path / "ckpt_000003.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(held["model"][name], tensor, atol=1e-5, rtol=1e-4)
