"""How far a result may be from float64, from the dtype's epsilon and the length of the sums.

A result rounded once is off by epsilon / 2 of its size. A sum of n terms in the accumulator's
precision, in blocks, is off by about sqrt(n) * epsilon of the terms' size (random signs); the
factor below covers the largest of the tens of thousands of elements of a case.
"""

from __future__ import annotations

import math

import torch

_ROUNDINGS = 4.0


def tolerance(dtype: torch.dtype, terms: int = 1) -> float:
    """Return the error allowed for values of size 1.

    Args:
        dtype: of the operands and the result; sums are in float32, or float64 for float64.
        terms: length of the longest sum behind one element.
    """
    stored = torch.finfo(dtype).eps
    accumulated = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return _ROUNDINGS * (stored + accumulated * math.sqrt(terms))
