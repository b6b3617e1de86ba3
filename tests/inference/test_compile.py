"""Decoding with compiled blocks: after the first few tokens nothing is compiled again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from plait.inference.decoding import decode, prefill
from tests.inference.helpers import make_model, tokens


@pytest.mark.parametrize("name", ["attention", "mamba2", "gru", ["attention of nanochat"]], ids=str)
def test_decoding_compiles_nothing_after_the_first_tokens(name: str | list[str]) -> None:
    torch._dynamo.reset()
    graphs: list[fx.GraphModule] = []

    def count(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model, plain = make_model(name), make_model(name)
    caches = [m.new_cache(2, 200) for m in (model, plain)]
    for each, cache in zip((model, plain), caches, strict=True):
        prefill(each, tokens(62, 41), cache)
    for block in model.blocks:
        block.step = torch.compile(block.step, backend=count)
    for step in range(75):  # past 64 tokens, and 128: the bound to which attention reads moves
        if step == 5:
            first = len(graphs)
        ids = torch.tensor([step % 61, 60 - step % 61])
        torch.testing.assert_close(decode(model, ids, caches[0]), decode(plain, ids, caches[1]))
    assert 0 < len(graphs) == first
