"""Mamba-2: regression tests for known defects (the issue numbers are those of state-spaces/mamba)."""

from __future__ import annotations

import pytest
import torch

from plait.mixers.contract import Layout
from tests.invariants import check_packed, check_steps, close, make_mixer, sequences

LIMITS = {"headdim": 4, "d_state": 5, "dt_limit": (0.02, 0.1)}


def test_step_obeys_dt_limit() -> None:
    """#887, #901: the step ignored the limits of the time step."""
    mixer = make_mixer("mamba2", LIMITS)
    free = make_mixer("mamba2", {"headdim": 4, "d_state": 5})
    check_steps(mixer, 1e-12)
    (x,) = sequences(mixer, [20])
    layout = Layout.dense(1, 20)
    with pytest.raises(AssertionError):  # the limits do something here
        close(mixer(x, layout)[0], free(x, layout)[0], 1e-2, "without limits")


def test_step_with_a_skip_weight_for_each_channel() -> None:
    """#903: the step gave D, one weight a channel, the wrong shape."""
    check_steps(make_mixer("mamba2", {"headdim": 4, "d_state": 5, "D_has_hdim": True}), 1e-12)


@pytest.mark.parametrize("ngroups", [1, 2, 8])
def test_groups_in_every_backend(ngroups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """#647: with several groups the reference's state, and its norm, differed from the kernel's."""
    mixer = make_mixer("mamba2", {"headdim": 4, "d_state": 5, "ngroups": ngroups})
    x = torch.cat(sequences(mixer, [70, 70]))
    results = []
    for backend in ("reference", "portable"):
        monkeypatch.setenv("PLAIT_BACKEND", backend)
        y, state = mixer(x, Layout.dense(2, 70), mixer.init_state(2, dtype=x.dtype))
        assert state is not None
        gradients = torch.autograd.grad(y.square().sum(), list(mixer.parameters()))
        results.append([y, state["ssm"], *gradients])
    for ours, true in zip(*reversed(results), strict=True):
        close(ours, true, 1e-11, "portable")


@pytest.mark.parametrize("kind", ["mamba2", "mamba3"])
def test_a_head_reads_its_own_group(kind: str) -> None:
    """Head h reads group h // (H / G): B of the second of two groups reaches the second half of them."""
    mixer = make_mixer(kind, {"headdim": 4, "d_state": 6, "ngroups": 2})
    x = torch.cat(sequences(mixer, [12]))
    rows = mixer.in_proj.weight
    first = 2 * 32 + 6  # after z, x and the first group of B
    layout = Layout.dense(1, 12)
    _, before = mixer(x, layout, mixer.init_state(1, dtype=x.dtype))
    with torch.no_grad():
        rows[first : first + 6] += 0.5
    _, after = mixer(x, layout, mixer.init_state(1, dtype=x.dtype))
    assert before is not None and after is not None
    moved = (after["ssm"] - before["ssm"]).abs().amax((0, 2, 3))
    assert not moved[:4].any() and (moved[4:] > 0).all()


@pytest.mark.parametrize("size", [1e3, -1e3])
def test_large_time_steps_give_no_nan(size: float) -> None:
    """#522, #713: exponentials of differences overflowed; also in a pack, where chunks hold pads."""
    mixer = make_mixer("mamba2", {"headdim": 4, "d_state": 5}, dtype=torch.float32)
    with torch.no_grad():
        mixer.dt_bias.fill_(size)
    (x,) = sequences(mixer, [150])
    y, state = mixer(x, Layout.from_lengths([70, 0, 80]), mixer.init_state(3, dtype=x.dtype))
    assert state is not None and y.isfinite().all() and state["ssm"].isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), list(mixer.parameters())))
    check_packed(make_mixer("mamba2", LIMITS), 1e-12)
