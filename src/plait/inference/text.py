"""From a row's tokens to text as they come: whole characters only, and nothing of a stop string.

What may still turn out to be part of a stop string is held back; where the text is cut in the end does not
depend on how it fell into tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Literal

from plait.tokenizers.base import StreamDecoder, Tokenizer

Finish = Literal["eos", "stop", "length"]

# A character has at most 4 bytes, so the end of a prompt tells which one it breaks off, if any.
_PROMPT_TAIL = 16


class StopFilter:
    """Passes text on up to the first stop string, which is the one that is complete first.

    Of several that are complete at the same character, the longest is cut.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The text that is now certain to stay."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)[1]], ""
            return certain
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins, without being complete."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Row:
    """What one row of a batch has written: token by token in, released ids and text out.

    ``ids`` ends with the end token, if there was one; of a stop string and what follows it, no token and no
    character stays. Without a tokenizer there are ids only.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self._filter = StopFilter(stops)
        self._filters = bool(stops)
        self._characters = [0]  # after each token: how many characters were complete
        self._released = 0
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        if self._decoder is not None:
            # The text goes on after the prompt's: a character that it breaks off, the space before a word.
            for token in prompt[-_PROMPT_TAIL:]:
                self._decoder.push(token)

    def push(self, token: int, *, eos: bool, last: bool) -> tuple[list[int], str]:
        """The ids and text that one more token releases; ``eos``: it ends the row; ``last``: no more come."""
        self.ids.append(token)
        piece = "" if eos or self._decoder is None else self._decoder.push(token)
        self._characters.append(self._characters[-1] + len(piece))
        text = self._filter.push(piece)
        if self._filter.stopped:
            self.finish = "stop"
            del self.ids[self._whole(len(self.text) + len(text)) :]
        elif eos or last:
            self.finish = "eos" if eos else "length"
            text += self._filter.finish()  # but not half a character: that is left out
        self.text += text
        held = self._filters and self.finish is None
        end = self._whole(len(self.text)) if held else len(self.ids)
        ids = self.ids[self._released : end]
        self._released = max(self._released, end)
        return ids, text

    def _whole(self, length: int) -> int:
        """How many tokens lie within the first ``length`` characters, with no half a character at the end."""
        reached = self._characters[bisect_right(self._characters, length) - 1]
        return bisect_left(self._characters, reached)
