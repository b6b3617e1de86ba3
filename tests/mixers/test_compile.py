"""torch.compile sees a mixer whole, from the first call on, and does not begin again for every packing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from plait.mixers.contract import Layout
from plait.ops import dispatch
from tests.invariants import BESIDES, TOLERANCE, VARIANTS, close, lay, make_mixer, sequences

LENGTH = 48


NAMES = ["attention", "attention of nanochat", "mamba", "mamba2", "mamba3", "s4d", "smear"]


@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_is_one_graph_for_many_packings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        dispatch, "_loaded", SimpleNamespace()
    )  # as in a new process: ops load while it traces
    torch._dynamo.reset()
    mixer = make_mixer(*{**VARIANTS, **BESIDES}[name], dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    traced = torch.compile(mixer, backend=counter, fullgraph=True)
    (x,) = sequences(mixer, [LENGTH])
    with dispatch.use_backend("portable"):
        for seed in range(20):
            g = torch.Generator().manual_seed(seed)
            cuts = torch.randint(0, LENGTH + 1, (7,), generator=g).sort().values
            bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([LENGTH])])
            layout = lay(Layout.packed(bounds, LENGTH, LENGTH), x)
            gradients = []
            for run in (traced, mixer):
                y, _ = run(x, layout)
                gradients.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
            for ours, true in zip(*gradients, strict=True):
                close(ours, true, 10 * TOLERANCE[torch.float32], f"{name}, packing {seed}")
    assert counter.frame_count <= 3
