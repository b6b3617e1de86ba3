"""Answers with tools: what is forced, what is drawn, from which state; against plain loops over whole texts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from plait.config.errors import BuildError, ConfigError, DataError, TokenizerError
from plait.inference.chat import ChatEngine, ChatSession, ReplyPiece, ToolUse
from plait.inference.generate import generate
from plait.inference.sampling import Sampling, Uniforms, sample
from plait.inference.tools import calculate
from plait.models import Model
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.chat import ChatTemplate
from tests.inference.chat_models import BYTES, SMALL, T, chain, rigged
from tests.inference.helpers import make_model, tokens


def answer_of(model: Model, **options: Any) -> tuple[list[int], list[int]]:
    """What one sample writes after a question, the end token among it, and its mask."""
    columns = list(ChatEngine(model).generate(QUESTION, temperature=0.0, **options))
    return [column[0] for column, _ in columns], [mask[0] for _, mask in columns]


QUESTION = T.render_for_completion([{"role": "user", "content": "?"}])
CALL = [T.assistant_start, ord("="), T.python_start, *b"6*7", T.python_end]


def test_a_call_gets_its_result_forced() -> None:
    ids, mask = answer_of(
        rigged(chain(*CALL, ord("!")) | chain(T.output_end, ord("o"), ord("k"), T.assistant_end))
    )
    assert ids == [*CALL[1:], T.output_start, *b"42", T.output_end, *b"ok", T.assistant_end]
    assert mask == [1] * len(CALL[1:]) + [0] * 4 + [1, 1, 1]


def test_the_model_goes_on_after_a_call_without_a_result() -> None:
    call = [T.assistant_start, T.python_start, *b"6*x", T.python_end, ord("!"), T.assistant_end]
    assert answer_of(rigged(chain(*call))) == (call[1:], [1] * 7)
    call = [T.assistant_start, T.python_start, T.python_end, ord("!"), T.assistant_end]
    assert answer_of(rigged(chain(*call))) == (call[1:], [1] * 4)  # nothing was called
    alone = [T.assistant_start, ord("1"), T.python_end, ord("!"), T.assistant_end]
    assert answer_of(rigged(chain(*alone))) == (alone[1:], [1] * 4)  # the end of a call that never began


def test_the_state_machine_token_by_token() -> None:
    seen: list[str] = []

    def tool(expression: str) -> str:
        seen.append(expression)
        return "9"

    tools = ToolUse(T, tool, 2)
    for token in [T.python_start, ord("1"), T.python_start, ord("2"), ord("3"), T.python_end]:
        assert tools(1, token) == token
    assert seen == ["23"]  # a call begins anew with each start
    assert [tools(1, 0) for _ in range(3)] == [T.output_start, ord("9"), T.output_end]
    assert tools(1, T.assistant_end) == T.assistant_end
    assert tools(1, 7) == 7  # one that has ended is asked for until the batch lets it go
    assert tools.rows[1].mask == [1] * 6 + [0] * 3 + [1] and tools.rows[0].mask == []
    for token in [T.python_start, *[ord("1")] * 5000, T.python_end]:
        tools(0, token)
    assert seen == ["23"] and tools(0, 5) == 5  # endless calls are not even read


def test_an_answer_ends_with_its_end_or_with_a_new_document() -> None:
    for end in (T.assistant_end, T.bos):
        ids, mask = answer_of(rigged(chain(T.assistant_start, ord("a"), end)))
        assert ids == [ord("a"), end] and mask == [1, 1]
    ids, _ = answer_of(rigged({T.assistant_start: ord("a"), ord("a"): ord("a")}), max_tokens=5)
    assert ids == [ord("a")] * 5


def test_a_forced_output_counts_towards_the_longest_answer() -> None:
    ids, mask = answer_of(rigged(chain(*CALL)), max_tokens=len(CALL) + 1)
    assert ids == [*CALL[1:], T.output_start, ord("4")] and mask[-2:] == [0, 0]


def test_without_tools_nothing_is_forced() -> None:
    engine = ChatEngine(rigged(chain(*CALL, ord("!"), T.assistant_end)), tool=None)
    columns = list(engine.generate(QUESTION, temperature=0.0))
    assert [column[0] for column, _ in columns] == [*CALL[1:], ord("!"), T.assistant_end]


def test_several_samples_in_columns() -> None:
    """Samples that end early repeat their end with mask 0 until the last has ended."""
    model = make_model("attention window")
    engine = ChatEngine(model, SMALL)
    columns = list(engine.generate(tokens(5)[0], 6, 40, temperature=1.0, seed=3))
    assert all(len(column) == len(mask) == 6 for column, mask in columns)
    ends = (engine.template.assistant_end, engine.template.bos)
    lengths = []
    for row in range(6):
        written = [column[row] for column, _ in columns]
        stop = next((i for i, token in enumerate(written) if token in ends), len(written) - 1)
        lengths.append(stop)
        assert all(token == written[stop] for token in written[stop:])
        assert all(mask[row] == 0 for _, mask in columns[stop + 1 :])
    assert len(set(lengths)) > 2 and max(lengths) == len(columns) - 1
    results, masks = engine.generate_batch(tokens(5)[0], 6, max_tokens=40, temperature=1.0, seed=3)
    for row in range(6):
        whole = [column[row] for column, _ in columns if column[row] not in ends]
        assert results[row] == tokens(5)[0] + whole
        assert len(masks[row]) == len(results[row]) and masks[row][:5] == [0] * 5


def test_samples_do_not_depend_on_how_many_there_are() -> None:
    engine = ChatEngine(make_model("hybrid"), SMALL)
    together, masks = engine.generate_batch(tokens(4)[0], 4, max_tokens=30, seed=5)
    for j in range(4):
        alone, mask = engine.generate_batch(tokens(4)[0], 1, max_tokens=30, seed=5 + j)
        assert alone[0] == together[j] and mask[0] == masks[j]
    assert len({tuple(row) for row in together}) == 4


def machine(
    prompt: list[int], drawn: Iterator[Any], template: ChatTemplate, most: int
) -> list[tuple[int, int]]:
    """The rules of tool use once more, in their plainest form: (token, mask) until the end."""
    text, written, forced, call = list(prompt), [], [], None
    while len(written) < most:
        token = drawn.send(list(text))
        mask = 0 if forced else 1
        token = forced.pop(0) if forced else token
        text.append(token)
        written.append((token, mask))
        if token in (template.assistant_end, template.bos):
            break
        if token == template.python_start:
            call = []
        elif call is not None and token == template.python_end:
            result = f"{len(template.tokenizer.decode(call))}.0"
            output = [template.output_start, *template.tokenizer.encode(result), template.output_end]
            forced, call = output if call else [], None
        elif call is not None:
            call.append(token)
    return written


def drawing(model: Model, seed: int, sampling: Sampling) -> Iterator[Any]:
    """Takes a whole text, gives the next token: no cache, one row."""
    uniforms, token = Uniforms([seed]), None
    while True:
        text = yield token
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[:, -1, : model.vocab_size]
        token = int(sample(logits, sampling, uniform=uniforms.next()))


@pytest.mark.parametrize("name", ["hybrid", "hybrid that ends in Mamba", "mamba", "mamba3"])
def test_every_mixers_cache_goes_through_calls_as_the_whole_text_would(name: str) -> None:
    model = make_model(name, head={"tie": False, "bias": True})
    engine = ChatEngine(model, SMALL, tool=lambda call: f"{len(call)}.0")
    template, prompt, sampling = engine.template, tokens(6)[0], Sampling(temperature=1.5)
    # Calls are begun and ended often, so that samples have forced tokens at different times; answers seldom end.
    with torch.no_grad():
        model.head.unembedding.bias[[template.python_start, template.python_end]] += 6
        model.head.unembedding.bias[[template.assistant_end, template.bos]] -= 4
    calls = drawn_tokens = 0
    columns = list(engine.generate(prompt, 6, 40, temperature=1.5, seed=11))
    for row in range(6):
        drawn = drawing(model, 11 + row, sampling)
        next(drawn)
        expected = machine(prompt, drawn, template, 40)
        got = [(column[row], mask[row]) for column, mask in columns]
        assert got[: len(expected)] == expected
        calls += sum(token == template.output_start and mask == 0 for token, mask in expected)
        drawn_tokens += sum(mask for _, mask in expected)
    assert calls >= 6 and drawn_tokens >= 60


@pytest.mark.parametrize("name", ["hybrid", "lstm", "mamba2"])
def test_greedy_is_plain_generation_when_no_tool_is_used(name: str) -> None:
    model = make_model(name)
    engine = ChatEngine(model, SMALL)
    ends = [engine.template.assistant_end, engine.template.bos]
    for prompt in tokens(3, 9, 17):
        ids = generate(model, prompt, temperature=0.0, max_new_tokens=30, eos_token_id=ends)
        columns = list(engine.generate(prompt, temperature=0.0, max_tokens=30))
        assert [column[0] for column, _ in columns] == ids
        assert all(mask == [1] for _, mask in columns)


def test_a_reply_is_a_message() -> None:
    model = rigged(chain(*CALL) | chain(T.output_end, ord("o"), T.assistant_end))
    question = [{"role": "user", "content": "?"}]
    assert ChatEngine(model).reply(question, temperature=0.0) == {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "="},
            {"type": "python", "text": "6*7"},
            {"type": "python_output", "text": "42"},
            {"type": "text", "text": "o"},
        ],
    }
    plain = rigged(chain(T.assistant_start, *b"hi", T.assistant_end))
    assert ChatEngine(plain).reply(question, temperature=0.0) == {"role": "assistant", "content": "hi"}
    silent = rigged({})
    assert ChatEngine(silent).reply(question, temperature=0.0) == {"role": "assistant", "content": ""}


def test_pieces_of_an_answer_as_it_comes() -> None:
    word = "é日"
    model = rigged(chain(T.assistant_start, *word.encode(), T.python_start, *b"6*7", T.python_end))
    pieces = list(ChatEngine(model).stream(QUESTION, temperature=0.0))
    assert pieces == [
        ReplyPiece("text", "é"),
        ReplyPiece("text", "日"),
        ReplyPiece("python", "", begins=True),
        *(ReplyPiece("python", c) for c in "6*7"),
        ReplyPiece("python_output", "", begins=True),
        *(ReplyPiece("python_output", c) for c in "42"),
    ]
    half = rigged(chain(T.assistant_start, *"é".encode()[:1], T.python_start, ord("1"), T.assistant_end))
    texts = [(piece.type, piece.text) for piece in ChatEngine(half).stream(QUESTION, temperature=0.0)]
    assert texts == [("text", "\N{REPLACEMENT CHARACTER}"), ("python", ""), ("python", "1")]


def test_a_session_keeps_the_very_tokens() -> None:
    model = rigged(chain(*CALL) | chain(T.output_end, ord("o"), T.assistant_end))
    session = ChatSession(ChatEngine(model), system="S")
    written = [*CALL[1:], T.output_start, *b"42", T.output_end, ord("o")]
    said = "".join(piece.text for piece in session.say("?", temperature=0.0))
    assert said == "=6*742o"
    first = [T.bos, *T.user("S\n\n?"), T.assistant_start, *written, T.assistant_end]
    assert session.ids == first
    list(session.say("x", temperature=0.0, max_new_tokens=2))  # cut off: it ends all the same
    assert session.ids == [*first, *T.user("x"), T.assistant_start, *CALL[1:3], T.assistant_end]
    assert [m["role"] for m in T.parse(session.ids)] == ["user", "assistant"] * 2
    session.clear()
    assert session.ids == [T.bos]
    answer = session.say("?", temperature=0.0)
    next(answer)
    answer.close()  # an interrupt: what is written stays
    assert session.ids == [T.bos, *T.user("S\n\n?"), T.assistant_start, CALL[1], T.assistant_end]


def test_a_session_says_what_is_wrong_before_anything_changes() -> None:
    session = ChatSession(ChatEngine(rigged({})))
    with pytest.raises(ConfigError, match="temperature is -1"):
        session.say("?", temperature=-1)
    assert session.ids == [T.bos]


def test_an_answer_of_a_damaged_model_is_an_error() -> None:
    model = rigged({})
    with torch.no_grad():
        model.head.unembedding.weight.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        ChatEngine(model).reply([{"role": "user", "content": "?"}])


def test_what_makes_no_sense_is_refused() -> None:
    model = rigged({})
    engine = ChatEngine(model)
    for name, value in (("stop", "x"), ("eos_token_id", 3)):
        with pytest.raises(ConfigError, match=f"{name} is not for conversations"):
            engine.generate(QUESTION, **{name: value})
    with pytest.raises(ConfigError, match="num_samples is for generate"):
        engine.stream(QUESTION, num_samples=2)
    with pytest.raises(ConfigError, match="no option 'top_q'"):
        engine.generate(QUESTION, top_q=1)
    model.tokenizer = BytesTokenizer()
    with pytest.raises(TokenizerError, match="for conversations"):
        ChatEngine(model)
    model.tokenizer = None
    with pytest.raises(BuildError, match="no tokenizer, which a conversation needs"):
        ChatEngine(model)
    assert ChatEngine(model, BYTES).tool is calculate
