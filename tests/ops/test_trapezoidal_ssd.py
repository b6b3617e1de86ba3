"""Mamba-3's op, SISO and MIMO: recorded numbers, the float64 reference, packing, splits, compile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from plait.ops.cumulative_angle import cumulative_angle
from plait.ops.ssd import portable, trapezoidal_ssd
from tests.ops.helpers import (
    Run,
    assert_close,
    assert_same_run,
    cumulative,
    padded_cumulative,
    random_lengths,
    run,
    separate_documents,
    to_double,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mamba3_ops"
CASES = json.loads((FIXTURES / "meta.json").read_text())["cases"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
PER_TOKEN = ("v", "k", "q", "log_decay", "dt", "lam")
STATES = ("ssm", "last_k", "last_v")
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)


def inputs(
    rows: int,
    length: int,
    n_seq: int,
    *,
    heads: int = 3,
    width: int = 3,
    state: int = 5,
    rank: int = 2,
    decay: str = "mixed",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """Random operands; `decay` sets log_decay: weak -0.01 or so, strong -20 or so, mixed anything between."""
    torch.manual_seed(seed)
    strength = {
        "weak": torch.full((heads,), 0.01),
        "strong": torch.full((heads,), 20.0),
        "mixed": torch.logspace(-2, 1.3, heads),
    }
    tensors = {
        "v": torch.randn(rows, length, heads, width),
        "k": torch.randn(rows, length, rank, heads, state),
        "q": torch.randn(rows, length, rank, heads, state),
        "log_decay": -strength[decay] * (0.5 + torch.rand(rows, length, heads)),
        "dt": torch.rand(rows, length, heads),
        "lam": torch.rand(rows, length, heads),
        "rank_in": torch.randn(heads, rank, width),
        "D": torch.randn(heads),
        "ssm": torch.randn(n_seq, heads, width, state),
        "last_k": torch.randn(n_seq, rank, heads, state),
        "last_v": torch.randn(n_seq, heads, width),
    }
    return {name: t.to(dtype) for name, t in tensors.items()}


def op(
    ssm: Tensor | None,
    last_k: Tensor | None,
    last_v: Tensor | None,
    *,
    backend: str = "portable",
    **options: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The op with its state as three arguments, as `run` wants it."""
    state = None if ssm is None or last_k is None or last_v is None else (ssm, last_k, last_v)
    return trapezoidal_ssd(**options, initial_state=state, backend=backend)


def in_chunks(size: int) -> Any:
    """The portable form with chunks of `size` rows, and the public function's defaults."""

    def call(ssm: Tensor | None, last_k: Tensor | None, last_v: Tensor | None, **options: Any) -> Any:
        state = None if ssm is None or last_k is None or last_v is None else (ssm, last_k, last_v)
        defaults = {"rank_in": None, "D": None, "cu_seqlens": None, "max_len": None}
        return portable.trapezoidal_ssd(**{**defaults, **options}, initial_state=state, chunk_size=size)

    return call


def reference_run(tensors: dict[str, Tensor | None], **options: Any) -> Run:
    return run(op, to_double(tensors), backend="reference", **options)


def rotate(x: Tensor, theta: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of x (B, T, R, H, N) by theta (B, T, H, Ra): neighbours, or i with N/2 + i."""
    angles, half = theta.shape[-1], x.shape[-1] // 2
    cos, sin = theta.cos().unsqueeze(2), theta.sin().unsqueeze(2)
    if interleaved:
        pairs, rest = x[..., : 2 * angles].unflatten(-1, (angles, 2)), x[..., 2 * angles :]
        a, b = pairs.unbind(-1)
        return torch.cat([torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2), rest], -1)
    a, b = x[..., :angles], x[..., half : half + angles]
    turned = (a * cos - b * sin, x[..., angles:half], a * sin + b * cos, x[..., half + angles :])
    return torch.cat(turned, -1)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_numbers_of_the_original(case: str, backend: str) -> None:
    """Bias, rotation, gates and the output norm are outside of the op, here as the originals have them."""
    meta, t = CASES[case], load_file(FIXTURES / f"{case}.safetensors")
    siso = meta["kind"] == "siso"
    wanted = {name.removeprefix("grad."): t[name] for name in t if name.startswith("grad.")}
    p = {name: v.requires_grad_(name in wanted) for name, v in t.items()}
    heads = p["V"].shape[2]
    cu = None if meta.get("cu_seqlens") is None else torch.tensor(meta["cu_seqlens"], dtype=torch.int32)
    packing: dict[str, Any] = {"cu_seqlens": cu, "max_len": None if cu is None else 32, "backend": backend}

    log_decay, dt = p["ADT"].transpose(1, 2), p["DT"].transpose(1, 2)
    step = math.pi * torch.tanh(p["Angles"]) * dt.unsqueeze(-1)
    theta, angle = cumulative_angle(step, initial_state=p.get("init_angle"), **packing)

    def keys(raw: Tensor, bias: Tensor) -> Tensor:
        if siso:
            raw, bias = raw.unsqueeze(2), bias.unsqueeze(1)
        raw = raw.repeat_interleave(heads // raw.shape[3], 3)
        return rotate(raw + bias.transpose(0, 1), theta, siso)

    state = None
    if "init_ssm" in p:
        state = (p["init_ssm"], p["init_k"].unsqueeze(1), p["init_v"])
    o, (ssm, last_k, last_v) = trapezoidal_ssd(
        p["V"],
        keys(p["K"], p["K_bias"]),
        keys(p["Q"], p["Q_bias"]),
        log_decay,
        dt,
        torch.sigmoid(p["Trap"].transpose(1, 2)),
        rank_in=p.get("MIMO_V"),
        D=p.get("D"),
        initial_state=state,
        **packing,
    )
    if meta.get("fused_norm"):
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + meta["norm_eps"]) * p["norm_w"]
    if "Z" in p:
        z = p["Z"].unsqueeze(2)
        o = o * torch.nn.functional.silu(z if siso else z * p["MIMO_Z"].transpose(0, 1))
    out = (o if siso else o * p["MIMO_Out"].transpose(0, 1)).sum(2)
    loss = (out * t["w_out"]).sum() + (ssm * t["w_state"]).sum()
    grads = torch.autograd.grad(loss, [p[name] for name in wanted])
    assert set(wanted) >= {"Q", "K", "V", "ADT", "DT", "Trap", "Angles"}
    for name, got, want, allowed in [
        ("out", out, t["out"], 2e-5),
        ("ssm", ssm, t["final_ssm"], 2e-5),
        ("k", last_k.squeeze(1) if siso else last_k, t["final_k"], 2e-5),
        ("v", last_v, t["final_v"], 2e-5),
        ("cos", angle.cos(), t["final_angle"].cos(), 2e-5),
        ("sin", angle.sin(), t["final_angle"].sin(), 2e-5),
        *((name, got, wanted[name], 2e-4) for name, got in zip(wanted, grads, strict=True)),
    ]:
        assert got.shape == want.shape and (got - want).abs().max() <= allowed * want.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@few
@given(data=st.data())
def test_equals_the_reference(dtype: torch.dtype, data: st.DataObject) -> None:
    shape: dict[str, Any] = {
        "heads": data.draw(st.sampled_from([1, 3]), "heads"),
        "rank": data.draw(st.sampled_from([1, 2, 3]), "rank"),
        "width": data.draw(st.sampled_from([1, 4, 7]), "width"),
        "state": data.draw(st.sampled_from([2, 5, 8]), "state"),
        "decay": data.draw(st.sampled_from(["weak", "strong", "mixed"]), "decay"),
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    size = data.draw(st.sampled_from([1, 4, 16, 64]), "chunk")
    length = data.draw(st.sampled_from([1, 2, 15, 16, 17, 33, 66]), "length")
    count = data.draw(st.integers(1, 7), "sequences")
    options: dict[str, Any] = {}
    packed = data.draw(st.booleans(), "packed")
    if packed:
        options["cu_seqlens"] = cumulative(random_lengths(length, count, shape["seed"]))
        options["max_len"] = data.draw(st.sampled_from([None, length, 2 * length]), "max_len")
    else:
        count = min(count, 3)
    tensors = inputs(1 if packed else count, length, count, dtype=dtype, **shape)
    if data.draw(st.booleans(), "without options"):
        tensors |= dict.fromkeys(("rank_in", "D", *STATES))
    want = reference_run(tensors, **options)
    assert_same_run(run(in_chunks(size), tensors, **options), want, TOLERANCE[dtype])


@pytest.mark.parametrize("rank", [1, 4])
def test_the_gradient_of_a_long_float32_row_is_exact(rank: int) -> None:
    tensors = inputs(1, 400, 1, rank=rank, dtype=torch.float32)
    tensors["log_decay"] = torch.where(torch.rand(1, 400, 3) < 0.1, -20.0, -0.02)
    assert_same_run(run(op, tensors), reference_run(tensors), 1e-5)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("rank", [1, 2])
def test_packed_equals_separate_documents(backend: str, rank: int) -> None:
    lengths = [5, 0, 1, 34, 0, 64, 3]
    tensors = inputs(1, sum(lengths), len(lengths), rank=rank)

    def separate(**t: Tensor) -> list[Tensor]:
        shared = {name: t[name] for name in ("rank_in", "D")}
        tokens, states = {n: t[n] for n in PER_TOKEN}, {n: t[n] for n in STATES}
        return separate_documents(
            lambda **document: op(**document, **shared, backend=backend), tokens, states, lengths
        )

    packed = run(op, tensors, cu_seqlens=cumulative(lengths), max_len=100, backend=backend)
    assert_same_run(packed, run(separate, tensors), 1e-12)


def test_nothing_of_one_document_reaches_another() -> None:
    """The one with numbers that are none stands between others, one of them empty."""
    lengths = [20, 0, 3, 0, 18]
    tensors = inputs(1, sum(lengths), 5)
    for name in PER_TOKEN:
        tensors[name][:, 20:23] = float("nan")  # type: ignore[index]
    for name in STATES:
        tensors[name][2] = float("nan")  # type: ignore[index]
    got = run(op, tensors, cu_seqlens=cumulative(lengths), max_len=32)
    others = torch.cat([torch.arange(20), torch.arange(23, sum(lengths))])
    assert got.outputs[0][:, 20:23].isnan().all() and not got.outputs[0][:, others].isnan().any()
    for final, name in zip(got.outputs[1:], STATES, strict=True):
        assert final[2].isnan().all() and not final[[0, 1, 3, 4]].isnan().any()
        assert not got.grads[name][[0, 1, 3, 4]].isnan().any()
    for name in PER_TOKEN:
        assert not got.grads[name][:, others].isnan().any()


@pytest.mark.parametrize("split", [1, 7, 8, 9, 19])
def test_chunked_equals_whole(split: int) -> None:
    """Three sequences split at different places, the second one with no token in its first part."""
    chunk, total, first = in_chunks(16), [30, 20, 25], [split, 0, split + 2]
    tensors = inputs(1, sum(total), 3)

    def part(t: dict[str, Tensor], begin: list[int], end: list[int], state: Any) -> Any:
        starts = [sum(total[:s]) for s in range(3)]
        index = torch.cat([torch.arange(o + a, o + b) for o, a, b in zip(starts, begin, end, strict=True)])
        tokens = {name: t[name][:, index] for name in PER_TOKEN}
        cu = cumulative([b - a for a, b in zip(begin, end, strict=True)])
        named = dict(zip(STATES, state, strict=True))
        y, state = chunk(**tokens, **named, rank_in=t["rank_in"], D=t["D"], cu_seqlens=cu, max_len=32)
        return y.new_zeros(1, sum(total), *y.shape[2:]).index_copy(1, index, y), state

    def both(**t: Tensor) -> Any:
        y, state = part(t, [0, 0, 0], first, [t[name] for name in STATES])
        rest, state = part(t, first, total, state)
        return y + rest, state

    whole = run(chunk, tensors, cu_seqlens=cumulative(total), max_len=32)
    assert_same_run(run(both, tensors), whole, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_no_tokens_and_no_sequences(backend: str) -> None:
    for rows, length, n_seq, cu in [
        (2, 0, 2, None),
        (0, 5, 0, None),
        (1, 0, 3, cumulative([0, 0, 0])),
        (1, 9, 4, cumulative([0, 9, 0, 0])),
    ]:
        tensors = inputs(rows, length, n_seq)
        tensors["ssm"].view(-1)[:1] = -0.0  # type: ignore[union-attr]
        tensors["last_v"].view(-1)[:1] = float("inf")  # type: ignore[union-attr]
        got = run(op, tensors, cu_seqlens=cu, max_len=None if cu is None else length, backend=backend)
        assert got.outputs[0].shape == (rows, length, 2, 3, 3)
        kept = [0, 2, 3] if n_seq == 4 else list(range(n_seq))
        for final, name in zip(got.outputs[1:], STATES, strict=True):
            before = tensors[name]
            assert before is not None
            assert torch.equal(final[kept].view(torch.int64), before[kept].view(torch.int64))


@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck(packed: bool) -> None:
    tensors = inputs(1, 5, 3 if packed else 1, heads=2, width=2, state=2)
    cu = cumulative([3, 0, 2]) if packed else None
    leaves = [t.requires_grad_() for t in tensors.values() if t is not None]

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        o, state = in_chunks(4)(**dict(zip(tensors, values, strict=True)), cu_seqlens=cu, max_len=5)
        return (o, *state)

    assert torch.autograd.gradcheck(call, leaves)


def test_narrow_types() -> None:
    tensors = inputs(2, 20, 2, decay="weak", dtype=torch.float32)
    for name in ("v", "k", "q"):
        tensors[name] = tensors[name].bfloat16()  # type: ignore[union-attr]
    want = op(**to_double(tensors), backend="reference")
    o, state = op(**tensors)
    assert o.dtype == torch.bfloat16 and all(t.dtype == torch.float32 for t in state)
    assert_close(o, want[0], 4e-3)
    for got, expected in zip(state, want[1], strict=True):
        assert_close(got, expected, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = op(**tensors)
    assert torch.equal(again, o)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_compiles_once_for_many_packings(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(op, fullgraph=True, backend=counter)
    n, counts = 70 if backend == "portable" else 7, []
    for i in range(20):
        cu, max_len = padded_cumulative(random_lengths(n, 5 + i % 4, i))
        tensors = inputs(1, n, 8, heads=2, dtype=torch.float32, seed=i)
        o, state = compiled(**tensors, cu_seqlens=cu, max_len=max_len, backend=backend)
        want = op(**tensors, cu_seqlens=cu, max_len=max_len)
        for got, expected in zip((o, *state), (want[0], *want[1]), strict=True):
            assert_close(got, expected, 1e-5)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[6] <= 4


def test_compiled_gradients() -> None:
    torch._dynamo.reset()
    tensors = inputs(1, 21, 4, dtype=torch.float32)
    options = {"cu_seqlens": cumulative([9, 0, 1, 11]), "max_len": 16}
    compiled = torch.compile(in_chunks(8), fullgraph=True, backend="aot_eager")
    assert_same_run(run(compiled, tensors, **options), run(op, tensors, **options), 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.ones(2, 5, 3, 5)}, r"k has shape \(2, 5, 3, 5\), expected \(S, T, R, H, N\)"),
        ({"lam": torch.ones(2, 5)}, r"lam has shape \(2, 5\), expected \(S, T, H\) = \(2, 5, 3\)"),
        ({"rank_in": torch.ones(3, 1, 3)}, r"expected \(H, R, P\) = \(3, 2, 3\)"),
        ({"last_k": torch.ones(2, 2, 5)}, r"initial_state\[1\] .* \(S, R, H, N\) = \(2, 2, 3, 5\)"),
    ],
)
def test_says_which_shape_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**{**inputs(2, 5, 2), **change})
