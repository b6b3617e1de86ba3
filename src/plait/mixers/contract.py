"""The contract of a mixer: the part of a block that mixes along time.

    y, state = mixer(x, layout, state=None)    pure and differentiable, for training
    y        = mixer.step(x, layout, state)    the same numbers; updates the state in place, no autograd
    x        = mixer.step_residual(x, norm, layout, state)    x + step(norm(x)), which a mixer may compute as one
    state    = mixer.init_state(n_seq, capacity)

``state=None`` means: begin with nothing and return None. Given a state, forward returns the state after each
sequence's last token as new tensors and leaves the given one as it was. A mixer never sees a pad, keeps no
cache and reads no number from the device.

Decoding spends its time on reading weights and starting kernels, so a block with a norm before and a residual after its
mixer hands it both: ``step_residual``. The default calls norm and step one after the other and serves every mixer. One
that overrides it asks ``one_each`` and ``plait.nn.joined.joins`` whether its joined kernels mean the same here (one new
token a sequence; plain maps and norms; no autocast, no compiler), and otherwise returns the default's result. The two
ways agree up to rounding, and tests hold them to that.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.config.options import Options
from plait.mixers.layout import Layout
from plait.mixers.state import State
from plait.nn.roles import Role

__all__ = ["Layout", "Mixer", "Options", "State", "one_each", "state_dtype"]


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of a recurrent state in a model of ``dtype``: float32, or float64 in a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_each(x: Tensor, layout: Layout, state: State) -> bool:
    """Whether x (S, 1, d) is one new token of every sequence, and the state lies as kernels that change it want."""
    return layout.cu_seqlens is None and x.shape[1] == 1 and all(t.is_contiguous() for t in state.values())


class Mixer(nn.Module):
    """Base class of all mixers; a new one needs ``forward``, and ``init_state`` if it remembers anything.

    ``options_class`` is the class of the kind's options; ``roles`` gives the role of each parameter the module holds
    directly (layers of torch have theirs). ``causal``: no output depends on a later token. ``stateful``: it
    accepts and returns states; one that does not trains, but generation must recompute the prefix.
    """

    options_class: ClassVar[type[Options]]
    roles: ClassVar[dict[str, Role]] = {}
    stateful: bool = True
    normal_init: ClassVar[bool] = False  # linear maps by the scheme of `init` instead of U(+-1/sqrt(fan_in))
    draws_all: ClassVar[bool] = False  # reset_parameters writes the weights of all modules inside as well
    reads_ids: ClassVar[bool] = False  # the constructor takes `vocab_rows` too, rows of a table of token ids

    def __init__(self, *, d_in: int, d_out: int, causal: bool = True) -> None:
        super().__init__()
        self.d_in = d_in
        self.d_out = d_out
        self.causal = causal
        if not causal:
            self.stateful = False

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """x (S, T, d_in) or packed (1, n, d_in) -> y (..., d_out) and the new state, if one was given."""
        raise TypeError(f"{type(self).__name__} defines no forward(x, layout, state)")

    @torch.no_grad()
    def step(self, x: Tensor, layout: Layout, state: State) -> Tensor:
        """Any number of new tokens, the state updated in place; the default serves every mixer."""
        y, new = self.forward(x, layout, state)
        assert new is not None
        state.write(new)
        return y

    @torch.no_grad()
    def step_residual(self, x: Tensor, norm: nn.Module, layout: Layout, state: State) -> Tensor:
        """x + step(norm(x)) as a new tensor: the mixer's half of a block with a norm before it and a residual."""
        return x + self.step(norm(x), layout, state)

    def init_state(
        self,
        n_seq: int,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state of ``n_seq`` sequences before their first token; at most ``capacity`` tokens will follow."""
        raise BuildError(
            f"{type(self).__name__} keeps no state" + ("" if self.causal else ": it is not causal")
        )

    def state_bytes(self, n_seq: int, capacity: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of the state of ``n_seq`` sequences."""
        return self.init_state(n_seq, capacity, "meta", dtype).nbytes if self.stateful else 0

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Floating-point operations (2 per multiply-add) of a forward over ``n_new`` tokens after ``n_past``."""
        return n_new * linear_flops(self)

    def residual_weights(self) -> list[Tensor]:
        """The weights that write into the residual stream; scaled by depth at initialisation."""
        return []

    def refuse_state(self, state: State | None) -> None:
        """Raise if a state was given to a mixer that keeps none."""
        if state is not None:
            raise BuildError(
                f"{type(self).__name__} keeps no state" + ("" if self.causal else ": it is not causal")
            )


def linear_flops(module: nn.Module) -> int:
    """Operations a token of all linear maps inside a module."""
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
