"""Decoding of whole models: milliseconds a token after a prompt, and what reading weights and states takes at least.

What is timed is generation's own loop, greedy, without looking at the tokens: feed, sample, feed. Each model passed a
check first: prefill and steps of two of its layers against the float64 reference over the whole text; a Mamba of
transformers, that it computes the same from the same weights. Peers take turns with ours, so that what disturbs the
machine disturbs them alike. What fails is a row that says why, with no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plait.bench.memory import in_use, peak_of
from plait.bench.models import (
    CHECKED_LAYERS,
    CHECKED_VOCABULARY,
    TOLERANCE,
    TOLERANCE_NARROW,
    exact_products,
    failure,
    kernels,
    model_config,
    ran_by,
    relative_error,
    require,
    split_name,
)
from plait.bench.peer_models import decoding_peers
from plait.bench.timing import Result, measure, wait
from plait.inference.decoding import decode, prefill, start
from plait.inference.sampling import Sampling, sample
from plait.models.model import Model
from plait.nn.roles import cast_parameters
from plait.ops.dispatch import use_backend
from plait.ops.norm_linear import norm_linear

DEFAULTS = {
    "cpu": (("mamba-70m", "mamba2-70m", "transformer-70m"), (1,), 128, 32),
    "cuda": (("mamba-130m", "mamba2-130m", "mamba-1.3b", "mamba2-1.3b"), (1, 64), 512, 128),
}
"""Models, sequences, tokens of a prompt, tokens that are timed."""
CHECKED_PROMPT, CHECKED_STEPS = 40, 24  # the graphs of a GPU begin with 16 steps
LARGE = {"cpu": 1 << 27, "cuda": 1 << 28}
"""Numbers whose reading is timed for the floors: a processor's last cache may hold hundreds of megabytes."""
GREEDY = Sampling(temperature=0)
WARM = 3


def benchmark_decoding(
    device: torch.device,
    *,
    models: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    prompt: int | None = None,
    tokens: int | None = None,
    dtype: torch.dtype | None = None,
    graphs: bool = True,
    peers: bool = True,
    repeats: int = 3,
    say: Callable[[dict[str, Any]], None] = lambda row: None,
) -> Result:
    """Time the named models at so many sequences; ``say`` is given each row as it comes.

    prompt, tokens: before what is timed, and of it. dtype: of the weights; None: bfloat16 on a GPU, else float32.
    graphs: as the option of ``generate``. peers: also models of other packages, where installed.
    """
    own_models, own_batches, own_prompt, own_tokens = DEFAULTS[device.type]
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    result = Result("decode", str(device))
    rate = memory_rate(device)
    names = list(models or own_models)
    for name in names:
        split_name(name)  # a mistake is told before anything is measured
    for name in names:
        what = {"model": name, "shape": "-", "dtype": str(dtype).removeprefix("torch."), "by": "plait"}
        length, count = prompt or own_prompt, tokens or own_tokens
        rows: Iterable[dict[str, Any]]
        try:
            check_steps(name, device, dtype, graphs)
            every = [
                _rows(name, batch, length, count, device, dtype, graphs, peers, rate, repeats)
                for batch in batches or own_batches
            ]
            rows = chain.from_iterable(every)
        except Exception as fault:  # whatever a backend does wrong here is one model's, and is reported
            rows = [{**what, "failed": failure(fault)}]
        for row in rows:
            result.rows.append(row)
            say(row)
    return result


def check_steps(name: str, device: torch.device, dtype: torch.dtype, graphs: bool) -> float:
    """The error of a prompt's and steps' logits against the reference over the whole text; PlaitError if too large."""
    torch.manual_seed(0)
    config = model_config(name, layers=CHECKED_LAYERS, vocabulary=CHECKED_VOCABULARY)
    model = Model(config, device=device).eval()
    length = CHECKED_PROMPT + CHECKED_STEPS
    ids = torch.randint(CHECKED_VOCABULARY, (2, length), device=device)
    with exact_products(), torch.no_grad():
        with use_backend("reference"):
            true = deepcopy(model).double()(ids).logits[:, CHECKED_PROMPT - 1 :]
        error = relative_error(_stepwise(model, ids, graphs), true)
        require(f"{name}, decoding", error, TOLERANCE)
        if dtype != torch.float32:
            cast_parameters(model, dtype)
            narrow = relative_error(_stepwise(model, ids, graphs), true)
            require(f"{name}, decoding in {str(dtype).removeprefix('torch.')}", narrow, TOLERANCE_NARROW)
    return error


def memory_rate(device: torch.device) -> float:
    """Bytes a second of memory larger than the caches: of a copy, and on a CPU of reading a matrix if that is more."""
    source = torch.ones(LARGE[device.type], device=device)
    target = torch.empty_like(source)
    n_bytes = source.numel() * source.element_size()
    copied = 2 * n_bytes / measure(lambda: target.copy_(source), device, seconds=0.5).median
    if device.type != "cpu":
        return 1000 * copied
    x, matrix = source[:1024][None], source.view(-1, 1024)
    return 1000 * max(copied, n_bytes / measure(lambda: norm_linear(x, matrix), device, seconds=0.5).median)


def _stepwise(model: Model, ids: Tensor, graphs: bool) -> Tensor:
    """Logits (B, 1 + steps, V) after a prompt and after each of the tokens that follow."""
    state = start(model, ids[:, :CHECKED_PROMPT].tolist(), CHECKED_STEPS, graphs=graphs)
    logits = [state.logits.clone()]
    for token in ids[:, CHECKED_PROMPT:].unbind(1):
        state.feed(token)
        logits.append(state.logits.clone())
    return torch.stack(logits, 1)


def _rows(
    name: str, batch: int, length: int, count: int, device: torch.device, dtype: torch.dtype,
    graphs: bool, peers: bool, rate: float, repeats: int,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    vocabulary = split_name(name)[1].vocabulary
    prompt = torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    what = {"model": name, "shape": f"B{batch} after {length}", "dtype": str(dtype).removeprefix("torch.")}
    makers: dict[str, Callable[[], _Entrant]] = {
        "plait": lambda: _own(name, prompt, count, dtype, graphs),
        **{
            label: partial(_peer, make, count, device)
            for label, make in (decoding_peers(name, prompt, dtype) if peers else {}).items()
        },
    }
    entrants: dict[str, _Entrant] = {}
    failed: dict[str, str] = {}
    for label, make in makers.items():
        try:
            entrants[label] = make()
        except (
            Exception
        ) as fault:  # ours is reported as a failure; another package's mistakes are no reason to stop
            failed[label] = failure(fault)
        if "plait" in failed:
            break
    taken: dict[str, list[tuple[float, float]]] = {label: [] for label in entrants}
    for _ in range(repeats):
        for label, entrant in entrants.items():
            taken[label].append(entrant.once())
    middle = {
        label: [sorted(seconds)[len(times) // 2] for seconds in zip(*times, strict=True)]
        for label, times in taken.items()
    }
    for label in makers:
        if label in failed:
            yield {**what, "by": label, "failed": failed[label]}
        elif label in entrants:
            (first, step), entrant = middle[label], entrants[label]
            own, floor = middle["plait"][1], entrants["plait"].n_bytes / rate
            yield {
                **what, "by": label, "parameters": entrant.parameters, **ran_by(entrant.ran),
                "peak_gib": None if entrant.peak is None else entrant.peak / 2**30,
                "prompt_ms": 1000 * first, "step_ms": 1000 * step, "tokens_per_second": batch / step,
                "times_plait": step / own, "floor_ms": 1000 * floor, "times_floor": step / floor,
            }  # fmt: skip


class _Entrant(NamedTuple):
    """A model that is ready to be timed."""

    once: Callable[
        [], tuple[float, float]
    ]  # seconds of the prompts with a first token, and of each token after it
    parameters: int
    peak: int | None  # bytes, at first
    ran: str
    n_bytes: int = 0  # that a step reads and writes at least


def _own(name: str, prompt: Tensor, count: int, dtype: torch.dtype, graphs: bool) -> _Entrant:
    device = prompt.device
    before = in_use(device)
    model = Model(model_config(name), device=device).eval()
    cast_parameters(model, dtype)
    once = partial(_write, model, prompt.tolist(), count, graphs)
    peak = peak_of(once, device, before)
    n_bytes = bytes_of_step(model, prompt.shape[0], prompt.shape[1] + count // 2)
    return _Entrant(once, sum(p.numel() for p in model.parameters()), peak, _ran(model, prompt), n_bytes)


def _peer(
    make: Callable[[], tuple[Callable[[int], object], int, str]], count: int, device: torch.device
) -> _Entrant:
    before = in_use(device)
    write, parameters, ran = make()

    def once() -> tuple[float, float]:
        one, many = (_seconds(partial(write, n), device) for n in (1, 1 + count))
        return one, (many - one) / count

    return _Entrant(once, parameters, peak_of(once, device, before), ran)


def _write(model: Model, prompts: list[list[int]], count: int, graphs: bool) -> tuple[float, float]:
    """Seconds of the prompts and a first token, and of each of ``count`` tokens after some that warm up."""
    begin = time.perf_counter()
    state = start(model, prompts, count + WARM, graphs=graphs)
    ids = sample(state.logits, GREEDY)
    wait(model.device)
    first = time.perf_counter() - begin
    for number in range(WARM + count):
        if number == WARM:
            wait(model.device)
            begin = time.perf_counter()
        state.feed(ids)
        ids = sample(state.logits, GREEDY)
    wait(model.device)
    return first, (time.perf_counter() - begin) / count


def bytes_of_step(model: Model, batch: int, length: int) -> int:
    """Weights read once, recurrent states read and written, keys and values of ``length`` tokens read; bytes."""
    table = model.embedding.tokens.weight
    head = model.head.parameters() if model.head is not None else ()
    tied = any(p is table for p in head)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not table)
    states = 0
    for mixer in model.mixers:
        now, later = (mixer.state_bytes(batch, n, model.dtype) for n in (length, length + 1))
        states += now if later > now else 2 * now
    return weights + states


def _ran(model: Model, prompt: Tensor) -> str:
    """The kernels of a prompt and of a step."""
    cache = model.new_cache(len(prompt), prompt.shape[1] + 1)

    def both() -> None:
        prefill(model, prompt.tolist(), cache)
        decode(model, prompt[:, 0].to(model.device), cache)

    return kernels(both)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin
