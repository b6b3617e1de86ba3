"""On a GPU: Muon's stacked matrices make the step that they make one at a time on a CPU, and a run resumes with it.

Run with ``pytest -m gpu tests/gpu``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from plait.config.optimizer import MuonConfig
from plait.training import train
from plait.training.muon import Muon
from tests.training import runs
from tests.training.test_muon import ALL

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SHAPES = [(64, 32), (32, 64), (64, 32), (48, 48), (64, 32)]


def test_a_stacked_step_is_that_of_single_matrices_on_a_cpu() -> None:
    config = MuonConfig.model_validate(ALL)
    on_cpu = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    on_gpu = [nn.Parameter(p.detach().cuda()) for p in on_cpu]
    group = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [Muon([{"params": p, **group}], config, {p[3]: (16, 32)}) for p in (on_cpu, on_gpu)]
    for _ in range(3):
        for a, b in zip(on_cpu, on_gpu, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(on_cpu, on_gpu, strict=True):
        torch.testing.assert_close(a.detach(), b.detach().cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_by_muon_resumes(tmp_path: Path, precision: str) -> None:
    muon = {**ALL, "parts": True, "precision": "bf16"}
    stages = [{"length": 8, "until": 0.5}]
    options = {"device": "cuda", "precision": precision, "optimizer": "muon", "muon": muon}
    options |= {"sequence_length_schedule": stages, "checkpoint_schedule": [0, 3], "tf32": True}
    whole = runs.run(tmp_path, **options)
    config = runs.tiny(tmp_path, **options, out=str(tmp_path / "again"))
    rest = train(config, resume=whole.run / "checkpoints" / "step-00000003", quiet=True)
    assert rest.step == whole.step == 8
    expected = runs.losses(whole.run)
    assert runs.losses(rest.run) == pytest.approx({k: v for k, v in expected.items() if k > 3}, rel=1e-2)
