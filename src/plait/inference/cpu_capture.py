"""Recording a decoding step on a CPU: the kernels' calls and torch's operations, to be run again without Python's.

As with CUDA graphs, what is recorded is a list of operations on fixed memory: nothing that a step decides from numbers
in tensors can be recorded. While recording, kernels and operations that change a tensor are only noted, so the states
stay as they are; operations that make new tensors run, to find out which. Calls of kernels that follow each other
become one call, and what depends on nothing is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from plait.ops.numba_team import Kernel, Program, recording

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operations that only find memory, which the recording keeps."""
_SHAPES = {"full_like", "ones_like", "zeros_like", "new_full", "new_ones", "new_zeros"}
"""Operations that see of a tensor nothing but its shape."""
_DEPENDS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class CpuCapture:
    """Records what a function does on a CPU."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], object]:
        """The recorded function; RuntimeError if it does what cannot be recorded, such as reading a number."""
        tape = Tape()
        with tape, recording(tape.note):
            function()
        return tape.finish()


class _Operation(NamedTuple):
    """What to run again; if it depends on nothing, the memory of its result."""

    run: Callable[[], object]
    constant: frozenset[int] | None


class _Replay(NamedTuple):
    """What a tape holds, and the tensors whose addresses its kernels have: these live as long as it does."""

    items: tuple[Callable[[], object], ...]
    kept: list[Sequence[Tensor | None]]

    @torch.no_grad()
    def run(self) -> None:
        """All of it, in order."""
        for item in self.items:
            item()


class Tape(TorchDispatchMode):
    """What happens inside, in order: a kernel's call as `Program` takes it, or an operation."""

    def __init__(self) -> None:
        super().__init__()
        self._events: list[tuple[int, ...] | _Operation] = []
        self._kept: list[Sequence[Tensor | None]] = []
        self._changed: set[int] = set()

    def note(self, kernel: Kernel, entry: tuple[int, ...], keep: Sequence[Tensor | None]) -> None:
        """A call of a kernel, which may change any of its tensors."""
        self._events.append(entry)
        self._kept.append(keep)
        self._changed |= _memory(keep)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _DEPENDS):
            raise RuntimeError(f"{func.name()} decides from numbers in a tensor, which cannot be recorded")
        name = func.name().partition("::")[2].partition(".")[0]
        if func.is_view or name in _EMPTY or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        # as they are seen now: the tensors themselves may be turned later
        given, named = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        if func._schema.is_mutable:
            changed = _changed_by(func, args, kwargs)
            self._changed |= _memory(changed)
            self._events.append(_Operation(lambda: func(*given, **named), None))
            return changed[0] if len(changed) == 1 else changed
        made = func(*args, **kwargs)
        into = [t.detach() for t in tree_leaves(made) if isinstance(t, Tensor)]

        def again() -> None:
            sources = (t for t in tree_leaves(func(*given, **named)) if isinstance(t, Tensor))
            for target, source in zip(into, sources, strict=True):
                target.copy_(source)

        alone = name in _SHAPES or not any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs)))
        self._events.append(_Operation(again, _memory(into) if alone else None))
        return made

    def finish(self) -> Callable[[], object]:
        """All of it, again."""
        return _Replay(tuple(self._items()), self._kept).run

    def _items(self) -> Iterator[Callable[[], object]]:
        calls: list[tuple[int, ...]] = []
        for event in self._events:
            if not isinstance(event, _Operation):
                calls.append(event)
            elif event.constant is None or event.constant & self._changed:
                if calls:
                    yield Program(calls)
                    calls = []
                yield event.run
        if calls:
            yield Program(calls)


def _changed_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that an operation changes and returns."""
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if all(a.is_out for a in written):
        return tuple(kwargs[a.name] for a in written)
    if len(written) > 1 or written[0] != func._schema.arguments[0] or len(func._schema.returns) != 1:
        raise RuntimeError(f"{func.name()} changes tensors in a way that is not recorded")
    return (args[0],)


def _memory(tensors: Sequence[object]) -> frozenset[int]:
    return frozenset(t.untyped_storage().data_ptr() for t in tensors if isinstance(t, Tensor))
