"""Gradients of the chunk engine's narrow inputs: a, w, the diagonal weights and D.

The gradient of a_t gathers, within a chunk, every path that crosses from before t to t or later. All its sums run in
one direction: over later rows for what came in with the entering state, over earlier columns for what goes out with
the leaving one, over both for a tile. So nothing large cancels, as it would in y . dy - x . dx, or in a tile's row
sums minus its column sums: with strong steps among weak ones those lose half the digits of float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from plait.ops.ssd.blocks import Run


class NarrowGrads:
    """Collects the narrow gradients block by block."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.crossing: list[Tensor] = []
        self.entering: list[Tensor] = []
        self.leaving: list[Tensor] = []
        self.through: list[Tensor] = []
        self.weight: list[Tensor] = []
        self.diagonal: list[Tensor] = []
        self.skip: list[Tensor] = []

    def within(self, dtile: Tensor, products: Tensor, decay: Tensor, lo: int, hi: int) -> Tensor:
        """Take the gradient of the tiles (B, G, F, M, M); return that of q k^T, (B G, M, M).

        Overwrites `decay` and the room of the tile.
        """
        run = self.run
        shape = (hi - lo, run.groups, run.per_group, run.rows)
        weight = run.weight[lo:hi].view(shape)
        decayed = decay.mul_(dtile)
        weighted = run.into("tile", decay.shape, torch.mul, decayed, weight.unsqueeze(3))
        dproducts = weighted.sum(2).mul_(run.mask)
        paths = decayed.mul_(products * run.mask)
        if run.skip is not None:
            diagonal = dtile.diagonal(dim1=3, dim2=4)
            if run.maps.valid is not None:
                valid = run.maps.valid[lo:hi].repeat_interleave(run.rank, 1)
                diagonal = diagonal.masked_fill(~valid[:, None, None], 0)
            self.skip.append(diagonal.sum((0, 3)))
        if run.diagonal is not None and run.same is not None:
            diagonal = run.diagonal[lo:hi].view(shape)
            dproducts.addcmul_((dtile * diagonal.unsqueeze(3)).sum(2), run.same)
            self.diagonal.append((dtile * (products * run.same)).sum(3).flatten(1, 2))
        self.weight.append(paths.sum(3).flatten(1, 2))
        # [i, t] becomes the sum over columns up to t; rows after t then give what crosses from t to t + 1
        crossing = paths.mul_(weight.unsqueeze(3)).cumsum_(4).mul_(run.later)
        self.crossing.append(crossing.sum(3).flatten(1, 2))
        return dproducts.flatten(0, 1)

    def entering_paths(self, dacross: Tensor, across: Tensor) -> None:
        """Take across = q S_in, which is overwritten, and dacross, the decayed gradient of y: (B G, M, F P)."""
        paths = across.mul_(dacross)
        self.entering.append(self.run.from_groups(paths).sum(4).flatten(2))

    def leaving_paths(self, x: Tensor, dx: Tensor, enter: Tensor, leave: Tensor, lo: int, hi: int) -> None:
        """Take x and dx = k dS_out as rows, and the states S_in, dS_out (B G, N, F P)."""
        run = self.run
        paths = run.into("scaled", x.shape, torch.mul, x, dx).sum(4)
        self.leaving.append((paths * run.to_end_unweighted[lo:hi].squeeze(4)).flatten(2))
        both = run.into("tile", enter.shape, torch.mul, enter, leave)
        both = both.view(hi - lo, run.groups, run.state, run.per_group, run.width).sum((2, 4))
        self.through.append((both * run.chunk_decay[lo:hi, :, 0, :, 0]).flatten(1))

    def finish(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The gradients of a (n, H), w (n, H), diagonal (n, H) or None, D (H) or None."""
        run = self.run
        leaving = torch.cat(self.leaving)
        weight = torch.cat(self.weight).transpose(1, 2) + leaving
        columns = self._tokens(leaving * run.weight.transpose(1, 2)).cumsum(1)
        rows = self._tokens(torch.cat(self.entering)).flip(1).cumsum(1).flip(1)
        crossing = torch.cat(self.crossing).transpose(1, 2)[:, run.rank - 1 :: run.rank]
        earlier = torch.nn.functional.pad((columns + crossing)[:, :-1], (0, 0, 1, 0))
        da = earlier + rows + torch.cat(self.through).unsqueeze(1)
        ddiagonal = (
            self._flat(self._tokens(torch.cat(self.diagonal).transpose(1, 2))) if self.diagonal else None
        )
        dskip = torch.stack(self.skip).sum(0).flatten() if self.skip else None
        return self._flat(da), self._flat(self._tokens(weight)), ddiagonal, dskip

    def _tokens(self, t: Tensor) -> Tensor:
        """(C, M, H) summed over the rows of each token: (C, Q, H)."""
        run = self.run
        return t if run.rank == 1 else t.reshape(-1, run.sizes.size, run.rank, run.n_head).sum(2)

    def _flat(self, t: Tensor) -> Tensor:
        """(C, Q, H) by slots to (n, H) by tokens."""
        t = t.reshape(-1, self.run.n_head)
        return t if self.run.maps.slot is None else t.index_select(0, self.run.maps.slot)
