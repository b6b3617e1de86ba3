"""Generation of every kind of layer: through the cache, in batches, in chunks and forks, always the same tokens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from plait.config.errors import BuildError, CapacityError, ConfigError, DataError, PlaitError
from plait.inference.decoding import decode, prefill
from plait.inference.generate import complete, generate
from plait.models import Model
from plait.tokenizers.bytes import BytesTokenizer
from tests.inference.helpers import PATTERNS, VOCAB, greedy_by_hand, make_model, rows_of, tokens

patterns = pytest.mark.parametrize("name", PATTERNS)
PROMPTS = tokens(7, 1, 30, 66)
NEW = 12


@patterns
def test_greedy_equals_the_whole_text_again_for_every_token(name: str) -> None:
    model = make_model(name)
    by_hand = [greedy_by_hand(model, prompt, NEW) for prompt in PROMPTS]
    ours = model.generate(PROMPTS, max_new_tokens=NEW, temperature=0)
    assert ours == by_hand
    assert model.generate(PROMPTS, max_new_tokens=NEW, temperature=0, use_cache=False) == by_hand
    assert len({tuple(row) for row in ours}) > 1, "the prompts do not matter"


@patterns
def test_a_cache_that_forgets_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above can fail: any layer that loses its state after the prefill changes what is written."""
    model = make_model(name)
    s = {"max_new_tokens": 40, "seed": 0}
    right = model.generate(PROMPTS, **s)
    for index in range(len(model.blocks)):

        def forgets(
            prompts_of: Model, prompts: list[list[int]], cache: object, *, chunk: None, at: int = index
        ) -> Tensor:
            logits = prefill(prompts_of, prompts, cache, chunk=chunk)  # type: ignore[arg-type]
            for tensor in cache.states[at].values():  # type: ignore[attr-defined]
                tensor.zero_()
            return logits

        monkeypatch.setattr("plait.inference.decoding.prefill", forgets)
        assert model.generate(PROMPTS, **s) != right, f"layer {index}"
        monkeypatch.undo()


@patterns
def test_a_row_writes_the_same_in_any_batch_and_any_chunks(name: str) -> None:
    model = make_model(name)
    options = {"max_new_tokens": NEW, "temperature": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
    together = generate(model, PROMPTS, seed=[5, 6, 7, 8], **options)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], seed=5 + row, **options) == [together[row]]
    assert generate(model, PROMPTS[::-1], seed=[8, 7, 6, 5], **options) == together[::-1]
    for chunk in (1, 7, 30, 64):
        assert generate(model, PROMPTS, seed=[5, 6, 7, 8], prefill_chunk=chunk, **options) == together
    assert len({tuple(row) for row in together}) == len(together)


@patterns
def test_samples_fork_the_cache_of_a_prompt_that_is_run_once(name: str) -> None:
    model, prompts = make_model(name), PROMPTS[:2]
    counted = Counted(model)
    rows = generate(model, prompts, num_samples=3, seed=[10, 20], max_new_tokens=NEW)
    assert counted.tokens[0] == sum(map(len, prompts)) and counted.tokens[1:] == [6] * (NEW - 1)
    for i, prompt in enumerate(prompts):
        for j in range(3):
            assert rows[3 * i + j] == generate(model, prompt, seed=[10, 20][i] + j, max_new_tokens=NEW)
    assert len({tuple(row) for row in rows}) == 6
    ids = torch.tensor([[1, 2], [3, 4]])
    out = rows_of(generate(model, ids, num_samples=2, seed=0, max_new_tokens=3))
    assert [row[:2] for row in out] == [[1, 2], [1, 2], [3, 4], [3, 4]]
    assert [row[2:] for row in out] == generate(model, rows_of(ids), num_samples=2, seed=0, max_new_tokens=3)


class Counted:
    """Notes the number of tokens of each call of the model's step."""

    def __init__(self, model: Model) -> None:
        self.tokens: list[int] = []
        step = model.step

        def counted(ids: Tensor, *args: object, **kwargs: object) -> Tensor:
            self.tokens.append(ids.numel())
            return step(ids, *args, **kwargs)  # type: ignore[arg-type]

        model.step = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("name", ["lstm", "hybrid"])
def test_rows_end_for_themselves_and_the_batch_shrinks(name: str) -> None:
    model = make_model(name)
    prompts = tokens(5, 9, 3, 4)
    options = {"seed": 1, "max_new_tokens": 30, "repetition_penalty": 1.5}
    free = [list(row) for row in generate(model, prompts, **options)]
    ends = [free[0][2], free[1][5]]
    cut = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), 30)] for row in free]
    assert len(set(map(len, cut))) > 2, "choose another seed: the rows should end at different places"
    counted = Counted(model)
    rows = complete(model, prompts, **options, eos_token_id=ends)
    assert [row.ids for row in rows] == cut
    assert [row.finish for row in rows] == [
        "length" if len(c) == 30 and c[-1] not in ends else "eos" for c in cut
    ]
    work = sum(counted.tokens[1:])
    assert work < 0.8 * 4 * max(map(len, cut)), f"{work} tokens: ended rows went on"
    padded = generate(model, torch.tensor([p[:3] for p in prompts]), **options, pad_token_id=-7)
    assert -7 not in padded
    ids = torch.tensor([p[:3] for p in prompts])
    free = generate(model, ids, **options)[:, 3:]
    padded = generate(model, ids, **options, pad_token_id=-7, eos_token_id=ends)[:, 3:]
    for a, b in zip(rows_of(free), rows_of(padded), strict=True):
        end = next((i + 1 for i, t in enumerate(a) if t in ends), 30)
        assert b == (a[:end] + [-7] * 30)[: len(b)]


def test_generation_stops_when_all_rows_have_ended() -> None:
    model, prompts = make_model("lstm"), tokens(5, 9)
    free = generate(model, prompts, temperature=0, max_new_tokens=6)
    counted = Counted(model)
    ends = [free[0][2], free[1][4]]
    generate(model, prompts, temperature=0, max_new_tokens=10**6, eos_token_id=ends)
    assert len(counted.tokens) <= 5


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_a_tensor_keeps_its_pads_and_pads_change_nothing(side: str) -> None:
    model = make_model("hybrid")
    prompts = tokens(9, 4, 1)
    places = {"left": lambda n: range(9 - n, 9), "right": range, "holes": lambda n: range(0, 2 * n, 2)[:n]}
    ids = torch.full((3, 18), 60)
    mask = torch.zeros(3, 18)
    for row, prompt in enumerate(prompts):
        at = list(places[side](len(prompt)))
        ids[row, at], mask[row, at] = torch.tensor(prompt), 1
    out = generate(model, ids, attention_mask=mask, seed=3, max_new_tokens=NEW)
    assert out[:, :18].equal(ids) and out.dtype == ids.dtype
    assert rows_of(out[:, 18:]) == generate(model, prompts, seed=3, max_new_tokens=NEW)


def test_padded_ids_are_never_sampled() -> None:
    model = make_model("lstm")
    with torch.no_grad():
        weight = model.get_parameter("head.unembedding.weight")
        weight[VOCAB:] = 100 * weight[:1]
    rows = generate(model, [[1]] * 40, temperature=100.0, max_new_tokens=20, seed=0)
    seen = {token for row in rows for token in row}
    assert max(seen) < VOCAB and len(seen) > 50


def test_seeds() -> None:
    model, prompts = make_model("gru"), tokens(3, 3)
    torch.manual_seed(0)
    first = generate(model, prompts, max_new_tokens=NEW)
    assert generate(model, prompts, max_new_tokens=NEW) != first
    torch.manual_seed(0)
    assert generate(model, prompts, max_new_tokens=NEW) == first
    a, b = (generate(model, prompts, seed=s, max_new_tokens=NEW) for s in (1, 2))
    assert a[1] != b[1] and generate(model, prompts[1], seed=2, max_new_tokens=NEW) == a[1]


def test_the_repetition_penalty_reads_the_rows_own_prompt_and_text() -> None:
    model, prompts = make_model("gru"), tokens(3, 4)
    rows = generate(model, prompts, temperature=0, repetition_penalty=1e9, max_new_tokens=NEW)
    for prompt, row in zip(prompts, rows, strict=True):
        text = [*prompt, *row]
        assert len(set(text)) == len(set(prompt)) + len(row), "a token was repeated"


def test_the_model_is_in_eval_mode_meanwhile_and_as_before_afterwards() -> None:
    model = make_model("hybrid", dropout=0.5, embedding={"dropout": 0.5})
    right = generate(model, PROMPTS, temperature=0, max_new_tokens=NEW)
    model.train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, PROMPTS, temperature=0, max_new_tokens=NEW) == right
    assert [module.training for module in model.modules()] == modes
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(DataError, match="row 0 are not finite"):
        generate(model, PROMPTS, max_new_tokens=NEW)
    assert [module.training for module in model.modules()] == modes


def test_nothing_is_read_from_the_device_before_the_end_if_nothing_depends_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, reads = make_model("lstm"), []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(t.shape) or tolist(t))
    monkeypatch.setattr(Tensor, "item", lambda t: pytest.fail("a number was read from the device"))
    generate(model, [[1, 2], [3, 4]], seed=0, max_new_tokens=50, top_p=0.9)
    assert reads == [(50, 2)]


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "mamba2"])
def test_recurrent_layers_need_no_more_memory_for_more_tokens(name: str) -> None:
    model = make_model(name)
    assert model.new_cache(2, 10).nbytes == model.new_cache(2, 10**7).nbytes
    cache = model.new_cache(2, 200)
    prefill(model, tokens(5, 8), cache)
    before = cache.nbytes
    for step in range(100):
        decode(model, torch.tensor([step % VOCAB, 1]), cache)
    assert cache.nbytes == before and cache.lengths == [105, 108]


def test_a_session_is_forked_and_goes_on_at_any_token() -> None:
    model, (first, second) = make_model("hybrid"), tokens(20, 9)
    cache = model.new_cache(1, 100)
    prefill(model, [first], cache)
    fork = cache.clone()
    logits = prefill(model, [second], cache, chunk=4)
    whole = model(torch.tensor([first + second])).logits[0, -1]
    torch.testing.assert_close(logits[0], whole, rtol=1e-10, atol=1e-10)
    assert prefill(model, [second], fork, chunk=4).equal(logits)


def test_learned_positions_are_a_limit_that_is_known_before_the_start() -> None:
    model = make_model("attention", embedding={"position": "learned", "max_positions": 12})
    assert len(generate(model, [1, 2, 3], max_new_tokens=10, seed=0)) == 10
    counted = Counted(model)
    with pytest.raises(
        CapacityError, match=r"3 tokens and 11 new .* 12 learned positions: .* at most 10 new"
    ):
        generate(model, [1, 2, 3], max_new_tokens=11)
    assert not counted.tokens


def test_models_that_look_ahead_or_have_another_head_are_refused_by_name() -> None:
    both_ways = {"mixer": "attention", "n_head": 2, "causal": False}
    with pytest.raises(BuildError, match=r"layer 1 \(attention\) is not causal"):
        generate(make_model("lstm", pattern=["lstm", both_ways], head="features"), [1])
    with pytest.raises(BuildError, match="masked_lm head cannot generate"):
        generate(make_model("lstm", head="masked_lm"), [1])


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        ([[]], {}, DataError, "prompt 0 is empty, and there is no tokenizer"),
        ([[1], [61]], {}, DataError, r"prompt 1 holds the token 61, .* 0 \.\. 60"),
        ([[-1]], {}, DataError, "holds the token -1"),
        ("text", {}, ConfigError, "no tokenizer"),
        ([1, [2]], {}, DataError, "different kinds"),
        ([[1.5]], {}, DataError, "whole numbers"),
        (torch.zeros(2), {}, DataError, "must be"),
        ([1], {"stop": "x"}, ConfigError, "stop strings need a tokenizer"),
        ([1], {"stop": [""]}, ConfigError, "stop is"),
        ([1], {"max_new_tokns": 3}, ConfigError, "no option 'max_new_tokns'.*did you mean 'max_new_tokens'"),
        ([1], {"max_new_tokens": -1}, ConfigError, "max_new_tokens is -1"),
        ([1], {"top_k": 0}, ConfigError, "top_k is 0"),
        ([1], {"prefill_chunk": 0}, ConfigError, "prefill_chunk is 0"),
        ([1], {"num_samples": 0}, ConfigError, "num_samples is 0"),
        ([1], {"eos_token_id": 61}, ConfigError, "eos_token_id 61"),
        ([1], {"seed": [1, 2]}, ConfigError, "2 numbers for 1 prompts"),
        ([1], {"attention_mask": torch.ones(1, 1)}, DataError, "attention_mask"),
    ],
)
def test_mistakes_are_named(
    prompts: object, options: dict[str, object], error: type[PlaitError], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(make_model("rnn"), prompts, **options)  # type: ignore[arg-type]


def test_nothing_asked_nothing_written() -> None:
    model = make_model("rnn")
    assert generate(model, [], max_new_tokens=3) == []
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]
    assert generate(model, torch.zeros(2, 3, dtype=torch.int64), max_new_tokens=0).shape == (2, 3)
    assert generate(model, torch.zeros(0, 3, dtype=torch.int64), max_new_tokens=4).shape == (0, 3)


@pytest.fixture(autouse=True)
def _no_warnings(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [w for w in recwarn if "keeps no state" in str(w.message)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_that_only_the_model_knows_are_never_drawn(temperature: float) -> None:
    """Those of a vocabulary rounded up beyond the tokenizer's stand for no text, however likely they are."""
    tokenizer = BytesTokenizer()
    model = make_model("hybrid", vocab_size=tokenizer.vocab_size + 6)
    with torch.no_grad():
        weight = model.get_parameter("head.unembedding.weight")
        weight[tokenizer.vocab_size :] *= 50
    prompts = [[104, 105]] * 8
    free = model.generate(prompts, max_new_tokens=20, temperature=temperature, seed=0, eos_token_id=[])
    assert any(token >= tokenizer.vocab_size for row in free for token in row)
    model.tokenizer = tokenizer
    for penalty in (1.0, 1.5):
        rows = model.generate(
            prompts,
            max_new_tokens=20,
            temperature=temperature,
            seed=0,
            eos_token_id=[],
            repetition_penalty=penalty,
        )
        assert all(token < tokenizer.vocab_size for row in rows for token in row)
    assert isinstance(model.generate("hi", max_new_tokens=20, temperature=temperature, seed=0), str)
