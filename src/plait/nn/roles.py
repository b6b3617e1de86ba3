"""The role of every parameter: what the optimizer, sharding and dtype casts need to know about it.

Each parameter has exactly one role. torch's own layers are known here; any other module declares the
roles of the parameters it holds directly in an attribute ``roles: dict[str, Role]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from plait.config.errors import BuildError


@dataclass(frozen=True)
class Role:
    """What a parameter is: ``matrix`` (Muon, weight decay), ``embedding`` or ``vector`` (AdamW, no decay).

    ``fp32`` parameters stay in float32 when a model is cast to a lower precision.
    """

    kind: Literal["matrix", "embedding", "vector"]
    fp32: bool = False


MATRIX = Role("matrix")
EMBEDDING = Role("embedding")
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
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{prefix}.{name}" if prefix else name
            if path not in names or parameter is None:  # tied: it already has a role under its first name
                continue
            role = _role(module, name)
            if role is None:
                raise BuildError(
                    f"parameter {path} of {type(module).__name__} has no role: add {name!r} to its `roles` "
                    "(Role('matrix'), Role('embedding') or Role('vector'), fp32=True to keep it in float32)"
                )
            roles[path] = role
    return roles


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's parameters to ``dtype`` in place, leaving those whose role says float32 in float32."""
    roles = parameter_roles(model)
    widened = dtype in (torch.bfloat16, torch.float16)
    for name, parameter in model.named_parameters():
        keep = widened and roles[name].fp32
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model
