"""Text in, text out, as it comes: with a scripted model, so that every case of characters and stops is met."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from plait.config.errors import ConfigError
from plait.inference.generate import Piece, complete, generate, stream_generate
from plait.models import Model
from plait.tokenizers.bytes import BytesTokenizer
from tests.inference.helpers import make_model

BYTES = BytesTokenizer()
EOS, PAD = 257, 258


@pytest.fixture
def model() -> Model:
    made = make_model("gru", vocab_size=BYTES.vocab_size)
    made.tokenizer = BYTES
    return made


class Script:
    """In the place of a model's rows: each writes the ids it was given, then end tokens."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.place = rows, 0

    @property
    def logits(self) -> Tensor:
        wanted = [row[self.place] if self.place < len(row) else EOS for row in self.rows]
        return 1e9 * torch.nn.functional.one_hot(torch.tensor(wanted), BYTES.vocab_size).float()

    def feed(self, ids: Tensor) -> None:
        assert ids.equal(self.logits.argmax(-1))
        self.place += 1

    def keep(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]


def script(monkeypatch: pytest.MonkeyPatch, *rows: str | Sequence[int]) -> None:
    """Let the rows of the generations to come write these texts or ids."""
    ids = [BYTES.encode(row) if isinstance(row, str) else list(row) for row in rows]
    monkeypatch.setattr("plait.inference.generate.start", lambda *_, **__: Script(ids))


def joined(pieces: Sequence[Piece], row: int) -> str:
    return "".join(piece.text for piece in pieces if piece.row == row)


def test_rows_stream_whole_characters_until_their_own_ends(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["héllo €", "\U0001f600", "a longer one", ""]
    script(monkeypatch, *texts)
    pieces = list(stream_generate(model, ["x"] * 4))
    for row, text in enumerate(texts):
        own = [piece for piece in pieces if piece.row == row]
        assert joined(pieces, row) == text
        assert [piece.finish for piece in own] == [None] * (len(own) - 1) + ["eos"]
        assert [i for piece in own for i in piece.ids] == [*BYTES.encode(text), EOS]
    assert all("\N{REPLACEMENT CHARACTER}" not in piece.text for piece in pieces)
    assert generate(model, ["x"] * 4) == texts


def test_text_comes_as_soon_as_it_is_certain(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "abSTx€STOP!")
    seen = [piece.text for piece in stream_generate(model, "x", stop=["STOP"])]
    assert seen == ["a", "b", "STx", "€", ""]


@pytest.mark.parametrize("stop", ["€nd", "nd", "d"])
def test_stop_strings_end_their_row_only(model: Model, monkeypatch: pytest.MonkeyPatch, stop: str) -> None:
    script(monkeypatch, "one €nd more", "endless", "tw€ €nd")
    rows = complete(model, ["a", "b", "c"], stop=stop)
    cut = [text.split(stop)[0] for text in ("one €nd more", "endless", "tw€ €nd")]
    assert [row.text for row in rows] == cut
    assert [row.finish for row in rows] == ["stop", "stop" if stop in "endless" else "eos", "stop"]
    assert [BYTES.decode(row.ids) for row in rows] == cut


def test_a_stop_string_that_does_not_come_to_its_end_is_text(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, "abSTO")
    assert generate(model, "x", stop=["STOP"]) == "abSTO"
    script(monkeypatch, "abSTOP")
    assert generate(model, "x", stop=["STOP"], max_new_tokens=5) == "abSTO"


def test_a_tensor_has_pads_for_what_was_cut(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "abSTOPc", "abcdefgh")
    ids = torch.tensor([[1, 2], [3, 4]])
    out = generate(model, ids, stop=["STOP"])
    assert out.tolist() == [[1, 2, 97, 98, *[PAD] * 7], [3, 4, *BYTES.encode("abcdefgh"), EOS]]


def test_a_new_documents_first_token_ends_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, [97, BYTES.bos_id, 98])
    assert generate(model, "x") == "a"
    assert generate(model, "x", eos_token_id=EOS) == "ab"
    script(monkeypatch, [97, EOS, 98])
    assert generate(model, "x", eos_token_id=[], max_new_tokens=3) == "ab"


def test_an_end_token_is_no_part_of_the_text(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "one\ntwo")
    (row,) = complete(model, "x", eos_token_id=ord("\n"))
    assert (row.text, row.ids, row.finish) == ("one", BYTES.encode("one\n"), "eos")


def test_forms_of_text(model: Model) -> None:
    options = {"max_new_tokens": 5, "eos_token_id": [], "seed": 0}
    ids = generate(model, [BYTES.bos_id, 104, 105], **options)
    assert generate(model, "hi", **options) == complete(model, "hi", **options)[0].text
    assert [row.ids for row in complete(model, ["hi"], **options)] == [ids]
    assert (
        complete(model, "hi", add_bos=False, **options)[0].ids
        == generate(model, [104, 105], **options)
        != ids
    )
    assert complete(model, "", **options)[0].ids == generate(model, [BYTES.bos_id], **options)
    assert generate(model, [[]], **options) == [generate(model, [BYTES.bos_id], **options)]
    assert generate(model, "hi", num_samples=2, **options)[0] == generate(model, "hi", **options)
    model.tokenizer = None
    assert (
        generate(model, "hi", tokenizer=BYTES, **options)
        == generate(model, ["hi"], tokenizer=BYTES, **options)[0]
    )


def test_the_callback_gets_every_piece_and_the_result_is_the_same(model: Model) -> None:
    pieces: list[Piece] = []
    texts = generate(model, ["a", "bc"], seed=0, max_new_tokens=30, stream=pieces.append)
    assert texts == generate(model, ["a", "bc"], seed=0, max_new_tokens=30)
    assert texts == [joined(pieces, 0), joined(pieces, 1)]
    assert pieces == list(stream_generate(model, ["a", "bc"], seed=0, max_new_tokens=30))


def test_mistakes_raise_before_the_first_piece_and_closing_restores_the_mode(model: Model) -> None:
    with pytest.raises(ConfigError, match="top_p"):
        stream_generate(model, "x", top_p=2.0)
    model.train()
    stream = stream_generate(model, "x", seed=0)
    assert model.training
    next(stream)
    assert not model.training
    stream.close()  # type: ignore[attr-defined]
    assert all(module.training for module in model.modules())
