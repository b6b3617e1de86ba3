"""The invariants of a mixer as functions that raise AssertionError, so that broken mixers can be shown to fail them.

Weights are redrawn until every branch matters and memory is long: at ordinary initialisation a mixer that
forgets its state would pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from plait.config.table import mixer_class
from plait.mixers.contract import Layout, Mixer, State
from plait.mixers.smear import Smear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CHUNK = 64  # the chunk of the portable ops: splits beside it are the ones that go wrong

# Small layers of every kind; several where an option changes how the state works.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "attention": ("attention", {"n_head": 4, "n_kv_head": 2, "qk_norm": True}),
    "attention window": ("attention", {"n_head": 2, "window": 9, "rope_fraction": 0.5}),
    "attention wide window": ("attention", {"n_head": 2, "window": 1000}),
    "attention multi-query": ("attention", {"n_head": 2, "n_kv_head": 1, "rope": False, "bias": True}),
    "attention of nanochat": (
        "attention",
        {
            "n_head": 4,
            "n_kv_head": 2,
            "window": 20,
            "rope_reverse": True,
            "rope_dtype": "bfloat16",
            "qk_norm": True,
            "qk_scale": 1.2,
            "value_embedding": True,
            "value_gate_channels": 5,
        },
    ),
    "mamba2": ("mamba2", {"headdim": 8, "d_state": 6}),
    "mamba2 groups": (
        "mamba2",
        {"headdim": 4, "d_state": 5, "ngroups": 2, "dt_limit": (0.01, 0.5), "D_has_hdim": True},
    ),
    "mamba2 narrow": ("mamba2", {"headdim": 8, "d_state": 4, "d_ssm": 16, "gate_norm": False, "d_conv": 3}),
    "mamba": ("mamba", {"d_state": 5}),
    "mamba rank and biases": (
        "mamba",
        {"d_state": 4, "d_conv": 3, "expand": 1.5, "dt_rank": 3, "bias": True, "conv_bias": False},
    ),
    "mamba separate": (
        "mamba",
        {"d_state": 3, "projections": "separate", "dt_rank": "full", "gate": "identity", "dt_bias_scale": 2},
    ),
    "mamba separate low rank": ("mamba", {"d_state": 4, "projections": "separate", "dt_rank": 2}),
    "mamba full rank": ("mamba", {"d_state": 4, "dt_rank": "full", "expand": 1, "dt_bias_scale": 0.5}),
    "mamba3": ("mamba3", {"headdim": 8, "d_state": 6}),
    "mamba3 groups": (
        "mamba3",
        {
            "headdim": 4,
            "d_state": 8,
            "ngroups": 2,
            "out_norm": True,
            "rope_fraction": 1.0,
            "a_activation": "softplus",
        },
    ),
    "mamba3 MIMO": ("mamba3", {"headdim": 8, "d_state": 6, "is_mimo": True, "mimo_rank": 2}),
    "mamba3 MIMO norm": (
        "mamba3",
        {
            "headdim": 16,
            "d_state": 4,
            "ngroups": 2,
            "is_mimo": True,
            "mimo_rank": 3,
            "out_norm": True,
            "rope_pairs": "interleaved",
        },
    ),
    "s4d": ("s4d", {"d_state": 5}),
    "s4d real": (
        "s4d",
        {"d_state": 6, "modes": "real", "A_init": "log", "activation": "silu", "gate": False, "bias": False},
    ),
    "rnn": ("rnn", {"d_hidden": 12}),
    "gru": ("gru", {}),
    "lstm": ("lstm", {"d_hidden": 20}),
}
TWO_WAY: dict[str, tuple[str, dict[str, object]]] = {
    "attention both ways": ("attention", {"n_head": 2, "causal": False}),
    "attention both ways window": ("attention", {"n_head": 2, "causal": False, "window": 7}),
    "lstm both ways": ("lstm", {"bidirectional": True}),
    "gru both ways": ("gru", {"bidirectional": True}),
    "rnn both ways": ("rnn", {"bidirectional": True}),
}
# Held to the same contract, but no kind of the table: what may stand around the blocks.
BESIDES: dict[str, tuple[str, dict[str, object]]] = {"smear": ("smear", {"channels": 5})}
WIDTH = 16
VOCAB_ROWS = 61


def rms(a: Tensor, b: Tensor) -> float:
    """rms(a - b) / rms(b); 0 for empty tensors."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes {tuple(a.shape)} and {tuple(b.shape)}")
    if not a.numel():
        return 0.0
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-30))


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Assert a small relative RMS error; NaN fails."""
    error = rms(a, b)
    assert error <= tolerance, f"{what}: error {error:.2e} above {tolerance:.0e}"


@torch.no_grad()
def redraw(module: nn.Module, seed: int = 0) -> None:
    """Weights of order one, time steps from 1e-3 to 1, decays near 1: nothing is forgotten soon."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        last = name.rsplit(".", 1)[-1]
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        if last == "dt_bias" or name.endswith("dt_proj.bias"):
            dt = torch.exp(
                torch.rand(p.shape, generator=g, dtype=torch.float64) * math.log(1e3) + math.log(1e-3)
            )
            value = dt + torch.log(-torch.expm1(-dt))
        elif last == "log_dt":
            value = torch.rand(p.shape, generator=g, dtype=torch.float64) * math.log(1e3) + math.log(1e-3)
        elif last in ("B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"):
            value = 1 + 0.5 * noise
        elif last in ("A_imag", "B", "C"):
            value = noise
        elif last == "A_log":
            value = torch.empty(p.shape, dtype=torch.float64).uniform_(0.02, 0.5, generator=g).log()
        elif "bias_hh" in name or "bias_ih" in name:
            value = 0.3 * noise + (1.0 if p.shape[0] % 4 == 0 else 0.5)  # gates stay open
        elif last == "D" or p.dim() < 2:
            value = 1 + 0.3 * noise if "weight" in last else 0.5 * noise
        else:
            value = noise / math.sqrt(p[0].numel() if p.dim() > 1 else 1)
        p.copy_(value)


def make_mixer(kind: str, options: dict[str, object], *, dtype: torch.dtype = torch.float64) -> Mixer:
    """A small redrawn mixer of width ``WIDTH``."""
    mixer = build_mixer(kind, options).to(dtype)
    redraw(mixer)
    return mixer.eval()


def build_mixer(kind: str, options: dict[str, object]) -> Mixer:
    """A small mixer as it begins; one that looks at token ids has a table of ``VOCAB_ROWS`` of them."""
    if kind == "smear":
        return Smear(WIDTH, **options)  # type: ignore[arg-type]
    cls = mixer_class(kind)
    more = {"vocab_rows": VOCAB_ROWS} if cls.reads_ids else {}
    return cls(
        cls.options_class(**options),
        WIDTH,
        causal=bool(options.get("causal", True)),
        layer_index=0,
        **more,
    )


def lay(layout: Layout, x: Tensor) -> Layout:
    """The layout with ids: each token's is made of its vector, so that a token has the same in any layout."""
    ids = (x[..., 0].detach().double() * 1000).floor().long() % VOCAB_ROWS
    return replace(layout, ids=ids)


def sequences(mixer: Mixer, lengths: Sequence[int], seed: int = 1) -> list[Tensor]:
    """Random inputs, one (1, n, d_in) a sequence."""
    g = torch.Generator().manual_seed(seed)
    dtype = next(mixer.parameters()).dtype
    return [torch.randn(1, n, mixer.d_in, generator=g, dtype=torch.float64).to(dtype) for n in lengths]


def alone(mixer: Mixer, x: Tensor, *, state: bool = False) -> tuple[Tensor, State | None]:
    """One sequence from its beginning, dense, in one call."""
    layout = lay(Layout.dense(1, x.shape[1]), x)
    return mixer(x, layout, mixer.init_state(1, x.shape[1], dtype=x.dtype) if state else None)


def check_splits(
    mixer: Mixer, tolerance: float, *, in_place: bool, cuts: Sequence[Sequence[int]] | None = None
) -> None:
    """Invariant 1: three sequences, packed pieces of any lengths from any state, equal one call each."""
    first = cuts or [(CHUNK - 1, CHUNK, CHUNK + 1), (1, 0, CHUNK), (CHUNK, CHUNK - 1, 1), (17, 3, 0)]
    totals = [sum(column) for column in zip(*first, strict=True)]
    xs = sequences(mixer, totals)
    whole = [alone(mixer, x, state=True) for x in xs]
    state = mixer.init_state(3, max(totals), dtype=xs[0].dtype)
    done, outputs = [0, 0, 0], [[], [], []]
    for piece in first:
        x = torch.cat([x[:, d : d + n] for x, d, n in zip(xs, done, piece, strict=True)], 1)
        layout = lay(Layout.from_lengths(piece, start=torch.tensor(done), max_past=max(done)), x)
        if in_place:
            y = mixer.step(x, layout, state)
        else:
            before = state.clone()
            y, new = mixer(x, layout, state)
            assert new is not None
            for name in before:
                assert torch.equal(before[name], state[name]), f"forward changed the given {name}"
                for row, n in enumerate(piece):
                    if n == 0:
                        assert torch.equal(new[name][row], before[name][row]), f"{name} moved without a token"
            state = new
        for out, part in zip(outputs, y.split(list(piece), 1), strict=True):
            out.append(part)
        done = [d + n for d, n in zip(done, piece, strict=True)]
    for row, (y, last) in enumerate(whole):
        close(torch.cat(outputs[row], 1), y, tolerance, f"sequence {row} in pieces")
        assert last is not None
        for name, tensor in last.items():
            if tensor.shape[1:] == state[name].shape[1:]:  # key and value buffers differ in capacity
                close(state[name][row : row + 1], tensor, 10 * tolerance, f"final {name} of sequence {row}")


def check_steps(mixer: Mixer, tolerance: float, length: int = CHUNK + 9) -> None:
    """Invariant 1, one token at a time, dense: the addresses of the state never change."""
    xs = torch.cat(sequences(mixer, [length] * 2))
    whole, _ = mixer(xs, lay(Layout.dense(2, length), xs))
    state = mixer.init_state(2, length, dtype=xs.dtype)
    addresses = [t.data_ptr() for t in state.values()]
    steps = []
    for t in range(length):
        x = xs[:, t : t + 1]
        layout = lay(Layout.dense(2, 1, start=torch.full((2,), t), max_past=t), x)
        steps.append(mixer.step(x, layout, state))
    assert addresses == [t.data_ptr() for t in state.values()], "step moved the state"
    close(torch.cat(steps, 1), whole, tolerance, "token by token")


def check_packed(mixer: Mixer, tolerance: float, lengths: Sequence[int] = (5, 0, 1, 70, 33)) -> None:
    """Invariant 2 without states: packed documents equal separate ones, outputs and gradients."""
    xs = [x.requires_grad_() for x in sequences(mixer, lengths)]
    parameters = list(mixer.parameters())
    row = torch.cat(xs, 1)
    packed, _ = mixer(row, lay(Layout.from_lengths(lengths), row))
    apart = torch.cat([alone(mixer, x)[0] for x in xs if x.shape[1]], 1)
    close(packed, apart, tolerance, "packed documents")
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = [*[x for x in xs if x.shape[1]], *parameters]
    gradients = [
        torch.autograd.grad((y * weight.to(y.dtype)).sum(), leaves, allow_unused=True, materialize_grads=True)
        for y in (packed, apart)
    ]
    for ours, true in zip(*gradients, strict=True):
        close(ours, true, 10 * tolerance, f"gradient of {tuple(true.shape)}")


def check_packed_states(mixer: Mixer, tolerance: float) -> None:
    """Invariant 2 with states: outputs, final states and all gradients, those of initial states too."""
    past, lengths = (3, 40, 7, 1), (5, 0, 1, 66)
    before = sequences(mixer, past, seed=5)
    xs = [x.requires_grad_() for x in sequences(mixer, lengths)]
    start = torch.tensor(past)
    given = []
    for x, more in zip(before, lengths, strict=True):
        state = mixer.init_state(1, x.shape[1] + more + 1, dtype=x.dtype)
        given.append(mixer(x, lay(Layout.dense(1, x.shape[1]), x), state)[1].detach())
    capacity = max(p + n for p, n in zip(past, lengths, strict=True)) + 1
    joint = mixer.init_state(4, capacity, dtype=before[0].dtype)
    for row, one in enumerate(
        given
    ):  # key and value buffers of a short sequence are the joint one's first slots
        for name, tensor in one.items():
            joint[name][row, : tensor.shape[1]] = tensor[0]
    joint = State({name: tensor.requires_grad_() for name, tensor in joint.items()})
    x = torch.cat(xs, 1)
    y, new = mixer(x, lay(Layout.from_lengths(lengths, start=start, max_past=max(past)), x), joint)
    assert new is not None
    apart, ends = [], []
    for row, x in enumerate(xs):
        state = joint.select([row])
        layout = Layout.dense(1, x.shape[1], start=start[row : row + 1], max_past=past[row])
        out, end = mixer(x, lay(layout, x), state)
        assert end is not None
        apart.append(out)
        ends.append(end)
    together = torch.cat(apart, 1)
    joined = {name: torch.cat([e[name] for e in ends]) for name in joint}
    close(y, together, tolerance, "packed documents with states")
    g = torch.Generator().manual_seed(3)
    losses = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
    for a, b in [(y, together), *((new[n], joined[n]) for n in joint)]:
        close(a, b, 10 * tolerance, "final states of packed documents")
        weight = torch.randn(a.shape, generator=g, dtype=torch.float64)
        losses = [losses[0] + (a * weight).sum(), losses[1] + (b * weight).sum()]
    leaves = [*[x for x in xs if x.shape[1]], *joint.values(), *mixer.parameters()]
    gradients = [
        torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True) for loss in losses
    ]
    for ours, true in zip(*gradients, strict=True):
        close(ours, true, 10 * tolerance, f"gradient of {tuple(true.shape)}")


def check_causal(mixer: Mixer) -> None:
    """Invariant 3: a change at t changes nothing before t, bit for bit, and something at or after it."""
    length = CHUNK + 40
    (x,) = sequences(mixer, [length])
    for t in (1, CHUNK - 1, CHUNK, length - 1):
        other = x.clone()
        other[:, t] += 1
        a, b = alone(mixer, x)[0], alone(mixer, other)[0]
        assert torch.equal(a[:, :t], b[:, :t]), f"a change at {t} reached back"
        assert not torch.equal(a[:, t:], b[:, t:])


def check_batch(mixer: Mixer, tolerance: float) -> None:
    """Invariant 4: the rest of the batch changes nothing."""
    xs = torch.cat(sequences(mixer, [50] * 3))
    together, _ = mixer(xs, lay(Layout.dense(3, 50), xs))
    for row in range(3):
        close(together[row : row + 1], alone(mixer, xs[row : row + 1])[0], tolerance, f"row {row} in a batch")


def check_fork(mixer: Mixer) -> None:
    """Invariant 9: a restored clone gives the same numbers, bit for bit."""
    xs = torch.cat(sequences(mixer, [30] * 2))
    state = mixer.init_state(2, 30, dtype=xs.dtype)
    mixer.step(xs[:, :20], lay(Layout.dense(2, 20), xs[:, :20]), state)
    fork = state.clone()
    after = lay(Layout.dense(2, 10, start=torch.full((2,), 20), max_past=20), xs[:, 20:])
    a = mixer.step(xs[:, 20:], after, state)
    assert not all(torch.equal(state[n], fork[n]) for n in state), "step left the state as it was"
    b = mixer.step(xs[:, 20:], after, fork)
    assert torch.equal(a, b)


def check_edges(mixer: Mixer) -> None:
    """Invariant 10: no tokens, no sequences, one token."""
    for n_seq, length in ((2, 0), (0, 3), (0, 0), (1, 1)):
        x = torch.zeros(n_seq, length, mixer.d_in, dtype=next(mixer.parameters()).dtype)
        layout = lay(Layout.dense(n_seq, length), x)
        y, _ = mixer(x, layout)
        assert y.shape == (n_seq, length, mixer.d_out)
        if mixer.stateful:
            state = mixer.init_state(n_seq, 4, dtype=x.dtype)
            y, new = mixer(x, layout, state)
            assert y.shape == (n_seq, length, mixer.d_out) and new is not None
            for name, tensor in state.items():
                assert new[name].shape == tensor.shape and new[name].dtype == tensor.dtype
                assert length or torch.equal(new[name], tensor)
    empty = torch.zeros(1, 0, mixer.d_in, dtype=next(mixer.parameters()).dtype)
    assert mixer(empty, lay(Layout.from_lengths([0, 0]), empty))[0].shape == (1, 0, mixer.d_out)


def check_gradient_through_states(mixer: Mixer, tolerance: float) -> None:
    """Truncated backpropagation without the truncation: pieces chained by states give the whole gradient."""
    (x,) = sequences(mixer, [CHUNK + 30])
    parameters = list(mixer.parameters())
    whole = torch.autograd.grad(alone(mixer, x)[0].square().sum(), parameters)
    state, outputs, cuts = mixer.init_state(1, x.shape[1], dtype=x.dtype), [], (0, 21, CHUNK, x.shape[1])
    for a, b in pairwise(cuts):
        layout = lay(Layout.dense(1, b - a, start=torch.tensor([a]), max_past=a), x[:, a:b])
        y, state = mixer(x[:, a:b], layout, state)
        outputs.append(y)
    chained = torch.autograd.grad(torch.cat(outputs, 1).square().sum(), parameters)
    for ours, true in zip(chained, whole, strict=True):
        close(ours, true, 10 * tolerance, f"gradient of {tuple(true.shape)}")
