"""Many processes: only under torchrun, which sets RANK and WORLD_SIZE. One process starts no group.

Every process runs the same loop on its own rows. ``World`` holds the few things they must agree on: sums,
errors, who writes. Gradients are averaged by torch's own engines (DDP or FSDP2), so the loss is scaled by
the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from plait.config.errors import PlaitError, TrainingError
from plait.config.training import TrainingConfig

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among ``size``; rank 0 alone writes and prints."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each number summed over all processes (float64, so counts are exact to 2^53)."""
        if self.size == 1:
            return list(values)
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        tensor = torch.tensor(values, dtype=wide, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            self.sums([0.0])

    def share(self, value: T) -> T:
        """What rank 0 passed, on every process."""
        if self.size == 1:
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise on every process if any of them has an error: their own, or the first other's words."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        texts: list[str | None] = [None] * self.size
        dist.all_gather_object(texts, None if error is None else str(error))
        if error is not None:
            raise error
        first = next((text for text in texts if text is not None), None)
        if first is not None:
            raise TrainingError(first)

    def first_makes(self, make: Callable[[], T]) -> T:
        """Call ``make`` on rank 0, then on the others, which find done what it has written."""
        if self.size == 1:
            return make()
        result: list[T] = []
        error: PlaitError | None = None
        if self.first:
            try:
                result.append(make())
            except PlaitError as caught:
                error = caught
        self.agree(error)
        return result[0] if result else make()


@contextmanager
def session(config: TrainingConfig) -> Iterator[World]:
    """The world of a run; a process group for its length if torchrun started several processes."""
    size = _environment("WORLD_SIZE", 1)
    if size == 1:
        yield World(0, 1, choose_device(config.device))
        return
    rank = _environment("RANK")
    device = choose_device(config.device, _environment("LOCAL_RANK", rank))
    if device.type == "mps":
        raise TrainingError("several processes need CPUs or CUDA GPUs; set --training.device=cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", rank=rank, world_size=size, device_id=device if on_gpu else None
    )
    try:
        yield World(rank, size, device)
    finally:
        dist.destroy_process_group()


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device a config names; auto: this process's CUDA GPU, else MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainingError(
            f"training.device: {name!r} is no device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("training.device is cuda, but torch finds no CUDA GPU here; use auto or cpu")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise TrainingError(
                f"training.device: there is no {device}; this machine has {torch.cuda.device_count()}"
            )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise TrainingError("training.device is mps, but torch finds no MPS here; use auto or cpu")
    return device


def spread(model: nn.Module, blocks: Sequence[nn.Module], parallel: str, world: World) -> nn.Module:
    """Move the model to the device and spread it over the processes; call what is returned for the forward.

    shard: FSDP2, each block and then the rest its own unit, in place; parameters and reductions stay
    float32 while autocast narrows the products. replicate: DDP around it.
    """
    if world.size == 1:
        return model.to(world.device)
    if parallel == "shard":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        scalars = [name for name, parameter in model.named_parameters() if parameter.dim() == 0]
        if scalars:
            raise TrainingError(
                f"{scalars[0]} is a scalar, which FSDP2 cannot shard; use --training.parallel=replicate"
            )
        mesh = init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    model.to(world.device)
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def exchange(forward: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: replicas exchange gradients with the last one of a step alone.

    Sharded models do so with each: whole gradients kept until the last would undo the sharding.
    """
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    return nullcontext()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every process holds a sharded model's whole parameters (no others: nothing changes).

    It keeps them through forwards too, so each process may run the model as often as it likes.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:  # as torch has it by default: after forward, all but the outermost
            unit.set_reshard_after_forward(unit is not units[0], recurse=False)
            unit.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole value (all processes must ask); others as they are."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _environment(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        if default is None:
            raise TrainingError(f"WORLD_SIZE is set but {name} is not; start several processes with torchrun")
        return default
    return int(text)
