"""Softmax attention: multi-head, grouped or multi-query; RoPE; QK norm; sliding window; value embeddings.

Glossary: H heads, Hk key/value heads, P head width, R slots of the ring buffer that holds keys and values.
Position p lives in slot p mod R. Without a window R is the capacity, so the slot is the position.
Sources: arXiv 1706.03762 (attention), 2305.13245 (grouped queries), 2104.09864 (RoPE), 2004.05150 (window).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.config.options import Options as MixerOptions
from plait.mixers.contract import Layout, Mixer, State, linear_flops, one_each
from plait.mixers.value_embedding import ValueEmbedding
from plait.nn.joined import joins, project
from plait.nn.linear import LinearSpec, make_linear
from plait.nn.rope import apply_rope
from plait.ops.attention import attention, cached_attention
from plait.ops.gated_norm import gated_norm


class Options(MixerOptions):
    """Options of attention."""

    n_head: int | None = Field(None, gt=0, description="heads; None: one for every 64 channels, at least one")
    n_kv_head: int | None = Field(None, gt=0, description="key/value heads; None: as many as heads")
    headdim: int | None = Field(None, gt=0, description="width of a head; None: d_model / n_head")
    rope: bool = Field(True, description="rotary position embedding")
    rope_base: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="share of a head's channels that is rotated")
    rope_interleaved: bool = Field(False, description="rotate pairs (2i, 2i+1) instead of (i, i + half)")
    rope_reverse: bool = Field(False, description="rotate by minus the angles (nanochat)")
    rope_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="cos and sin are rounded to this precision"
    )
    qk_norm: bool = Field(False, description="RMS norm without weights on queries and keys, after RoPE")
    qk_scale: float = Field(1.0, gt=0, description="factor of the queries and of the keys, after the norm")
    window: int | None = Field(None, gt=0, description="a token sees itself and window-1 tokens before it")
    scale: float | None = Field(None, description="factor of the scores; None: headdim ** -0.5")
    bias: bool = Field(False, description="bias of the query, key and value projections")
    out_bias: bool | None = Field(None, description="bias of the output projection; None: as `bias`")
    attn_dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the attention weights")
    value_embedding: bool = Field(False, description="add a gated vector of the token's id to the values")
    value_gate_channels: int = Field(
        12, gt=0, description="value embedding: how many channels of x its gates look at"
    )
    causal: bool | None = Field(None, description="look only back; None: as the model")


class Attention(Mixer):
    """Multi-head attention over (S, T, d_model); its state is the keys and values of the past."""

    options_class: ClassVar = Options
    normal_init: ClassVar = True
    reads_ids: ClassVar = True

    def __init__(
        self,
        options: Options,
        d_model: int,
        *,
        causal: bool = True,
        layer_index: int = 0,
        linear: LinearSpec = "dense",
        vocab_rows: int = 0,
    ) -> None:
        super().__init__(
            d_in=d_model, d_out=d_model, causal=causal if options.causal is None else options.causal
        )
        self.n_head = options.n_head or max(1, d_model // 64)
        self.n_kv_head = options.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise BuildError(
                f"layer {layer_index} (attention): n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}"
            )
        if options.headdim is None and d_model % self.n_head:
            raise BuildError(
                f"layer {layer_index} (attention): d_model {d_model} is not a multiple of n_head {self.n_head}; "
                "choose another n_head or give headdim"
            )
        self.headdim = options.headdim or d_model // self.n_head
        self.n_angles = int(self.headdim * options.rope_fraction) // 2 if options.rope else 0
        self.rope_base = options.rope_base
        self.rope_interleaved = options.rope_interleaved
        self.rope_reverse = options.rope_reverse
        self.rope_tables = torch.bfloat16 if options.rope_dtype == "bfloat16" else torch.float32
        self.qk_norm = options.qk_norm
        self.qk_scale = options.qk_scale
        self.window = options.window
        self.scale = options.scale
        self.attn_dropout = options.attn_dropout
        parts = [n * self.headdim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        out_bias = options.bias if options.out_bias is None else options.out_bias
        self.in_proj = make_linear(d_model, sum(parts), bias=options.bias, kind=linear, parts=parts)
        self.out_proj = make_linear(self.n_head * self.headdim, d_model, bias=out_bias, kind=linear)
        self.value_embedding: ValueEmbedding | None = None
        if options.value_embedding:
            self.value_embedding = ValueEmbedding(
                vocab_rows,
                d_model,
                self.n_kv_head,
                self.headdim,
                options.value_gate_channels,
                f"layer {layer_index} (attention)",
            )

    def residual_weights(self) -> list[Tensor]:
        """The output projection."""
        return [self.out_proj.weight]

    def init_state(
        self,
        n_seq: int,
        capacity: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """Zeroed ring buffers k, v (S, R, Hk, P), R = min(capacity, window)."""
        if not self.causal:
            return super().init_state(n_seq, capacity, device, dtype)
        size = capacity if self.window is None else min(capacity, self.window)
        shape = (n_seq, size, self.n_kv_head, self.headdim)
        return State({name: torch.zeros(shape, device=device, dtype=dtype) for name in ("k", "v")})

    def forward(self, x: Tensor, layout: Layout, state: State | None = None) -> tuple[Tensor, State | None]:
        """See the contract; with a state the new keys and values are appended to copies of its buffers."""
        q, k, v = self._project(x, layout)
        if state is None:
            y = attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                scale=self.scale,
                cu_seqlens=layout.cu_seqlens,
                max_len=layout.max_new,
                dropout=self.attn_dropout if self.training else 0.0,
            )
            return self.out_proj(y.flatten(-2)), None
        self.refuse_state(None if self.causal else state)
        y = self._attend_past(q, k, v, layout, state)
        new = State({n: _append(state[n], t, layout, state[n].shape[1]) for n, t in (("k", k), ("v", v))})
        return self.out_proj(y.flatten(-2)), new

    @torch.no_grad()
    def step(self, x: Tensor, layout: Layout, state: State) -> Tensor:
        """Write only the new keys and values where no slot is written twice, then read the buffers."""
        return self.out_proj(self._step(*self._project(x, layout), layout, state))

    @torch.no_grad()
    def step_residual(self, x: Tensor, norm: nn.Module, layout: Layout, state: State) -> Tensor:
        """See the contract; the projections of one token of each sequence are joined with norm and residual."""
        joined = self.value_embedding is None and joins(x, norm, self.in_proj, self.out_proj)
        if not (joined and one_each(x, layout, state)):
            return super().step_residual(x, norm, layout, state)
        rows = x[:, 0]
        heads = self._heads(project(rows, self.in_proj, norm)[:, None], None, layout)
        return project(self._step(*heads, layout, state)[:, 0], self.out_proj, residual=rows)[:, None]

    def _step(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: State) -> Tensor:
        """What the output projection is given (..., H P); the state is updated in place."""
        # a ring smaller than the window holds all tokens there will ever be: no slot is written twice
        wraps = self.window is not None and state["k"].shape[1] >= self.window
        if wraps and layout.max_new != 1:
            y = self._attend_past(q, k, v, layout, state)
            for name, t in (("k", k), ("v", v)):
                state[name].copy_(_append(state[name], t, layout, state[name].shape[1]))
            return y.flatten(-2)
        rows = layout.seq_index
        if rows is None:
            rows = torch.arange(layout.n_seq, device=q.device)[:, None]
        for name, t in (("k", k), ("v", v)):
            buffer = state[name]
            slot = layout.positions.remainder(max(1, buffer.shape[1]))
            where = (rows, slot if layout.seq_index is None else slot[0])
            buffer.index_put_(where, (t if layout.seq_index is None else t[0]).to(buffer.dtype))
        return self._read(q, state["k"], state["v"], layout).flatten(-2)

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Projections, and two products of each query with the keys it sees."""
        reach = n_past + n_new if self.window is None else min(self.window, n_past + n_new)
        if self.causal:  # query i sees n_past + i + 1 keys, until that is more than the window
            growing = max(0, min(n_new, reach - n_past))
            seen = growing * n_past + growing * (growing + 1) // 2 + (n_new - growing) * reach
        else:  # itself, and up to reach - 1 on either side
            seen = n_new + (reach - 1) * (2 * n_new - reach)
        gate = 0 if self.value_embedding is None else 2 * self.value_embedding.gate.numel()
        return n_new * (linear_flops(self) + gate) + 4 * seen * self.n_head * self.headdim

    def _project(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        added = None if self.value_embedding is None else self.value_embedding(x, layout.ids)
        return self._heads(self.in_proj(x), added, layout)

    def _heads(
        self, projected: Tensor, added: Tensor | None, layout: Layout
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (..., H or Hk, P); ``added`` to the values."""
        heads = projected.unflatten(-1, (-1, self.headdim))
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], -2)
        if added is not None:
            v = v + added
        return self._positioned(q, layout), self._positioned(k, layout), v

    def _positioned(self, x: Tensor, layout: Layout) -> Tensor:
        if self.n_angles:
            x = apply_rope(
                x,
                layout.positions,
                base=self.rope_base,
                n_angles=self.n_angles,
                interleaved=self.rope_interleaved,
                reverse=self.rope_reverse,
                tables=self.rope_tables,
            )
        # torch's default of eps for float32, with which models of this norm were trained, in every precision
        x = gated_norm(x, eps=torch.finfo(torch.float32).eps) if self.qk_norm else x
        return x if self.qk_scale == 1 else x * self.qk_scale

    def _attend_past(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, state: State) -> Tensor:
        """Attend to past and new tokens through temporary buffers large enough for both."""
        size = state["k"].shape[1]
        if self.window is not None:
            size = min(layout.max_past + layout.max_new, self.window - 1 + layout.max_new)
        return self._read(
            q, _append(state["k"], k, layout, size), _append(state["v"], v, layout, size), layout
        )

    def _read(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """Attention of the new queries over buffers that hold the new keys already."""
        positions = (
            layout.positions if layout.seq_index is None else layout.pad(layout.positions[..., None])[..., 0]
        )
        y = cached_attention(
            layout.pad(q),
            k,
            v,
            positions,
            layout.start + layout.lengths,
            window=self.window,
            scale=self.scale,
            max_keys=layout.max_past + layout.max_new,
        )
        return layout.unpad(y)


def _append(ring: Tensor, new: Tensor, layout: Layout, size: int) -> Tensor:
    """The ring (S, R, Hk, P) with the new tokens' entries in it, as a new ring of ``size`` slots.

    A gather instead of a scatter: slot j holds the last position p = j (mod size) below the total, and that
    position is either new or in the old ring; so no slot is written twice, whatever the lengths.
    """
    n_tokens = new.shape[0] * new.shape[1]
    if size == 0 or n_tokens == 0:
        return ring.clone() if size == ring.shape[1] else ring.new_zeros(ring.shape[0], size, *ring.shape[2:])
    last = (layout.start + layout.lengths - 1)[:, None]
    position = last - torch.remainder(last - torch.arange(size, device=ring.device), size)  # (S, size)
    offset = position - layout.start[:, None]
    first = (
        torch.arange(layout.n_seq, device=ring.device) * new.shape[1]
        if layout.cu_seqlens is None
        else layout.cu_seqlens[:-1].to(torch.int64)
    )
    token = (first[:, None] + offset).clamp(0, n_tokens - 1)
    fresh = new.flatten(0, 1)[token].to(ring.dtype)
    rows = torch.arange(layout.n_seq, device=ring.device)[:, None]
    kept = ring[rows, position.remainder(ring.shape[1])] if ring.shape[1] else torch.zeros_like(fresh)
    return torch.where((offset >= 0)[..., None, None], fresh, kept)
