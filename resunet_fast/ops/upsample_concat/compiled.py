"""upsample_concat by the compiled libraries, CPU or CUDA: both halves written in one sweep."""

from __future__ import annotations

from torch import Tensor

from ... import native
from ..layout import dense, layout_of
from ..upsample.reference import MODES


def forward(input: Tensor, skip: Tensor, output: Tensor, mode: str) -> None:
    """Compute as the reference does; `output` is dense."""
    layout = layout_of(output)
    source, behind = dense(input, layout), dense(skip, layout)
    native.ops().upsample_forward(source, behind, MODES.index(mode), output)
