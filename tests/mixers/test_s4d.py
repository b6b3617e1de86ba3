"""S4D: the recurrence is the convolution with its kernel, and begins as the paper says."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plait.mixers.contract import Layout
from plait.mixers.s4d import S4D, Options, _expm1
from plait.nn.roles import parameter_roles
from tests.invariants import close, make_mixer, sequences

PLAIN = {"activation": "none", "gate": False, "bias": False, "d_state": 5}


def kernel(mixer: S4D, length: int) -> Tensor:
    """K (E, T) by zero-order hold, arXiv 2206.11893, equation 9; all of it in complex128."""
    dt = mixer.log_dt.exp()[:, None].to(torch.complex128)
    A = -mixer.A_log.exp().to(torch.complex128)
    B, C = mixer.B, mixer.C
    if mixer.A_imag is not None:
        A = A + 1j * mixer.A_imag
        B, C = B[..., 0] + 1j * B[..., 1], C[..., 0] + 1j * C[..., 1]
    decay = torch.exp(dt * A)
    powers = decay[..., None] ** torch.arange(length)
    K = (C * (decay - 1) / A * B)[..., None] * powers
    return K.sum(1).real * (2 if mixer.A_imag is not None else 1)


@pytest.mark.parametrize("modes", ["complex", "real"])
@torch.no_grad()
def test_the_recurrence_is_a_convolution(modes: str) -> None:
    length = 150
    mixer = make_mixer("s4d", PLAIN | {"modes": modes})
    mixer.out_proj.weight.copy_(torch.eye(16))
    (x,) = sequences(mixer, [length])
    K = kernel(mixer, length)
    want = F.conv1d(F.pad(x.transpose(1, 2), (length - 1, 0)), K.flip(1)[:, None], groups=16).transpose(1, 2)
    close(mixer(x, Layout.dense(1, length))[0], want + mixer.D * x, 1e-11, "convolution")
    assert K[:, 100:].abs().max() > 0.01 * K.abs().max()  # it remembers


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "silu", "none"])
@torch.no_grad()
def test_activation_and_gate(activation: str, gate: bool) -> None:
    mixer = make_mixer("s4d", {"d_state": 4, "activation": activation, "gate": gate})
    bare = make_mixer("s4d", PLAIN | {"d_state": 4})
    bare.load_state_dict(mixer.state_dict() | {"out_proj.weight": torch.eye(16)}, strict=False)
    (x,) = sequences(mixer, [9])
    layout = Layout.dense(1, 9)
    y = bare(x, layout)[0]
    y = {"gelu": F.gelu, "silu": F.silu, "none": lambda t: t}[activation](y)
    y = mixer.out_proj(y)
    want = y[..., :16] * torch.sigmoid(y[..., 16:]) if gate else y
    close(mixer(x, layout)[0], want, 1e-12, "output")


def test_initial_modes() -> None:
    lin = S4D(Options(d_state=4), 3)
    assert torch.allclose(lin.A_log.exp(), torch.full((3, 4), 0.5))
    assert lin.A_imag is not None
    assert torch.allclose(lin.A_imag, math.pi * torch.arange(4.0).expand(3, 4))
    log = S4D(Options(d_state=4, A_init="log"), 3)
    assert log.A_imag is not None
    assert torch.allclose(log.A_imag, math.pi * 4.0 ** torch.tensor([0, 1 / 3, 2 / 3, 1]).expand(3, 4))
    real = S4D(Options(d_state=4, modes="real"), 3)
    assert real.A_imag is None
    assert torch.allclose(real.A_log.exp(), torch.arange(1.0, 5.0).expand(3, 4))
    spaced = S4D(Options(d_state=4, modes="real", A_init="log"), 3)
    assert torch.allclose(spaced.A_log.exp(), 4.0 ** torch.tensor([0, 1 / 3, 2 / 3, 1]).expand(3, 4))
    assert S4D(Options(d_state=1, A_init="log"), 3).A_log.isfinite().all()


def test_initial_time_steps_and_weights() -> None:
    torch.manual_seed(0)
    mixer = S4D(Options(dt_min=0.01, dt_max=0.02, d_state=64), 200)
    dt = mixer.log_dt.exp()
    assert 0.00999 < dt.min() < 0.0105 and 0.019 < dt.max() < 0.02001
    assert torch.equal(torch.view_as_complex(mixer.B), torch.ones(200, 64, dtype=torch.complex64))
    assert abs(mixer.C.square().sum(-1).mean() - 1) < 0.05
    assert all(role.fp32 for name, role in parameter_roles(mixer).items() if "proj" not in name)


def test_small_steps_keep_their_digits() -> None:
    """exp(dt A) - 1 in float32 for dt A near 1e-7 would have no correct digit."""
    a, b = -torch.logspace(-9, 0, 40), torch.logspace(-8, 1, 40)
    exact = torch.exp(torch.complex(a.double(), b.double())) - 1
    got = _expm1(a, b)
    assert ((got - exact).abs() / exact.abs()).max() < 1e-6


@torch.no_grad()
def test_any_weights_are_stable() -> None:
    """The real part of A is negative whatever is learned, so states never grow by themselves."""
    mixer = make_mixer("s4d", PLAIN)
    mixer.A_log.copy_(10 * torch.randn(mixer.A_log.shape, generator=torch.Generator().manual_seed(0)))
    state = mixer.init_state(1, dtype=torch.float64)
    state["ssm"].fill_(1.0)
    x = torch.zeros(1, 200, 16, dtype=torch.float64)
    _, after = mixer(x, Layout.dense(1, 200), state)
    assert after is not None
    assert (after["ssm"].square().sum(-1) <= state["ssm"].square().sum(-1)).all()
    assert after["ssm"].abs().max() > 0.5  # and slow modes remain
