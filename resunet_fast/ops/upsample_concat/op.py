"""upsample_concat: the decoder's input, written into a given buffer; not differentiable."""

from __future__ import annotations

from torch import Tensor

from ...registry import Implementation, Operator
from ..backends import cpu_refusals
from . import cpu, reference


def _fake(input: Tensor, skip: Tensor, output: Tensor, mode: str) -> None:
    return None


UPSAMPLE_CONCAT = Operator(
    "upsample_concat",
    "(Tensor input, Tensor skip, Tensor(a!) output, str upsample='bilinear', str backend='') -> ()",
    fake=_fake,
)
UPSAMPLE_CONCAT.add(
    Implementation("cpu", cpu.forward, cpu_refusals),
    Implementation("reference", reference.forward),
)
