"""On a GPU: the kernels of decoding against the reference in every dtype, at the shapes of real models, and recorded.

Run with ``pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.causal_conv1d_update import causal_conv1d_update
from plait.ops.convolved_linear import convolved_linear
from plait.ops.norm_linear import norm_linear
from plait.ops.selective_state_update import selective_state_update
from plait.ops.ssd_update import ssd_update
from tests.ops.decoding import (
    STATES,
    Result,
    Tensors,
    call,
    cast,
    for_convolution,
    for_convolved,
    for_norm_linear,
    for_selective,
    for_ssd,
    widened,
)
from tests.ops.helpers import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
Made = tuple[Callable[..., Tensor], Tensors, dict[str, Any]]
NORM = {"eps": 1e-5}

CASES: dict[str, Callable[[], Made]] = {
    "in_proj of Mamba-2 130M": lambda: (norm_linear, for_norm_linear(1, 768, 3352), NORM),
    "out_proj, two rows": lambda: (norm_linear, for_norm_linear(2, 1536, 768), NORM),
    "three rows": lambda: (norm_linear, for_norm_linear(3, 1536, 80), NORM),
    "batch 64": lambda: (norm_linear, for_norm_linear(64, 768, 3352), NORM),
    "100 rows of groups": lambda: (norm_linear, for_norm_linear(100, 1536, 768), {**NORM, "group_size": 192}),
    "a row of groups": lambda: (norm_linear, for_norm_linear(1, 1536, 768), {**NORM, "group_size": 192}),
    "200 rows": lambda: (norm_linear, for_norm_linear(200, 768, 200), NORM),
    "a wide row": lambda: (norm_linear, for_norm_linear(1, 11008, 300), NORM),
    "odd widths": lambda: (norm_linear, for_norm_linear(2, 77, 51), NORM),
    "odd widths, more rows": lambda: (norm_linear, for_norm_linear(21, 77, 51), NORM),
    "convolution": lambda: (causal_conv1d_update, for_convolution(3, 1792, 4), {"activation": "silu"}),
    "a narrow convolution": lambda: (causal_conv1d_update, for_convolution(3, 5, 3), {"activation": "silu"}),
    "convolved": lambda: (convolved_linear, for_convolved(1, 768, 3352, 1792, 4), {**NORM, "first": 1536}),
    "two convolved": lambda: (convolved_linear, for_convolved(2, 768, 3072, 1536, 4), {**NORM, "first": 0}),
    "many convolved": lambda: (convolved_linear, for_convolved(64, 768, 3352, 1792, 4), {**NORM, "first": 1536}),
    "more convolved": lambda: (convolved_linear, for_convolved(150, 64, 96, 32, 4), {**NORM, "first": 7}),
    "one convolved": lambda: (convolved_linear, for_convolved(1, 20, 3, 1, 2), {**NORM, "first": 1}),
    "selective": lambda: (selective_state_update, for_selective(1, 1536, 16, 48), {"dt_softplus": True}),
    "selective, batch 64": lambda: (
        selective_state_update, for_selective(64, 1536, 16, 48), {"dt_softplus": True}
    ),
    "a small selective": lambda: (selective_state_update, for_selective(3, 5, 3, None), {"dt_softplus": True}),
    "ssd": lambda: (ssd_update, for_ssd(1, 24, 64, 128, 1), {"ngroups": 1}),
    "ssd, batch 64": lambda: (ssd_update, for_ssd(64, 24, 64, 128, 1), {"ngroups": 1}),
    "ssd of groups": lambda: (ssd_update, for_ssd(3, 6, 33, 50, 3, each=True), {"ngroups": 3}),
    "a small ssd": lambda: (ssd_update, for_ssd(2, 1, 1, 1, 1), {"ngroups": 1}),
}  # fmt: skip


def on_gpu(tensors: Tensors) -> Tensors:
    """Columns of a matrix stay such."""
    return {
        name: None
        if t is None
        else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)
        for name, t in tensors.items()
    }


def run(op: Callable[..., Tensor], tensors: Tensors, **options: Any) -> Result:
    return call(op, tensors, "gpu", **options)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference_and_bit_for_bit_again(name: str, dtype: torch.dtype) -> None:
    op, tensors, options = CASES[name]()
    tensors = cast(tensors, dtype)
    want = call(op, widened(tensors), "reference", **options)
    own = on_gpu(tensors)
    got = run(op, own, **options)
    assert got.y.dtype == dtype
    assert_close(got.y.cpu(), want.y, TOLERANCE[dtype], "y")
    for key, state in want.states.items():
        assert_close(got.states[key].cpu(), state, TOLERANCE[dtype], key)
    for _ in range(3):
        again = run(op, own, **options)
        assert torch.equal(again.y, got.y)
        assert all(torch.equal(again.states[key], got.states[key]) for key in got.states)


@pytest.mark.parametrize("name", CASES)
def test_a_replay_is_the_call_and_neither_waits(name: str) -> None:
    """Thirty tokens, recorded and not: states move on in place, at the same addresses."""
    op, tensors, options = CASES[name]()
    own = on_gpu(cast(tensors, torch.bfloat16))
    states = [{key: own[key].clone() for key in STATES if own.get(key) is not None} for _ in range(2)]
    places = [t.data_ptr() for t in states[0].values()]
    call(op, own, "gpu", **options)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(**{**own, **states[0]}, **options, backend="gpu")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(30):
            graph.replay()
            want = op(**{**own, **states[1]}, **options, backend="gpu")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(y, want)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert places == [t.data_ptr() for t in states[0].values()]
