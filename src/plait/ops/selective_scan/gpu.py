"""Mamba-1's selective scan on GPUs: the Triton kernels of gpu_forward.py and gpu_backward.py as torch custom ops.

It likes channels contiguous, as projections give them; x, dt, z or gradients in another order are copied.
Results do not depend on which order programs run in: two runs are equal bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.ops.selective_scan import gpu_backward, gpu_forward, gpu_step
from plait.ops.selective_scan.gpu_tiles import TILE
from plait.ops.triton_launch import Plans, Program
from plait.ops.triton_support import INTERPRET, KernelOp, cdiv, power_of_2


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
    def numbers(self) -> dict[str, Any]:
        """Sizes and kinds by the kernels' names for them; what is written has channels side by side."""
        names = ("length", "tiles", "sequences", "segment", "segments", "slots", "items")
        return {
            **{name: getattr(self, name) for name in names},
            "CHANNELS": self.channels, "GROUPS": self.groups, "STATES": self.states, "PADDED": self.padded,
            "out_r": self.length * self.channels, "OUT_T": self.channels, "SEGMENTED": self.segments > 1,
            "VARLEN": self.varlen, "EDGE": self.varlen or self.length % TILE > 0,
        }  # fmt: skip

    def blocks(self, width: int) -> int:
        """Blocks of so many channels in a group."""
        return cdiv(self.channels // self.groups, width)


class Kept(NamedTuple):
    """Where in one float32 tensor lies what forward leaves for backward, counted in numbers.

    First the local states of all segments, then their sums of dt, B and C, and A, the last two in the kernels' order.
    """

    sums: int
    bc: int
    a: int
    total: int

    @classmethod
    def of(cls, p: Plan) -> Kept:
        """For a plan."""
        segments = p.items if p.segments > 1 else 0
        sums = _rounded(segments * p.padded * p.channels)
        bc = sums + _rounded(segments * p.channels)
        a = bc + _rounded(p.slots * p.groups * p.padded * 2 * TILE)
        return cls(sums, bc, a, a + p.padded * p.channels)


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
    longest = x.shape[1] if max_len is None or cu_seqlens is None else max_len
    y, final, _ = SCAN(*given, cu_seqlens, dt_softplus, longest, save)
    return y, final


FORWARD = ("x", "dt", "z", "A", "B", "C", "D", "bias", "initial", "bounds", "y", "final", "kept")
BACKWARD = (
    "x", "dt", "z", "A", "B", "C", "D", "bias", "initial", "bounds", "kept", "dy", "dfinal",
    "dx", "ddt", "dA", "dB", "dC", "dD", "dz", "dbias", "dinitial",
)  # fmt: skip
"""Tensors of a call by their names in the programs."""
plans: Plans[tuple[Plan, Program]] = Plans()
"""Of the kinds of calls so far."""


class Inputs(NamedTuple):
    """What the kernels read: tokens in rows of channels, the others without gaps but A, B and C."""

    x: Tensor
    dt: Tensor
    z: Tensor | None
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor | None
    bounds: Tensor | None

    def key(self) -> tuple[Any, ...]:
        """All that a program depends on."""
        x, dt, z, A, B, C, *others = self
        return (
            x.device, x.dtype, x.shape, x.stride(), dt.dtype, dt.stride(), None if z is None else (z.dtype, z.stride()),
            A.dtype, A.shape, A.stride(), B.dtype, B.shape, B.stride(), C.dtype, C.stride(),
            *(None if t is None else (t.dtype, t.shape[0]) for t in others),
        )  # fmt: skip

    def flags(self) -> dict[str, bool]:
        """Which of the optional ones there are, in the kernels' words."""
        return {
            "BIAS": self.bias is not None,
            "SKIP": self.D is not None,
            "GATE": self.z is not None,
            "INITIAL": self.initial is not None,
        }


def _inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, initial: Tensor | None, cu_seqlens: Tensor | None,
) -> Inputs:  # fmt: skip
    D, dt_bias, initial = (None if t is None else t.contiguous() for t in (D, dt_bias, initial))
    z = None if z is None else _rows(z)
    return Inputs(_rows(x), _rows(dt), z, A, B, C, D, dt_bias, initial, cu_seqlens)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and if `save` what backward needs (see `Kept`)."""
    given = _inputs(x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens)

    def make() -> tuple[Plan, Program]:
        p = plan(x, A, B, cu_seqlens, max_len)
        program = Program(FORWARD)
        _name_parts(p, program)
        tile_programs = p.rows * p.tiles * p.groups
        strides = {
            f"{name}_{d}": n
            for name, t in (("b", B), ("c", C))
            for d, n in zip(
                "rtgn", (*t.stride()[:2], t.stride(2) if t.dim() == 4 else 0, t.stride(-1)), strict=True
            )
        }
        numbers = {
            **p.numbers, **strides, "a_e": A.stride(0), "a_n": A.stride(1), "tile_programs": tile_programs,
            "WIDTH": power_of_2(p.padded),
        }  # fmt: skip
        grid = (tile_programs + cdiv(p.channels, 32), 1, 1)
        names = ("B", "C", "A", "bc", "a", "bounds")
        program.add(gpu_forward.pack_kernel, grid, names, numbers, num_warps=1)
        program.memory("carry", p.items, p.padded, p.channels)
        if p.segments > 1:
            _sweep("local", p, program, given, given.x, "y", softplus, elapsed="sums", carry="local")
        _sweep("output", p, program, given, given.x, "y", softplus, carry="carry", final="final")
        return p, program

    p, program = plans.of(("forward", given.key(), softplus, max_len), make)
    y, final, kept = _outputs(p, x)
    if y.numel() == 0 or final.numel() == 0:
        return y.zero_(), final.zero_() if initial is None else final.copy_(initial), kept
    program(*given, y, final, kept)
    return y, final, kept if save else kept.new_empty(0)


def _outputs(p: Plan, x: Tensor, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape),
        x.new_empty(p.sequences, p.channels, p.states, dtype=torch.float32),
        x.new_empty(Kept.of(p).total if save else 0, dtype=torch.float32),
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
    kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and the initial state; empty for what was not given."""
    grads = _fake_backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial)
    if x.numel() == 0 or A.numel() == 0:
        for grad in grads:
            grad.zero_()
        if initial is not None and dfinal is not None:
            grads[-1].copy_(dfinal)
        return grads
    given, dy = _inputs(x, dt, A, B, C, D, z, dt_bias, initial, cu_seqlens), _rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()

    def make() -> tuple[Plan, Program]:
        p = plan(x, A, B, cu_seqlens, max_len)
        program = Program(BACKWARD)
        _name_parts(p, program)
        return p, _add_backward(p, program, given, dy, dfinal is not None, softplus)

    key = ("backward", given.key(), softplus, max_len, dy.dtype, dy.stride(), dfinal is not None)
    _, program = plans.of(key, make)
    program(*given, kept, dy, dfinal, *grads)
    return grads


def _add_backward(
    p: Plan, program: Program, given: Inputs, dy: Tensor, final: bool, softplus: bool
) -> Program:
    """Append the sweep forward again, the sweep back, and the sums."""
    whole = p.segments == 1
    states = (p.items, p.padded, p.channels)
    program.memory("before", p.slots, p.padded, p.channels)
    if not whole:
        program.memory("back", *states)
        program.memory("elapsed", p.items, p.channels)
    out = "dx" if given.z is None else "dz"
    elapsed, back = (None, None) if whole else ("elapsed", "back")
    _sweep("again", p, program, given, dy, out, softplus, "dy", elapsed=elapsed, carry=back, kept="before")
    for name in ("w", "da"):
        program.memory(name, *states)
    program.memory("vectors", p.items, 2, p.channels)
    config = CONFIGS["reverse"]
    program.memory("parts", p.blocks(config.channels), p.slots, p.groups, p.padded, 2 * TILE)
    tokens = _tokens(given, dy, "dy")
    numbers = {
        **p.numbers, **given.flags(), **_strides(tokens), "R": config.channels, "U": config.states,
        "SOFTPLUS": softplus, "FINAL": final,
        "EXACT": given.x.dtype == torch.float32 and not INTERPRET.value,
    }  # fmt: skip
    grid = (p.items * p.groups * p.blocks(config.channels), 1, 1)
    names = (
        *(name for name, _ in tokens), "bc", "a", "D", "bias", "before", "dfinal", "bounds", back, elapsed, "w", "da",
        "vectors", "parts", "dx", "ddt", "dinitial",
    )  # fmt: skip
    program.add(gpu_backward.reverse_kernel, grid, names, numbers, **_options(config))
    tile_programs = p.rows * p.tiles * p.groups
    numbers |= {"tile_programs": tile_programs, "WIDTH": power_of_2(p.padded), "ITEMS": 8}
    grid = (tile_programs + (p.states + 2) * cdiv(p.channels, 128), 1, 1)
    names = ("parts", "da", "vectors", "bounds", "dB", "dC", "dA", "dD", "dbias")
    program.add(gpu_backward.finish_kernel, grid, names, numbers, num_warps=1)
    return program


def _fake_backward(dy, dfinal, x, dt, A, B, C, D, z, dt_bias, initial, *_):  # type: ignore[no-untyped-def]
    none = x.new_empty(0)
    rest = (A, B, C, D, dt_bias, initial)
    dA, dB, dC, dD, dbias, dinitial = (none if t is None else t.new_empty(t.shape) for t in rest)
    dx, ddt, dz = (none if t is None else t.new_empty(t.shape) for t in (x, dt, z))
    return dx, ddt, dA, dB, dC, dD, dz, dbias, dinitial


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*inputs[:10], output[2])
    ctx.options = inputs[10:12]


def _gradients(ctx: Any, backward: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *given, kept = ctx.saved_tensors
    dy = torch.zeros_like(given[0]) if dy is None else dy
    grads = backward(dy, dfinal, *given, *ctx.options, kept)
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


def _name_parts(p: Plan, program: Program) -> None:
    """Name what is in `kept`."""
    at, segments = Kept.of(p), p.items if p.segments > 1 else 0
    program.part("local", "kept", 0, segments, p.padded, p.channels)
    program.part("sums", "kept", 4 * at.sums, segments, p.channels)
    program.part("bc", "kept", 4 * at.bc, p.slots, p.groups, p.padded, 2 * TILE)
    program.part("a", "kept", 4 * at.a, p.padded, p.channels)


def _tokens(given: Inputs, dy: Tensor, dy_name: str) -> tuple[tuple[str, Tensor], ...]:
    """What the sweeps read of every token: x, dt, z and the gradient of y, with x for what is not there."""
    z = ("x", given.x) if given.z is None else ("z", given.z)
    return ("x", given.x), ("dt", given.dt), z, (dy_name, dy)


def _strides(tokens: tuple[tuple[str, Tensor], ...]) -> dict[str, int]:
    """Of the tensors that `_tokens` names, in the kernels' words."""
    return {
        name: n
        for letter, (_, t) in zip(("x", "dt", "z", "g"), tokens, strict=True)
        for name, n in ((f"{letter}_r", t.stride(0)), (f"{letter.upper()}_T", t.stride(1)))
    }


def _sweep(
    mode: str, p: Plan, program: Program, given: Inputs, dy: Tensor, out: str, softplus: bool, dy_name: str = "x", *,
    elapsed: str | None = None, carry: str | None = None, kept: str | None = None,
    final: str | None = None,
) -> None:  # fmt: skip
    """Append the sweep forward in one of its three uses (gpu_forward.py)."""
    config = CONFIGS[mode]
    tokens = _tokens(given, dy, dy_name)
    numbers = {
        **p.numbers, **given.flags(), **_strides(tokens), "R": config.channels, "U": config.states,
        "MODE": MODES[mode], "SOFTPLUS": softplus,
    }  # fmt: skip
    names = (
        *(name for name, _ in tokens), "bc", "a", "D", "bias", "initial", "bounds", "local", "sums",
        elapsed, carry, kept, out, final,
    )  # fmt: skip
    grid = (p.items * p.groups * p.blocks(config.channels), 1, 1)
    program.add(gpu_forward.sweep_kernel, grid, names, numbers, **_options(config))


def _options(config: Config) -> dict[str, int]:
    """Options of Triton for a config: always one warp, so that nothing in a program waits for another warp."""
    if config.registers and torch.version.cuda:
        return {"num_warps": 1, "maxnreg": config.registers}
    return {"num_warps": 1}


def _rounded(n: int) -> int:
    """Numbers, so that what follows them is aligned."""
    return cdiv(n, 64) * 64


def _rows(x: Tensor) -> Tensor:
    """x (S, T, E), copied unless its channels lie side by side."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
