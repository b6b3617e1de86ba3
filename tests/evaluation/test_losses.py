"""What documents cost: in any batches, chunks and lanes the same as each document alone in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.config.errors import BuildError, ConfigError
from plait.evaluation import losses as module
from plait.evaluation.losses import can_carry, token_losses
from plait.models import Cache, Model
from tests.inference.helpers import PATTERNS, VOCAB, make_model, tokens
from tests.invariants import close

START = 60
DOCUMENTS = tokens(0, 1, 2, 90, 33, 150, 5, 64, 149, 31, 32)


def alone(model: Model, text: Sequence[int], start: int = START) -> Tensor:
    """The plainest form: one forward pass over one document."""
    with torch.no_grad():
        logits = model(torch.tensor([[start, *text]])).logits[0, :-1]
    return F.cross_entropy(logits, torch.tensor(list(text), dtype=torch.int64), reduction="none")


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(a, b, tolerance, f"document {number}")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that most of the documents are carried through several."""
    monkeypatch.setattr(module, "_CHUNK", 16)
    monkeypatch.setattr(module, "_WHOLE", 32)


class Calls:
    """The tokens of each call of a model, and whether it was one with a cache."""

    def __init__(self, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.cached = 0
        forward, step = model.forward, model.step

        def counted_forward(ids: Tensor, **options: object) -> object:
            self.sizes.append(ids.numel())
            return forward(ids, **options)  # type: ignore[arg-type]

        def counted_step(ids: Tensor, *args: object, **options: object) -> Tensor:
            self.sizes.append(ids.numel())
            self.cached += 1
            return step(ids, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "forward", counted_forward)
        monkeypatch.setattr(model, "step", counted_step)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", PATTERNS)
def test_carried_chunks_equal_each_document_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    calls = Calls(model, monkeypatch)
    ours = token_losses(model, DOCUMENTS, start=START, batch_tokens=32)
    assert calls.cached > 4 and max(calls.sizes) <= 32, "the memory is not bounded, or nothing was carried"
    assert sum(calls.sizes) == sum(map(len, DOCUMENTS)), "tokens were run twice"
    compare(ours, [alone(model, text) for text in DOCUMENTS])


@pytest.mark.usefixtures("small_chunks")
def test_the_smear_and_value_embeddings_are_carried_too() -> None:
    model = make_model(
        ["attention of nanochat", "mamba2"], embedding={"smear": True, "smear_channels": 5}, backout=True
    )
    ours = token_losses(model, DOCUMENTS, start=START, batch_tokens=32)
    compare(ours, [alone(model, text) for text in DOCUMENTS])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["lstm", "hybrid"])
@pytest.mark.parametrize("broken", ["_reset", "advance", "select"])
def test_the_comparison_can_fail(name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name)
    right = [alone(model, text) for text in DOCUMENTS]
    if broken == "_reset":  # the next document of a lane sees the one before it
        reset = module._reset

        def keeps(cache: Cache, lane: int, blank: Cache) -> None:
            reset(cache, lane, cache.select([lane]))

        monkeypatch.setattr(module, "_reset", keeps)
    elif broken == "advance":  # a chunk that forgets the one before it
        step = model.step

        def forgets(ids: Tensor, cache: object, **options: object) -> Tensor:
            for state in cache.states:  # type: ignore[attr-defined]
                for tensor in state.values():
                    tensor.zero_()
            return step(ids, cache, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(model, "step", forgets)
    else:  # lanes mixed up when some have no more documents
        select = Cache.select
        monkeypatch.setattr(Cache, "select", lambda cache, rows: select(cache, [0] * len(rows)))
    with pytest.raises(AssertionError, match="document"):
        compare(token_losses(model, DOCUMENTS, start=START, batch_tokens=32), right)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", ["lstm", "hybrid"])
def test_batches_and_order_change_nothing(name: str) -> None:
    model = make_model(name)
    first = token_losses(model, DOCUMENTS, start=START)
    for budget in (16, 100, 10**6):
        compare(token_losses(model, DOCUMENTS[::-1], start=START, batch_tokens=budget)[::-1], first)


def test_documents_that_fit_go_side_by_side_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("hybrid")
    calls = Calls(model, monkeypatch)
    ours = token_losses(model, DOCUMENTS, start=START)
    assert calls.sizes == [sum(map(len, DOCUMENTS))] and not calls.cached
    compare(ours, [alone(model, text) for text in DOCUMENTS])


def test_attention_looks_back_no_further_than_the_context() -> None:
    """One layer of attention: what a chunk's tokens see is what a run over the last ``context`` tokens shows."""
    model, context = make_model("attention"), 24
    text = tokens(150)[0]
    (ours,) = token_losses(model, [text], start=START, max_context=context)
    read, theirs = [START, *text[:-1]], []
    for a in range(0, len(text), context // 2):
        end = min(a + context // 2, len(text))
        begin = max(0, end - context)
        with torch.no_grad():
            logits = model(torch.tensor([read[begin:end]])).logits[0, a - begin :]
        theirs.append(F.cross_entropy(logits, torch.tensor(text[a:end]), reduction="none"))
    close(ours, torch.cat(theirs), 1e-5, "context of 24")  # RoPE's tables are float32
    assert (ours[context:] - alone(model, text)[context:]).abs().max() > 1e-3


def test_a_context_limits_attention_but_not_the_recurrence() -> None:
    text = tokens(200)[0]
    other = [(text[0] + 1) % VOCAB, *text[1:]]
    for name, reaches in (("attention", False), ("mamba2", True), ("lstm", True)):
        model = make_model(name)
        a, b = (token_losses(model, [t], start=START, max_context=16)[0] for t in (text, other))
        moved = (a - b).abs()
        assert moved[1:16].max() > 0
        assert bool((moved[40:] > 0).any()) == reaches, name


@pytest.mark.parametrize("context", [16, 17, 40])
def test_windows_overlap_by_half_and_count_each_token_once(
    context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("attention", embedding={"position": "learned", "max_positions": 40})
    assert not can_carry(model)
    calls = Calls(model, monkeypatch)
    ours = token_losses(
        model, DOCUMENTS, start=START, max_context=None if context == 40 else context, batch_tokens=80
    )
    assert max(calls.sizes) <= 80 and not calls.cached
    for text, cost in zip(DOCUMENTS, ours, strict=True):
        theirs, done = [], 0
        while done < len(text):
            end = min(len(text), context if done == 0 else done + context // 2)
            begin = max(0, end - context)
            window = [START, *text][begin:end]
            with torch.no_grad():
                logits = model(torch.tensor([window])).logits[0, done - begin :]
            theirs.append(F.cross_entropy(logits, torch.tensor(text[done:end]), reduction="none"))
            done = end
        close(cost, torch.cat([torch.zeros(0), *theirs]), 1e-10, f"a document of {len(text)}")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("carry", [True, False])
def test_without_a_start_the_first_token_is_a_guess(carry: bool) -> None:
    model = make_model("gru")
    ours = token_losses(model, DOCUMENTS, start=None, carry=carry, batch_tokens=32)
    for text, cost in zip(DOCUMENTS, ours, strict=True):
        assert len(cost) == len(text)
        if text:
            assert float(cost[0]) == math.log(VOCAB)
        if len(text) > 1:
            close(cost[1:], alone(model, text[1:], text[0]), 1e-10, f"a document of {len(text)}")


def test_the_model_is_as_before_and_mistakes_are_named() -> None:
    model = make_model("hybrid", dropout=0.5).train()
    compare(token_losses(model, DOCUMENTS, start=START), [alone(model.eval(), text) for text in DOCUMENTS])
    model.train()
    token_losses(model, DOCUMENTS[:4], start=START)
    assert all(m.training for m in model.modules())
    with pytest.raises(ConfigError, match="max_context is 1"):
        token_losses(model, DOCUMENTS, start=START, max_context=1)
    learned = make_model("lstm", embedding={"position": "learned", "max_positions": 40})
    with pytest.raises(ConfigError, match="carry is set, but"):
        token_losses(learned, DOCUMENTS, start=START, carry=True)
    with pytest.raises(BuildError, match="masked_lm head"):
        token_losses(make_model("lstm", head="masked_lm"), DOCUMENTS, start=START)
