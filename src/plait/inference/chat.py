"""Conversations with a model: answers that may call a tool, whose output is put into the answer as it is written.

When the model ends a call (``<|python_end|>``) the tool gets what it wrote since ``<|python_start|>``; if there is a
result, the next tokens are not drawn but forced: ``<|output_start|> result <|output_end|>``. An answer ends with
``<|assistant_end|>`` or ``<|bos|>``. All of it is one ``steer`` of the ordinary generation, so it runs from the cache
of any mixer, and every sample draws its own tokens, its first one too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from plait.config.errors import BuildError, ConfigError
from plait.inference.generate import Piece, stream_generate
from plait.inference.tools import MOST_CHARACTERS, Tool, calculate
from plait.models.model import Model
from plait.tokenizers.base import StreamDecoder, Tokenizer
from plait.tokenizers.chat import ChatTemplate, Conversation, PartSplitter

MAX_TOKENS = 512


@dataclass
class _RowTools:
    """One sample's state: what it is calling, and what is forced on it."""

    forced: deque[int] = field(default_factory=deque)
    call: list[int] | None = None  # the tokens of a call that has begun
    mask: list[int] = field(default_factory=list)  # of each token: 1 drawn, 0 forced
    ended: bool = False


class ToolUse:
    """The state machine of tool calls for some samples; called as ``steer`` with each token that is drawn."""

    def __init__(self, template: ChatTemplate, tool: Tool | None, num_samples: int) -> None:
        self._template = template
        self._tool = tool
        self._ends = (template.assistant_end, template.bos)
        self.rows = [_RowTools() for _ in range(num_samples)]

    def __call__(self, row: int, token: int) -> int:
        """The token that the sample takes: a forced one, if any is waiting, else the drawn one."""
        state = self.rows[row]
        if state.ended:
            return token
        state.mask.append(0 if state.forced else 1)
        token = state.forced.popleft() if state.forced else token
        state.ended = token in self._ends
        if token == self._template.python_start:
            state.call = []
        elif token == self._template.python_end and state.call is not None:
            state.forced.extend(self._output(state.call))
            state.call = None
        elif state.call is not None:
            state.call.append(token)
        return token

    def _output(self, call: list[int]) -> list[int]:
        """The tokens that a call forces: none if there is no result."""
        tokenizer = self._template.tokenizer
        # No token has less than one byte: a call of more tokens than this is no expression that is computed.
        if self._tool is None or not 0 < len(call) <= 4 * MOST_CHARACTERS:
            return []
        result = self._tool(tokenizer.decode(call))
        if result is None:
            return []
        return [self._template.output_start, *tokenizer.encode(result), self._template.output_end]


@dataclass(frozen=True)
class ReplyPiece:
    """A piece of an answer as it comes: a text, a call of the tool, or its output."""

    type: str  # "text", "python", "python_output"
    text: str
    begins: bool = False  # the first piece of a call or of an output; its text is empty


Replies = Generator[ReplyPiece, None, None]


class ChatEngine:
    """Answers conversations with a model whose tokenizer has the chat tokens."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer | None = None, *, tool: Tool | None = calculate
    ) -> None:
        """tokenizer: the model's own by default; tool: what a call is given to, None for no tools.

        BuildError without a tokenizer, TokenizerError if it has no chat tokens.
        """
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        if tokenizer is None:
            raise BuildError("the model has no tokenizer, which a conversation needs: give tokenizer=")
        self.model = model
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self.tool = tool

    def generate(
        self,
        tokens: Sequence[int],
        num_samples: int = 1,
        max_tokens: int = MAX_TOKENS,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = 42,
        **options: Any,
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Continue a prompt of ids, step by step: (token of each sample, 1 where it was drawn, 0 where forced).

        A sample that has ended repeats its end token with 0 until all have. ``options``: further ones of
        ``GenerateOptions``. Sample j draws with seed + j, whatever num_samples is.
        """
        tools = ToolUse(self.template, self.tool, num_samples)
        pieces = self._pieces(
            tokens,
            tools,
            num_samples=num_samples,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            **options,
        )
        return self._columns(pieces, tools)

    def generate_batch(
        self, tokens: Sequence[int], num_samples: int = 1, **options: Any
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Whole samples, the prompt before each and the end token left out: (ids, masks), the prompt's mask 0."""
        results = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        ends = (self.template.assistant_end, self.template.bos)
        for column, mask in self.generate(tokens, num_samples, **options):
            for row, token in enumerate(column):
                if token not in ends:
                    results[row].append(token)
                    masks[row].append(mask[row])
        return results, masks

    def stream(self, tokens: Sequence[int], reply: list[int] | None = None, **options: Any) -> Replies:
        """One answer to a prompt of ids, piece by piece, never half a character; ``reply`` collects its ids.

        ``options`` are those of ``GenerateOptions``.
        """
        if "num_samples" in options:
            raise ConfigError("num_samples is for generate and generate_batch; a stream is one answer")
        tools = ToolUse(self.template, self.tool, 1)
        pieces = self._pieces(tokens, tools, **{"max_new_tokens": MAX_TOKENS, **options})
        return self._replies(pieces, [] if reply is None else reply)

    def reply(self, conversation: Conversation, **options: Any) -> dict[str, Any]:
        """The assistant's next message in a conversation; its content is a list of parts if it called the tool."""
        ids: list[int] = []
        prompt = self.template.render_for_completion(conversation)
        for _ in self.stream(prompt, ids, **options):
            pass
        ends = (self.template.assistant_end, self.template.bos)
        body = [self.template.assistant_start, *(token for token in ids if token not in ends)]
        return self.template.parse(body)[0]

    def _pieces(self, tokens: Sequence[int], tools: ToolUse, **options: Any) -> Iterator[Piece]:
        for name in ("stop", "eos_token_id"):
            if name in options:
                raise ConfigError(f"{name} is not for conversations: an answer ends where the model ends it")
        ends = [self.template.assistant_end, self.template.bos]
        return stream_generate(
            self.model, list(tokens), tokenizer=self.tokenizer, steer=tools, eos_token_id=ends, **options
        )

    def _columns(self, pieces: Iterator[Piece], tools: ToolUse) -> Iterator[tuple[list[int], list[int]]]:
        """Pieces put together again to steps: each has one token of every sample that has not ended."""
        n_rows = len(tools.rows)
        column, mask = [self.template.assistant_end] * n_rows, [0] * n_rows
        alive, waiting, step = n_rows, n_rows, 0
        for piece in pieces:
            column[piece.row], mask[piece.row] = piece.ids[0], tools.rows[piece.row].mask[step]
            alive -= piece.finish is not None
            waiting -= 1
            if waiting == 0:
                yield list(column), list(mask)
                mask = [0] * n_rows
                waiting, step = alive, step + 1

    def _replies(self, pieces: Iterator[Piece], reply: list[int]) -> Replies:
        splitter, decoder = PartSplitter(self.template), StreamDecoder(self.tokenizer)
        for piece in pieces:
            for token in piece.ids:
                reply.append(token)
                before, kind = splitter.kind, splitter.push(token)
                if splitter.begins or kind != before:
                    if rest := decoder.finish():
                        yield ReplyPiece(before, rest)
                    if splitter.begins:
                        yield ReplyPiece(kind, "", begins=True)
                if text := decoder.push(token):
                    yield ReplyPiece(kind, text)
        if rest := decoder.finish():
            yield ReplyPiece(splitter.kind, rest)


class ChatSession:
    """A conversation that goes on: what was said stays as the very tokens that were written."""

    def __init__(self, engine: ChatEngine, system: str | None = None) -> None:
        """system: put before the user's first message."""
        self.engine = engine
        self.system = system
        self.ids = [engine.template.bos]

    def clear(self) -> None:
        """Begin a new conversation."""
        self.ids = [self.engine.template.bos]

    def say(self, text: str, **options: Any) -> Replies:
        """The user's message in, the answer out, piece by piece; it is in ``ids`` once the iterator is exhausted.

        If it is closed before that, what was written so far stays as the answer.
        """
        template = self.engine.template
        if self.system is not None and len(self.ids) == 1:
            text = f"{self.system}\n\n{text}"
        prompt = [*self.ids, *template.user(text), template.assistant_start]
        reply: list[int] = []
        pieces = self.engine.stream(prompt, reply, **options)  # mistakes raise here, before anything changes
        return self._answer(prompt, reply, pieces)

    def _answer(self, prompt: list[int], reply: list[int], pieces: Replies) -> Replies:
        ends = (self.engine.template.assistant_end, self.engine.template.bos)
        try:
            yield from pieces
        finally:
            said = [token for token in reply if token not in ends]
            self.ids = [*prompt, *said, self.engine.template.assistant_end]
