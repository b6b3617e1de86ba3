"""Defects of the originals that lie between their parts: one test for each, numbered as in docs/originals.md.

A is the nanochat hybrid, B Model Foundry, D BitByte; a fix is named by the commit that made it in nanochat later.
"""

from __future__ import annotations

import ast
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import plait
from plait.compat.nanochat.gpt import GPT, GPTConfig
from plait.config.data import TokenizerConfig
from plait.config.originals.nanochat import translate
from plait.config.schema import ModelConfig
from plait.data.documents import Document
from plait.evaluation.bits_per_byte import bits_per_byte
from plait.evaluation.minimal_pairs import MinimalPair, score_pairs
from plait.evaluation.surprisal import surprisals
from plait.formats.native import save_model
from plait.models import Model
from plait.nn.roles import cast_parameters
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.load import train_tokenizer
from tests.invariants import redraw, rms

ROOT = Path(__file__).parents[2]
GPT_SIZES: dict[str, Any] = {
    "sequence_len": 32,
    "vocab_size": 61,
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 2,
    "n_embd": 32,
}
PEERS = ("mamba_ssm", "causal_conv1d")


# ---- 3.A-11


def test_a11_a_hybrid_needs_neither_cuda_nor_mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    """There a hybrid could not even be imported without mamba-ssm, and its tests failed on a CPU or were skipped."""
    for name in (*PEERS, *(f"{name}.ops" for name in PEERS)):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**GPT_SIZES, "block_pattern": ["T", "M"]}))
    optimizers, ids = model.setup_optimizers(), torch.randint(61, (2, 17))
    losses = []
    for _ in range(12):
        loss = model(ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        losses.append(float(loss.detach()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0] == pytest.approx(math.log(61)) and losses[-1] < 0.8 * losses[0]


def test_a11_the_weights_are_those_of_mamba_ssm() -> None:
    """The same names and shapes as the kernels' module has, so a checkpoint of a GPU runs on a CPU."""
    theirs = load_file(next((ROOT / "tests/fixtures/mamba1_module").glob("*_state_dict.safetensors")))
    mixer: Any = GPT(GPTConfig(**{**GPT_SIZES, "block_pattern": ["M", "M"]})).transformer.h[0].mixer
    assert {name for name, _ in mixer.named_parameters()} == set(theirs)


def test_a11_nothing_imports_them_but_to_compare_with_them() -> None:
    for path in (ROOT / "src" / "plait").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in PEERS] or path.parent.name == "bench", path


# ---- 3.A-16


@torch.no_grad()
def test_a16_documents_of_a_row_may_be_kept_apart() -> None:
    """There keys and states of one document went on into the next, and nothing could be done about it."""
    model = GPT(GPTConfig(**{**GPT_SIZES, "block_pattern": ["T", "M"]})).model
    redraw(model)
    model.eval()
    first, other, second = (torch.randint(61, (1, n)) for n in (7, 7, 9))
    bounds = torch.tensor([0, 7, 16], dtype=torch.int32)
    alone = model(second).logits
    for before in (first, other):
        row = torch.cat([before, second], 1)
        apart = model(row, cu_seqlens=bounds).logits[:, 7:]
        assert rms(apart, alone) < 1e-5
        assert rms(model(row).logits[:, 7:], alone) > 1e-2, "joined, as in nanochat, the one before is seen"
    assert translate({"depth": 2})["data"]["documents"] == "joined"
    assert plait.load_config("nanochat", ["--data.documents=separate"]).data.documents == "separate"


# ---- fixed in nanochat later


def test_fix_16788ee_the_soft_cap_is_computed_in_float32() -> None:
    """There it was computed in bfloat16, which cannot tell large logits apart, and widened afterwards."""
    config = {
        "preset": "nanochat",
        "d_model": 32,
        "pattern": "T",
        "vocab_size": 61,
        "attention": {"n_head": 2},
    }
    model = Model(ModelConfig.model_validate(config))
    redraw(model)
    cast_parameters(model, torch.bfloat16)
    hidden = 30 * torch.randn(1, 50, 32, dtype=torch.bfloat16)
    head: Any = model.head
    raw = head.unembedding(hidden)
    capped = head(hidden)
    assert raw.dtype == torch.bfloat16 and capped.dtype == torch.float32
    torch.testing.assert_close(capped, 15 * torch.tanh(raw.float() / 15))
    narrow = (15 * torch.tanh(raw / 15)).float()
    large = (raw.abs() > 25) & (raw.abs() < 45)
    assert len(capped[large].unique()) > 4 * len(narrow[large].unique())


# ---- 3.B-13


def reader() -> Model:
    text = ["He thinks that he knows.", "it was late.", "the cat sleeps under the old tree"] * 20
    tokenizer = train_tokenizer(TokenizerConfig(type="bpe", vocab_size=290), text)
    config = {
        "d_model": 24,
        "pattern": "M T",
        "vocab_size": tokenizer.vocab_size,
        "attention": {"n_head": 2},
    }
    model = Model(ModelConfig.model_validate(config), dtype=torch.float64)
    redraw(model)
    model.tokenizer = tokenizer
    return model.eval()


@torch.no_grad()
def bits_of(model: Model, text: str) -> list[float]:
    """-log2 of each token's probability, from one forward over all of them."""
    tokenizer: Any = model.tokenizer
    ids = tokenizer.encode(text)
    table = model(torch.tensor([[tokenizer.bos_id, *ids]])).logits[0, :-1].log_softmax(-1) / -math.log(2)
    return [float(table[place, token]) for place, token in enumerate(ids)]


def test_b13_after_a_context_no_token_of_the_text_is_lost_and_no_other_counts() -> None:
    """There the first two tokens, the pronoun under study, were cut off, and the end token was counted."""
    model, context, text = reader(), "it was late. ", "He thinks"
    tokenizer: Any = model.tokenizer
    found = surprisals(model, [text], contexts=[context])[0]
    count = len(found.tokens)
    assert tokenizer.decode(tokenizer.encode(context + text)[-count:]).lstrip() == text
    want = bits_of(model, context + text)[-count:]
    assert [token.bits for token in found.tokens] == pytest.approx(want, rel=1e-9)
    assert found.of("He").bits == pytest.approx(want[0] + (want[1] if found.of("He").n_tokens == 2 else 0))
    assert found.of("He").n_tokens + found.of(" thinks").n_tokens == len(found.tokens)
    assert tokenizer.eos_id not in [token.token_id for token in found.tokens]


def test_b13_perplexity_is_over_the_tokens_that_were_predicted() -> None:
    """There the sum was divided by a number that counted the begin token, which nobody predicts."""
    model, text = reader(), "the cat knows that he sleeps."
    bits = bits_of(model, text)
    score = bits_per_byte(model, [Document("a", text)])
    assert score.n_targets == len(bits)
    assert score.perplexity == pytest.approx(2 ** (sum(bits) / len(bits)), rel=1e-6)


def test_b13_pairs_are_compared_by_the_total_not_the_mean() -> None:
    """There the mean over tokens decided, which rewards whatever has more of them."""
    model = reader()
    long = "He knows that the cat sleeps under the old tree"
    shorts = ("He knows", "it was late", "the old tree", "He sleeps", "the cat knows", "under the tree")
    bits = {text: bits_of(model, text) for text in (long, *shorts)}
    mean = {text: sum(found) / len(found) for text, found in bits.items()}
    short = next(text for text in shorts if sum(bits[text]) < sum(bits[long]) and mean[text] > mean[long])
    pair = MinimalPair(good=short, bad=long)
    (score,) = score_pairs(model, [pair])
    assert score.good_bits == pytest.approx(sum(bits[pair.good]), rel=1e-9)
    assert score.points == 1, "by the mean it would be 0"


def test_b13_a_region_is_found_by_its_characters_whatever_its_tokens_are() -> None:
    """There a word that was no single token was not found, and one inside of another word was."""
    model, text = reader(), "the xylophone sleeps."
    found = surprisals(model, [text])[0]
    word = found.of("xylophone")
    assert word.n_tokens > 1 and (word.begin, word.end) == (4, 13)
    inside = [t.bits for t in found.tokens if t.begin < 13 and t.end > 4]
    assert word.bits == pytest.approx(sum(inside)) and word.n_tokens == len(inside)


# ---- 3.D-9


def test_d9_nothing_is_said_to_be_smaller_than_it_is(tmp_path: Path) -> None:
    """There weights of three values were called 1.58 bits and kept as floats. Ours are floats too, and say so."""
    config = {"preset": "bitbyte-mamba", "d_model": 64, "n_layer": 2, "vocab_size": 260, "mlp": {"width": 96}}
    model = Model(ModelConfig.model_validate(config))
    model.tokenizer = BytesTokenizer()
    save_model(model, tmp_path / "saved", model.tokenizer)
    count = sum(p.numel() for p in model.parameters())
    saved = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert 4 * count < saved < 4.2 * count
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.yaml")]:
        for line in path.read_text().splitlines():
            honest = "not " in line or "until packing" in line
            assert "1.58" not in line or honest, (path.name, line)
