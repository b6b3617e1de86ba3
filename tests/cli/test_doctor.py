"""`plait doctor` must find a backend that computes wrong, and must look at everything an op is given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plait.api import build
from plait.cli import selfcheck
from plait.cli.cases import CASES, Case
from plait.cli.warm import one_of_each
from plait.config.errors import BackendError
from plait.config.schema import ModelConfig
from plait.ops import dispatch, numba_run, verdicts
from plait.ops.causal_conv1d import CAUSAL_CONV1D, causal_conv1d
from tests.cli.conftest import Run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_verdicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What these tests break stays theirs."""
    monkeypatch.setenv("PLAIT_CACHE", str(tmp_path))
    verdicts._held.cache_clear()
    yield
    verdicts._held.cache_clear()


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
        other = replace(case, inputs={**case.inputs, name: given * _nearly_one(given)})
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


CONV = "plait.ops.causal_conv1d.cpu:causal_conv1d"


def _conv(backend: str | None = None) -> torch.Tensor:
    return causal_conv1d(torch.ones(1, 3, 2), torch.ones(2, 2), backend=backend)[0]


def test_what_is_wrong_is_not_used_any_more_until_it_is_right(
    plait: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dispatch.choose_name(CAUSAL_CONV1D, None, "cpu") == "cpu"
    right = dispatch._load(CONV)
    with monkeypatch.context() as patch:
        _break(patch, CONV, lambda x, weight, *args, **more: right(x, 2 * weight, *args, **more))
        assert plait("doctor").status == 1
    # that it is refused is remembered, by this process and by later ones
    for _ in range(2):
        with pytest.raises(BackendError, match=r"'cpu' cannot run: plait doctor found it wrong .*error"):
            _conv("cpu")
        assert dispatch.choose_name(CAUSAL_CONV1D, None, "cpu") == "portable"
        assert _conv().tolist() == [[[1, 1], [2, 2], [2, 2]]]
        verdicts._held.cache_clear()
    assert plait("doctor").status == 0
    assert dispatch.choose_name(CAUSAL_CONV1D, None, "cpu") == "cpu"
    assert _conv("cpu").tolist() == [[[1, 1], [2, 2], [2, 2]]]


def test_a_verdict_holds_for_the_machine_it_was_found_on() -> None:
    verdicts.record({("ssd", "cpu", "cpu"): "error 1", ("ssd", "portable", "mps"): "error 2"})
    assert "error 1" in verdicts.against("ssd", "cpu", "cpu")
    assert verdicts.against("ssd", "portable", "cpu") == ""
    assert verdicts.against("selective_scan", "cpu", "cpu") == ""
    path = verdicts.verdicts_file()
    rows = json.loads(path.read_text())
    rows[0]["on"]["numba"] = "0.1"
    path.write_text(json.dumps(rows))
    verdicts._held.cache_clear()
    assert verdicts.against("ssd", "cpu", "cpu") == ""


def test_a_damaged_file_of_verdicts_is_said_and_not_heeded(caplog: pytest.LogCaptureFixture) -> None:
    verdicts.verdicts_file().write_text("[{")
    assert verdicts.against("ssd", "cpu", "cpu") == ""
    assert "is damaged" in caplog.text


def test_warming_compiles_each_layer_once() -> None:
    model = ModelConfig(d_model=64, pattern=["M2*3", {"mixer": "M2", "d_state": 32}, "T", "M2"], n_layer=None)
    layers = one_of_each(model).layers()
    assert [(layer.kind, getattr(layer.options, "d_state", None)) for layer in layers] == [
        ("mamba2", 128), ("mamba2", 32), ("attention", None),
    ]  # fmt: skip


def test_after_warming_nothing_is_left_to_compile(plait: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    said = plait("doctor", "--warm", "--config=hybrid")
    assert said.status == 0
    assert said.out.count(": ready after ") == 2 * (1 + torch.cuda.is_available())

    def refuse(kernel: Any, args: Any) -> None:
        raise AssertionError(f"{kernel} was not compiled for {args}")

    monkeypatch.setattr(numba_run, "_compile", refuse)
    model = build("hybrid", d_model=192, pattern="M2 T")
    ids = torch.randint(0, 50, (1, 90))
    model(ids, labels=ids, cu_seqlens=torch.tensor([0, 40, 90])).loss.backward()
    model.generate(ids, max_new_tokens=3)


def test_a_config_without_warming_makes_no_sense(plait: Run) -> None:
    assert "--warm" in plait("doctor", "--config=hybrid").error
