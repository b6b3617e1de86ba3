"""The GPU's packed attention, with a plain model of torch's varlen_attn in its place: it runs on GPUs only."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops.attention import ATTENTION, attention, gpu
from plait.ops.chunks import autocast_dtype
from plait.ops.dispatch import choose_name
from tests.ops.helpers import assert_close, cumulative

LENGTHS = [5, 0, 1, 9, 3]
calls: list[dict[str, Any]] = []


def model(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, scale: float,
    window_size: tuple[int, int], enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What its documentation says of (n, H, P): keys within (left, right) of a query, -1 for any."""
    assert q.dtype == k.dtype == v.dtype and cu_q.dtype == torch.int32 and torch.equal(cu_q, cu_k)
    assert q.shape[2] % 8 == 0 and all(type(n) is int for n in (max_q, max_k, *window_size))
    calls.append({"max": (max_q, max_k), "window": window_size, "dtype": q.dtype})
    group, out = q.shape[1] // k.shape[1], []
    left, right = window_size
    for a, b in pairwise(cu_q.tolist()):
        assert b - a <= max_q
        apart = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = ((apart <= left) | (left < 0)) & ((-apart <= right) | (right < 0))
        keys, values = (t[a:b].repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("ihp,jhp->hij", q[a:b], keys) * scale
        out.append(torch.einsum("hij,jhp->ihp", scores.masked_fill(~seen, -torch.inf).softmax(-1), values))
    return torch.cat(out)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "varlen_attn", model)
    calls.clear()


def draw(heads: int, kv: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    n = sum(LENGTHS)
    return [torch.randn(1, n, h, width, dtype=dtype, requires_grad=True) for h in (heads, kv, kv)]


@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 1), (True, 3), (False, None), (False, 2)]
)
@pytest.mark.parametrize(("heads", "kv", "width"), [(2, 2, 8), (4, 2, 13), (3, 1, 16)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_packed(
    heads: int, kv: int, width: int, causal: bool, window: int | None, scale: float | None
) -> None:
    arguments = draw(heads, kv, width)
    options = {"causal": causal, "window": window, "scale": scale}
    packing = {"cu_seqlens": cumulative(LENGTHS, torch.int64), "max_len": 10}
    results = []
    for y in (
        gpu.attention(*arguments, **options, **packing),
        attention(*arguments, **options, **packing, backend="reference"),
    ):
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad(y, arguments, weight)])
    for ours, true in zip(*results, strict=True):
        assert_close(ours, true, 1e-12)
    reach = -1 if window is None else window - 1
    assert calls == [{"max": (10, 10), "window": (reach, 0 if causal else reach), "dtype": torch.float64}]


def test_without_a_bound_of_the_lengths() -> None:
    gpu.attention(*draw(1, 1, 8), cu_seqlens=cumulative(LENGTHS))
    assert calls[0]["max"] == (sum(LENGTHS),) * 2


def test_autocast_decides_the_precision() -> None:
    q, k, v = draw(2, 1, 8, torch.float32)
    assert autocast_dtype(q) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype(q) == torch.bfloat16 and autocast_dtype(q.double()) == torch.float64
        y = gpu.attention(q, k.bfloat16(), v, cu_seqlens=cumulative(LENGTHS), max_len=9)
    assert y.dtype == calls[0]["dtype"] == torch.bfloat16


@pytest.mark.parametrize(
    ("width", "packed", "dropout"),
    [(264, True, 0.0), (8, False, 0.0), (8, True, 0.5)],
    ids=["wide", "dense", "dropout"],
)
def test_what_flash_attention_cannot_do_is_portable(width: int, packed: bool, dropout: float) -> None:
    arguments = draw(2, 1, width)
    options = {"cu_seqlens": cumulative(LENGTHS) if packed else None, "max_len": 9, "dropout": dropout}
    results = []
    for run in (gpu.attention, attention):
        torch.manual_seed(0)
        results.append(run(*arguments, **options))
    assert torch.equal(*results) and not calls


def test_no_tokens() -> None:
    empty = torch.zeros(1, 0, 2, 8, requires_grad=True)
    for lengths in ([], [0, 0]):
        assert (
            gpu.attention(empty, empty, empty, cu_seqlens=cumulative(lengths), max_len=0).shape == empty.shape
        )


def test_float32_is_left_to_portable() -> None:
    assert gpu.attention.__module__ == ATTENTION.targets["gpu"].split(":")[0]
    assert choose_name(ATTENTION, None, "cpu", torch.float32) == "portable"
    assert torch.float32 not in ATTENTION.dtypes["gpu"]
