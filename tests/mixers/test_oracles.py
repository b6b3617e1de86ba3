"""Mamba-1, -2 and -3 against the numbers of state-spaces/mamba: forward, states, eight steps, gradients.

The files under tests/fixtures hold a module's weights under their original names, inputs, outputs and
gradients; the tolerances are those their README files state for float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from plait.config.table import mixer_class
from plait.mixers.contract import Layout, Mixer, State

FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDERS = {"mamba": "mamba1_module", "mamba2": "mamba2_module", "mamba3": "mamba3_module"}
ABSOLUTE = {"mamba": 1e-5, "mamba2": 1e-5, "mamba3": 2e-5}  # of outputs and states
RELATIVE = {"mamba": 1e-4, "mamba2": 1e-4, "mamba3": 2e-4}  # of gradients, to their largest element
# our options for the originals' arguments that are named otherwise
RENAMED = {"rmsnorm": "gate_norm", "is_outproj_norm": "out_norm"}


class Oracle(NamedTuple):
    """One case: our module with its weights, and the numbers it must give."""

    kind: str
    mixer: Mixer
    data: dict[str, Tensor]
    prefill: int
    steps: int


def meta(kind: str) -> dict[str, Any]:
    return json.loads((FIXTURES / FOLDERS[kind] / "meta.json").read_text())["cases"]


CASES = [(kind, case) for kind in FOLDERS for case in meta(kind)]


def read(kind: str, case: str, dtype: torch.dtype = torch.float32, **more: object) -> Oracle:
    about, folder = meta(kind)[case], FIXTURES / FOLDERS[kind]
    given = {RENAMED.get(k, k): v for k, v in about["config"].items()} | more
    d_model = given.pop("d_model")
    cls = mixer_class(kind)
    mixer = cls(cls.options_class(**given), d_model, layer_index=0)
    mixer.load_state_dict(load_file(folder / f"{case}_state_dict.safetensors"))
    data = {name: t.to(dtype) for name, t in load_file(folder / f"{case}.safetensors").items()}
    return Oracle(kind, mixer.to(dtype), data, about["prefill_len"], about["decode_steps"])


def within(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = float((got.detach() - want).abs().max())
    assert error <= tolerance, f"{what}: off by {error:.2e}, more than {tolerance:.0e}"


def check_states(oracle: Oracle, state: State, when: str) -> None:
    """Ours keep W-1 inputs of the convolution, time before channels; theirs W. Angles count modulo 2 pi."""
    tolerance = ABSOLUTE[oracle.kind]
    for name, ours in state.items():
        theirs = oracle.data.get(f"{when}_{name}_state", oracle.data.get(f"{when}_{name}"))
        assert theirs is not None
        if name == "conv":
            theirs = theirs[:, :, 1:].transpose(1, 2)
        if name == "angle":
            assert ours.min() >= 0 and ours.max() < 2 * torch.pi
            within(ours.cos(), theirs.cos(), tolerance, f"{when} cos angle")
            within(ours.sin(), theirs.sin(), tolerance, f"{when} sin angle")
        else:
            within(ours, theirs, tolerance, f"{when} {name}")


oracles = pytest.mark.parametrize(("kind", "case"), CASES)
backends = pytest.mark.parametrize("backend", ["portable", "reference"])


@oracles
@backends
def test_forward_and_gradients(kind: str, case: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLAIT_BACKEND", backend)
    oracle = read(kind, case)
    u = oracle.data["u"].requires_grad_()
    y, state = oracle.mixer(u, Layout.dense(u.shape[0], u.shape[1]))
    assert state is None
    within(y, oracle.data["out"], ABSOLUTE[kind], "out")
    (y * oracle.data["w_out"]).sum().backward()
    gradients = {name: p.grad for name, p in oracle.mixer.named_parameters()} | {"u": u.grad}
    assert {f"grad.{name}" for name in gradients} == {n for n in oracle.data if n.startswith("grad.")}
    for name, gradient in gradients.items():
        want = oracle.data[f"grad.{name}"]
        assert gradient is not None
        within(gradient, want, RELATIVE[kind] * float(want.abs().max()), f"gradient of {name}")


@oracles
def test_prefill_then_eight_steps(kind: str, case: str) -> None:
    oracle = read(kind, case)
    u = oracle.data["u"]
    n_seq, length = u.shape[:2]
    state = oracle.mixer.init_state(n_seq, length, dtype=u.dtype)
    first = oracle.mixer.step(u[:, : oracle.prefill], Layout.dense(n_seq, oracle.prefill), state)
    within(first, oracle.data["out"][:, : oracle.prefill], ABSOLUTE[kind], "prefill")
    check_states(oracle, state, "prefill")
    outputs = []
    for t in range(oracle.prefill, oracle.prefill + oracle.steps):
        layout = Layout.dense(n_seq, 1, start=torch.full((n_seq,), t), max_past=t)
        outputs.append(oracle.mixer.step(u[:, t : t + 1], layout, state))
    within(torch.cat(outputs, 1), oracle.data["step_out"], ABSOLUTE[kind], "steps")
    check_states(oracle, state, "final")


@oracles
def test_forward_gives_the_states_that_step_gives(kind: str, case: str) -> None:
    oracle = read(kind, case)
    u = oracle.data["u"]
    n_seq, length = u.shape[:2]
    given = oracle.mixer.init_state(n_seq, length, dtype=u.dtype)
    _, middle = oracle.mixer(u[:, : oracle.prefill], Layout.dense(n_seq, oracle.prefill), given)
    check_states(oracle, middle, "prefill")
    rest = Layout.dense(n_seq, length - oracle.prefill, start=torch.full((n_seq,), oracle.prefill))
    y, final = oracle.mixer(u[:, oracle.prefill :], rest, middle)
    within(y, oracle.data["out"][:, oracle.prefill :], ABSOLUTE[kind], "out from a state")
    check_states(oracle, final, "final")


@pytest.mark.parametrize("case", meta("mamba3"))
def test_the_activation_of_the_decay_is_an_option(case: str) -> None:
    """Two releases of the original read the same parameters in two ways, and their files do not say which."""
    softplus = read("mamba3", case, a_activation="softplus")
    u = softplus.data["u"]
    layout = Layout.dense(u.shape[0], u.shape[1])
    within(softplus.mixer(u, layout)[0], softplus.data["out_a_softplus"], ABSOLUTE["mamba3"], "softplus")
    other = read("mamba3", case, a_activation="heavy_tail").mixer(u, layout)[0]
    assert (other - softplus.data["out_a_softplus"]).abs().max() > 100 * ABSOLUTE["mamba3"]


@oracles
def test_the_numbers_hold_in_float64_and_depend_on_every_parameter(kind: str, case: str) -> None:
    oracle = read(kind, case, torch.float64)
    u, want = oracle.data["u"], oracle.data["out"]
    layout = Layout.dense(u.shape[0], u.shape[1])
    within(oracle.mixer(u, layout)[0], want, 1e-6, "out in float64")
    for name, p in oracle.mixer.named_parameters():
        kept = p.detach().clone()
        with torch.no_grad():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=p.dtype))
            error = float((oracle.mixer(u, layout)[0] - want).abs().max())
            p.copy_(kept)
        assert error > 10 * ABSOLUTE[kind], f"{name} does not matter: it moves the output by {error:.1e}"
