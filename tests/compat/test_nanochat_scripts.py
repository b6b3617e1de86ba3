"""nanochat's scripts from the raw text to a conversation: in its own folder, under its own settings, shrunk."""

from __future__ import annotations

import ast
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import plait
from plait.compat.nanochat.blocks import BaseBlock, register_block
from plait.compat.nanochat.checkpoint_manager import load_model
from plait.compat.nanochat.common import get_base_dir, run_script
from plait.compat.nanochat.configurator import read_command_line
from plait.compat.nanochat.engine import Engine
from plait.compat.nanochat.scripts import base_eval, base_loss, base_train, chat_cli, tok_eval, tok_train
from plait.compat.nanochat.scripts.base_train import Settings
from plait.compat.nanochat.scripts.chat_sft import ChatSFT
from plait.compat.nanochat.scripts.fine_tuning import FineTuning, fine_tune
from plait.compat.nanochat.tokenizer import get_token_bytes, get_tokenizer
from plait.config.errors import ConfigError
from plait.config.load import load_config
from plait.config.originals.nanochat import WHOLE_BLOCKS
from plait.config.table import TABLE
from plait.formats.folders import list_checkpoints
from plait.formats.nanochat import write

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "and",
    "sleeps",
    "under",
    "old",
    "trees",
]
# nanochat's names for what it names; Plait's for a width that is no depth's.
SMALL = [
    "--depth=4",
    "--max_seq_len=32",
    "--device-batch-size",
    "4",
    "--total_batch_size=256",
    "--num_iterations=4",
    "--eval_tokens=512",
    "--sample_every=-1",
    "--device_type=cpu",
]
NARROW = ["--model.d_model=32", "--model.attention={n_head: 2, n_kv_head: 1}"]
HYBRID = ["configs/hybrid_alternating_d20.py", *SMALL, '--block_pattern=["T", "M"] * 2', *NARROW]
CONVERSATIONS = [
    [
        {"role": "user", "content": f"What is {WORDS[i]}?"},
        {"role": "assistant", "content": f"The {WORDS[i]} is {WORDS[-i - 1]}."},
    ]
    for i in range(len(WORDS))
]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60))) + "."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nanochat's folder with three files of text, a tokenizer, and a hybrid that was trained for 4 steps."""
    folder = tmp_path_factory.mktemp("nanochat")
    rng = random.Random(0)
    (folder / "base_data").mkdir()
    for number in range(3):
        texts = [sentence(rng) for _ in range(40)]
        pq.write_table(pa.table({"text": texts}), folder / "base_data" / f"shard_{number:05}.parquet")
    (folder / "conversations").mkdir()
    lines = "".join(json.dumps({"messages": messages}) + "\n" for messages in CONVERSATIONS * 3)
    (folder / "conversations" / "some.jsonl").write_text(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        patch.setenv("PLAIT_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        assert tok_train.main(["--vocab_size=320", "--doc_cap=200", "--max-chars", "4000"]) == 0
        assert base_train.main(HYBRID) == 0
        yield folder


def test_the_tokenizer_is_nanochats(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == 320 and get_base_dir() == base
    names = [
        "bos",
        *(f"{who}_{end}" for who in ("user", "assistant", "python", "output") for end in ("start", "end")),
    ]
    assert [tokenizer.encode_special(f"<|{name}|>") for name in names] == list(range(311, 320))
    assert tokenizer.get_special_tokens() == {f"<|{name}|>" for name in names}
    assert tokenizer.get_bos_token_id() == 311 and tokenizer.id_to_token(312) == "<|user_start|>"
    text = "the quick <|bos|> fox, 1234 é"
    ids = tokenizer.encode(text, prepend="<|bos|>", append=319)
    assert (ids[0], ids[-1]) == (311, 319) and 311 not in ids[1:], "a special token is never read out of text"
    assert tokenizer.decode(ids) == f"<|bos|>{text}<|output_end|>"
    assert tokenizer(["a", "fox"]) == [tokenizer.encode("a"), tokenizer.encode("fox")]
    table = get_token_bytes()
    assert table.shape == (320,) and table[311:].sum() == 0
    assert table[torch.tensor(tokenizer.encode(text))].sum() == len(text.encode())
    assert tok_eval.main([]) == 0
    shown = capsys.readouterr().out
    ratio = float(re.search(r"320 ids, ([\d.]+) bytes a token", shown)[1])  # type: ignore[index]
    assert 2 < ratio < 12
    conversation = {"messages": CONVERSATIONS[1]}
    ids, mask = tokenizer.render_conversation(conversation)
    learnt = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(learnt) == "The quick is old.<|assistant_end|>" and mask[0] == 0
    prompt = tokenizer.render_for_completion(conversation)
    assert tokenizer.decode(prompt) == "<|bos|><|user_start|>What is quick?<|user_end|><|assistant_start|>"
    colours = tokenizer.visualize_tokenization(ids, mask)
    assert colours.count("\x1b[32m") == sum(mask) and colours.count("\x1b[31m") == len(mask) - sum(mask)


def test_the_run_begins_with_the_config_that_it_builds(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert base_train.main([*HYBRID, "--dry-run"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Building model with config: {")
    shown = ast.literal_eval(first.removeprefix("Building model with config: "))
    assert shown == {
        "sequence_len": 32,
        "vocab_size": 320,
        "n_layer": 4,
        "n_head": 2,
        "n_kv_head": 1,
        "n_embd": 32,
        "block_pattern": ["T", "M", "T", "M"],
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "mamba_use_mlp": False,
    }


def test_what_was_trained_is_what_the_config_says(base: Path) -> None:
    run = base / "base_checkpoints" / "d4"
    saved = load_config(run / "config.yaml")
    assert saved.training.steps == 4 and saved.training.batch_tokens == 256
    assert saved.training.micro_batch_tokens == 128 and saved.data.validation_split == "last_file"
    assert saved.data.train == str(base / "base_data" / "*.parquet")
    model, tokenizer, meta = load_model("base", "cpu", "eval")
    assert [block.kind for block in model.model.blocks] == ["attention", "mamba"] * 2
    assert meta["step"] == 4 and meta["model_config"]["block_pattern"] == ["T", "M", "T", "M"]
    assert tokenizer.get_vocab_size() == model.config.vocab_size == 320 and not model.training
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert abs(losses[0] - 5.768) < 0.01 and losses[-1] < losses[0] - 0.5  # ln 320
    assert load_model("base", "cpu", "train", model_tag="d4", step=4)[0].training


def test_it_goes_on_where_it_stopped_and_generates(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = base / "base_checkpoints" / "d4"
    longer = [word if "num_iter" not in word else "--num_iterations=6" for word in HYBRID]
    assert base_train.main([*longer, f"--training.out={base / 'on'}", f"--resume={run}"]) == 0
    assert "resumed at step 4" in capfd.readouterr().err
    assert [path.name for path in list_checkpoints(base / "on")] == ["step-00000006"]
    model = plait.load(base / "on")
    assert [block.kind for block in model.blocks] == ["attention", "mamba"] * 2
    assert isinstance(model.generate("the quick", max_new_tokens=5), str)
    assert run_script(lambda: base_train.main(HYBRID)) == 1  # there is a run already, and it says so
    assert "already holds a run" in capfd.readouterr().err


def test_bits_per_byte_of_both_sides(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert base_loss.main(["--split_tokens=400", "--device_type=cpu"]) == 0
    found = re.findall(r"(train|val) bpb: ([\d.]+) \((\d+) tokens, (\d+) bytes\)", capsys.readouterr().out)
    assert [side for side, *_ in found] == ["train", "val"]
    for _, bits, tokens, n_bytes in found:
        assert 400 <= int(tokens) < 480 and int(n_bytes) > 2 * int(tokens) and 0.5 < float(bits) < 4


def test_core_of_local_files(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words that the texts are made of: the model has seen no others, so wrong answers are letters."""
    items = [{"query": "the", "choices": ["zxqvj", "quick"], "gold": 1} for _ in range(4)]
    folder = base / "eval_bundle"
    (folder / "eval_data").mkdir(parents=True)
    (folder / "eval_data" / "words.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nwords,50\n")
    entry = {
        "label": "words",
        "dataset_uri": "words.jsonl",
        "icl_task_type": "multiple_choice",
        "num_fewshot": [1],
    }
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [entry]}))
    assert base_eval.main(["--max-per-task=3", "--device_type=cpu"]) == 0
    out = capsys.readouterr().out
    accuracy, centered = map(
        float, re.search(r"words: accuracy ([\d.]+), centered ([-\d.]+) \(3 items\)", out).groups()
    )  # type: ignore[union-attr]
    assert accuracy in (0.0, 1.0) and centered == 2 * accuracy - 1  # the same item each time
    assert f"CORE metric: {centered:.4f}" in out
    (written,) = (base / "base_eval").glob("base_model_*.csv")
    assert f"CORE,,{centered:.6f}" in written.read_text()


def test_fine_tuned_it_answers(base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "--source=base",
        "--max_seq_len=64",
        "--device_batch_size=4",
        "--total_batch_size=512",
        "--device_type=cpu",
    ]
    assert fine_tune([*words, "--num_iterations=3", "--init_lr_frac=0.5"], ChatSFT, "sft") == 0
    saved = load_config(base / "chatsft_checkpoints" / "d4" / "config.yaml")
    assert saved.training.objective == "chat" and saved.training.decay_fraction == 1.0
    assert saved.training.embedding_lr == pytest.approx(0.1) and saved.training.muon_lr == pytest.approx(0.01)
    assert saved.training.init_from == str(base / "base_checkpoints" / "d4" / "checkpoints" / "step-00000004")
    tuned, tokenizer, _ = load_model("sft")
    assert [block.kind for block in tuned.model.blocks] == ["attention", "mamba"] * 2
    engine = Engine(tuned, tokenizer)
    prompt = tokenizer.render_for_completion({"messages": CONVERSATIONS[0]})
    columns = list(engine.generate(prompt, num_samples=2, max_tokens=6, temperature=0))
    assert 0 < len(columns) <= 6 and all(len(column) == len(mask) == 2 for column, mask in columns)
    assert all(column[0] == column[1] for column, _ in columns)
    results, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=6, temperature=0)
    ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    said = [token for token in (column[0] for column, _ in columns) if token not in ends]
    assert results == [prompt + said] * 2 and masks[0] == [0] * len(prompt) + [1] * len(said)
    without_end = engine.generate_batch(prompt, temperature=0)[0][0]
    assert len(without_end) <= 64 and without_end[: len(results[0])] == results[0]
    capfd.readouterr()
    assert (
        chat_cli.main(["-i", "sft", "-p", "What is fox?", "-t", "0", "-k", "5", "--device-type", "cpu"]) == 0
    )
    assert capfd.readouterr().out.endswith("\n")


def test_midtraining_takes_nanochats_own_files_as_well(base: Path) -> None:
    """A base model in nanochat's layout: converted for the time of the start, learnt on, saved as a run."""
    model, tokenizer, _ = load_model("base", model_tag="d4")
    write(model.model, base / "base_checkpoints" / "theirs", step=7, tokenizer=tokenizer.tokenizer)
    words = ["--max_seq_len=64", "--device_batch_size=2", "--total_batch_size=256", "--device_type=cpu"]
    words += ["--model_tag=theirs", "--num_iterations=2", "--overwrite"]
    assert fine_tune(words, FineTuning, "mid") == 0
    learnt = load_model("mid", model_tag="theirs")[0]
    moved = learnt.transformer.wte.weight - model.transformer.wte.weight
    assert learnt.block_pattern == model.block_pattern and 0 < moved.abs().max() < 3
    for path in (base / "tokenizer").glob("token*.p*"):
        path.unlink()  # as it was for the other tests: a folder with a tokenizer.json alone


def test_a_block_type_of_ones_own_in_a_config(base: Path, tmp_path: Path) -> None:
    @register_block("halved")
    class Halved(BaseBlock):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.proj = torch.nn.Linear(config.n_embd, config.n_embd)

        def forward(self, x: torch.Tensor, context: dict[str, Any] | None = None) -> torch.Tensor:
            return x + 0.5 * self.proj(x)

    try:
        file = tmp_path / "own.py"
        file.write_text('depth = 1\nblock_pattern = ["M", "halved", "T"][0:3]\n')
        with pytest.raises(ConfigError, match=r"own\.py line 2: .*only literals"):
            base_train.main([str(file)])
        file.write_text('depth = 3\nblock_pattern = ["M", "halved", "T"]\nnum_iterations = 2\n')
        words = [str(file), *SMALL[1:5], "--total_batch_size=128", "--eval_tokens=128", "--sample_every=-1"]
        assert base_train.main([*words, "--device_type=cpu", f"--training.out={tmp_path / 'run'}"]) == 0
        model = plait.load(tmp_path / "run")
        own = model.blocks[1].mixer.module
        assert type(own) is Halved and own.config.n_embd == 192 and own.layer_idx == 1
        assert (own.proj.weight.abs().max() > 0) and own.proj.bias.abs().max() > 0
        with pytest.warns(UserWarning, match="keeps no state"):
            assert isinstance(model.generate("the", max_new_tokens=3), str)
    finally:
        TABLE.pop("halved")
        WHOLE_BLOCKS.discard("halved")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (["--", "--depth=20"], {"depth": 20}),
        (["--depth", "20", "--max-seq-len=512"], {"depth": 20, "max_seq_len": 512}),
        (["--mamba_use_mlp", "--run=007"], {"mamba_use_mlp": True, "run": "007"}),
        (["--mamba-use-mlp=true"], {"mamba_use_mlp": "true"}),
        (["--block_pattern=['T'] * 3 + ['M']"], {"block_pattern": ["T", "T", "T", "M"]}),
        (["--block_pattern=T*3 M"], {"block_pattern": "T*3 M"}),
        (["--target_flops=1e18", "--grad_clip=0"], {"target_flops": 1e18, "grad_clip": 0}),
        (["--depth=4", "--depth=6"], {"depth": 6}),
    ],
)
def test_settings_have_every_form_of_nanochats(words: list[str], settings: dict[str, Any]) -> None:
    line = read_command_line(words, Settings)
    assert line.settings == settings and line.overrides == [] and line.source is None
    Settings.model_validate(line.settings)


def test_a_file_comes_first_and_options_go_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["configs/rtx3070_d16.py", "--device_batch_size=2", "--training.lr", "1e-3", "--data.train=x"]
    line = read_command_line(words, Settings)
    assert line.settings["device_batch_size"] == 2 and line.settings["max_seq_len"] == 1024
    assert (
        line.settings["block_pattern"] == ["T"] * 10 + ["M"] * 6 and line.source == "configs/rtx3070_d16.py"
    )
    assert line.overrides == ["--training.lr=1e-3", "--data.train=x"]
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "rtx3070_d16.py").write_text("depth = 2\n")
    assert read_command_line(["configs/rtx3070_d16.py"], Settings).settings == {"depth": 2}, (
        "one's own comes first"
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--block_patern=T"], r"no setting 'block_patern' .did you mean 'block_pattern'"),
        (["--depth"], r"--depth: a value must follow"),
        (["a.py", "b.py"], r"one config file at most; got a\.py, b\.py"),
        (["configs/mamba_d21.py"], r"configs/mamba_d21\.py: there is no such file"),
    ],
)
def test_a_wrong_command_line(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_command_line(words, Settings)


def test_a_config_is_read_and_never_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evil.py"
    file.write_text(f"import os\nos.makedirs({str(tmp_path / 'made')!r})\ndepth = 4\n")
    assert run_script(lambda: base_train.main([str(file)])) == 1
    assert "a config holds only assignments" in capsys.readouterr().err and not (tmp_path / "made").exists()
    assert os.listdir(tmp_path) == ["evil.py"]
