"""The role of every parameter: what the optimizer, sharding and dtype casts need to know about it.

Each parameter has exactly one role. torch's own layers are known here; any other module declares the
roles of the parameters it holds directly in an attribute ``roles: dict[str, Role]``, or one role for whatever
inside of it has none, ``unknown_role``. Where several matrices are joined in one, their numbers of rows are
declared too (``declare_parts``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from plait.config.errors import BuildError


@dataclass(frozen=True)
class Role:
    """What a parameter is: ``matrix`` (Muon, weight decay), or one that AdamW takes, without decay.

    Those are an ``embedding``, an ``unembedding`` (an output map that is no embedding's) and any ``vector``.
    ``fp32`` parameters stay in float32 when a model is cast to a lower precision.
    """

    kind: Literal["matrix", "embedding", "unembedding", "vector"]
    fp32: bool = False


MATRIX = Role("matrix")
EMBEDDING = Role("embedding")
UNEMBEDDING = Role("unembedding")
VECTOR = Role("vector")
VECTOR_FP32 = Role("vector", fp32=True)

# One dict for the parameters of a torch layer; recurrent layers name theirs by direction, hence the prefixes.
_TORCH_LAYERS: tuple[tuple[type[nn.Module], dict[str, Role]], ...] = (
    (nn.Linear, {"weight": MATRIX, "bias": VECTOR}),
    (nn.Conv1d, {"weight": VECTOR, "bias": VECTOR}),
    (nn.Embedding, {"weight": EMBEDDING}),
    (nn.RMSNorm, {"weight": VECTOR_FP32}),
    (nn.LayerNorm, {"weight": VECTOR_FP32, "bias": VECTOR_FP32}),
    (nn.RNNBase, {"weight_": MATRIX, "bias_": VECTOR}),
)


def _declared(module: nn.Module) -> Mapping[str, Role]:
    roles = getattr(module, "roles", None)
    return roles if isinstance(roles, Mapping) else {}


def _role(module: nn.Module, name: str) -> Role | None:
    declared = _declared(module)
    if name in declared:
        return declared[name]
    for layer, roles in _TORCH_LAYERS:
        if isinstance(module, layer):
            return next((role for prefix, role in roles.items() if name.startswith(prefix)), None)
    return None


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter of a model, by the name ``named_parameters`` gives it.

    Raises BuildError naming the first parameter that has no role.
    """
    roles: dict[str, Role] = {}
    names = {name for name, _ in model.named_parameters()}
    foreign: dict[nn.Module, Role] = {}  # modules that were not written for this, by the `unknown_role` above
    for prefix, module in model.named_modules():
        unknown = getattr(module, "unknown_role", None)
        if isinstance(unknown, Role):
            foreign.update(dict.fromkeys(module.modules(), unknown))
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if path not in names or parameter is None:  # tied: it already has a role under its first name
                continue
            role = _role(module, name) or foreign.get(module)
            if role is None:
                raise BuildError(
                    f"parameter {path} of {type(module).__name__} has no role: add {name!r} to its `roles` "
                    "(Role('matrix'), Role('embedding') or Role('vector'), fp32=True to keep it in float32)"
                )
            roles[path] = role
    return roles


_PARTS = "_parts"


def declare_parts(module: nn.Module, name: str, sizes: Sequence[int]) -> None:
    """Say that the rows of ``module``'s matrix ``name`` are those of several matrices, ``sizes`` rows each."""
    module.__dict__.setdefault(_PARTS, {})[name] = tuple(sizes)


def matrix_parts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The rows of each matrix that is joined in one parameter, by the parameter's name; not of single ones.

    Besides what is declared: the gates of torch's recurrent layers.
    """
    parts: dict[str, tuple[int, ...]] = {}
    for prefix, module in model.named_modules():
        own: dict[str, tuple[int, ...]] = module.__dict__.get(_PARTS, {})
        if isinstance(module, nn.RNNBase):
            weights = {n: p for n, p in module.named_parameters(recurse=False) if n.startswith("weight_")}
            own = {n: (module.hidden_size,) * (p.shape[0] // module.hidden_size) for n, p in weights.items()}
        for name, sizes in own.items():
            if len(sizes) > 1:
                parts[f"{prefix}.{name}" if prefix else name] = sizes
    return parts


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's parameters to ``dtype`` in place, leaving those whose role says float32 in float32."""
    roles = parameter_roles(model)
    widened = dtype in (torch.bfloat16, torch.float16)
    for name, parameter in model.named_parameters():
        keep = widened and roles[name].fp32
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model
