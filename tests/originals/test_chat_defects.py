"""One test for each defect of nanochat that would lie in its conversations and its tokenizer, named after it."""

from __future__ import annotations

import builtins
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.config.errors import TokenizerError
from plait.config.schema import ModelConfig
from plait.inference.chat import ChatEngine
from plait.models import Model
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.chat import NANOCHAT_SPECIAL_TOKENS, with_chat_tokens
from plait.tokenizers.nanochat import from_ranks, read_tokenizer, write_tokenizer
from plait.tokenizers.train import SPLITS, train_subwords
from tests.invariants import redraw

BYTES = with_chat_tokens(BytesTokenizer())


def test_fix_8f979a8_every_sample_draws_its_own_first_token() -> None:
    """It was drawn once, from the prompt's logits, and given to all samples."""
    config = {
        "d_model": 16,
        "pattern": ["mamba2", "attention"],
        "mlp": "none",
        "vocab_size": BYTES.vocab_size,
    }
    sections = {"mamba2": {"headdim": 8, "d_state": 8}, "attention": {"n_head": 2}}
    model = Model(ModelConfig.model_validate({**config, **sections})).eval()
    redraw(model)
    engine = ChatEngine(model, BYTES)
    prompt = engine.template.render_for_completion([{"role": "user", "content": "hi"}])
    [(first, mask)] = engine.generate(prompt, 64, max_tokens=1, temperature=1.0, seed=0)
    assert mask == [1] * 64 and len(set(first)) > 8
    with torch.no_grad():  # and from the right distribution: of its 64 draws none is improbable
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    assert min(float(p[token]) for token in first) > 1e-6
    frequent = [token for token in range(BYTES.vocab_size) if float(p[token]) > 0.15]
    assert all(abs(first.count(token) / 64 - float(p[token])) < 0.2 for token in frequent)


def test_fix_2ce972a_a_token_that_is_no_text_by_itself_has_its_own_bytes(tmp_path: Path) -> None:
    """They were counted in the decoded string, where such a token is U+FFFD: three bytes, whatever it stands for."""
    text = "日本語 émigré 🙂 naïve "
    ranks = {bytes((i,)): i for i in range(256)}
    for token in ("日".encode()[:2], "🙂".encode()[:2], "🙂".encode()[:3]):
        ranks[token] = len(ranks)
    specials = {name: len(ranks) + i for i, name in enumerate(NANOCHAT_SPECIAL_TOKENS)}
    trained = train_subwords("bpe", [text] * 9, 280, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
    for tokenizer in (from_ranks(ranks, SPLITS["nanochat"], specials), trained):
        ids = tokenizer.encode(text)
        halves = [token for token in ids if b"\xef\xbf\xbd" in tokenizer.decode([token]).encode()]
        assert halves  # the text has tokens that the old way counts wrong
        assert sum(map(tokenizer.token_bytes, ids)) == len(text.encode())
        assert sum(len(tokenizer.decode([token]).encode()) for token in ids) > len(text.encode())
        assert all(tokenizer.token_bytes(token) == 0 for token in tokenizer.special_ids)
        write_tokenizer(tokenizer, tmp_path)
        table = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
        assert int(table[torch.tensor(ids)].sum()) == len(text.encode())


class Evil:
    """A pickle of it writes a file when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def evils(sign: Path) -> dict[str, bytes]:
    """Pickles that run code when an ordinary reader loads them."""
    command = f"open({str(sign)!r}, 'w').close()"
    attack = Evil(builtins.exec, command)
    state = {"name": "x", "pat_str": ".", "mergeable_ranks": {}, "special_tokens": attack}
    body = pickle.dumps(state, protocol=3)[2:-1]
    return {
        "exec": pickle.dumps(attack),
        "system": pickle.dumps(Evil(os.system, f"touch {sign}")),
        "protocol 0": pickle.dumps(attack, protocol=0),
        "in the state": b"\x80\x03ctiktoken.core\nEncoding\n)\x81" + body + b"b.",
        "by attributes": pickle.dumps(Evil(getattr(builtins, "eval"), command.replace("'w'", "'w'"))),  # noqa: B009
        "another tiktoken class": b"\x80\x03ctiktoken.load\nread_file\n(X\x01\x00\x00\x00xtR.",
    }


@pytest.mark.parametrize("name", evils(Path("x")))
def test_defect_18_a_tokenizers_pickle_runs_no_code(name: str, tmp_path: Path) -> None:
    sign = tmp_path / "ran"
    content = evils(sign)[name]
    if name in (
        "exec",
        "system",
        "protocol 0",
        "by attributes",
    ):  # the attack works, where nothing guards against it
        pickle.loads(content)
        assert sign.exists()
        sign.unlink()
    (tmp_path / "tokenizer.pkl").write_bytes(content)
    with pytest.raises(TokenizerError, match="--allow-pickle"):
        read_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"is no pickled tokenizer, and was not run: it asks for"):
        read_tokenizer(tmp_path, allow_pickle=True)
    assert not sign.exists()


def test_defect_18_nor_does_its_table_of_bytes(tmp_path: Path) -> None:
    tokenizer = train_subwords("bpe", ["a text"], 270, NANOCHAT_SPECIAL_TOKENS, split="nanochat")
    write_tokenizer(tokenizer, tmp_path)
    sign = tmp_path / "ran"
    torch.save(Evil(builtins.exec, f"open({str(sign)!r}, 'w').close()"), tmp_path / "token_bytes.pt")
    with pytest.raises(TokenizerError, match=r"token_bytes\.pt cannot be read as a tensor"):
        read_tokenizer(tmp_path, allow_pickle=True)
    assert not sign.exists()
    torch.load(tmp_path / "token_bytes.pt", weights_only=False)
    assert sign.exists()


def test_defect_18_what_plait_itself_writes_holds_no_pickle(tmp_path: Path) -> None:
    train_subwords("bpe", ["a text"], 270, NANOCHAT_SPECIAL_TOKENS).save(tmp_path)
    BYTES.save(tmp_path / "bytes")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json"}
