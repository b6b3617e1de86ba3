"""How kernels are launched again, and the sum of programs' parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops import triton_launch
from plait.ops.triton_launch import Launch
from plait.ops.triton_sums import sum_parts
from tests.ops.helpers import assert_close
from tests.ops.interpreter import needs_interpreter, normal

pytestmark = needs_interpreter


class Kernel:
    """Stands for a Triton kernel: notes whether it was launched by Triton's own way or in its compiled form."""

    arg_names = ("x_p", "y_p", "length", "WIDTH", "BIAS")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.calls.append(("looked at", grid, args, constants))
            return {grid: lambda *args: self.calls.append(("compiled", grid, args))}

        return launch


def test_a_second_launch_takes_the_compiled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRET", SimpleNamespace(value=False))
    monkeypatch.setattr(triton_launch, "on_device", lambda x: torch.no_grad())
    kernel, x, grid = Kernel(), torch.zeros(64), (3, 1, 1)
    launch = Launch(kernel, 3, (7,), BIAS=True, WIDTH=4, num_warps=1, maxnreg=None)
    looked = ("looked at", grid, (x, x, 7), {"BIAS": True, "WIDTH": 4, "num_warps": 1})
    launch(x[1:], x)  # not aligned: what is compiled for it does not fit the others
    launch(x, x)
    launch(x, x)
    launch(x[1:], x)
    launch(x, x)
    names = [call[0] for call in kernel.calls]
    assert names == ["looked at", "looked at", "compiled", "looked at", "compiled"]
    for call, want in ((kernel.calls[1], looked), (kernel.calls[2], ("compiled", grid, (x, x, 7, 4, True)))):
        assert call[:2] == want[:2] and call[3:] == want[3:]
        assert all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(call[2], want[2], strict=True))
    Launch(kernel, 0, ())(x)
    assert len(kernel.calls) == 5


@pytest.mark.parametrize("parts", [1, 33, 70])
@pytest.mark.parametrize("vector", [False, True])
def test_sum_of_parts(parts: int, vector: bool) -> None:
    width, channels = 3, 30
    given = normal(parts, 4 * channels)
    matrix, sums = torch.full((channels, width), torch.nan), torch.full((channels,), torch.nan)
    sum_parts(parts, 4 * channels, width, channels, vector=vector)(given, matrix, sums)
    true = given.double().sum(0).view(4, channels)
    assert_close(matrix, true[:3].t(), 1e-6)
    if vector:
        assert_close(sums, true[3], 1e-6)
    else:
        assert sums.isnan().all()
