"""`plait doctor` must find a backend that computes wrong, and must look at everything an op is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plait.cli import selfcheck
from plait.cli.cases import CASES, Case
from plait.config.errors import BackendError
from plait.ops import dispatch
from tests.cli.conftest import Run

CPU = torch.device("cpu")


def test_a_sound_machine(plait: Run) -> None:
    ran = plait("doctor")
    assert ran.status == 0, ran
    for words in ("torch", "memory", "threads", "pyarrow", "portable", "selective_scan", "trapezoidal_ssd"):
        assert words in ran.out
    assert "WRONG" not in ran.out


def test_there_is_a_case_for_every_op() -> None:
    assert set(CASES) == {row.op for row in dispatch.table()}


@pytest.mark.parametrize("op", CASES)
def test_the_reference_agrees_with_itself_and_every_input_matters(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert selfcheck.check(op, "reference", CPU) < selfcheck.TOLERANCE
    case = CASES[op](torch.Generator().manual_seed(0))
    results = _results(case)
    for name, given in case.inputs.items():
        other = Case(case.run, {**case.inputs, name: given * _nearly_one(given)}, case.fixed)
        changed = _results(other)
        outputs = [n for n in results if n.startswith("output")]
        assert (
            max(selfcheck.relative_rms(changed[n], results[n]) for n in outputs) > 10 * selfcheck.TOLERANCE
        ), name


def _nearly_one(given: torch.Tensor) -> torch.Tensor:
    return (0.95 + 0.1 * (torch.arange(given.numel()) % 2)).view(given.shape)  # no norm divides it out


def _results(case: Case) -> dict[str, torch.Tensor]:
    return selfcheck._results(case, "reference", CPU, wide=True, seed=0)


def _break(monkeypatch: pytest.MonkeyPatch, target: str, broken: Callable[..., Any]) -> None:
    monkeypatch.setattr(dispatch._loaded, dispatch.attribute_of(target), broken)


def test_a_wrong_number_is_named(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "plait.ops.causal_conv1d.portable:causal_conv1d"
    right = dispatch._load(target)

    def forgets(x: torch.Tensor, *args: Any, initial_state: Any = None, **more: Any) -> Any:
        return right(x, *args, initial_state=torch.zeros_like(initial_state), **more)

    _break(monkeypatch, target, forgets)
    ran = plait("doctor")
    assert ran.status == 1
    assert "wrong: portable causal_conv1d on cpu: error " in ran.out
    assert ran.out.count("WRONG") == 1


def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "plait.ops.gated_norm.portable:gated_norm"
    right = dispatch._load(target)
    _break(monkeypatch, target, lambda x, z, weight, **more: right(x, z.detach() + 0 * z, weight, **more))
    assert selfcheck.check("gated_norm", "portable", CPU) > 0.1


def test_what_a_backend_raises_is_named(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no kernel image\nis available")

    _break(monkeypatch, "plait.ops.ssd.portable:ssd", fails)
    ran = plait("doctor")
    assert ran.status == 1
    assert "wrong: portable ssd on cpu: RuntimeError: no kernel image is available" in ran.out


def test_a_backend_that_refuses_is_not_wrong_but_says_why(
    plait: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any, **more: Any) -> Any:
        raise BackendError("ssd: backend 'portable' cannot run: it is Sunday")

    _break(monkeypatch, "plait.ops.ssd.portable:ssd", refuses)
    ran = plait("doctor")
    assert "portable: ssd: backend 'portable' cannot run: it is Sunday" in ran.out
    assert "wrong: portable ssd" not in ran.out


def test_not_a_number_is_wrong() -> None:
    one = torch.ones(3)
    assert selfcheck.relative_rms(one * math.nan, one) == math.inf
    assert selfcheck.relative_rms(one[:2], one) == math.inf
    assert selfcheck.relative_rms(one * 1.5, one) == pytest.approx(0.5)
