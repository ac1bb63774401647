"""All operators, by name."""

from __future__ import annotations

from tbcm_kernels import (
    attention,
    consistency_loss,
    cross_attention,
    gated_residual,
    glu_depthwise,
    linear_attention,
    norm_modulate,
    tangent,
    trigflow_step,
)
from tbcm_kernels.catalog import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        trigflow_step.OPERATOR,
        tangent.OPERATOR,
        consistency_loss.OPERATOR,
        norm_modulate.OPERATOR,
        gated_residual.OPERATOR,
        gated_residual.NORM_OPERATOR,
        glu_depthwise.OPERATOR,
        linear_attention.OPERATOR,
        cross_attention.OPERATOR,
        attention.OPERATOR,
    )
}
