"""Choice of a backend: its order, its errors, what it logs, and that torch.compile follows it."""

from __future__ import annotations

import logging

import pytest
import torch

from plait.config.errors import BackendError
from plait.ops import OPERATORS, dispatch
from plait.ops.dispatch import BACKENDS, Op, choose, choose_name, table, use_backend

CPU = torch.device("cpu")
BOTH = Op("both", {"portable": "math:floor", "reference": "math:ceil"})
KERNELS = Op("kernels", {"gpu": "math:sin", "cpu": "math:cos", "portable": "math:floor"})


def test_automatic_takes_the_first_that_runs() -> None:
    assert choose_name(BOTH, None, "cpu") == "portable"
    assert choose_name(BOTH, None, "mps") == "portable"
    assert choose_name(Op("o", {"reference": "math:ceil"}), None, "cpu") == "reference"


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_BACKEND", "reference")
    assert choose_name(BOTH, None, "cpu") == "reference"
    with use_backend("portable"):
        assert choose_name(BOTH, None, "cpu") == "portable"
        assert choose_name(BOTH, "reference", "cpu") == "reference"
        with use_backend("auto"):
            assert choose_name(BOTH, None, "cpu") == "portable"
    assert choose_name(BOTH, "auto", "cpu") == "portable"
    assert choose_name(BOTH, None, "cpu") == "reference"


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose_name(BOTH, None, "cpu") == "portable"


def test_choose_loads_the_function() -> None:
    assert choose(BOTH, None, CPU)(1.5) == 1
    assert choose(BOTH, "reference", CPU)(1.5) == 2


@pytest.mark.parametrize(
    ("op", "name", "reason"),
    [
        (BOTH, "cpu", "has only portable, reference"),
        (KERNELS, "gpu", "needs tensors on 'cuda', given 'cpu'"),
        (BOTH, "portible", "did you mean 'portable'"),
        (BOTH, "fast", "allowed: gpu, cpu, portable, reference, auto"),
    ],
)
def test_a_backend_asked_for_that_cannot_run_raises_with_the_reason(
    op: Op, name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match=reason):
        choose_name(op, name, "cpu")


def test_a_missing_package_is_a_reason_and_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "_has_package", lambda package: False)
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.WARNING, logger="plait.ops"):
        assert [choose_name(KERNELS, None, "cpu") for _ in range(3)] == ["portable"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "kernels: backend 'cpu' cannot run (the package 'numba' is not installed); using the next one"
    ]
    with pytest.raises(BackendError, match="'numba' is not installed"):
        choose_name(KERNELS, "cpu", "cpu")


def test_the_interpreter_runs_gpu_kernels_on_a_cpu_only_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_name(KERNELS, "gpu", "cpu") == "gpu"
    assert choose_name(KERNELS, None, "cpu") == "cpu"


@pytest.mark.parametrize(
    ("available", "capability", "reason"),
    [
        (False, (0, 0), "torch sees no GPU"),
        (True, (7, 5), "the kernels need compute capability 8.0, this GPU has 7.5"),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels_is_a_reason(
    available: bool, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(BackendError, match=reason):
        choose_name(KERNELS, "gpu", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert choose_name(KERNELS, "gpu", "cuda") == choose_name(KERNELS, None, "cuda") == "gpu"


def test_no_backend_at_all_raises() -> None:
    with pytest.raises(BackendError, match="no backend can run on device 'cpu'; it has gpu"):
        choose_name(Op("o", {"gpu": "math:sin"}), None, "cpu")


def test_table_has_every_op_and_backend() -> None:
    rows = table()
    assert len(rows) == len(OPERATORS) * len(BACKENDS)
    assert len({row.op for row in rows}) == len(OPERATORS)
    assert all(row.available == (row.reason == "") for row in rows)
    available = {(row.op, row.backend) for row in rows if row.available}
    for op in ("ssd", "trapezoidal_ssd", "cumulative_angle"):
        assert {(op, "portable"), (op, "reference")} <= available


def test_a_compiled_function_follows_use_backend() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return choose(Op("o", {"portable": "torch:sin", "reference": "torch:cos"}), None, x.device)(x)

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    x = torch.ones(2)
    assert torch.equal(compiled(x), x.sin())
    with use_backend("reference"):
        assert torch.equal(compiled(x), x.cos())
    assert torch.equal(compiled(x), x.sin())
