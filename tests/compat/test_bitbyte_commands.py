"""BitByte's commands over Plait's: train by flags, validate, generate, demonstrate."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import plait
from plait.cli.entry import main as plait_command
from plait.compat.bitbyte import demo_generate, demo_mamba, train, validate
from plait.compat.bitbyte.data import ByteShardDataset
from plait.compat.bitbyte.models.mamba_mlm import MambaMLM
from plait.compat.bitbyte.training.trainer import Trainer
from plait.config.errors import ConfigError
from plait.evaluation.bits_per_byte import bits_per_byte
from plait.formats.folders import list_checkpoints
from tests.compat.bitbyte_models import FIXTURES, SMALL, adamw

SIZES = ["--n_layer=2", "--d_model", "32", "--n_head", "2", "--d_ff", "48"]


def flags(shards: Path, out: Path) -> list[str]:
    """Every flag of BitByte's trainer but those of several processes and of resuming."""
    return [
        *("--data", str(shards), "--out", str(out), "--steps", "6", "--log_every", "2", "--save_every", "3"),
        *SIZES,
        *(
            "--use_sdpa",
            "--no_ckpt",
            "--no_act_quant",
            "--lr",
            "0.003",
            "--warmup_frac",
            "0.1",
            "--wd",
            "0.05",
        ),
        *("--grad_clip", "0.5", "--batch_size", "2", "--grad_accum", "2", "--seq_len", "32"),
        *("--seq_len_cap", "24", "--data.cache", str(out.parent / "cache"), "--training.device=cpu"),
    ]


def test_end_to_end_by_flags(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Trains, saves, resumes, validates and generates; each flag is in the run that its folder describes."""
    out = tmp_path / "run"
    assert train.main(flags(shards, out)) == 0
    config = plait.load_config(out / "config.yaml")
    t, m = config.training, config.model
    assert (t.steps, t.log_every, t.checkpoint_every, t.lr, t.warmup) == (6, 2, 3, 0.003, 0.1)
    assert (t.weight_decay, t.grad_clip, t.batch_tokens, t.micro_batch_tokens) == (0.05, 0.5, 96, 48)
    assert (t.schedule, t.min_lr_ratio, t.betas, t.precision) == ("cosine", 0.1, (0.9, 0.95), "fp32")
    assert t.activation_checkpointing == "none" and not t.sequence_length_schedule and t.skip_nonfinite == 10
    assert (config.data.sequence_length, config.data.format, config.data.documents) == (24, "bytes", "joined")
    assert (m.d_model, m.mlp.width, m.linear.kind, m.linear.activations) == (32, 48, "ternary", "none")
    assert [layer.kind for layer in m.layers()] == ["attention"] * 2 and m.layers()[0].options.n_head == 2
    assert [int(p.name.split("-")[1]) for p in list_checkpoints(out)] == [3, 6]

    more = [word if word != "6" else "9" for word in flags(shards, out)]
    assert train.main([*more, "--resume", str(out)]) == 0
    assert list_checkpoints(out)[-1].name.endswith("09")
    begun = [word if word != str(out) else str(tmp_path / "new") for word in flags(shards, out)]
    assert train.main([*begun, "--resume", str(out), "--no_opt_state"]) == 0
    assert plait.load_config(tmp_path / "new" / "config.yaml").training.init_from.startswith(str(out))

    capfd.readouterr()
    assert validate.main(["--ckpt", str(out), "--data", str(shards), "--device", "cpu"]) == 0
    shown = capfd.readouterr().out
    texts = [path.read_bytes() for path in sorted(shards.glob("*.bin"))]
    score = bits_per_byte(plait.load(out), texts)
    assert score.n_bytes == 3037 and f"{score.bits_per_byte:.4f}" in shown
    words = ["--ckpt", str(out), "--prompt", "the quick", "--max_new_tokens", "12", "--temperature", "0"]
    assert demo_generate.main([*words, "--device=cpu"]) == 0
    want = plait.load(out).generate("the quick", max_new_tokens=12, temperature=0.0)
    assert capfd.readouterr().out.rstrip("\n") == want.rstrip("\n")


def test_a_checkpoint_of_the_trainers_is_validated_and_continued(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = MambaMLM(**SMALL)
    loader = DataLoader(ByteShardDataset(shards, 32), batch_size=4)
    Trainer(model, adamw(model, 1e-2), steps=20, log_every=0, out=tmp_path, save_every=10).train(loader)
    texts = [path.read_bytes() for path in sorted(shards.glob("*.bin"))]
    for path in (tmp_path, tmp_path / "ckpt_000020.pt"):  # of several it is the last
        assert validate.main(["--ckpt", str(path), "--data", str(shards)]) == 0
        shown = capfd.readouterr().out
    nats = sum(
        F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum").item() + math.log(256)
        for ids in (torch.tensor([list(text)]) for text in texts)
    )
    # the first byte of each file is guessed
    assert float(shown.split()[3]) == pytest.approx(nats / math.log(2) / 3037, abs=2e-4)
    words = ["--ckpt", str(tmp_path), "--prompt", "the ", "--max_new_tokens=5", "--temperature=0"]
    assert demo_generate.main(words) == 0
    ids = model.generate(torch.tensor([list(b"the ")]), 5, temperature=0.0)[0, 4:]
    assert capfd.readouterr().out.rstrip("\n") == bytes(ids.tolist()).decode(errors="replace").rstrip("\n")


def test_families_curriculum_and_packed_folders(tmp_path: Path) -> None:
    def config(*words: str) -> plait.Config:
        return train.run_config(train.read_command_line([*SIZES, *words], train.Flags))

    for family, pattern, norm in (
        ("bitbyte", ["attention"] * 2, "rms"),
        ("mamba", ["mamba"] * 2, "layer"),
        ("hybrid", ["mamba", "attention"], "rms"),
    ):
        made = config(f"--model_family={family}")
        assert [layer.kind for layer in made.model.layers()] == pattern
        assert made.model.final_norm.kind == norm
    made = config("--seq_len_cap=3000", "--batch_size=3", "--grad_accum=2")
    stages = [(s.length, s.until) for s in made.training.sequence_length_schedule]
    assert stages == [(2048, 0.2), (4096, 0.5)] and made.data.sequence_length == 3000
    assert made.training.batch_tokens == 18000 and made.training.activation_checkpointing == "block"
    assert made.model.linear.activations == "int8" and made.run_folder == str(Path("runs/bitbyte"))
    assert config("--training.muon_lr=0.1").training.muon_lr == 0.1
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"text {number}\n" * 20)
    out = tmp_path / "packed"
    words = ["data", "pack", str(tmp_path), "--out", str(out), "--validation-fraction", "0.2"]
    assert plait_command(words) == 0
    made = config("--data", str(out))
    assert (made.data.train, made.data.validation) == (str(out / "train"), str(out / "validation"))
    stream = np.fromfile(out / "train" / "shard_00000.bin", np.uint8)
    assert len(ByteShardDataset(out / "train", 32)) == len(stream) // 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--diffusion"], "diffusion over bytes was not taken over"),
        (["--use_deq=true"], r"deep equilibrium models \(DEQ\) was not taken over"),
        (["--galore_rank", "4"], "GaLore was not taken over"),
        (["--adamw8bit"], "8-bit Adam was not taken over"),
        (["--log-linear"], "the log-linear state space was not taken over"),
        (["--d_modle=3"], r"there is no setting 'd_modle' \(did you mean 'd_model'\?\)"),
        (["--ddp"], "--ddp: start the processes with torchrun"),
        (["--no_opt_state"], "no_opt_state: it goes with --resume"),
        (["--use_sdpa=false"], "use_sdpa: attention has no other form"),
        (["--lr=-1"], "lr: expected"),
        (
            ["--data=bytes", "--resume", str(FIXTURES / "mambamlm.safetensors")],
            "--resume wants a run's folder",
        ),
    ],
)
def test_what_is_not_taken_over_is_said_by_name(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match=message):
        train.main(words)


def test_the_demonstration_trains_and_writes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--steps=2", f"--out={tmp_path / 'run'}", "--n_layer=1", "--d_model=16", "--d_ff=16"]
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 300)
    more = [f"--data={text}", "--data.validation_fraction=0", f"--data.cache={tmp_path}", "--seq_len=32"]
    assert demo_mamba.main([*words, *more]) == 0
    assert [layer.kind for layer in plait.load(tmp_path / "run").config.layers()] == ["mamba"]
    assert len(capfd.readouterr().out) > 200
