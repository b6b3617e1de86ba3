"""Floor 1: sequence operators as functions on tensors, one folder an op, several backends an op.

Every op's folder holds the public function (`__init__.py`), the plain recurrence (`reference.py`) and a chunked
form in plain torch (`portable.py`). `OPERATORS` names the table of each op for `plait doctor`; nothing is
imported here, so that a light import stays light.
"""

from __future__ import annotations

OPERATORS: tuple[str, ...] = (
    "plait.ops.add_norm:ADD_NORM",
    "plait.ops.attention:ATTENTION",
    "plait.ops.attention:CACHED_ATTENTION",
    "plait.ops.causal_conv1d:CAUSAL_CONV1D",
    "plait.ops.causal_conv1d_update:CAUSAL_CONV1D_UPDATE",
    "plait.ops.convolved_linear:CONVOLVED_LINEAR",
    "plait.ops.cumulative_angle:CUMULATIVE_ANGLE",
    "plait.ops.diagonal_ssm:DIAGONAL_SSM",
    "plait.ops.gated_norm:GATED_NORM",
    "plait.ops.norm_linear:NORM_LINEAR",
    "plait.ops.selective_scan:SELECTIVE_SCAN",
    "plait.ops.selective_state_update:SELECTIVE_STATE_UPDATE",
    "plait.ops.ssd:SSD",
    "plait.ops.ssd:TRAPEZOIDAL_SSD",
    "plait.ops.ssd_update:SSD_UPDATE",
    "plait.ops.ternary:INT8_ROWS",
    "plait.ops.ternary:TERNARY_WEIGHT",
)
