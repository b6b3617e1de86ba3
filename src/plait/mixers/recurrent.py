"""What rnn, gru and lstm share: a torch recurrent layer behind the mixer contract.

A packed row is run with torch's own packed sequences; sequences with no token are left out and keep their state.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from plait.config.errors import BuildError
from plait.config.options import Options as MixerOptions
from plait.mixers.contract import Layout, Mixer, State, state_dtype
from plait.nn.linear import LinearSpec, linear_kind


class RecurrentOptions(MixerOptions):
    """Options of rnn, gru and lstm."""

    d_hidden: int | None = Field(
        None, gt=0, description="width of the hidden state; None: d_model, shared by the directions"
    )
    bidirectional: bool = Field(False, description="also read from the end; not causal, so no generation")
    bias: bool = Field(True, description="biases of the gates")


class Recurrent(Mixer):
    """(S, T, d_model) -> (S, T, d_hidden x directions); the state is each tensor of ``state_names`` (S, d_hidden)."""

    options_class: ClassVar = RecurrentOptions
    layer_class: ClassVar[Any]  # nn.RNN, nn.GRU or nn.LSTM
    state_names: ClassVar[tuple[str, ...]] = ("h",)

    def __init__(
        self,
        options: RecurrentOptions,
        d_model: int,
        *,
        causal: bool = True,
        layer_index: int = 0,
        linear: LinearSpec = "dense",
    ) -> None:
        if linear_kind(linear) != "dense":
            raise BuildError(
                f"layer {layer_index}: the gates of a recurrent layer are dense; set linear: dense for it "
                "(mlp.linear may differ)"
            )
        directions = 2 if options.bidirectional else 1
        if options.d_hidden is None and d_model % directions:
            raise BuildError(
                f"layer {layer_index}: d_model {d_model} cannot be shared by two directions; give d_hidden"
            )
        d_hidden = options.d_hidden or d_model // directions
        super().__init__(d_in=d_model, d_out=d_hidden * directions, causal=not options.bidirectional)
        self.rnn: nn.RNNBase = self.layer_class(
            d_model, d_hidden, batch_first=True, bidirectional=options.bidirectional, bias=options.bias
        )

    def train(self, mode: bool = True) -> Recurrent:
        """As any module; the inner layer, which has no dropout, stays in training mode.

        cuDNN computes no gradient of a recurrent layer in evaluation mode.
        """
        super().train(mode)
        self.rnn.train()
        return self

    def init_state(
        self,
        n_seq: int,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Zeros (S, d_hidden), float32 at least."""
        if not self.causal:
            return super().init_state(n_seq, capacity, device, dtype)
        shape = (n_seq, self.rnn.hidden_size)
        return State(
            {name: torch.zeros(shape, device=device, dtype=state_dtype(dtype)) for name in self.state_names}
        )

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract; computed in the dtype of the weights, whatever autocast says."""
        if not self.causal:
            self.refuse_state(state)
        with torch.autocast(x.device.type, enabled=False):
            y, new = self._run(x.to(self.rnn.all_weights[0][0].dtype), layout, state)
        return y.to(x.dtype), new

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """The products with the input and hidden weights."""
        weights = sum(p.numel() for n, p in self.rnn.named_parameters() if n.startswith("weight"))
        return 2 * n_new * weights

    def _run(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State | None]:
        if x.shape[0] == 0 or x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.d_out), None if state is None else state.clone()
        hidden = None if state is None else [state[n].to(x.dtype)[None] for n in self.state_names]
        if not layout.is_packed:
            y, last = self._layer(x, hidden)
            return y, None if state is None else self._state(last)
        lengths = layout.lengths.cpu()  # torch's packed sequences want them on the host
        rows = lengths.nonzero()[:, 0]
        rows_here = rows.to(x.device)
        packed = pack_padded_sequence(
            layout.pad(x)[rows_here], lengths[rows], batch_first=True, enforce_sorted=False
        )
        y, last = self._layer(packed, None if hidden is None else [h[:, rows_here] for h in hidden])
        padded, _ = pad_packed_sequence(y, batch_first=True, total_length=layout.max_new)
        full = padded.new_zeros(layout.n_seq, *padded.shape[1:]).index_copy(0, rows_here, padded)
        if state is None:
            return layout.unpad(full), None
        moved = self._state(last)
        kept = {n: state[n].index_copy(0, rows_here, moved[n].to(state[n].dtype)) for n in self.state_names}
        return layout.unpad(full), State(kept)

    def _layer(self, x: Tensor | PackedSequence, hidden: list[Tensor] | None) -> tuple[Any, Any]:
        if hidden is None:
            return self.rnn(x)
        # contiguous: a row taken from a larger state is a view, which torch refuses
        given = [h.contiguous() for h in hidden]
        return self.rnn(x, tuple(given) if len(given) > 1 else given[0])

    def _state(self, last: Tensor | tuple[Tensor, ...]) -> State:
        tensors = last if isinstance(last, tuple) else (last,)
        return State(
            {n: t[0].to(state_dtype(t.dtype)) for n, t in zip(self.state_names, tensors, strict=True)}
        )
