"""What the model's parts promise: door, output, heads, vocabulary, initialisation, sizes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from plait.config.errors import BuildError, CapacityError, DataError
from plait.config.schema import ModelConfig
from plait.config.table import kinds
from plait.mixers.layout import Layout
from plait.models import Model
from plait.models.heads import pool
from plait.models.init import init_weights
from plait.models.loss import next_token_targets
from plait.nn.roles import cast_parameters, parameter_roles
from tests.invariants import TWO_WAY, VARIANTS, redraw

VOCAB = 50


def build(**values: object) -> Model:
    values = {"d_model": 16, "vocab_size": VOCAB, "pattern": "attention lstm", **values}
    model = Model(ModelConfig.model_validate(values))
    redraw(model)
    return model.eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(4))


def test_loss_is_the_next_tokens_cross_entropy_shifted_once() -> None:
    model, x = build(), ids(3, 11)
    labels = x.clone()
    labels[0, 4] = -100
    out = model(x, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    assert torch.allclose(out.loss, F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100))
    assert out.n_targets == 3 * 10 - 1
    assert torch.allclose(out["loss_sum"], out.loss * 29)
    assert set(out) == {"loss", "logits", "hidden", "loss_sum", "n_targets"}
    assert "cache" not in out
    with pytest.raises(KeyError, match="cache"):
        out["cache"]


def test_targets_stop_at_documents() -> None:
    layout = Layout.from_lengths([3, 0, 1, 2])
    row = torch.arange(6)[None]
    assert next_token_targets(row, layout).tolist() == [[1, 2, -100, -100, 5, -100]]
    assert next_token_targets(row[:, :1], Layout.dense(1, 1)).tolist() == [[-100]]


def test_masked_language_models_do_not_shift() -> None:
    model, x = build(causal=False, pattern="attention", head={"kind": "masked_lm"}), ids(2, 9)
    labels = torch.full_like(x, -100)
    labels[:, 3] = x[:, 3]
    out = model(x, labels=labels)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits[:, 3], x[:, 3]))


def test_a_causal_model_refuses_layers_that_look_ahead() -> None:
    with pytest.raises(BuildError, match=r"layer 1 \(lstm\) is not causal"):
        build(pattern=["attention", {"mixer": "lstm", "bidirectional": True}])
    with pytest.raises(BuildError, match=r"layer 0 \(attention\) is not causal"):
        build(causal=False)
    with pytest.raises(BuildError, match=r"layer 0 \(attention\) is not causal"):
        build(causal=False, head="features").new_cache(1, 4)


@pytest.mark.parametrize("how", ["first", "last", "mean", "max"])
def test_pooling_ignores_pads(how: str) -> None:
    hidden = torch.randn(3, 6, 4)
    lengths = [6, 2, 0]
    rows = torch.cat([hidden[i, :n] for i, n in enumerate(lengths)])[None]
    packed = pool(rows, Layout.from_lengths(lengths), how)
    for i, n in enumerate(lengths):
        if n == 0:
            assert torch.equal(packed[i], torch.zeros(4))
            continue
        own = hidden[i, :n]
        true = {"first": own[0], "last": own[-1], "mean": own.mean(0), "max": own.amax(0)}[how]
        assert torch.allclose(packed[i], true)
        assert torch.allclose(pool(own[None], Layout.dense(1, n), how)[0], true)


def test_classification_and_regression() -> None:
    head = {"kind": "classification", "num_labels": 3, "pooling": "mean", "pooler": True}
    model, x = build(head=head), ids(4, 7)
    mask = (torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]).long()
    labels = torch.tensor([0, 2, 1, -100])
    out = model(x, attention_mask=mask, labels=labels)
    assert out.logits.shape == (4, 3)
    assert torch.allclose(out.loss, F.cross_entropy(out.logits[:3], labels[:3]))
    for row in range(4):
        own = model(x[row : row + 1, : int(mask[row].sum())]).logits
        assert torch.allclose(own[0], out.logits[row], atol=1e-5)
    regression = build(head={"kind": "classification", "num_labels": 1})
    values = torch.randn(4)
    out = regression(x, labels=values)
    assert torch.allclose(out.loss, F.mse_loss(out.logits[:, 0], values))


def test_features_have_hidden_states_and_no_loss() -> None:
    model, x = build(head="features"), ids(2, 5)
    out = model(x)
    assert out.hidden.shape == (2, 5, 16) and out.logits is None
    with pytest.raises(DataError, match="no loss"):
        model(x, labels=x)


def test_padded_vocabulary_is_no_output() -> None:
    model = build(pad_vocab_size_multiple=32)
    assert model.embedding.tokens.weight.shape[0] == 64
    assert model(ids(1, 3)).logits.shape == (1, 3, VOCAB)


def test_softcap_bounds_the_logits() -> None:
    x = ids(2, 6)
    free, capped = build(), build(head={"softcap": 2.0})
    assert free(x).logits.abs().max() > 2
    assert torch.allclose(capped(x).logits, 2 * torch.tanh(free(x).logits / 2), atol=1e-6)


def test_token_types_positions_scale_and_norm_of_the_embedding() -> None:
    embedding = {"position": "learned", "max_positions": 9, "token_types": 2, "scale": 3.0, "norm": "layer"}
    model, x = build(embedding=embedding), ids(2, 7)
    e, types = model.embedding, ids(2, 7) % 2
    by_hand = e.norm(3 * e.tokens(x) + e.positions.weight[:7] + e.types(types))
    assert torch.allclose(e(x, torch.arange(7).expand(2, 7), types), by_hand)
    assert torch.allclose(model(x).logits, model(x, token_type_ids=torch.zeros_like(x)).logits)
    assert not torch.allclose(model(x).logits, model(x, token_type_ids=types).logits)
    with pytest.raises(CapacityError, match="10 tokens exceed the 9 learned positions"):
        model(ids(1, 10))
    cache = model.new_cache(1, 20)
    model.step(ids(1, 8), cache)
    with pytest.raises(CapacityError, match="11 tokens exceed the 9 learned positions"):
        model.step(ids(1, 3), cache)


def test_post_norm_scaled_and_absent_residuals() -> None:
    x = ids(2, 5)
    post = build(pattern="attention", norm={"kind": "layer", "place": "post"}, mlp="none", final_norm="none")
    block, h = post.blocks[0], post.embedding(x, torch.arange(5).expand(2, 5))
    layout = Layout.dense(2, 5)
    assert torch.allclose(post(x).hidden, block.norm1(h + block.mixer(h, layout)[0]))
    none = build(pattern="lstm", norm="none", residual="no", mlp="none", final_norm="none")
    assert torch.allclose(
        none(x).hidden, none.blocks[0].mixer(h * 0 + none.embedding(x, layout.positions), layout)[0]
    )
    scaled = build(pattern="attention", residual={"kind": "scaled", "embedded": True}, mlp="none")
    mix = scaled.blocks[0].input_mix
    with torch.no_grad():
        mix.scale.fill_(0.5)
        mix.share.fill_(0.25)
    h = scaled.embedding(x, layout.positions)
    entered = 0.75 * h
    branch = scaled.blocks[0].mixer(scaled.blocks[0].norm1(entered), layout)[0]
    assert torch.allclose(scaled(x).hidden, scaled.final_norm(entered + branch), atol=1e-6)


def test_widths_of_neighbours_must_fit() -> None:
    wide = {"mixer": "lstm", "d_hidden": 24, "residual": "no", "mlp": "none"}
    model = build(pattern=[wide, "attention"], head={"tie": False})
    assert model(ids(1, 4)).hidden.shape == (1, 4, 24)
    with pytest.raises(
        BuildError, match=r"layer 0 .lstm. turns width 16 into 24, which its residual cannot add"
    ):
        build(pattern=[{**wide, "residual": "yes"}])
    with pytest.raises(
        BuildError, match=r"the last layer is 24 wide but the embedding 16; set head.tie: false"
    ):
        build(pattern=[wide])


@pytest.mark.parametrize("tie", [True, False])
def test_resizing_the_vocabulary_keeps_what_it_can(tie: bool) -> None:
    model, x = build(head={"tie": tie, "bias": True}, pad_vocab_size_multiple=4), ids(1, 4)
    before = model(x).logits
    model.resize_token_embeddings(70)
    assert model(x).logits.shape[-1] == model.vocab_size == model.config.vocab_size == 70
    assert torch.allclose(model(x).logits[..., :VOCAB], before)
    assert (model.head.unembedding.weight is model.embedding.tokens.weight) is tie
    model.resize_token_embeddings(40)
    small = x % 40
    assert model(small).logits.shape[-1] == 40
    model.resize_token_embeddings(40)
    with pytest.raises(BuildError, match="vocab_size 0"):
        model.resize_token_embeddings(0)


def test_parameter_counts_add_up() -> None:
    for tie in (True, False):
        counts = build(head={"tie": tie}).parameter_counts()
        assert counts["head"] == (0 if tie else VOCAB * 16)
        assert counts["total"] == sum(n for part, n in counts.items() if part != "total")
        assert counts["embedding"] == VOCAB * 16


def test_wrong_inputs_are_named() -> None:
    model, x = build(), ids(2, 5)
    for arguments, message in [
        ({"input_ids": x[0]}, r"input_ids has shape \(5,\)"),
        ({"input_ids": x, "attention_mask": x[:, :3]}, "attention_mask has shape"),
        ({"input_ids": x, "labels": x[:, :3]}, "labels have shape"),
        ({"input_ids": x, "cu_seqlens": torch.tensor([0, 5])}, "one row"),
        (
            {"input_ids": x[:1], "cu_seqlens": torch.tensor([0, 3])},
            "cu_seqlens must rise from 0 to the 5 tokens",
        ),
        ({"input_ids": x, "cache": model.new_cache(3, 9)}, "2 rows but the cache 3 sequences"),
    ]:
        with pytest.raises(DataError, match=message):
            model(**arguments)


def test_no_vocabulary_no_model() -> None:
    with pytest.raises(BuildError, match="vocab_size is not set"):
        build(vocab_size=None)


def mixed_pattern() -> list[dict[str, object]]:
    chosen = {
        kind: {"mixer": kind, **options, "d_hidden": 16}
        if "d_hidden" in options
        else {"mixer": kind, **options}
        for kind, options in VARIANTS.values()
    }
    return list(chosen.values())


def test_meta_build_and_initialisation_write_every_element() -> None:
    values = {
        "d_model": 16,
        "vocab_size": VOCAB,
        "pattern": mixed_pattern(),
        "residual": {"kind": "scaled", "embedded": True},
        "embedding": {"position": "learned", "token_types": 2, "norm": "layer"},
        "head": {"tie": False, "bias": True, "transform": "gelu"},
    }
    config = ModelConfig.model_validate(values)
    meta = Model(config, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*meta.parameters(), *meta.buffers()):
            tensor.fill_(math.nan)
    init_weights(meta)
    for name, p in meta.named_parameters():
        assert p.isfinite().all(), f"{name} was left uninitialised"
    assert meta(ids(1, 4)).logits.isfinite().all()


def test_materialize_keeps_tied_weights_tied() -> None:
    config = ModelConfig.model_validate({"d_model": 16, "vocab_size": VOCAB, "pattern": "attention"})
    model = Model(config, device="meta").materialize("cpu")
    assert model.head.unembedding.weight is model.embedding.tokens.weight
    assert model.parameter_counts()["head"] == 0


def test_output_projections_are_scaled_by_depth() -> None:
    torch.manual_seed(0)
    config = {"d_model": 64, "vocab_size": VOCAB, "pattern": "attention*8", "mlp": "gelu"}
    model = Model(ModelConfig.model_validate(config))
    for block in model.blocks:
        for weight in (block.mixer.out_proj.weight, block.mlp.fc2.weight):
            assert float(weight.std()) == pytest.approx(0.02 / 4, rel=0.1)
        assert float(block.mixer.in_proj.weight.std()) == pytest.approx(0.02, rel=0.1)


def test_roles_cover_a_model_of_every_kind_and_decide_casts() -> None:
    model = build(pattern=mixed_pattern())
    assert {b.kind for b in model.blocks} == set(kinds())
    roles = parameter_roles(model)
    assert roles.keys() == dict(model.named_parameters()).keys()
    cast_parameters(model, torch.bfloat16)
    for name, p in model.named_parameters():
        assert p.dtype == (torch.float32 if roles[name].fp32 else torch.bfloat16), name
    assert model(ids(1, 5)).logits.isfinite().all()
    assert roles["embedding.tokens.weight"].kind == "embedding"


def test_a_parameter_without_a_role_is_an_error() -> None:
    model = build()
    model.blocks[0].mixer.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(BuildError, match=r"blocks.0.mixer.extra of Attention has no role"):
        parameter_roles(model)


def test_flops_and_state_bytes_are_those_of_the_layers() -> None:
    model = build(pattern="attention lstm attention")
    assert model.flops(10) == sum(b.flops(10) for b in model.blocks) + 2 * 10 * 16 * VOCAB
    short, long = model.new_cache(2, 10), model.new_cache(2, 40)
    assert short.nbytes == sum(b.mixer.state_bytes(2, 10) for b in model.blocks)
    assert (
        long.nbytes - short.nbytes == 2 * 2 * 2 * 30 * 16 * 4
    )  # layers, k and v, sequences, tokens, width, float32


def test_bidirectional_kinds_build_a_feature_model() -> None:
    for kind, options in TWO_WAY.values():
        model = build(pattern=[{"mixer": kind, **options}], causal=False, head="features")
        out = model(ids(2, 6), attention_mask=torch.tensor([[1] * 6, [0] * 6]))
        assert out.hidden.shape == (2, 6, 16)
