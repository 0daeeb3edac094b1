"""upsample_concat: the decoder's input, written into a given buffer; not differentiable."""

from __future__ import annotations

from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import (
    cpu_refusals,
    cuda_refusals,
    deferred,
    triton_declines,
    triton_refusals,
)
from . import compiled, reference


def _fake(input: Tensor, skip: Tensor, output: Tensor, mode: str) -> None:
    return None


UPSAMPLE_CONCAT = Operator(
    "upsample_concat",
    "(Tensor input, Tensor skip, Tensor(a!) output, str upsample='bilinear', str backend='') -> ()",
    fake=_fake,
)
UPSAMPLE_CONCAT.add(
    Implementation("cuda", compiled.forward, cuda_refusals),
    Implementation(
        "triton",
        deferred("resunet_fast.ops.upsample_concat.triton_kernel", "forward"),
        triton_refusals,
        triton_declines,
    ),
    Implementation("cpu", compiled.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
