"""How kernels are launched again, and the sum of programs' parts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from plait.ops import triton_launch
from plait.ops.triton_launch import Launch, Program
from plait.ops.triton_sums import TOTALS, sum_parts, totals_grid, totals_kernel
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
            return {
                grid: lambda *args, **at: self.calls.append(("compiled", grid, args, *at.values())),
            }

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
    address = x.data_ptr()
    assert same(kernel.calls[1], looked)
    assert kernel.calls[2] == ("compiled", grid, (address, address, 7, 4, True))
    Launch(kernel, 0, ())(x)
    assert len(kernel.calls) == 5


def same(call: tuple[Any, ...], want: tuple[Any, ...]) -> bool:
    """Alike, and with these very tensors."""
    found = all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(call[2], want[2], strict=True))
    return found and call[:2] == want[:2] and call[3:] == want[3:]


def test_a_program_launches_all_with_addresses_and_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "INTERPRET", SimpleNamespace(value=False))
    monkeypatch.setattr(triton_launch, "on_device", lambda x: torch.no_grad())
    streams = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 5))
    monkeypatch.setattr(triton_launch, "driver", streams)
    spaces = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: spaces.append(empty(*a, **k)) or spaces[-1])
    program = Program(("x", "y"))
    program.memory("first", 3, 5)
    program.memory("second", 2, 7, dtype=torch.bfloat16)
    kernels = [Kernel(), Kernel()]
    program.add(kernels[0], (2, 1, 1), ("x", "first"), {"length": 7, "WIDTH": 4, "BIAS": True}, num_warps=1)
    program.add(kernels[1], (0, 1, 1), ("x", "first"), {"length": 7, "WIDTH": 4, "BIAS": True})
    program.add(
        kernels[1], (3, 2, 1), ("second", None), {"length": 8, "WIDTH": 4, "BIAS": False}, maxnreg=None
    )
    x, other = torch.zeros(64), torch.zeros(64)
    program(x, None)  # compiles
    call = kernels[0].calls[0]
    assert call[:2] == ("looked at", (2, 1, 1)) and call[2][0] is x
    assert call[2][1].shape == (3, 5) and call[2][1].dtype == torch.float32
    assert call[3] == {"length": 7, "WIDTH": 4, "BIAS": True, "num_warps": 1}
    call = kernels[1].calls[0]
    second = call[2][0]
    assert second.shape == (2, 7) and second.dtype == torch.bfloat16 and call[2][1] is second
    assert call[3] == {"length": 8, "WIDTH": 4, "BIAS": False}
    assert kernels[0].calls[0][2][1].data_ptr() + 256 == second.data_ptr()  # they do not overlap
    program(other, None)
    base = spaces[-1].data_ptr()
    assert kernels[0].calls[1:] == [("compiled", (2, 1, 1), (other.data_ptr(), base, 7, 4, True), 5)]
    assert kernels[1].calls[1:] == [("compiled", (3, 2, 1), (base + 256, other.data_ptr(), 8, 4, False), 5)]
    program(x[1:], None)  # what is compiled for aligned tensors does not fit it
    program(x[1:], None)
    program(x, None)
    assert [call[0] for call in kernels[0].calls[2:]] == ["looked at", "compiled", "compiled"]


@pytest.mark.parametrize(("parts", "columns"), [(1, 3), (130, 40)])
def test_totals(parts: int, columns: int) -> None:
    """Of three tensors and of one, into what has another dtype; nothing else is written."""
    given = normal(3, parts, columns)
    for count in (1, 2, 3):
        to = [torch.full((columns + 1,), torch.nan, dtype=torch.float64) for _ in range(3)]
        program = Program(("parts", "a", "b", "c"))
        numbers = {"parts": parts, "columns": columns, "SECOND": count > 1, "THIRD": count > 2, **TOTALS}
        program.add(totals_kernel, totals_grid(columns, count), ("parts", "a", "b", "c"), numbers)
        program(given, *to)
        for i, total in enumerate(to):
            if i < count:
                assert_close(total[:columns], given[i].double().sum(0), 1e-6)
            assert total[columns if i < count else 0 :].isnan().all()


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
