"""A block: norm, mixer, residual; then optionally norm, mlp, residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from plait.config.errors import BuildError
from plait.config.schema import LayerConfig
from plait.config.table import mixer_class
from plait.mixers.contract import Layout, Mixer, State
from plait.nn.mlp import MLP
from plait.nn.norm import add_and_norm, make_norm, norm_for_products
from plait.nn.roles import VECTOR_FP32, Role
from plait.ops.chunks import autocast_dtype


class InputMix(nn.Module):
    """Learned scales on what enters a block: scale * x + share * embedded (both optional)."""

    roles: ClassVar[dict[str, Role]] = {"scale": VECTOR_FP32, "share": VECTOR_FP32}

    def __init__(self, *, scaled: bool, embedded: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1)) if scaled else None
        self.share = nn.Parameter(torch.empty(1)) if embedded else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin as the identity."""
        if self.scale is not None:
            nn.init.ones_(self.scale)
        if self.share is not None:
            nn.init.zeros_(self.share)

    def fill(self, scale: float, share: float) -> None:
        """Begin as scale * x + share * embedded, as far as they are learned."""
        if self.scale is not None:
            nn.init.constant_(self.scale, scale)
        if self.share is not None:
            nn.init.constant_(self.share, share)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """x and embedded: (..., d_model)."""
        if self.scale is not None:
            x = x * self.scale.to(x.dtype)
        return x if self.share is None else x + self.share.to(x.dtype) * embedded


class Block(nn.Module):
    """One strand of the plait: a mixer of any kind with its norms, residuals and MLP.

    ``vocab_rows``: the rows of a table of token ids, for mixers that look at ids.
    """

    def __init__(
        self, layer: LayerConfig, d_in: int, *, causal: bool, index: int, vocab_rows: int = 0
    ) -> None:
        super().__init__()
        self.kind = layer.kind
        options = layer.block
        self.place = options.norm.place
        self.residual = options.residual.kind != "none"
        normed = self.place != "none" and options.norm.kind != "none"
        made = mixer_class(layer.kind)
        more = {"vocab_rows": vocab_rows} if made.reads_ids else {}
        self.mixer: Mixer = made(
            layer.options, d_in, causal=causal, layer_index=index, linear=options.linear, **more
        )
        d_out = self.mixer.d_out
        if self.mixer.d_in != d_in:
            raise BuildError(
                f"layer {index} ({layer.kind}) takes width {self.mixer.d_in} but is given {d_in}"
            )
        if self.residual and d_out != d_in:
            raise BuildError(
                f"layer {index} ({layer.kind}) turns width {d_in} into {d_out}, which its residual cannot add: "
                "make them equal or set residual: none"
            )
        self.d_out = d_out
        mixes = options.residual.kind == "scaled" or options.residual.embedded
        self.input_mix = (
            InputMix(scaled=options.residual.kind == "scaled", embedded=options.residual.embedded)
            if mixes
            else None
        )
        self.norm1 = (
            make_norm(options.norm, d_out if self.place == "post" else d_in) if normed else nn.Identity()
        )
        self.mlp = MLP(options.mlp, d_out, linear=options.linear) if options.mlp.kind != "none" else None
        self.norm2 = make_norm(options.norm, d_out) if normed and self.mlp is not None else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self, x: Tensor, layout: Layout, state: State | None = None, embedded: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """x (S, T, d_in) or packed (1, n, d_in) -> the same form, d_out wide, and the mixer's new state."""
        new: State | None = None

        def mix(h: Tensor) -> Tensor:
            nonlocal new
            y, new = self.mixer(h, layout, state)
            return y

        return self._run(x, mix, embedded), new

    @torch.no_grad()
    def step(self, x: Tensor, layout: Layout, state: State, embedded: Tensor | None = None) -> Tensor:
        """The same numbers; the mixer's state is updated in place, and norms and residuals are joined with maps."""
        drops = self.dropout.p > 0 and self.training
        if not self.residual or self.place == "post" or drops or autocast_dtype(x) != x.dtype:
            return self._run(x, lambda h: self.mixer.step(h, layout, state), embedded)
        x = self.mixer.step_residual(self._mixed_input(x, embedded), self.norm1, layout, state)
        return x if self.mlp is None else self.mlp.step_residual(x, self.norm2)

    def _mixed_input(self, x: Tensor, embedded: Tensor | None) -> Tensor:
        if self.input_mix is None:
            return x
        assert embedded is not None
        return self.input_mix(x, embedded)

    def _run(self, x: Tensor, mix: Callable[[Tensor], Tensor], embedded: Tensor | None) -> Tensor:
        x = self._mixed_input(x, embedded)
        if self.place == "pre":
            return self._pre_norm(x, mix)
        y = self._added(x, self.dropout(mix(x)))
        if self.place == "post":
            y = self.norm1(y)
        if self.mlp is not None:
            y = y + self.dropout(self.mlp(y))
        return self.norm2(y) if self.place == "post" and self.mlp is not None else y

    def _pre_norm(self, x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        y = self.dropout(mix(norm_for_products(self.norm1, x)))
        if self.mlp is None:
            return self._added(x, y)
        if self.residual:
            h, x = add_and_norm(x, y, self.norm2)
        else:
            h, x = norm_for_products(self.norm2, y), y
        return x + self.dropout(self.mlp(h))

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.residual else y

    def residual_weights(self) -> list[Tensor]:
        """The weights of this block that write into the residual stream."""
        mlp = [] if self.mlp is None else self.mlp.residual_weights()
        return (self.mixer.residual_weights() if self.residual else []) + mlp

    def flops(self, n_new: int, n_past: int = 0) -> int:
        """Operations of the mixer and the MLP; norms and activations are not counted."""
        return self.mixer.flops(n_new, n_past) + (0 if self.mlp is None else self.mlp.flops(n_new))
