"""For each invariant a small mixer that breaks it: the checks must catch them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from plait.mixers.contract import Layout, Mixer, State
from plait.ops.causal_conv1d import causal_conv1d
from tests.invariants import (
    check_batch,
    check_causal,
    check_edges,
    check_fork,
    check_gradient_through_states,
    check_packed,
    check_packed_states,
    check_splits,
    check_steps,
    redraw,
)

TOLERANCE = 1e-12


class Sound(Mixer):
    """A causal convolution, a rotation by position and a running sum: right in every respect."""

    def __init__(self) -> None:
        super().__init__(d_in=16, d_out=16)
        self.conv = nn.Conv1d(16, 16, 4, groups=16)
        self.proj = nn.Linear(16, 16)

    def init_state(self, n_seq, capacity=0, device=None, dtype=None) -> State:  # type: ignore[no-untyped-def]
        return State(
            tail=torch.zeros(n_seq, 3, 16, device=device, dtype=dtype),
            total=torch.zeros(n_seq, 16, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        given = state or self.init_state(layout.n_seq, dtype=x.dtype)
        y, tail = causal_conv1d(
            self.proj(x),
            self.conv.weight.squeeze(1),
            self.conv.bias,
            initial_state=given["tail"],
            cu_seqlens=layout.cu_seqlens,
            max_len=layout.max_new,
            backend="reference",
        )
        y = y * self.angle(layout).cos()[..., None]
        running, total = self.running_sum(y, layout, given["total"])
        return running, None if state is None else State(tail=tail, total=total)

    def angle(self, layout: Layout) -> Tensor:
        return layout.positions.double()

    def running_sum(self, y: Tensor, layout: Layout, before: Tensor) -> tuple[Tensor, Tensor]:
        padded = layout.pad(y)
        total = before + padded.sum(1)
        return layout.unpad(before[:, None] + padded.cumsum(1)), total


class ForgetsTail(Sound):
    def forward(self, x, layout, state=None):  # type: ignore[no-untyped-def]
        if state is not None:
            state = State(tail=torch.zeros_like(state["tail"]), total=state["total"])
        return super().forward(x, layout, state)


class ForgetsState(Sound):
    def forward(self, x, layout, state=None):  # type: ignore[no-untyped-def]
        if state is not None:
            state = State(tail=state["tail"], total=torch.zeros_like(state["total"]))
        return super().forward(x, layout, state)


class WrongPosition(Sound):
    def angle(self, layout: Layout) -> Tensor:
        return layout.positions.double() - layout.positions.min()


class LeaksOverBoundary(Sound):
    def running_sum(self, y: Tensor, layout: Layout, before: Tensor) -> tuple[Tensor, Tensor]:
        if not layout.is_packed:
            return super().running_sum(y, layout, before)
        return before[layout.seq_index][None] + y.cumsum(1), before + layout.pad(y).sum(1)


class LooksAhead(Sound):
    def running_sum(self, y: Tensor, layout: Layout, before: Tensor) -> tuple[Tensor, Tensor]:
        running, total = super().running_sum(y, layout, before)
        return running + 1e-9 * layout.unpad(layout.pad(y).flip(1).cumsum(1).flip(1)), total


class UsesTheBatch(Sound):
    def running_sum(self, y: Tensor, layout: Layout, before: Tensor) -> tuple[Tensor, Tensor]:
        running, total = super().running_sum(y, layout, before)
        return running + running.mean(0, keepdim=True), total


class ChangesTheGivenState(Sound):
    def forward(self, x, layout, state=None):  # type: ignore[no-untyped-def]
        y, new = super().forward(x, layout, state)
        if state is not None:
            state["total"].add_(1e-3)
        return y, new


class MovesItsBuffers(Sound):
    @torch.no_grad()
    def step(self, x: Tensor, layout: Layout, state: State) -> Tensor:
        y, new = self.forward(x, layout, state)
        state.update(new)
        return y


class StopsTheGradientOfTheState(Sound):
    def forward(self, x, layout, state=None):  # type: ignore[no-untyped-def]
        y, new = super().forward(x, layout, state)
        return y, None if new is None else new.detach()


class DriftsWithoutTokens(Sound):
    def running_sum(self, y: Tensor, layout: Layout, before: Tensor) -> tuple[Tensor, Tensor]:
        running, total = super().running_sum(y, layout, before)
        return running, total * (1 + 1e-15)


class RefusesNothingness(Sound):
    def running_sum(self, y: Tensor, layout: Layout, before: Tensor) -> tuple[Tensor, Tensor]:
        assert y.shape[1], "no tokens"
        return super().running_sum(y, layout, before)


CHECKS = {
    "splits": lambda m: check_splits(m, TOLERANCE, in_place=False),
    "splits in place": lambda m: check_splits(m, TOLERANCE, in_place=True),
    "steps": lambda m: check_steps(m, TOLERANCE),
    "packed": lambda m: check_packed(m, TOLERANCE),
    "packed states": lambda m: check_packed_states(m, TOLERANCE),
    "gradients through states": lambda m: check_gradient_through_states(m, TOLERANCE),
    "causal": check_causal,
    "batch": lambda m: check_batch(m, TOLERANCE),
    "fork": check_fork,
    "edges": check_edges,
}
BROKEN = [
    (ForgetsTail, ["splits", "splits in place", "steps"]),
    (ForgetsState, ["splits", "splits in place", "steps"]),
    (WrongPosition, ["splits", "steps"]),
    (LeaksOverBoundary, ["packed"]),
    (LooksAhead, ["causal"]),
    (UsesTheBatch, ["batch"]),
    (ChangesTheGivenState, ["splits"]),
    (MovesItsBuffers, ["steps"]),
    (StopsTheGradientOfTheState, ["gradients through states"]),
    (DriftsWithoutTokens, ["splits"]),
    (RefusesNothingness, ["edges"]),
]


def build(cls: type[Sound]) -> Sound:
    mixer = cls().double()
    redraw(mixer)
    return mixer


@pytest.mark.parametrize("check", CHECKS)
def test_a_sound_mixer_passes(check: str) -> None:
    CHECKS[check](build(Sound))


@pytest.mark.parametrize(("cls", "check"), [(cls, check) for cls, checks in BROKEN for check in checks])
def test_a_broken_mixer_is_caught(cls: type[Sound], check: str) -> None:
    with pytest.raises(AssertionError):
        CHECKS[check](build(cls))
