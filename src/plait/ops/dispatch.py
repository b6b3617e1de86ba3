"""Choose the backend of an op, and say why.

The order of choice is: the op's `backend` argument, `with use_backend(name)`, the environment variable
PLAIT_BACKEND, automatic. A backend that was asked for by name and cannot run raises `BackendError` with the
reason; the automatic choice takes the next one and logs that once. An op declares an `Op`: its name and a table
from backend to "module:function", naming only the backends that exist. Modules are loaded when first chosen.

`choose` is traced by torch.compile: the functions marked as constant below run while tracing, and the chosen
function is then traced itself. `use_backend` is guarded (a compiled function follows it); PLAIT_BACKEND is read
once per compilation.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from plait.config.errors import BackendError, nearest
from plait.ops import verdicts

BACKENDS: tuple[str, ...] = ("gpu", "cpu", "portable", "reference")
AUTO = "auto"
_PACKAGE = {"gpu": "triton", "cpu": "numba"}
_DEVICE = {"gpu": "cuda", "cpu": "cpu"}
# Ampere: the first with bfloat16 products and asynchronous copies
_CAPABILITY = (8, 0)
_log = logging.getLogger("plait.ops")


@dataclass(frozen=True)
class Op:
    """An op's name and its table from backend to "module:function" (only backends that exist)."""

    name: str
    targets: Mapping[str, str]
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    """of the backends that cannot compute in any: the dtypes of the main input that they take"""
    largest: Mapping[str, int] = field(default_factory=dict)
    """of the backends whose kernels hold a state at once: the largest size of it that they take"""


class Row(NamedTuple):
    """One line of `table()`: can this backend of this op run on this machine, and if not, why."""

    op: str
    backend: str
    available: bool
    reason: str


class _Chosen:
    """The name set by `use_backend`; a plain object, because torch.compile guards its attribute.

    It belongs to the process, not to a thread.
    """

    name: str | None = None


_chosen = _Chosen()
# The loaded functions; no dict: dynamo would not see what is added to one while it traces.
_loaded = SimpleNamespace()
_said: set[tuple[str, str]] = set()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every op uses backend `name` ("auto" undoes an outer choice).

    Raises BackendError for an unknown name. Holds for the whole process, so do not change it from two threads.
    """
    _check_name(name)
    before, _chosen.name = _chosen.name, name
    try:
        yield
    finally:
        _chosen.name = before


def choose(
    op: Op,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
    size: int | None = None,
) -> Callable[..., Any]:
    """Return the function that computes `op` for tensors on `device`.

    `backend` is the op's argument: a name in BACKENDS, "auto", or None to follow use_backend, PLAIT_BACKEND, auto.
    `dtype` is that of the main input and `size` that of the state, for ops with backends that do not take all. Raises
    BackendError when a backend asked for by name is unknown or cannot run here.
    """
    return _load(op.targets[choose_name(op, backend, device.type, dtype, size)])


def choose_name(
    op: Op,
    backend: str | None,
    device_type: str,
    dtype: torch.dtype | None = None,
    size: int | None = None,
) -> str:
    """The name of the backend that `choose` takes; same arguments and errors."""
    name = backend or _chosen.name or _environment() or AUTO
    _check_name(name)
    if name != AUTO:
        reason = _why_not(op, name, device_type, dtype, size)
        if reason:
            raise BackendError(f"{op.name}: backend {name!r} cannot run: {reason}")
        return name
    for candidate in BACKENDS:
        if candidate not in op.targets or _DEVICE.get(candidate, device_type) != device_type:
            continue
        reason = _why_not(op, candidate, device_type, dtype, size)
        if not reason:
            return candidate
        _say_once(op.name, candidate, reason)
    raise BackendError(f"{op.name}: no backend can run on device {device_type!r}; it has {_names(op)}")


def table() -> list[Row]:
    """Every op's backends on this machine, for `plait doctor`."""
    from plait.ops import OPERATORS

    rows = []
    for path in OPERATORS:
        op = _load(path)
        assert isinstance(op, Op)
        for backend in BACKENDS:
            reason = _why_not(op, backend, _DEVICE.get(backend, "cpu"))
            rows.append(Row(op.name, backend, not reason, reason))
    return rows


def _why_not(
    op: Op, name: str, device_type: str, dtype: torch.dtype | None = None, size: int | None = None
) -> str:
    if name not in op.targets:
        return f"this op has only {_names(op)}"
    if _DEVICE.get(name, device_type) != device_type and not (name == "gpu" and _interprets(device_type)):
        return f"it needs tensors on {_DEVICE[name]!r}, given {device_type!r}"
    package = _PACKAGE.get(name)
    if package and not _has_package(package):
        return f"the package {package!r} is not installed"
    if name == "gpu" and not _interprets(device_type):
        reason = _why_no_gpu()
        if reason:
            return reason
    wrong = _found_wrong(op.name, name, device_type)
    if wrong:
        return wrong
    if dtype is not None and dtype not in op.dtypes.get(name, (dtype,)):
        return f"it takes {', '.join(map(str, op.dtypes[name]))}, given {dtype}"
    if size is not None and size > op.largest.get(name, size):
        return f"it takes a state size of at most {op.largest[name]}, given {size}"
    return ""


def _names(op: Op) -> str:
    return ", ".join(name for name in BACKENDS if name in op.targets)


def _check_name(name: str) -> None:
    if name != AUTO and name not in BACKENDS:
        raise BackendError(
            f"unknown backend {name!r}; allowed: {', '.join(BACKENDS)}, {AUTO}{nearest(name, (*BACKENDS, AUTO))}"
        )


def _say_once(op: str, backend: str, reason: str) -> None:
    # A log call would break a traced graph; the eager call of the same op has said it or will.
    if torch.compiler.is_compiling() or (op, backend) in _said:
        return
    _said.add((op, backend))
    _log.warning("%s: backend %r cannot run (%s); using the next one", op, backend, reason)


@torch._dynamo.assume_constant_result
def _environment() -> str:
    return os.environ.get("PLAIT_BACKEND", "")


@torch._dynamo.assume_constant_result
def _found_wrong(op: str, backend: str, device_type: str) -> str:
    return verdicts.against(op, backend, device_type)


@torch._dynamo.assume_constant_result
def _has_package(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@torch._dynamo.assume_constant_result
def _interprets(device_type: str) -> bool:
    """Whether Triton runs its kernels on tensors of a CPU: for tests, and only when a call asks for "gpu" by name."""
    return device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch._dynamo.assume_constant_result
def _why_no_gpu() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < _CAPABILITY:
        given = ".".join(map(str, torch.cuda.get_device_capability()))
        return f"the kernels need compute capability {'.'.join(map(str, _CAPABILITY))}, this GPU has {given}"
    return ""


@torch._dynamo.assume_constant_result
def _ensure_loaded(target: str) -> bool:
    if attribute_of(target) not in vars(_loaded):
        module, name = target.split(":")
        setattr(_loaded, attribute_of(target), getattr(importlib.import_module(module), name))
    return True


def attribute_of(target: str) -> str:
    """The name under which a loaded "module:function" is kept."""
    return target.replace(".", "_").replace(":", "__")


def _load(target: str) -> Any:
    _ensure_loaded(target)
    return getattr(_loaded, attribute_of(target))
