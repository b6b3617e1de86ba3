"""One test for each defect of the nanochat hybrid that would lie in the model or in the format.

Those of its configs, its optimizers and its chat are tested where these are.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plait.config.errors import ConfigError
from plait.config.schema import ModelConfig
from plait.formats.nanochat import from_state_dict, read, read_meta, write
from plait.formats.native import load_model, save_model
from plait.models import Model
from plait.models.init import init_weights
from plait.nn.roles import cast_parameters
from tests.invariants import redraw

VOCAB = 61
FIXTURES = Path(__file__).parents[1] / "fixtures"


def build(pattern: str | list[str], **more: Any) -> Model:
    """A small hybrid of nanochat's, as it begins."""
    values = {"preset": "nanochat", "d_model": 32, "pattern": pattern, "vocab_size": VOCAB, **more}
    return Model(ModelConfig.model_validate({"attention": {"n_head": 2}, **values}))


def ids(n_seq: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (n_seq, length), generator=torch.Generator().manual_seed(seed))


def test_defect_2_initialisation_after_the_meta_device_leaves_nothing_uninitialised() -> None:
    config = build("T M M T").config
    model = Model(config, device="meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(math.nan)
    init_weights(model)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), f"{name} was left as it was"
    assert {"A_log", "D"} <= {name.rsplit(".", 1)[-1] for name, _ in model.named_parameters()}
    assert model(ids(1, 5)).logits.isfinite().all()


def test_defect_3_the_generic_rule_does_not_touch_the_mixer() -> None:
    torch.manual_seed(0)
    mixer: Any = build("M", d_model=256, init={"std": 9.0}).blocks[0].mixer
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert 0.9e-3 < float(steps.min()) < 5e-3 and 0.03 < float(steps.max()) < 0.11, "time steps"
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert torch.equal(mixer.D, torch.ones(512))
    assert float(mixer.conv1d.weight.abs().max()) <= 0.5, "U(+-1/sqrt(4)) of torch's convolution"
    assert float(mixer.in_proj.weight.abs().max()) <= 256**-0.5
    assert 0.2 < float(mixer.dt_proj.weight.abs().max()) <= 16**-0.5


@pytest.mark.parametrize("pattern", ["T*2 M*2", "M*3", "M T M"])
def test_defect_5_a_hybrid_whose_last_block_is_mamba_decodes_correctly(pattern: str, tmp_path: Path) -> None:
    """The fork advanced its position in the last layer, if that was attention, and gave Mamba no state at all."""
    model = build(pattern)
    redraw(model)
    save_model(model, tmp_path / "native")
    write(model, tmp_path / "base_checkpoints" / "d4", step=1)
    text = ids(2, 30)
    for again in (load_model(tmp_path / "native"), read(tmp_path)[0]):
        whole = again(text).logits
        cache = again.new_cache(2, 30)
        parts = [again.step(text[:, :17], cache)]
        parts += [again.step(text[:, t : t + 1], cache) for t in range(17, 30)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
        assert cache.lengths == [30, 30]
        torch.testing.assert_close(whole, model(text).logits)
        # keys and values belong to attention alone
        kinds = ["attention" if "k" in state else "mamba" for state in cache.states]
        assert kinds == [block.kind for block in again.blocks]


def test_defect_5_could_be_seen() -> None:
    """A Mamba that starts anew at each token would move the logits far beyond the tolerance above."""
    model, text = build("T*2 M*2"), ids(2, 30)
    redraw(model)
    cache = model.new_cache(2, 30)
    model.step(text[:, :17], cache)
    for state in cache.states[2:]:
        for tensor in state.values():
            tensor.zero_()
    assert float((model.step(text[:, 17:18], cache) - model(text[:, :18]).logits[:, -1:]).abs().max()) > 1e-2


def test_defect_7_embeddings_in_bfloat16_meet_float32_weights() -> None:
    folder = FIXTURES / "nanochat_oct2025" / "base_checkpoints" / "d4"
    stored = torch.load(folder / "model_000020.pt", weights_only=True)
    assert stored["transformer.wte.weight"].dtype == torch.bfloat16
    model = from_state_dict(stored, read_meta(folder))
    assert model(ids(1, 8)).logits.dtype == torch.float32
    narrow = build("T M")
    redraw(narrow)
    before = narrow(ids(1, 8)).logits
    cast_parameters(narrow, torch.bfloat16)
    kept: Any = narrow.blocks[1].mixer
    assert {p.dtype for p in (kept.A_log, kept.D, kept.dt_proj.bias)} == {torch.float32}
    assert kept.in_proj.weight.dtype == narrow.embedding.tokens.weight.dtype == torch.bfloat16
    error = (narrow(ids(1, 8)).logits.float() - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert float(error) < 0.1


def test_defect_8_the_config_is_not_changed_and_metas_of_pure_transformers_are_stock(tmp_path: Path) -> None:
    given = {"sequence_len": 32, "vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32}
    pure = build("T*2")
    write(pure, tmp_path / "d2", step=1, sequence_len=32)
    meta = json.loads((tmp_path / "d2" / "meta_000001.json").read_text())
    assert list(meta["model_config"].items()) == list(given.items())
    hybrid_meta = {**given, "block_pattern": None, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2}
    hybrid_meta["mamba_use_mlp"] = False
    tensors = torch.load(tmp_path / "d2" / "model_000001.pt", weights_only=True)
    for pattern in (None, ["T", "T"]):  # as given, and as the fork's constructor left it
        asked = {**hybrid_meta, "block_pattern": pattern}
        before = json.dumps(asked)
        model = from_state_dict(tensors, asked)
        assert json.dumps(asked) == before
        write(model, tmp_path / "again", step=1, sequence_len=32)
        again = json.loads((tmp_path / "again" / "meta_000001.json").read_text())
        assert again["model_config"] == given, "stock nanochat would refuse its own model"
    write(build("T M"), tmp_path / "hybrid", step=1)
    assert [block.kind for block in read(tmp_path / "hybrid")[0].blocks] == ["attention", "mamba"]


def test_defect_9_strategic_placement_has_twenty_entries() -> None:
    printed = ["T", "T", *["M"] * 6, "T", *["M"] * 6, "T", "M", "T", "T"]
    with pytest.raises(ConfigError, match="has 19 layers; the two must match"):
        build(printed, n_layer=20)
    kinds = [layer.kind[0] for layer in build("T T M*7 T M*6 T M T T", n_layer=20).config.layers()]
    assert "".join(kinds) == "aammmmmmmammmmmmamaa"


def test_defect_10_flops_are_those_of_each_block() -> None:
    model = build("T M")
    attention, mamba = model.blocks
    d, n, inner, states = 32, 40, 64, 16
    pairs = n * (n + 1) // 2
    assert attention.mixer.flops(n) == n * 2 * (4 * d * d) + 4 * pairs * d
    assert attention.flops(n) == attention.mixer.flops(n) + n * 2 * (2 * 4 * d * d)
    rank = 2
    maps = 2 * (d * 2 * inner + inner * (rank + 2 * states) + rank * inner + inner * d)
    assert mamba.flops(n) == n * (maps + 2 * inner * 4 + 5 * inner * states)
    assert mamba.flops(2 * n) == 2 * mamba.flops(n), "no attention in a Mamba block"
    assert model.flops(n) == attention.flops(n) + mamba.flops(n) + n * 2 * d * VOCAB


def test_defect_12_pure_mamba_has_neither_rotary_tables_nor_a_cap() -> None:
    model = build("M*2")
    redraw(model)
    assert not list(model.buffers())
    text = ids(1, 700)
    cache = model.new_cache(1, 10**9)
    assert cache.nbytes == model.new_cache(1, 1).nbytes
    parts = [model.step(piece, cache) for piece in text.split(100, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(text).logits, rtol=1e-4, atol=1e-4)
    assert not list(build("T").buffers()), "attention makes its tables from the positions it is given"


def test_defect_17_every_block_begins_as_the_identity_mamba_too() -> None:
    model = build("T M", mamba={"mlp": "relu2"})
    entered = model.embedding(ids(2, 9), torch.arange(9).expand(2, 9))
    assert torch.equal(model(ids(2, 9)).hidden, model.final_norm(entered))
    mixers: list[Any] = [block.mixer for block in model.blocks]
    assert all(not mixer.out_proj.weight.any() and mixer.in_proj.weight.any() for mixer in mixers)
    assert not model(ids(2, 9)).logits.any(), "equal odds for every token"
    plain = build("T M", init={"output": "depth"})
    assert not torch.equal(plain(ids(2, 9)).hidden, model(ids(2, 9)).hidden)
