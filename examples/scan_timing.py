"""The selective scan of Mamba by each backend that this machine has: the same numbers, and how long it takes."""

from time import perf_counter

import torch

from plait.ops.dispatch import table
from plait.ops.selective_scan import selective_scan

CHANNELS, STATES = 128, 16


def inputs(length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "x": normal(1, length, CHANNELS),
        "dt": torch.rand(1, length, CHANNELS, generator=generator) * 0.1,
        "A": -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1),
        "B": normal(1, length, STATES),
        "C": normal(1, length, STATES),
    }


def main() -> None:
    rows = [row for row in table() if row.op == "selective_scan" and row.available and row.backend != "gpu"]
    names = [row.backend for row in rows]
    print("tokens  backend     ms  error")
    for length in (8, 128, 1000):
        given = inputs(length)
        wide = {name: tensor.double() for name, tensor in given.items()}
        true, _ = selective_scan(**wide, backend="reference")
        for name in names:
            selective_scan(**given, backend=name)  # the first call may compile
            begin = perf_counter()
            y, _ = selective_scan(**given, backend=name)
            took = 1000 * (perf_counter() - begin)
            error = ((y - true).square().mean() / true.square().mean()).sqrt().item()
            print(f"{length:6}  {name:<9} {took:5.1f}  {error:.0e}")


if __name__ == "__main__":
    main()
