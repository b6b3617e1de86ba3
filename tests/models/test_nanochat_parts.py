"""What nanochat's models have beyond the others, by hand: smear, backout, value embeddings, initial weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.config.errors import BuildError, ConfigError, DataError
from plait.config.schema import ModelConfig
from plait.mixers.attention import Attention, Options
from plait.mixers.layout import Layout
from plait.models import Model
from plait.nn.rope import apply_rope
from tests.invariants import WIDTH, lay, make_mixer, redraw, sequences

VOCAB = 50


def build(*, drawn: bool = True, **values: Any) -> Model:
    values = {"d_model": 16, "vocab_size": VOCAB, "pattern": "attention lstm", **values}
    model = Model(ModelConfig.model_validate(values))
    if drawn:
        redraw(model)
    return model.eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(4))


def test_the_smear_adds_a_gated_share_of_the_token_before() -> None:
    model, x = build(embedding={"smear": True, "smear_channels": 5}, pattern="T"), ids(2, 7)
    embedded = model.embedding(x, torch.arange(7).expand(2, 7))
    smear = model.smear
    assert smear is not None
    gate = smear.share * torch.sigmoid(embedded[:, 1:, :5] @ smear.gate)[..., None]
    by_hand = torch.cat([embedded[:, :1], embedded[:, 1:] + gate * embedded[:, :-1]], 1)
    entered = []
    model.blocks[0].register_forward_hook(lambda _m, given, _o: entered.append(given[0]))  # type: ignore[attr-defined]
    model(x)
    torch.testing.assert_close(entered[0], by_hand)
    assert model.parameter_counts()["smear"] == 6
    assert not build(embedding={"smear": True, "smear_channels": 5}, drawn=False).smear.share.any()
    with pytest.raises(BuildError, match="smear_channels is 24, more than the 16 channels"):
        build(embedding={"smear": True})


def test_backout_takes_away_a_share_of_the_middle() -> None:
    model, x = build(pattern="T*5", backout=True), ids(2, 7)
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out[0]))
    hidden = model(x).hidden
    assert model.backout is not None and model.backout.after == 2
    torch.testing.assert_close(hidden, model.final_norm(outputs[4] - model.backout.share * outputs[2]))
    assert build(backout=True, drawn=False).backout.share.item() == pytest.approx(0.2)
    counts = model.parameter_counts()
    assert counts["backout"] == 1 and counts["total"] == sum(n for k, n in counts.items() if k != "total")
    wide = {"mixer": "lstm", "d_hidden": 24, "residual": "no", "mlp": "none"}
    with pytest.raises(BuildError, match="backout: layer 1 is 16 wide but the last one 24"):
        build(pattern=["T", "T", wide], backout=True, head={"tie": False})


def test_value_embeddings_are_gated_rows_of_a_table() -> None:
    options = {"n_head": 4, "n_kv_head": 2, "value_embedding": True, "value_gate_channels": 3, "rope": False}
    mixer = make_mixer("attention", options)
    assert isinstance(mixer, Attention) and mixer.value_embedding is not None
    (x,) = sequences(mixer, [9])
    layout = lay(Layout.dense(1, 9), x)
    q, k, v = mixer.in_proj(x).unflatten(-1, (-1, 4)).split([4, 2, 2], -2)
    gate = 3 * torch.sigmoid(x[..., :3] @ mixer.value_embedding.gate.T)
    v = v + gate[..., None] * mixer.value_embedding.table(layout.ids).unflatten(-1, (2, 4))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(mixer(x, layout)[0], mixer.out_proj(y.flatten(-2)))
    with pytest.raises(DataError, match=r"layer 0 .attention.: value_embedding looks at token ids"):
        mixer(x, Layout.dense(1, 9))
    with pytest.raises(BuildError, match="value_gate_channels 17 is more than d_model 16"):
        Attention(Options(value_embedding=True, value_gate_channels=17), WIDTH, vocab_rows=5)
    with pytest.raises(BuildError, match="needs the size of the vocabulary"):
        Attention(Options(value_embedding=True), WIDTH)


def test_the_vocabulary_of_value_embeddings_is_resized_too() -> None:
    model, x = build(pattern="T", attention={"value_embedding": True}, pad_vocab_size_multiple=8), ids(1, 6)
    before = model(x).logits
    model.resize_token_embeddings(70)
    table = model.blocks[0].mixer.value_embedding.table  # type: ignore[union-attr]
    assert table.weight.shape == (72, 16) and table.num_embeddings == 72
    torch.testing.assert_close(model(x).logits[..., :VOCAB], before)
    assert model(torch.full((1, 3), 69)).logits.isfinite().all()
    new = table.weight[VOCAB:]
    assert float(new.std()) == pytest.approx(16**-0.5, rel=0.2) and float(new.abs().max()) <= math.sqrt(
        3 / 16
    )


def test_queries_and_keys_are_scaled_after_their_norm_and_turned_the_other_way() -> None:
    options = {"n_head": 2, "qk_norm": True, "qk_scale": 1.5, "rope_reverse": True}
    mixer = make_mixer("attention", options)
    (x,) = sequences(mixer, [7])
    layout = Layout.dense(1, 7, start=torch.tensor([3]))
    q, k, v = mixer.in_proj(x).unflatten(-1, (-1, 8)).split([2, 2, 2], -2)  # type: ignore[operator]

    def positioned(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        angle = (layout.positions[..., None] / 10000 ** (torch.arange(4) / 4)).unsqueeze(-2)
        turned = torch.cat([a * angle.cos() + b * angle.sin(), b * angle.cos() - a * angle.sin()], -1)
        return 1.5 * F.rms_norm(turned, (8,), eps=torch.finfo(torch.float32).eps)

    heads = [t.transpose(1, 2) for t in (positioned(q), positioned(k), v)]
    y = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    ours = mixer(x, layout)[0]
    torch.testing.assert_close(ours, mixer.out_proj(y.flatten(-2)), rtol=1e-6, atol=1e-6)  # type: ignore[operator]


def test_tables_of_the_rotation_are_rounded() -> None:
    """Rounded as nanochat rounds: one unit more or less in a frequency would give another bfloat16 here and there."""
    length, width = 2000, 128
    x, positions = torch.randn(1, length, 1, width), torch.arange(length)[None]
    channel = torch.arange(0, width, 2, dtype=torch.float32) / width
    angle = torch.outer(torch.arange(length, dtype=torch.float32), 1.0 / (10000**channel))
    cos, sin = angle.cos().bfloat16()[:, None], angle.sin().bfloat16()[:, None]
    a, b = x.chunk(2, -1)
    ours = apply_rope(x, positions, base=10000.0, n_angles=width // 2, tables=torch.bfloat16)
    assert torch.equal(ours, torch.cat([a * cos - b * sin, a * sin + b * cos], -1))
    assert not torch.equal(ours, apply_rope(x, positions, base=10000.0, n_angles=width // 2))


def test_a_window_that_the_capacity_does_not_fill_is_written_in_place() -> None:
    wide = make_mixer("attention", {"n_head": 2, "window": 40})
    (x,) = sequences(wide, [30])
    state = wide.init_state(1, 30, dtype=x.dtype)
    buffer = state["k"]
    y = torch.cat([
        wide.step(x[:, :13], Layout.dense(1, 13), state),
        wide.step(x[:, 13:], Layout.dense(1, 17, start=torch.tensor([13]), max_past=13), state),
    ], 1)  # fmt: skip
    torch.testing.assert_close(y, wide(x, Layout.dense(1, 30))[0])
    assert state["k"] is buffer and buffer.any()


def test_flops_of_a_window() -> None:
    def pairs(n_new: int, n_past: int, window: int | None, causal: bool) -> int:
        total = n_past + n_new
        at = range(n_past, total)
        reach = window or total
        return sum(1 for i in at for j in range(total) if (j <= i or not causal) and abs(i - j) < reach)

    for causal in (True, False):
        for window in (None, 1, 3, 8, 50):
            mixer = make_mixer("attention", {"n_head": 2, "window": window, "causal": causal})
            maps = 2 * sum(p.numel() for p in mixer.parameters())
            for n_new, n_past in [(1, 0), (7, 0), (20, 0), (1, 30), (5, 2), (6, 4), (9, 30)]:
                if n_past and not causal:
                    continue
                expected = n_new * maps + 4 * pairs(n_new, n_past, window, causal) * WIDTH
                assert mixer.flops(n_new, n_past) == expected, (causal, window, n_new, n_past)


def test_vectors_may_stand_for_ids() -> None:
    model, x = build(embedding={"scale": 2.0}), ids(3, 8)
    vectors = model.embedding.tokens(x)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    true = model(x, attention_mask=mask, labels=x)
    ours = model(inputs_embeds=vectors, attention_mask=mask, labels=x)
    assert torch.equal(ours.logits, true.logits) and torch.equal(ours.loss, true.loss)
    row, bounds = vectors.flatten(0, 1)[None], torch.tensor([0, 8, 16, 24])
    torch.testing.assert_close(
        model(inputs_embeds=row, cu_seqlens=bounds).logits, model(x.flatten()[None], cu_seqlens=bounds).logits
    )
    with pytest.raises(DataError, match="give either input_ids or inputs_embeds"):
        model()
    with pytest.raises(DataError, match="give either input_ids or inputs_embeds"):
        model(x, inputs_embeds=vectors)
    with pytest.raises(
        DataError, match=r"inputs_embeds has shape \(8, 16\); it must be \(batch, tokens, width\)"
    ):
        model(inputs_embeds=vectors[0])
    with pytest.raises(
        DataError, match="value_embedding looks at token ids, but the model was given vectors"
    ):
        build(pattern="T", attention={"value_embedding": True})(inputs_embeds=vectors)


def std(weight: Tensor) -> float:
    return float(weight.detach().std())


def test_fan_in_looks_at_each_of_the_joined_maps() -> None:
    """nanochat of October 2025: N(0, 1/sqrt(fan_in) min(1, sqrt(fan_out/fan_in)))."""
    torch.manual_seed(0)
    model = build(
        drawn=False,
        d_model=256,
        pattern="T",
        attention={"n_head": 8, "n_kv_head": 2},
        mlp={"kind": "relu2"},
        embedding={"position": "learned", "max_positions": 64},
        head={"tie": False},
        init={"scheme": "fan_in", "embedding": 1.0, "head": 0.0, "output": "plain"},
    )
    attention: Any = model.blocks[0].mixer
    mlp: Any = model.blocks[0].mlp
    q, k, v = attention.in_proj.weight.split([256, 64, 64])
    assert std(q) == pytest.approx(1 / 16, rel=0.03)
    assert std(k) == pytest.approx(1 / 32, rel=0.03) and std(v) == pytest.approx(1 / 32, rel=0.03)
    assert std(attention.out_proj.weight) == pytest.approx(1 / 16, rel=0.03)
    assert std(mlp.fc1.weight) == pytest.approx(1 / 16, rel=0.03)
    assert std(mlp.fc2.weight) == pytest.approx(1 / 32 / 2, rel=0.03)
    assert std(model.embedding.tokens.weight) == pytest.approx(1, rel=0.03)
    assert std(model.embedding.positions.weight) == pytest.approx(1, rel=0.03)
    assert not model.head.unembedding.weight.any()  # type: ignore[union-attr]
    zero = build(drawn=False, pattern="T M", init={"output": "zero"})
    assert all(not weight.any() for block in zero.blocks for weight in block.residual_weights())


def test_the_presets_begin_as_nanochat_does() -> None:
    torch.manual_seed(0)
    new = Model(ModelConfig(preset="nanochat2026", d_model=192, vocab_size=999, attention={"n_head": 3}))
    s = 192**-0.5
    first: Any = new.blocks[0]
    assert std(first.mixer.in_proj.weight) == pytest.approx(s, rel=0.03)
    assert float(first.mixer.in_proj.weight.abs().max()) <= math.sqrt(3) * s
    assert std(first.mlp.fc1.weight) == pytest.approx(0.4 * s, rel=0.03)
    assert std(new.embedding.tokens.weight) == pytest.approx(0.8, rel=0.03)
    assert std(new.head.unembedding.weight) == pytest.approx(0.001, rel=0.03)  # type: ignore[union-attr]
    assert all(not weight.any() for block in new.blocks for weight in block.residual_weights())
    scales = [float(block.input_mix.scale) for block in new.blocks]
    shares = [float(block.input_mix.share) for block in new.blocks]
    assert scales == pytest.approx([1.15 - 0.1 * i / 11 for i in range(12)])
    assert shares == pytest.approx([0.2 - 0.15 * i / 11 for i in range(12)])
    tables = {i for i, block in enumerate(new.blocks) if block.mixer.value_embedding is not None}
    assert tables == {1, 3, 5, 7, 9, 11}
    windows = [block.mixer.window for block in new.blocks]
    assert windows == [513, 513, 513, 2049] * 3
    second: Any = new.blocks[1].mixer.value_embedding
    assert std(second.table.weight) == pytest.approx(s, rel=0.03) and second.table.weight.shape == (1024, 192)
    assert float(second.gate.min()) >= 0 and float(second.gate.max()) <= 0.02
    assert float(new.smear.share) == 0 and float(new.smear.gate.max()) <= 0.02  # type: ignore[union-attr]
    assert not new(ids(1, 4)).logits.isnan().any()


def test_init_std_is_still_understood() -> None:
    old = ModelConfig(pattern="T", init_std=0.5)
    assert old == ModelConfig(pattern="T", init={"std": 0.5}) and old.init.scheme == "normal"
    assert ModelConfig(pattern="T", init="fan_in").init.scheme == "fan_in"
    assert ModelConfig(preset="gpt2", init_std=0.5).init.std == 0.5
    with pytest.raises(ConfigError, match="init: given twice, as 'init' and as 'init_std'"):
        ModelConfig(pattern="T", init={}, init_std=0.5)
    with pytest.raises(ConfigError, match=r"init\.std: expected a number greater than 0; got 0"):
        ModelConfig(pattern="T", init_std=0)


def test_a_model_of_2026_is_one_graph_and_decodes_without_a_look_at_the_device() -> None:
    torch._dynamo.reset()
    entry = {"mixer": "T", "window": 5, "value_embedding": True, "value_gate_channels": 4}
    parts: dict[str, Any] = {
        "pattern": [entry, "T", entry],
        "embedding": {"smear": True, "smear_channels": 4},
        "residual": {"kind": "scaled", "embedded": True},
        "backout": True,
    }
    model, x = build(**parts), ids(2, 11)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, true = traced(x, labels=x), model(x, labels=x)
    torch.testing.assert_close(out.logits, true.logits)
    ours, wanted = (torch.autograd.grad(o.loss, list(model.parameters())) for o in (out, true))
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # a tensor on the meta device has no numbers: reading one is an error
    ghost = Model(model.config, device="meta").eval()
    cache = ghost.new_cache(2, 16)
    for _ in range(3):
        assert ghost.step(torch.zeros(2, 1, dtype=torch.int64, device="meta"), cache).shape == (2, 1, VOCAB)
