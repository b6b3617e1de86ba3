"""The kernels of decoding in Triton's interpreter: against the reference, at shapes that no tile divides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from plait.ops.causal_conv1d_update import CAUSAL_CONV1D_UPDATE, causal_conv1d_update
from plait.ops.causal_conv1d_update.gpu import UPDATE as CONVOLVE
from plait.ops.convolved_linear import convolved_linear
from plait.ops.convolved_linear.gpu import MAP as CONVOLVED
from plait.ops.norm_linear import NORM_LINEAR, norm_linear
from plait.ops.norm_linear import gpu as norm_linear_gpu
from plait.ops.norm_linear.gpu import MAP, blocks
from plait.ops.selective_state_update import selective_state_update
from plait.ops.selective_state_update.gpu import UPDATE as SELECT
from plait.ops.selective_state_update.gpu import channels_of
from plait.ops.ssd_update import ssd_update
from plait.ops.ssd_update.gpu import UPDATE as SSD
from plait.ops.ssd_update.gpu import slice_of
from tests.ops.decoding import (
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
from tests.ops.interpreter import needs_interpreter, poisoned, without

__all__ = ["poisoned"]
pytestmark = [needs_interpreter, pytest.mark.usefixtures("poisoned")]
TOLERANCE = 1e-6


def against_reference(op: Any, tensors: Tensors, **options: Any) -> None:
    """Twice, on copies: two runs are equal bit for bit."""
    tensors = cast(tensors, torch.float32)
    want = call(op, widened(tensors), "reference", **options)
    got, again = (call(op, tensors, "gpu", **options) for _ in range(2))
    assert_close(got.y, want.y, TOLERANCE, "y")
    assert torch.equal(got.y, again.y)
    for name, state in want.states.items():
        assert_close(got.states[name], state, TOLERANCE, name)
        assert torch.equal(got.states[name], again.states[name])


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize(("d_in", "d_out", "groups"), [(48, 37, 1), (70, 5, 0), (24, 70, 3), (33, 1, 1)])
def test_norm_linear(rows: int, d_in: int, d_out: int, groups: int) -> None:
    """Rows of both kernels, on one program and several, and groups whose width is no power of two."""
    tensors = for_norm_linear(rows, d_in, d_out)
    if not groups:
        against_reference(norm_linear, without(tensors, "norm_weight", "bias"))
        return
    size = d_in // groups
    against_reference(norm_linear, tensors, eps=0.02, group_size=size)
    bare = without(tensors, "norm_weight", "residual")
    against_reference(norm_linear, bare, eps=0.02, group_size=size)


def test_norm_linear_of_columns_and_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of wider matrices; and beyond the kernels' rows torch's product, after the kernel of the norm."""
    t = cast(for_norm_linear(3, 40, 12), torch.float32)
    wide = {name: torch.cat([t[name], t[name] + 1], 1) for name in ("x", "weight", "residual")}
    cut = {"x": wide["x"][:, :40], "weight": wide["weight"][:, :40], "residual": wide["residual"][:, :12]}
    want = norm_linear(**t, eps=0.1, backend="gpu")
    assert torch.equal(norm_linear(**{**t, **cut}, eps=0.1, backend="gpu"), want)
    turned = {name: t[name].t().contiguous().t() for name in ("x", "weight", "residual")}
    assert torch.equal(norm_linear(**{**t, **turned}, eps=0.1, backend="gpu"), want)
    monkeypatch.setattr(norm_linear_gpu, "ROWS", 2)
    with pytest.MonkeyPatch.context() as own:
        own.setenv("PLAIT_BACKEND", "gpu")
        assert_close(norm_linear(**t, eps=0.1), want, TOLERANCE)


def test_more_rows_than_a_tile() -> None:
    against_reference(norm_linear, for_norm_linear(70, 40, 18), eps=0.02)


@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize(
    ("d_out", "first", "channels"), [(37, 0, 20), (37, 9, 28), (20, 3, 1), (24, 24, 0)], ids=str
)
def test_convolved_linear(rows: int, d_out: int, first: int, channels: int) -> None:
    """Columns at the beginning, at the end, one, none; of several programs; from one tap on."""
    for taps in (1, 2, 4) if rows == 2 else (4,):
        tensors = for_convolved(rows, 24, d_out, channels, taps)
        against_reference(convolved_linear, tensors, first=first, eps=0.02, group_size=8)
    bare = without(tensors, "bias", "conv_bias", "norm_weight")
    against_reference(convolved_linear, bare, first=first)


def test_convolved_linear_of_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_linear_gpu, "ROWS", 2)
    with pytest.MonkeyPatch.context() as own:
        own.setenv("PLAIT_BACKEND", "gpu")
        t = cast(for_convolved(3, 24, 20, 7, 4), torch.float32)
        got = call(convolved_linear, t, "gpu", first=5, eps=0.1)
    want = call(convolved_linear, widened(t), "reference", first=5, eps=0.1)
    assert_close(got.y, want.y, TOLERANCE)
    assert_close(got.states["state"], want.states["state"], TOLERANCE)


def test_ssd_of_what_is_convolved() -> None:
    t = for_ssd(3, 4, 8, 16, 2)
    own = {**t, "conv_state": None, "conv_weight": None, "conv_bias": None}
    against_reference(ssd_update, own, ngroups=2)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("channels", "taps"), [(5, 4), (200, 4), (130, 2), (64, 1), (33, 7)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_convolution(rows: int, channels: int, taps: int, activation: str | None) -> None:
    tensors = for_convolution(rows, channels, taps)
    against_reference(causal_conv1d_update, tensors, activation=activation)
    against_reference(causal_conv1d_update, without(tensors, "bias"), activation=activation)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("channels", "states", "rank"), [(5, 3, None), (40, 16, 3), (33, 7, 48), (70, 1, 1)])
def test_selective(rows: int, channels: int, states: int, rank: int | None) -> None:
    tensors = for_selective(rows, channels, states, rank)
    against_reference(selective_state_update, tensors, dt_softplus=True)
    bare = without(tensors, "z", "D", "dt_bias")
    against_reference(selective_state_update, bare, dt_softplus=True)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(4, 8, 16, 2), (1, 1, 1, 1), (6, 5, 7, 3), (2, 48, 33, 1)])
def test_ssd(rows: int, shape: tuple[int, int, int, int]) -> None:
    tensors = for_ssd(rows, *shape, each=True)
    against_reference(ssd_update, tensors, ngroups=shape[3])
    one = for_ssd(rows, *shape, 2)
    against_reference(ssd_update, one, ngroups=shape[3], dt_limit=(0.05, 0.4))
    bare = without(one, "z", "D", "dt_bias", "conv_bias")
    against_reference(ssd_update, bare, ngroups=shape[3])


def test_extreme_time_steps() -> None:
    """dt from 1e-6 to 20: nothing overflows, a state that is wiped out is exactly replaced."""
    tensors = for_ssd(3, 4, 8, 16, 2)
    tensors["dt"] = torch.tensor([-13.8, 0.0, 5.0, 25.0], dtype=torch.float64).expand(3, 4)
    tensors["dt_bias"] = None
    against_reference(ssd_update, tensors, ngroups=2)
    one = for_selective(3, 4, 8, None)
    one["dt"], one["dt_bias"] = tensors["dt"], None
    against_reference(selective_state_update, one, dt_softplus=True)


def test_nothing_to_do() -> None:
    """No sequences, and no channels."""
    for tensors, op, options in (
        (for_norm_linear(0, 8, 4), norm_linear, {"eps": 1e-5}),
        (for_convolution(0, 8, 4), causal_conv1d_update, {}),
        (for_selective(0, 8, 4, 2), selective_state_update, {}),
        (for_ssd(0, 2, 8, 4, 1), ssd_update, {"ngroups": 1}),
    ):
        got = call(op, cast(tensors, torch.float32), "gpu", **options)
        assert got.y.shape[0] == 0


def test_registered_ops() -> None:
    """Schemas, what is mutated and fakes: torch.compile sees what happens."""
    t = cast(for_norm_linear(3, 24, 10), torch.float32)
    maps = (t["x"], t["weight"], t["bias"], t["norm_weight"], t["residual"], 1e-5, 1)
    torch.library.opcheck(MAP.op, maps)
    t = cast(for_convolved(3, 24, 10, 6, 4), torch.float32)
    given = (t["x"], t["weight"], t["bias"], t["norm_weight"], 1e-5, 1, 3, t["state"])
    torch.library.opcheck(CONVOLVED.op, (*given, t["conv_weight"], t["conv_bias"]))
    t = cast(for_convolution(3, 12, 4), torch.float32)
    torch.library.opcheck(CONVOLVE.op, (t["x"], t["state"], t["weight"], t["bias"], True))
    t = cast(for_selective(3, 12, 8, 5), torch.float32)
    names = ("x", "dt", "A", "B", "C", "D", "state", "z", "dt_bias", "dt_weight")
    torch.library.opcheck(SELECT.op, (*(t[name] for name in names), True))
    t = cast(for_ssd(3, 4, 8, 16, 2), torch.float32)
    mixed = t["xbc"].contiguous()
    given = (t["z"], mixed, t["dt"], t["ssm_state"], t["A"], t["D"], t["dt_bias"])
    torch.library.opcheck(SSD.op, (*given, 2, 0.0, math.inf))


def test_dtypes_they_take() -> None:
    for table in (NORM_LINEAR, CAUSAL_CONV1D_UPDATE):
        assert torch.float64 not in table.dtypes["gpu"] and torch.bfloat16 in table.dtypes["gpu"]


def test_the_work_is_cut_to_fill_the_device() -> None:
    """At batch 1 of a 130M model every launch has a program for each of an H200's 132 multiprocessors, or more."""
    full = 2 * 132
    for d_in, d_out in ((768, 3352), (1536, 768), (768, 50288), (1536, 80), (4096, 2048), (2048, 8512)):
        b = blocks(1, d_in, d_out, 1, full, 2)
        assert b.channels >= d_in and b.outputs * b.channels <= max(8192, b.channels)
        assert -(-d_out // b.outputs) >= min(full, d_out)
        many = blocks(64, d_in, d_out, 1, full, 2)
        assert many.rows == 64 and many.outputs >= 16
    assert 24 * -(-64 // slice_of(24, 64, 128, full)) >= 132
    assert -(-1536 // channels_of(1, 1536, 64, full)) >= 264
    assert slice_of(64 * 24, 64, 128, full) == 16
