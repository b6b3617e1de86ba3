"""The ops of decoding, one token a sequence: every backend against the reference, and that against the whole ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from plait.config.errors import PlaitError
from plait.ops import dispatch
from plait.ops.causal_conv1d import causal_conv1d
from plait.ops.causal_conv1d_update import CAUSAL_CONV1D_UPDATE, causal_conv1d_update
from plait.ops.convolved_linear import CONVOLVED_LINEAR, convolved_linear
from plait.ops.gated_norm import gated_norm
from plait.ops.norm_linear import NORM_LINEAR, norm_linear
from plait.ops.selective_scan import selective_scan
from plait.ops.selective_state_update import SELECTIVE_STATE_UPDATE, selective_state_update
from plait.ops.ssd import ssd
from plait.ops.ssd_update import SSD_UPDATE, ssd_update
from tests.ops.decoding import (
    OPS,
    Tensors,
    backends,
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
from tests.ops.interpreter import without

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}
CONVOLVED = {**TOLERANCE, torch.bfloat16: 1e-2}  # of a map of what a norm has rounded, a few numbers of it
DTYPES = list(TOLERANCE)
EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)


def against_reference(
    table: dispatch.Op, op: Callable[..., Tensor], tensors: Tensors, dtype: torch.dtype, **options: Any
) -> None:
    tensors = cast(tensors, dtype)
    want = call(op, widened(tensors), "reference", **options)
    for backend in backends(table, dtype):
        got = call(op, tensors, backend, **options)
        assert got.y.dtype == dtype
        allowed = (CONVOLVED if table is CONVOLVED_LINEAR else TOLERANCE)[dtype]
        assert_close(got.y, want.y, allowed, f"{backend} y")
        for name, state in want.states.items():
            # recurrent states are wider than the model; a convolution's are moved, and made by one op alone
            exact = name == "conv_state" or (name == "state" and table is CAUSAL_CONV1D_UPDATE)
            limit = allowed if table is CONVOLVED_LINEAR else min(allowed, 1e-5)
            assert_close(got.states[name], state, 0 if exact else limit, f"{backend} {name}")


@EXAMPLES
@given(
    rows=st.sampled_from([0, 1, 2, 3, 5, 17, 33]),
    d_in=st.sampled_from([1, 6, 24, 96]),
    d_out=st.sampled_from([1, 5, 48]),
    groups=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from(DTYPES),
    dropped=st.sets(st.sampled_from(["bias", "norm_weight", "residual"])),
)
def test_norm_linear(
    rows: int, d_in: int, d_out: int, groups: int, dtype: torch.dtype, dropped: set[str]
) -> None:
    tensors = without(for_norm_linear(rows, d_in, d_out), *dropped)
    if not groups:
        against_reference(NORM_LINEAR, norm_linear, without(tensors, "norm_weight"), dtype)
        return
    size = d_in // groups if d_in % groups == 0 and groups > 1 else None
    against_reference(NORM_LINEAR, norm_linear, tensors, dtype, eps=1e-5, group_size=size)


@EXAMPLES
@given(
    rows=st.sampled_from([0, 1, 3]),
    place=st.sampled_from([(0, 5), (3, 4), (2, 10), (7, 0)]),
    taps=st.sampled_from([1, 2, 4]),
    groups=st.sampled_from([0, 1, 3]),
    dtype=st.sampled_from(DTYPES),
    dropped=st.sets(st.sampled_from(["bias", "norm_weight", "conv_bias"])),
)
def test_convolved_linear(
    rows: int, place: tuple[int, int], taps: int, groups: int, dtype: torch.dtype, dropped: set[str]
) -> None:
    first, channels = place
    tensors = without(for_convolved(rows, 12, 12, channels, taps), *dropped)
    options: dict[str, Any] = {"eps": 1e-5, "group_size": 12 // groups} if groups else {}
    if not groups:
        tensors = without(tensors, "norm_weight")
    against_reference(CONVOLVED_LINEAR, convolved_linear, tensors, dtype, first=first, **options)


def test_convolved_linear_is_both() -> None:
    """The reference is the map and then the update of its columns, which stand in their place."""
    t = for_convolved(3, 24, 20, 7, 4)
    got = call(convolved_linear, t, "reference", first=5, eps=0.1, group_size=8)
    want = norm_linear(
        t["x"],
        t["weight"],
        t["bias"],
        norm_weight=t["norm_weight"],
        eps=0.1,
        group_size=8,
        backend="reference",
    )
    state = t["state"].clone()
    want[:, 5:12] = causal_conv1d_update(
        want[:, 5:12].clone(), state, t["conv_weight"], t["conv_bias"], activation="silu", backend="reference"
    )
    assert_close(got.y, want, 1e-12)
    assert_close(got.states["state"], state, 1e-12)


def test_ssd_of_what_is_convolved() -> None:
    """Without a convolution's state and taps nothing is convolved."""
    t = for_ssd(3, 4, 8, 16, 2)
    state = t["conv_state"].clone()
    mixed = causal_conv1d_update(
        t["xbc"], state, t["conv_weight"], t["conv_bias"], activation="silu", backend="reference"
    )
    whole = call(ssd_update, t, "reference", ngroups=2)
    own = {**t, "xbc": mixed, "conv_state": None, "conv_weight": None, "conv_bias": None}
    assert_close(call(ssd_update, own, "reference", ngroups=2).y, whole.y, 1e-12)
    for dtype in DTYPES:
        against_reference(SSD_UPDATE, ssd_update, own, dtype, ngroups=2)
    with pytest.raises(ValueError, match="belong together"):
        ssd_update(**{**t, "conv_weight": None}, ngroups=2)


@EXAMPLES
@given(
    rows=st.sampled_from([0, 1, 3]),
    channels=st.sampled_from([1, 7, 32, 100]),
    taps=st.sampled_from([1, 2, 4, 5]),
    activation=st.sampled_from([None, "silu"]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_convolution(
    rows: int, channels: int, taps: int, activation: str | None, dtype: torch.dtype, bias: bool
) -> None:
    tensors = for_convolution(rows, channels, taps)
    against_reference(
        CAUSAL_CONV1D_UPDATE,
        causal_conv1d_update,
        tensors if bias else without(tensors, "bias"),
        dtype,
        activation=activation,
    )


@EXAMPLES
@given(
    rows=st.sampled_from([0, 1, 3]),
    channels=st.sampled_from([1, 7, 33]),
    states=st.sampled_from([1, 5, 16]),
    rank=st.sampled_from([None, 1, 3, 48]),
    softplus=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    dropped=st.sets(st.sampled_from(["z", "D", "dt_bias"])),
)
def test_selective(
    rows: int,
    channels: int,
    states: int,
    rank: int | None,
    softplus: bool,
    dtype: torch.dtype,
    dropped: set[str],
) -> None:
    tensors = without(for_selective(rows, channels, states, rank), *dropped)
    if not softplus:
        dt, weight = tensors["dt"], tensors["dt_weight"]
        assert dt is not None
        tensors |= {
            "dt": dt.abs() / 4,
            "dt_weight": None if weight is None else weight.abs(),
            "dt_bias": None,
        }
    against_reference(SELECTIVE_STATE_UPDATE, selective_state_update, tensors, dtype, dt_softplus=softplus)


@EXAMPLES
@given(
    rows=st.sampled_from([0, 1, 3]),
    shape=st.sampled_from([(4, 8, 16, 2), (1, 1, 1, 1), (6, 5, 7, 3), (2, 64, 128, 1), (3, 16, 20, 1)]),
    taps=st.sampled_from([1, 2, 4]),
    each=st.booleans(),
    limit=st.sampled_from([(0.0, math.inf), (0.05, 0.4)]),
    dtype=st.sampled_from(DTYPES),
    dropped=st.sets(st.sampled_from(["z", "D", "dt_bias", "conv_bias"])),
)
def test_ssd(
    rows: int,
    shape: tuple[int, int, int, int],
    taps: int,
    each: bool,
    limit: tuple[float, float],
    dtype: torch.dtype,
    dropped: set[str],
) -> None:
    tensors = without(for_ssd(rows, *shape, taps, each=each), *dropped)
    against_reference(SSD_UPDATE, ssd_update, tensors, dtype, ngroups=shape[3], dt_limit=limit)


def test_references_are_the_whole_ops_token_by_token() -> None:
    """From the same states, five tokens: the states go on in place, in the memory that was given."""
    length, (heads, width, states, groups) = 5, (4, 8, 16, 2)
    first = for_ssd(3, heads, width, states, groups)
    tokens = [for_ssd(3, heads, width, states, groups, seed=seed) for seed in range(length)]
    conv_state, ssm_state = first["conv_state"].clone(), first["ssm_state"].clone()
    places = conv_state.data_ptr(), ssm_state.data_ptr()
    fixed = {k: first[k] for k in ("conv_weight", "conv_bias", "A", "D", "dt_bias")}
    got = [
        ssd_update(
            t["z"], t["xbc"], t["dt"], conv_state, ssm_state, ngroups=groups, backend="reference", **fixed
        )
        for t in tokens
    ]
    z, xbc, dt = (torch.stack([t[k] for t in tokens], 1) for k in ("z", "xbc", "dt"))
    mixed, tail = causal_conv1d(
        xbc, fixed["conv_weight"], fixed["conv_bias"], activation="silu", initial_state=first["conv_state"],
        backend="reference",
    )  # fmt: skip
    x, B, C = mixed.split([heads * width, groups * states, groups * states], 2)
    y, last = ssd(
        x.unflatten(2, (heads, width)), dt, fixed["A"], B.unflatten(2, (groups, states)),
        C.unflatten(2, (groups, states)), fixed["D"], dt_bias=fixed["dt_bias"], dt_softplus=True,
        initial_state=first["ssm_state"], backend="reference",
    )  # fmt: skip
    assert_close(torch.stack(got, 1), y.flatten(2) * torch.nn.functional.silu(z), 1e-12)
    assert_close(conv_state, tail, 1e-12)
    assert_close(ssm_state, last, 1e-12)
    assert places == (conv_state.data_ptr(), ssm_state.data_ptr())

    first = for_selective(3, 12, 8, 5)
    state = first["state"].clone()
    steps = [for_selective(3, 12, 8, 5, seed=seed) for seed in range(length)]
    fixed = {k: first[k] for k in ("A", "D", "dt_bias", "dt_weight")}
    got = [
        selective_state_update(
            t["x"], t["dt"], B=t["B"], C=t["C"], z=t["z"], state=state, dt_softplus=True, backend="reference",
            **fixed,
        )
        for t in steps
    ]  # fmt: skip
    x, dt, B, C, z = (torch.stack([t[k] for t in steps], 1) for k in ("x", "dt", "B", "C", "z"))
    y, last = selective_scan(
        x, dt @ first["dt_weight"].t(), first["A"], B, C, first["D"], z=z, dt_bias=first["dt_bias"],
        dt_softplus=True, initial_state=first["state"], backend="reference",
    )  # fmt: skip
    assert_close(torch.stack(got, 1), y, 1e-12)
    assert_close(state, last, 1e-12)

    t = for_norm_linear(3, 24, 10)
    normed = gated_norm(t["x"], None, t["norm_weight"], eps=0.1, group_size=8, backend="reference")
    want = t["residual"] + torch.nn.functional.linear(normed, t["weight"], t["bias"])
    assert_close(norm_linear(**t, eps=0.1, group_size=8, backend="reference"), want, 1e-12)


@pytest.mark.parametrize("name", [table.name for table, _ in OPS])
def test_nothing_else_is_written(name: str) -> None:
    """Inputs stay as they were, and what is returned shares no memory with them."""
    table, op = next(pair for pair in OPS if pair[0].name == name)
    tensors, options = _example(name)
    for backend in [*backends(table, torch.float32), "reference"]:
        before = {k: None if t is None else t.clone() for k, t in tensors.items()}
        y = op(**tensors, **options, backend=backend)
        for key, t in tensors.items():
            if t is not None and key not in ("state", "conv_state", "ssm_state"):
                assert torch.equal(t, before[key])
        memory = {t.untyped_storage().data_ptr() for t in tensors.values() if t is not None}
        assert y.untyped_storage().data_ptr() not in memory


@pytest.mark.parametrize("name", [table.name for table, _ in OPS])
def test_autocast_changes_nothing(name: str) -> None:
    table, op = next(pair for pair in OPS if pair[0].name == name)
    tensors, options = _example(name)
    for backend in [*backends(table, torch.float32), "reference"]:
        want = call(op, tensors, backend, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = call(op, tensors, backend, **options)
        assert torch.equal(got.y, want.y)
        assert all(torch.equal(got.states[k], want.states[k]) for k in want.states)


@pytest.mark.parametrize("name", [table.name for table, _ in OPS])
def test_no_gradient_is_lost_silently(name: str) -> None:
    op = next(op for table, op in OPS if table.name == name)
    tensors, options = _example(name)
    for key in tensors:
        leaf = tensors[key]
        assert leaf is not None
        own = {**tensors, key: leaf.detach().clone().requires_grad_()}
        with pytest.raises(ValueError, match="no gradient"):
            op(**own, **options)
        with torch.no_grad():
            op(**own, **options)


@pytest.mark.parametrize("name", [table.name for table, _ in OPS])
def test_shapes_that_do_not_fit(name: str) -> None:
    """One line that names the op and the tensor, whichever of them is one too long."""
    op = next(op for table, op in OPS if table.name == name)
    tensors, options = _example(name)
    for key, t in tensors.items():
        assert t is not None
        longer = torch.cat([t, t[..., -1:]], -1)
        with pytest.raises(ValueError, match=f"{name}: ") as raised:
            op(**{**tensors, key: longer}, **options)
        assert "\n" not in str(raised.value)
    for key in ("state", "conv_state", "ssm_state"):
        if (state := tensors.get(key)) is not None:
            apart = torch.stack([state, state], -1)[..., 0]
            with pytest.raises(ValueError, match=f"{key} has strides"):
                op(**{**tensors, key: apart}, **options)
    with pytest.raises(PlaitError, match="unknown backend"):
        op(**tensors, **options, backend="fast")


def test_options_that_do_not_fit() -> None:
    t = for_norm_linear(2, 12, 4)
    with pytest.raises(ValueError, match="give its eps too"):
        norm_linear(**t)
    with pytest.raises(ValueError, match="divisor of the 12"):
        norm_linear(**t, eps=1e-5, group_size=5)
    with pytest.raises(ValueError, match=r"weight is torch\.float32, expected torch\.float64"):
        norm_linear(**{**t, "weight": t["weight"].float()}, eps=1e-5)
    with pytest.raises(ValueError, match="columns 7 to 13 are to be convolved, of 12"):
        convolved_linear(**for_convolved(2, 8, 12, 6, 4), first=7, eps=1e-5)
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d_update(**for_convolution(2, 4, 3), activation="relu")
    with pytest.raises(ValueError, match="divisor of the 4 heads"):
        ssd_update(**for_ssd(2, 4, 8, 4, 2), ngroups=3)


def _example(name: str) -> tuple[Tensors, dict[str, Any]]:
    made: dict[str, tuple[Tensors, dict[str, Any]]] = {
        "norm_linear": (for_norm_linear(3, 24, 10), {"eps": 1e-5}),
        "causal_conv1d_update": (for_convolution(3, 12, 4), {"activation": "silu"}),
        "convolved_linear": (for_convolved(3, 24, 10, 6, 4), {"first": 3, "eps": 1e-5}),
        "selective_state_update": (for_selective(3, 12, 8, 5), {"dt_softplus": True}),
        "ssd_update": (for_ssd(3, 4, 8, 16, 2), {"ngroups": 2}),
    }
    tensors, options = made[name]
    return cast(tensors, torch.float32), options
