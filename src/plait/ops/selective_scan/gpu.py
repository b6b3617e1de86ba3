"""Mamba-1's selective scan on GPUs: the Triton kernels of gpu_forward.py and gpu_backward.py as torch custom ops.

It likes channels contiguous, as projections give them; x, dt, z or gradients in another order are copied.
Results do not depend on which order programs run in: two runs are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.selective_scan import gpu_backward, gpu_forward, gpu_step
from plait.ops.selective_scan.gpu_tiles import TILE
from plait.ops.triton_support import INTERPRET, KernelOp, cdiv, on_device, power_of_2


class Config(NamedTuple):
    """A kernel's shape: states it handles at once (1, 2 or 4), channels a program (32, or 64: two a lane), and how many
    registers a thread may have (0: any)."""

    states: int
    channels: int = 32
    registers: int = 0


CONFIGS = {
    "local": Config(4, 64, 168),
    "output": Config(4, 32, 128),
    "again": Config(4, 32, 128),
    "reverse": Config(2, 64),
}
"""By kernel, as measured on an H200. Two channels a lane share the loads of B and C; more programs a multiprocessor
hide each other's waiting."""
UNIT = 4
"""States are padded to a multiple of this, so that every config divides them."""
MODES = {
    "local": gpu_forward.LOCAL.value,
    "output": gpu_forward.OUTPUT.value,
    "again": gpu_forward.AGAIN.value,
}
ENOUGH, PROGRAMS = 1536, 4096
"""Programs of 32 channels that keep a GPU busy: with fewer than the first, sequences are cut into segments until there
are about as many as the second says (132 multiprocessors hold 16 each at a time)."""
SHORTEST, MOST = 64, 64
"""Tokens a segment at least, because cutting costs a second pass; segments a sequence at most, because each one begins
by going through those before it."""


class Plan(NamedTuple):
    """How the work is cut: sizes in the kernels' words (gpu_tiles.py); packed, `items` and `slots` are bounds."""

    rows: int
    length: int
    channels: int
    groups: int
    states: int
    padded: int
    sequences: int
    tiles: int
    segment: int
    segments: int
    items: int
    slots: int
    varlen: bool

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """CHANNELS, GROUPS, STATES and PADDED of the kernels."""
        return self.channels, self.groups, self.states, self.padded

    def blocks(self, width: int) -> int:
        """Blocks of so many channels in a group."""
        return cdiv(self.channels // self.groups, width)


def plan(x: Tensor, A: Tensor, B: Tensor, cu_seqlens: Tensor | None, max_len: int) -> Plan:
    """Cut sequences of up to max_len tokens into as many segments as fill the GPU."""
    (rows, length, channels), states = x.shape, A.shape[1]
    groups = B.shape[2] if B.dim() == 4 else 1
    varlen = cu_seqlens is not None
    longest = max(min(max_len, length) if varlen else length, 1)
    together = max(length // longest if varlen else rows, 1)
    programs = together * groups * cdiv(channels // groups, 32)
    wanted = 1 if programs >= ENOUGH else max(min(PROGRAMS // programs, longest // SHORTEST, MOST), 1)
    segment = TILE * max(cdiv(longest if wanted > 1 else length, TILE * wanted), 1)
    tiles, segments = cdiv(length, TILE), cdiv(length, segment)
    sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
    items = max(sequences + segments - 1, 0) if varlen else rows * segments
    slots = rows * tiles + (items if varlen else 0)
    padded = UNIT * cdiv(states, UNIT)
    widths = (rows, length, channels, groups, states, padded)
    return Plan(*widths, sequences, tiles, segment, segments, items, slots, varlen)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-1's recurrence in float32; shapes as in `plait.ops.selective_scan.selective_scan`. x may not be float64."""
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if x.shape[1] == 1 and cu_seqlens is None and not save:
        return gpu_step.step(*given, dt_softplus)
    longest = x.shape[1] if max_len is None else max_len
    y, final, *_ = SCAN(*given, cu_seqlens, dt_softplus, longest, save)
    return y, final


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    max_len: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, and for backward the local states and sums of dt of all segments, B and C, and A packed."""
    p = plan(x, A, B, cu_seqlens, max_len)
    y, final, local, sums, bc, a = _outputs(p, x)
    if y.numel() == 0 or final.numel() == 0:
        return y.zero_(), final.zero_() if initial is None else final.copy_(initial), local, sums, bc, a
    _pack(p, A, B, C, cu_seqlens, bc, a)
    tokens = [_rows(x), _rows(dt), _rows(x if z is None else z), _rows(x)]
    launch = _sweeps(p, tokens, y, bc, a, D, z, dt_bias, initial, cu_seqlens, softplus)
    if p.segments > 1:
        launch("local", local, sums, sums, local, bc, final)
    launch("output", local, sums, sums, _states(p, x), bc, final)
    if not save:
        local, sums, bc, a = (t.new_empty(0, *t.shape[1:]) for t in (local, sums, bc, a))
    return y, final, local, sums, bc, a


def _outputs(p: Plan, x: Tensor, save: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    kept = p.items if save and p.segments > 1 else 0
    return (
        x.new_empty(x.shape),
        x.new_empty(p.sequences, p.channels, p.states, dtype=torch.float32),
        x.new_empty(kept, p.padded, p.channels, dtype=torch.float32),
        x.new_empty(kept, p.channels, dtype=torch.float32),
        x.new_empty(p.slots if save else 0, p.groups, p.padded, 2 * TILE, dtype=torch.float32),
        x.new_empty(p.padded if save else 0, p.channels, dtype=torch.float32),
    )


def _fake_forward(x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens, softplus, max_len, save):  # type: ignore[no-untyped-def]
    return _outputs(plan(x, A, B, cu_seqlens, max_len), x, save)


def _backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    softplus: bool,
    max_len: int,
    local: Tensor,
    sums: Tensor,
    bc: Tensor,
    a: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty for what was not given."""
    grads = _fake_backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial)
    dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial = grads
    p = plan(x, A, B, cu_seqlens, max_len)
    if x.numel() == 0 or A.numel() == 0 or p.sequences == 0:
        for grad in grads:
            grad.zero_()
        if initial is not None and dfinal is not None:
            dinitial.copy_(dfinal)
        return grads
    kept = x.new_empty(p.slots, p.padded, p.channels, dtype=torch.float32)
    back, elapsed = kept, kept
    if p.segments > 1:
        back, elapsed = _states(p, x), x.new_empty(p.items, p.channels, dtype=torch.float32)
    tokens = [_rows(t) for t in (x, dt, x if z is None else z, dy)]
    launch = _sweeps(p, tokens, dx if z is None else dz, bc, a, D, z, dt_bias, initial, cu_seqlens, softplus)
    launch("again", local, sums, elapsed, back, kept, kept)
    w, da = _states(p, x), _states(p, x)
    vectors = x.new_empty(p.items, 2, p.channels, dtype=torch.float32)
    config = CONFIGS["reverse"]
    parts = x.new_empty(p.blocks(config.channels), p.slots, p.groups, p.padded, 2 * TILE, dtype=torch.float32)
    dfinal = None if dfinal is None else dfinal.contiguous()
    with on_device(x):
        gpu_backward.reverse_kernel[(p.items * p.groups * parts.shape[0],)](
            *tokens, bc, a, _given(D, a), _given(dt_bias, a), kept, _given(dfinal, a), _given(cu_seqlens, a), back,
            elapsed, w, da, vectors, parts, dx, ddt, dinitial, *(t.stride(0) for t in (*tokens, dx)),
            p.length, p.tiles, p.sequences, p.segment, p.segments, p.slots, *(t.stride(1) for t in (*tokens, dx)),
            *p.widths, config.channels, config.states, SOFTPLUS=softplus, BIAS=dt_bias is not None,
            SKIP=D is not None, GATE=z is not None, FINAL=dfinal is not None, INITIAL=initial is not None,
            SEGMENTED=p.segments > 1, VARLEN=p.varlen, EDGE=p.varlen or p.length % TILE > 0,
            EXACT=x.dtype == torch.float32 and not INTERPRET.value, **_options(config),
        )  # fmt: skip
        gpu_backward.finish_kernel[(p.rows * p.tiles * p.groups + (p.states + 2) * cdiv(p.channels, 128),)](
            parts, da, vectors, _given(cu_seqlens, da), dB, dC, dA, dD, dbias, p.length, p.tiles, p.sequences,
            p.segment, p.slots, p.items, p.rows * p.tiles * p.groups, *p.widths, power_of_2(p.padded),
            config.channels, config.states, ITEMS=8, SKIP=D is not None, BIAS=dt_bias is not None, VARLEN=p.varlen,
            num_warps=1,
        )  # fmt: skip
    return grads


def _fake_backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial, *_):  # type: ignore[no-untyped-def]
    none = x.new_empty(0)
    rest = (A, B, C, D, dt_bias, initial)
    dA, dB, dC, dD, dbias, dinitial = (none if t is None else t.new_empty(t.shape) for t in rest)
    dx, ddt, dz = (none if t is None else t.new_empty(t.shape) for t in (x, dt, z))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*inputs[:10], *output[2:])
    ctx.options = inputs[10:12]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Any) -> tuple[Any, ...]:
    given, kept = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
    dy = torch.zeros_like(given[0]) if dy is None else dy
    grads = backward(dy, dfinal, *given, *ctx.options, *kept)
    return (*(None if t is None else grad for t, grad in zip(given[:9], grads, strict=True)), *(None,) * 4)


SCAN = KernelOp(
    "selective_scan_gpu",
    _forward,
    _backward,
    fake=_fake_forward,
    fake_backward=_fake_backward,
    save=_save,
    gradients=_gradients,
)
"""The scan with its gradient."""


def _pack(p: Plan, A: Tensor, B: Tensor, C: Tensor, cu_seqlens: Tensor | None, bc: Tensor, a: Tensor) -> None:
    """Write B and C, and A, as the kernels read them (gpu_forward.py)."""
    strides = [n for t in (B, C) for n in (*t.stride()[:2], t.stride(2) if t.dim() == 4 else 0, t.stride(-1))]
    tile_programs = p.rows * p.tiles * p.groups
    with on_device(A):
        gpu_forward.pack_kernel[(tile_programs + cdiv(p.channels, 32),)](
            B, C, A, bc, a, _given(cu_seqlens, a), *strides, *A.stride(), p.length, p.tiles, p.sequences, p.segment,
            tile_programs, *p.widths, power_of_2(p.padded), p.varlen, num_warps=1,
        )  # fmt: skip


def _sweeps(
    p: Plan, tokens: list[Tensor], out: Tensor, bc: Tensor, a: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None, softplus: bool,
) -> Callable[..., None]:  # fmt: skip
    """The sweep forward with all that its three uses share: call it with what they do not.

    tokens: x, dt, z and the gradient of y, each in rows of channels; any tensors for the last two if not needed.
    """
    initial = None if initial is None else initial.contiguous()
    given = (bc, a, _given(D, a), _given(dt_bias, a), _given(initial, a), _given(cu_seqlens, a))
    rows, steps = ([t.stride(i) for t in (*tokens, out)] for i in (0, 1))

    def launch(
        mode: str, local: Tensor, sums: Tensor, elapsed: Tensor, carry: Tensor, kept: Tensor, final: Tensor
    ) -> None:
        config = CONFIGS[mode]
        with on_device(out):
            gpu_forward.sweep_kernel[(p.items * p.groups * p.blocks(config.channels),)](
                *tokens, *given, local, sums, elapsed, carry, kept, out, final, *rows, p.length, p.tiles, p.sequences,
                p.segment, p.segments, *steps, *p.widths, config.channels, config.states, MODES[mode], softplus,
                dt_bias is not None, D is not None, z is not None, initial is not None, p.segments > 1, p.varlen,
                p.varlen or p.length % TILE > 0, **_options(config),
            )  # fmt: skip

    return launch


def _options(config: Config) -> dict[str, int]:
    """Options of Triton for a config: always one warp, so that nothing in a program waits for another warp."""
    if config.registers and torch.version.cuda:
        return {"num_warps": 1, "maxnreg": config.registers}
    return {"num_warps": 1}


def _states(p: Plan, x: Tensor) -> Tensor:
    """Scratch for states of all items."""
    return x.new_empty(p.items, p.padded, p.channels, dtype=torch.float32)


def _rows(x: Tensor) -> Tensor:
    """x (S, T, E), copied unless its channels lie side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """x, or in its place any tensor: a kernel that is told of no x does not look."""
    return other if x is None else x
