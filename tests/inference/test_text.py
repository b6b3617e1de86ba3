"""Text as it streams: whole characters, nothing of a stop string, the same cut however the text falls into tokens."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from plait.inference.text import Row, StopFilter
from plait.tokenizers.bytes import BytesTokenizer

BYTES = BytesTokenizer()


def cut_by_hand(text: str, stops: list[str]) -> str:
    """Up to the stop string that is complete first; of those complete at the same place, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))]
    return text


@settings(max_examples=300, deadline=None)
@given(
    st.text("ab€", max_size=20),
    st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 5), max_size=30),
)
@example("ab€", ["ab€", "b"], [])
@example("ab€", ["ab€", "b€"], [1])
def test_the_cut_does_not_depend_on_the_pieces(text: str, stops: list[str], sizes: list[int]) -> None:
    stop_filter, out, rest = StopFilter(stops), "", text
    right = cut_by_hand(text, stops)
    for size in [*sizes, len(text)]:
        out += stop_filter.push(rest[:size])
        rest = rest[size:]
        assert right.startswith(out), "a part of a stop string was passed on"
    assert stop_filter.stopped == (right != text)
    assert out + stop_filter.finish() == right


def write(row: Row, ids: list[int]) -> list[tuple[list[int], str]]:
    """Push ids until the row ends; 257 is the end token."""
    pieces = []
    for number, token in enumerate(ids, 1):
        pieces.append(row.push(token, eos=token == 257, last=number == len(ids)))
        if row.finish is not None:
            break
    return pieces


@settings(max_examples=300, deadline=None)
@given(st.text("aé€\U0001f600S", max_size=8), st.sampled_from([[], ["S"], ["€S"], ["éS", "a€"]]))
def test_ids_and_text_released_agree_at_every_step(text: str, stops: list[str]) -> None:
    row = Row(BYTES, [], stops)
    ids, shown = [], ""
    right = cut_by_hand(text, stops)
    for new_ids, new_text in write(row, [*BYTES.encode(text), 257]):
        ids += new_ids
        shown += new_text
        assert "\N{REPLACEMENT CHARACTER}" not in shown and right.startswith(shown)
        if stops:
            assert right.startswith(BYTES.decode(ids)), (
                "ids of a stop string, or half a character, were released"
            )
    assert shown == row.text == right and ids == row.ids
    stopped = row.finish == "stop"
    assert stopped == (right != text) and ids == BYTES.encode(right) + ([] if stopped else [257])


def test_a_stop_string_inside_a_token_takes_the_token_with_it() -> None:
    class Words(BytesTokenizer):
        def piece(self, token_id: int, first: bool = False) -> bytes:
            return [b"one ", b"two\nEND", b"\xc3", b"\xa9END"][token_id]

    row = Row(Words(), [], ["END"])
    assert write(row, [0, 1, 0]) == [([0], "one "), ([], "two\n")]
    assert (row.ids, row.text, row.finish) == ([0], "one two\n", "stop")
    row = Row(Words(), [], ["END"])
    write(row, [0, 2, 3])
    assert (row.ids, row.text) == ([0], "one é")


def test_half_a_character_is_never_shown_not_even_at_the_end() -> None:
    row = Row(BYTES, [])
    euro = list("€".encode())
    assert write(row, [*euro, *euro[:2]]) == [
        ([euro[0]], ""),
        ([euro[1]], ""),
        ([euro[2]], "€"),
        ([euro[0]], ""),
        ([euro[1]], ""),
    ]
    assert row.finish == "length"


def test_a_character_that_the_prompt_breaks_off_is_completed() -> None:
    euro = list("€".encode())
    row = Row(BYTES, [65, *euro[:1]])
    assert "".join(text for _, text in write(row, [*euro[1:], 66])) == "€B"


def test_without_a_tokenizer_there_are_ids_only() -> None:
    row = Row(None, [1, 2])
    assert write(row, [5, 257, 6]) == [([5], ""), ([257], "")] and row.finish == "eos"
