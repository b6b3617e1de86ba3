"""Models that write what a table tells, and a small vocabulary with the chat tokens."""

from __future__ import annotations

from itertools import pairwise

import torch

from plait.config.schema import ModelConfig
from plait.models import Model
from plait.tokenizers.bytes import BytesTokenizer
from plait.tokenizers.characters import CharactersTokenizer
from plait.tokenizers.chat import CHAT_TOKENS, ChatTemplate, with_chat_tokens
from tests.inference.helpers import VOCAB

BYTES = with_chat_tokens(BytesTokenizer())
T = ChatTemplate(BYTES)
CHARACTERS = "0123456789+-*/(). abcdefghijklmnopqrstuvwxyz"
SMALL = CharactersTokenizer(
    CHARACTERS,
    ["<|unk|>", "<|bos|>", *CHAT_TOKENS, *(f"<|{i}|>" for i in range(VOCAB - 10 - len(CHARACTERS)))],
)


def rigged(follows: dict[int, int]) -> Model:
    """A real model that writes after each token the one that a table tells: one-hot vectors, and a head that maps
    them; its attention layer adds nothing."""
    size = BYTES.vocab_size
    config = {
        "d_model": size,
        "vocab_size": size,
        "pattern": [{"mixer": "attention", "n_head": 4}],
        "mlp": "none",
        "head": {"tie": False},
    }
    model = Model(ModelConfig.model_validate(config))
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.embedding.tokens.weight.copy_(torch.eye(size))
        head = torch.zeros(size, size)
        for token in range(size):
            head[follows.get(token, T.assistant_end), token] = 10.0
        model.head.unembedding.weight.copy_(head)
    model.tokenizer = BYTES
    return model.eval()


def chain(*ids: int) -> dict[int, int]:
    """Each token is followed by the next one."""
    assert len(set(ids[:-1])) == len(ids) - 1
    return dict(pairwise(ids))
