"""Conversations as tokens: the special tokens that mark who speaks, and the template that renders with them.

    <|bos|> <|user_start|> question <|user_end|> <|assistant_start|> answer <|assistant_end|> <|user_start|> ...

In an answer a call of a tool is ``<|python_start|> expression <|python_end|>``, followed by what came of it,
``<|output_start|> result <|output_end|>``. Tokens and template are nanochat's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from plait.config.errors import DataError, TokenizerError, nearest
from plait.tokenizers.base import Tokenizer

BOS = "<|bos|>"
CHAT_TOKENS = (
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
NANOCHAT_SPECIAL_TOKENS = (BOS, *CHAT_TOKENS)  # in the order of nanochat's ids
ROLES = ("system", "user", "assistant")
PARTS = ("text", "python", "python_output")

Message = Mapping[str, Any]
Conversation = Mapping[str, Any] | Sequence[Message]  # {"messages": [...]}, or the messages themselves


class Rendered(NamedTuple):
    """A conversation's ids, and for each of them whether the model is to learn it (1) or only reads it (0)."""

    ids: list[int]
    mask: list[int]


class Part(NamedTuple):
    """A piece of an answer: text, a python call, or the output of one."""

    type: str
    text: str


def with_chat_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with the chat tokens: itself if it has them, else with what it lacks after its last id.

    TokenizerError if its kind cannot take more tokens once it is made.
    """
    wanted = CHAT_TOKENS if tokenizer.bos_id is not None else NANOCHAT_SPECIAL_TOKENS
    missing = [name for name in wanted if name not in tokenizer.special_tokens]
    return tokenizer.with_special_tokens(missing) if missing else tokenizer


def checked_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages of a conversation, user and assistant by turns, a system message put before the first question.

    A message is {"role", "content"}; content is a text, or for the assistant also a list of parts {"type", "text"}.
    DataError says which message is wrong; the conversation itself is left as it was.
    """
    given = conversation
    if isinstance(conversation, Mapping):
        if "messages" not in conversation:
            raise DataError(f"a conversation needs the key 'messages'{nearest('messages', conversation)}")
        given = conversation["messages"]
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise DataError("a conversation is a list of messages, at least one of them")
    messages = [_checked(number, message) for number, message in enumerate(given, 1)]
    if messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise DataError("message 2: a user's message must follow the system's")
        content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        messages[:2] = [{"role": "user", "content": content}]
    skipped = len(given) - len(messages)
    for place, message in enumerate(messages):
        expected = ("user", "assistant")[place % 2]
        if message["role"] != expected:
            raise DataError(
                f"message {place + 1 + skipped} is the {message['role']}'s, but should be the {expected}'s: user and "
                "assistant speak by turns, the user first, after at most one system message"
            )
    return messages


def _checked(number: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise DataError(f"message {number} must be an object with the keys 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"message {number}: role {role!r} is none of {', '.join(ROLES)}")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if role != "assistant":
        raise DataError(f"message {number}: the content of a {role}'s message must be a text")
    if not isinstance(content, Sequence) or isinstance(content, bytes) or len(content) == 0:
        raise DataError(f"message {number}: content must be a text or a list of parts")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or not {"type", "text"} <= part.keys():
            raise DataError(f"message {number}: a part must be an object with the keys 'type' and 'text'")
        if part["type"] not in PARTS or not isinstance(part["text"], str):
            raise DataError(
                f"message {number}: a part is a text of type {', '.join(PARTS)}; got {part['type']!r} with "
                f"a {type(part['text']).__name__}"
            )
        parts.append({"type": part["type"], "text": part["text"]})
    return {"role": role, "content": parts}


class ChatTemplate:
    """Renders conversations with a tokenizer's chat tokens, and reads them back."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """TokenizerError if the tokenizer lacks a token of the template."""
        missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
        if missing or tokenizer.bos_id is None:
            raise TokenizerError(
                f"the {tokenizer.type} tokenizer has no token {missing[0] if missing else BOS} for conversations: make "
                "it with tokenizer.chat: true, or fine-tune its model with training.objective: chat, which adds them"
            )
        ids = tokenizer.special_tokens
        self.tokenizer = tokenizer
        self.bos = tokenizer.bos_id
        self.user_start, self.user_end = ids["<|user_start|>"], ids["<|user_end|>"]
        self.assistant_start, self.assistant_end = ids["<|assistant_start|>"], ids["<|assistant_end|>"]
        self.python_start, self.python_end = ids["<|python_start|>"], ids["<|python_end|>"]
        self.output_start, self.output_end = ids["<|output_start|>"], ids["<|output_end|>"]

    def render(self, conversation: Conversation, max_tokens: int | None = None) -> Rendered:
        """The conversation's ids and mask, cut to ``max_tokens``.

        Learnt are the assistant's texts and calls and the end of its answers; what a tool put out is only read.
        DataError for what is no conversation.
        """
        ids, mask = [self.bos], [0]

        def add(more: Sequence[int], learnt: int) -> None:
            ids.extend(more)
            mask.extend([learnt] * len(more))

        for message in checked_messages(conversation):
            content = message["content"]
            if message["role"] == "user":
                add(self.user(content), 0)
                continue
            add([self.assistant_start], 0)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                text = self.tokenizer.encode(part["text"])
                if part["type"] == "text":
                    add(text, 1)
                elif part["type"] == "python":
                    add([self.python_start, *text, self.python_end], 1)
                else:
                    add([self.output_start, *text, self.output_end], 0)
            add([self.assistant_end], 1)
        return Rendered(ids[:max_tokens], mask[:max_tokens])

    def render_for_completion(self, conversation: Conversation) -> list[int]:
        """The ids up to where the assistant begins to speak; an answer at the end is left out."""
        messages = checked_messages(conversation)
        if messages[-1]["role"] == "assistant":
            messages.pop()
        return [*self.render(messages).ids, self.assistant_start]

    def user(self, text: str) -> list[int]:
        """The ids of one message of the user's."""
        return [self.user_start, *self.tokenizer.encode(text), self.user_end]

    def parts(self, ids: Iterable[int]) -> list[Part]:
        """What an answer's ids say, its start and end tokens left out; a call that was cut off ends with the ids."""
        splitter = PartSplitter(self)
        found: list[tuple[str, list[int]]] = []
        for token in ids:
            kind = splitter.push(token)
            if splitter.begins:
                found.append((kind, []))
            elif token not in self.tokenizer.special_ids:
                if not found or found[-1][0] != kind:
                    found.append((kind, []))
                found[-1][1].append(token)
        return [Part(kind, self.tokenizer.decode(own)) for kind, own in found]

    def parse(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """The messages that ids stand for: what ``render`` was given, a system message and its question as one.

        DataError where the ids are no conversation.
        """
        messages: list[dict[str, Any]] = []
        at = 1 if ids and ids[0] == self.bos else 0
        while at < len(ids):
            role = {self.user_start: "user", self.assistant_start: "assistant"}.get(ids[at])
            if role is None:
                raise DataError(f"token {at} of the conversation does not begin a message")
            end = {"user": self.user_end, "assistant": self.assistant_end}[role]
            stop = next((i for i in range(at, len(ids)) if ids[i] == end), len(ids))
            body = ids[at + 1 : stop]
            content: Any = self.tokenizer.decode(body)
            parts = self.parts(body)
            if role == "assistant" and any(part.type != "text" for part in parts):
                content = [part._asdict() for part in parts]
            messages.append({"role": role, "content": content})
            at = stop + 1
        return messages


class PartSplitter:
    """Tells, token by token, what part of an answer a token belongs to; the tokens that mark parts belong to none."""

    def __init__(self, template: ChatTemplate) -> None:
        self._opens = {template.python_start: "python", template.output_start: "python_output"}
        self._closes = {template.python_end, template.output_end}
        self.kind = "text"
        self.begins = False  # whether the last token began a call or an output

    def push(self, token: int) -> str:
        """The kind of part that this token belongs to or begins; after an end token, text."""
        self.begins = token in self._opens
        if self.begins:
            self.kind = self._opens[token]
        elif token in self._closes:
            self.kind = "text"
        return self.kind
