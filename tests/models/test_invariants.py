"""The invariants for whole models: every kind alone, and hybrids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plait.config.errors import CapacityError
from plait.config.schema import ModelConfig
from plait.mixers.smear import Smear
from plait.models import Cache, Model
from tests.invariants import CHUNK, VARIANTS, close, redraw, rms

VOCAB = 61
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}
MIXED = ["mamba2", "attention window", "lstm", "mamba2 groups", "attention"]
PATTERNS = {
    **{name: [name] for name in VARIANTS},
    "hybrid": MIXED,
    "hybrid that ends in a recurrence": ["attention", "gru", "mamba2"],
    "hybrid with smear and backout": [
        "attention of nanochat",
        "mamba2",
        "attention",
        "attention of nanochat",
    ],
}
MORE: dict[str, dict[str, object]] = {
    "hybrid with smear and backout": {
        "embedding": {"smear": True, "smear_channels": 5, "norm": "rms"},
        "residual": {"kind": "scaled", "embedded": True},
        "backout": True,
    }
}
patterns = pytest.mark.parametrize("name", PATTERNS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def entry(variant: str) -> dict[str, object]:
    kind, options = VARIANTS[variant]
    widths = {"d_hidden": 16} if "d_hidden" in options else {}
    return {"mixer": kind, **options, **widths}


def make_model(name: str, dtype: torch.dtype = torch.float64, **more: object) -> Model:
    """A small redrawn model with MLPs in every second block, scaled residuals and a padded vocabulary."""
    pattern = [{**entry(v), "mlp": "swiglu" if i % 2 else "none"} for i, v in enumerate(PATTERNS[name])]
    config = ModelConfig.model_validate(
        {"d_model": 16, "pattern": pattern, "vocab_size": VOCAB, "pad_vocab_size_multiple": 8}
        | MORE.get(name, {})
        | more
    )
    model = Model(config, dtype=dtype)
    redraw(model)
    return model.eval()


def tokens(n_seq: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (n_seq, length), generator=torch.Generator().manual_seed(seed))


@dtypes
@patterns
def test_pieces_equal_one_call_in_place_and_as_a_function(name: str, dtype: torch.dtype) -> None:
    model, ids = make_model(name, dtype), tokens(3, 2 * CHUNK + 10)
    whole = model(ids).logits
    for cuts in [(CHUNK - 1, CHUNK + 11), (CHUNK, CHUNK + 10), (CHUNK + 1, 1, 1, 0, CHUNK + 7)]:
        assert sum(cuts) == ids.shape[1]
        stepped, chained = model.new_cache(3, ids.shape[1]), model.new_cache(3, ids.shape[1])
        outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
        for piece in ids.split(list(cuts), 1):
            outputs[0].append(model.step(piece, stepped))
            out = model(piece, cache=chained)
            outputs[1].append(out.logits)
            chained = out.cache
        for done in outputs:
            close(torch.cat(done, 1), whole, TOLERANCE[dtype], f"pieces {cuts}")
        assert stepped.lengths == chained.lengths == stepped.positions.tolist() == [ids.shape[1]] * 3


@dtypes
@patterns
def test_ragged_prompts_then_decoding_equal_each_sequence_alone(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    prompts = [tokens(1, n, seed=n) for n in (5, 1, CHUNK + 6, 40)]
    cache = model.new_cache(4, 200)
    model.step(*packed(prompts, cache))
    more = [tokens(1, n, seed=10 + n) for n in (3, CHUNK, 0, 1)]
    model.step(*packed(more, cache))
    last = tokens(4, 2, seed=3)
    decoded = torch.cat([model.step(last[:, t : t + 1], cache) for t in range(2)], 1)
    for row in range(4):
        text = torch.cat([prompts[row], more[row], last[row : row + 1]], 1)
        close(decoded[row], model(text).logits[0, -2:], TOLERANCE[dtype], f"sequence {row}")


def packed(pieces: list[Tensor], cache: Cache) -> tuple[Tensor, Cache]:
    """Step's arguments for pieces of different lengths, as a padded batch with a mask."""
    longest = max(p.shape[1] for p in pieces)
    ids = torch.zeros(len(pieces), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, piece in enumerate(pieces):
        ids[row, longest - piece.shape[1] :] = piece
        mask[row, longest - piece.shape[1] :] = 1
    return ids, cache, mask  # type: ignore[return-value]


@dtypes
@patterns
def test_packed_documents_equal_separate_ones(name: str, dtype: torch.dtype) -> None:
    model = make_model(name, dtype)
    lengths = [5, 0, 1, CHUNK + 9, 33]
    row = tokens(1, sum(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    documents = [d for d in row.split(lengths, 1) if d.shape[1]]
    losses, outputs = [], []
    together = model(row, labels=row, cu_seqlens=bounds)
    apart = [model(d, labels=d) for d in documents]
    outputs = [together.logits, torch.cat([o.logits for o in apart], 1)]
    close(outputs[0], outputs[1], TOLERANCE[dtype], "logits")
    assert together.n_targets == sum(o.n_targets for o in apart)
    losses = [together.loss_sum, sum(o.loss_sum for o in apart)]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in losses]
    for ours, true in zip(*gradients, strict=True):
        close(ours, true, 10 * TOLERANCE[dtype], f"gradient of {tuple(true.shape)}")


@patterns
def test_nothing_reaches_back(name: str) -> None:
    model, ids = make_model(name, torch.float32), tokens(1, CHUNK + 20)
    whole = model(ids).logits
    for t in (1, CHUNK - 1, CHUNK):
        other = ids.clone()
        other[0, t] = (other[0, t] + 1) % VOCAB
        assert torch.equal(model(other).logits[:, :t], whole[:, :t])


@dtypes
@patterns
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_and_the_rest_of_the_batch_change_nothing(name: str, side: str, dtype: torch.dtype) -> None:
    model, ids = make_model(name, dtype), tokens(3, 90)
    mask = torch.ones_like(ids)
    for row, n in enumerate((90, 50, 1)):
        if side == "left":
            mask[row, : 90 - n] = 0
        elif side == "right":
            mask[row, n:] = 0
        else:
            mask[row, torch.randperm(90, generator=torch.Generator().manual_seed(row))[: 90 - n]] = 0
    labels = ids.clone()
    out = model(ids, attention_mask=mask, labels=labels)
    total = torch.zeros(())
    for row in range(3):
        kept = mask[row].bool()
        own = model(ids[row : row + 1, kept], labels=labels[row : row + 1, kept])
        close(out.logits[row, kept], own.logits[0], TOLERANCE[dtype], f"row {row}")
        total = total + own.loss_sum
    close(out.loss_sum, total, TOLERANCE[dtype], "loss")
    garbage = torch.where(mask.bool(), ids, (ids + 7) % VOCAB)
    again = model(garbage, attention_mask=mask).logits
    assert torch.equal(again[mask.bool()], out.logits[mask.bool()])


@patterns
def test_fork_rewind_and_select(name: str) -> None:
    model, ids = make_model(name, torch.float32), tokens(2, 40)
    cache = model.new_cache(2, 60)
    model.step(ids[:, :30], cache)
    saved = cache.clone()
    a = model.step(ids[:, 30:], cache)
    assert not torch.equal(cache.positions, saved.positions)
    assert torch.equal(model.step(ids[:, 30:], saved.clone()), a)
    swapped = model.step(ids[[1, 0, 1], 30:], saved.select([1, 0, 1]))
    close(swapped, a[[1, 0, 1]], TOLERANCE[torch.float32], "selected rows")


@patterns
def test_a_full_cache_is_refused_before_anything_is_written(name: str) -> None:
    model, ids = make_model(name, torch.float32), tokens(2, 9)
    cache = model.new_cache(2, 8)
    model.step(ids[:, :5], cache)
    saved = cache.clone()
    with pytest.raises(CapacityError, match=r"sequence 0 holds 5 tokens and 4 more would exceed .* 8"):
        model.step(ids[:, 5:], cache)
    for state, before in zip(cache.states, saved.states, strict=True):
        assert all(torch.equal(state[n], before[n]) for n in state)
    assert cache.lengths == [5, 5]
    model.step(ids[:, 5:8], cache)


@patterns
def test_every_mixer_and_state_matters(name: str) -> None:
    """Taking any mixer or any tensor of its state away moves the logits by more than 100 tolerances."""
    model, ids = make_model(name), tokens(2, 80)
    far = 100 * TOLERANCE[torch.float32]
    whole = model(ids).logits
    for mixer in model.mixers:
        # a mixer gives nothing; the smear, which has no residual of its own, gives back what it was given
        keeps = isinstance(mixer, Smear)
        hook = mixer.register_forward_hook(
            lambda _m, given, out, keeps=keeps: (given[0] if keeps else torch.zeros_like(out[0]), out[1])
        )
        moved = rms(model(ids).logits, whole)
        hook.remove()
        assert moved > far, f"{type(mixer).__name__} does not matter: {moved:.1e}"
    cache = model.new_cache(2, 80)
    model.step(ids[:, :70], cache)
    for index, state in enumerate(cache.states):
        for tensor in state:
            poorer = cache.clone()
            poorer.states[index][tensor].zero_()
            moved = rms(model.step(ids[:, 70:], poorer), whole[:, 70:])
            kind = type(model.mixers[index]).__name__
            assert moved > far, f"{tensor} of layer {index} ({kind}) does not matter: {moved:.1e}"


@patterns
def test_no_tokens_and_no_sequences(name: str) -> None:
    model = make_model(name, torch.float32)
    for shape in ((2, 0), (0, 3), (1, 1)):
        ids = torch.zeros(shape, dtype=torch.int64)
        assert model(ids).logits.shape == (*shape, VOCAB)
        assert model.step(ids, model.new_cache(shape[0], 3)).shape == (*shape, VOCAB)
