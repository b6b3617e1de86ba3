"""``plait chat`` and what leads to it: conversations into a model, on a command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.schema import ModelConfig
from plait.formats import nanochat
from plait.formats.native import save_model
from plait.models import Model
from plait.tokenizers import load_tokenizer
from plait.tokenizers.chat import NANOCHAT_SPECIAL_TOKENS
from plait.tokenizers.nanochat import write_tokenizer
from plait.tokenizers.train import train_subwords
from tests.cli.conftest import TINY, Run, run_plait
from tests.inference.chat_models import BYTES, T, chain, rigged
from tests.invariants import redraw

TALKS = [
    [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}],
    [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}],
]


def saved(folder: Path, model: Model) -> Path:
    save_model(model, folder, BYTES)
    return folder


@pytest.fixture(scope="module")
def calculating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers anything with a calculation."""
    call = [T.assistant_start, *b"a ", T.python_start, *b"6*7", T.python_end]
    follows = chain(*call) | chain(T.output_end, ord("!"), T.assistant_end)
    return saved(tmp_path_factory.mktemp("model"), rigged(follows))


@pytest.fixture(scope="module")
def polite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained on conversations by a command."""
    folder = tmp_path_factory.mktemp("polite")
    (folder / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    ran = run_plait(
        "train",
        *(
            word
            for word in TINY
            if "validation" not in word and "d_model" not in word and "sequence" not in word
        ),
        "--model.d_model=32",
        "--training.objective=chat",
        f"--data.train={folder / 'chat.jsonl'}",
        "--data.validation_fraction=0",
        f"--data.cache={folder / 'cache'}",
        "--data.sequence_length=64",
        "--training.steps=60",
        "--training.lr=2e-2",
        f"--training.out={folder / 'run'}",
    )
    assert ran.status == 0, ran.err
    return folder / "run"


def test_one_question(polite: Path, plait: Run) -> None:
    for question, answer in (("hello", "hi there\n"), ("bye", "so long\n")):
        ran = plait("chat", polite, "-p", question, "-t", 0)
        assert (ran.status, ran.out) == (0, answer), ran


def test_a_conversation_over_stdin(polite: Path, plait: Run) -> None:
    ran = plait("chat", polite, "-t", 0, "-k", 1, stdin="hello\n\nclear\nbye\nCLEAR\nhello\nquit\nbye\n")
    assert (ran.status, ran.out) == (0, "hi there\nso long\nhi there\n"), ran
    assert plait("chat", polite, stdin="").out == ""


def test_a_calculation_is_shown_in_brackets(calculating: Path, plait: Run) -> None:
    assert plait("chat", calculating, "-p", "?", "-t", 0).out == "a [6*7 = 42]!\n"
    assert plait("chat", calculating, "-p", "?", "-t", 0, "--no-tools").out == "a [6*7]\n"
    assert plait("chat", calculating, "-p", "?", "-t", 0, "--max-new-tokens", 5).out == "a [6*]\n"


def test_what_the_model_is_told_first(calculating: Path, plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from plait.inference.chat import ChatEngine

    prompts: list[str] = []
    stream = ChatEngine.stream

    def noted(self: ChatEngine, tokens: list[int], *more: Any, **options: Any) -> Any:
        prompts.append(BYTES.decode(tokens))
        return stream(self, tokens, *more, **options)

    monkeypatch.setattr(ChatEngine, "stream", noted)
    assert (
        plait("chat", calculating, "-t", 0, "--system", "Be kind.", stdin="one\ntwo\nclear\nthree\n").status
        == 0
    )
    answer = "a 6*742!"
    assert prompts == ["Be kind.\n\none", f"Be kind.\n\none{answer}two", "Be kind.\n\nthree"]


def test_the_same_seed_gives_the_same_answers(tmp_path: Path, plait: Run) -> None:
    torch.manual_seed(0)
    model = rigged({})
    with torch.no_grad():
        model.head.unembedding.weight.normal_(std=0.3)
    folder = saved(tmp_path, model)
    words = ("chat", folder, "-t", 1, "-k", 0, "--max-new-tokens", 20)
    first = plait(*words, "--seed", 3, stdin="x\nclear\nx\n")
    again = plait(*words, "--seed", 3, stdin="x\nclear\nx\n")
    other = plait(*words, "--seed", 4, stdin="x\nclear\nx\n")
    assert first.out == again.out != other.out
    assert first.status == 0


def test_an_interrupt_ends_the_answer_alone(
    calculating: Path, plait: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.cli import chat

    write, shown = chat.write, []

    def interrupted(text: str) -> None:
        shown.append(text)
        if shown.count(" ") == 1 and text == " ":
            raise KeyboardInterrupt
        write(text)

    monkeypatch.setattr(chat, "write", interrupted)
    ran = plait("chat", calculating, "-t", 0, stdin="one\ntwo\n")
    assert (ran.status, ran.out) == (0, "a\na [6*7 = 42]!\n")
    shown.clear()
    assert plait("chat", calculating, "-t", 0, "-p", "one").status == 130


def test_fine_tuning_on_a_command_line(trained: Path, polite: Path, tmp_path: Path, plait: Run) -> None:
    """What is shown is the model that is taken over, with its new tokens; the command that comes next works."""
    data = f"--data.train={polite.parent / 'chat.jsonl'}"
    words = (
        "--training.objective=chat",
        f"--training.init_from={trained}",
        data,
        "--data.validation_fraction=0",
    )
    more = (
        "--data.sequence_length=64",
        "--training.batch_tokens=64",
        "--training.steps=2",
        "--training.device=cpu",
    )
    ran = plait("train", *words, *more, f"--training.out={tmp_path / 'tuned'}")
    assert ran.status == 0, ran.err
    assert "268 ids" in ran.out and "mamba2" in ran.out, ran.out
    [command] = [line.split("#")[0].split() for line in ran.out.splitlines() if "plait chat" in line]
    assert plait(*command[1:], "-p", "hello", "--max-new-tokens", 4).status == 0
    assert "plait generate" not in ran.out
    again = plait(
        "train", *words, *more, f"--training.out={tmp_path / 'tuned'}", "--training.steps=3", "--resume"
    )
    assert again.status == 0 and "resumed at step 2" in again.err + again.out


def test_mistakes(calculating: Path, tmp_path: Path, plait: Run) -> None:
    assert "there is no folder" in plait("chat", tmp_path / "nothing").error
    model = rigged({})
    save_model(model, tmp_path / "mute")
    assert "the model has no tokenizer" in plait("chat", tmp_path / "mute", "-p", "x").error
    from plait.tokenizers.bytes import BytesTokenizer

    save_model(model, tmp_path / "plain", BytesTokenizer())
    error = plait("chat", tmp_path / "plain", "-p", "x").error
    assert "has no token <|user_start|> for conversations" in error and "training.objective: chat" in error
    assert plait("chat", calculating, "-t", -1).status == 2


def test_prepare_counts_conversations(tmp_path: Path, plait: Run) -> None:
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    words = (
        "--training.objective=chat",
        "--data.validation_fraction=0",
        f"--data.cache={tmp_path / 'cache'}",
    )
    ran = plait("data", "prepare", f"--data.train={tmp_path / 'chat.jsonl'}", *words)
    assert ran.status == 0 and len(list((tmp_path / "cache").glob("*/mask.bin"))) == 1
    [row] = [line.split() for line in ran.out.splitlines() if "train" in line and "/" not in line]
    assert row[:4] == ["train", "2", "23", "B"]  # conversations, their text


def test_a_tokenizer_for_conversations_is_trained(tmp_path: Path, plait: Run) -> None:
    (tmp_path / "a.txt").write_text("the fox 123456 jumps " * 50)
    words = ("--data", tmp_path / "a.txt", "--out", tmp_path / "tokenizer", "--vocab-size", 300)
    assert plait("tokenizer", "train", *words, "--chat", "--split", "nanochat").status == 0
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert set(NANOCHAT_SPECIAL_TOKENS) <= tokenizer.special_tokens.keys()
    assert all(len(tokenizer.decode([i])) < 3 for i in tokenizer.encode("123456"))
    error = plait("tokenizer", "train", *words, "--type", "characters", "--split", "nanochat").error
    assert "tokenizer.split is for bpe and unigram" in error


def test_a_nanochat_tokenizer_is_imported(tmp_path: Path, plait: Run) -> None:
    theirs = train_subwords("bpe", ["the fox 123 jumps"] * 9, 290, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
    write_tokenizer(theirs, tmp_path / "theirs")
    words = ("tokenizer", "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert "--allow-pickle" in plait(*words).error and not (tmp_path / "ours").exists()
    ran = plait(*words, "--allow-pickle")
    assert ran.status == 0 and f"--tokenizer.path={tmp_path / 'ours'}" in ran.out
    assert load_tokenizer(tmp_path / "ours").encode("the fox 1234") == theirs.encode("the fox 1234")


def test_a_nanochat_model_with_its_pickled_tokenizer_is_converted_and_answers(
    tmp_path: Path, plait: Run
) -> None:
    theirs = train_subwords("bpe", ["the fox 123 jumps"] * 9, 290, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
    values = {"preset": "nanochat", "d_model": 32, "pattern": "T*2", "vocab_size": theirs.vocab_size}
    model = Model(ModelConfig.model_validate({**values, "attention": {"n_head": 2}}))
    redraw(model)
    nanochat.write(model, tmp_path / "chatsft_checkpoints" / "d2", step=3, tokenizer=theirs)
    assert (tmp_path / "tokenizer" / "tokenizer.pkl").is_file()
    words = ("convert", tmp_path / "chatsft_checkpoints" / "d2", tmp_path / "ours", "--from", "nanochat")
    assert "--allow-pickle" in plait(*words).error and not (tmp_path / "ours").exists()
    ran = plait(*words, "--allow-pickle")
    assert ran.status == 0 and f"bpe, {theirs.vocab_size} ids" in ran.out, ran
    ran = plait(
        "chat", tmp_path / "ours", "-p", "the fox", "--seed", 1, "--max-new-tokens", 9, "--device", "cpu"
    )
    assert ran.status == 0 and ran.out.strip()
    other = ("convert", tmp_path, tmp_path / "x", "--from", "minimamba", "--allow-pickle")
    assert "minimamba has none: leave it out" in plait(*other).error
