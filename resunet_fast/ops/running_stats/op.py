"""update_running_stats: the one operator that mutates; not differentiable, safe in a CUDA graph."""

from __future__ import annotations

from typing import Any

from ...registry import Implementation, Operator
from ..backends import (
    cpu_refusals,
    cuda_refusals,
    deferred,
    triton_declines,
    triton_refusals,
)
from . import compiled, reference


def _fake(*_: Any) -> None:
    return None


UPDATE_RUNNING_STATS = Operator(
    "update_running_stats",
    "(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked,"
    " Tensor mean, Tensor var, Tensor? conv_bias, SymInt count, float? momentum=0.1,"
    " str backend='') -> ()",
    fake=_fake,
)
_TRITON = "resunet_fast.ops.running_stats.triton_kernel"
UPDATE_RUNNING_STATS.add(
    Implementation("cuda", compiled.update, cuda_refusals),
    Implementation("triton", deferred(_TRITON, "update"), triton_refusals, triton_declines),
    Implementation("cpu", compiled.update, cpu_refusals),
    Implementation("reference", reference.update),
)
