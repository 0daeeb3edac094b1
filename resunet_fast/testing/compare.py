"""Comparison with a float64 reference: the worst element by its coordinates, errors in a line."""

from __future__ import annotations

import torch
from torch import Tensor


def worst(actual: Tensor, expected: Tensor) -> tuple[float, tuple[int, ...]]:
    """Return the largest absolute difference and where; a NaN on one side only is infinite."""
    difference = (actual.double() - expected.double()).abs()
    same = (actual.double() == expected.double()) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, 0.0, difference).nan_to_num(nan=torch.inf)
    if difference.numel() == 0:
        return 0.0, ()
    index = int(difference.argmax())
    where = torch.unravel_index(torch.tensor(index), difference.shape)
    return float(difference.flatten()[index]), tuple(int(i) for i in where)


def one_line(error: Exception) -> str:
    """What was raised, by its kind and the first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[0]}"


def assert_close(name: str, actual: Tensor, expected: Tensor, allowed: float) -> float:
    """Fail with the worst element unless |actual - expected| <= allowed * scale.

    Args:
        name: of the quantity, for the message.
        actual: the result.
        expected: the float64 reference.
        allowed: the error for values of size 1; it is scaled by the root mean square of `expected`
            and, element by element, by |expected|.

    Returns:
        The largest error as a share of `allowed`.

    Raises:
        AssertionError: shape, or a value, differs.
    """
    assert actual.shape == expected.shape, (
        f"{name}: expected shape {tuple(expected.shape)}, got {tuple(actual.shape)}"
    )
    reference = expected.double()
    finite = reference[reference.isfinite()]
    rms = float(finite.square().mean().sqrt()) if finite.numel() else 0.0
    scale = reference.abs().nan_to_num(0.0, 0.0, 0.0) + max(rms, 1e-30)
    error, where = worst(actual.double() / scale, reference / scale)
    assert error <= allowed, (
        f"{name}: at {where} got {float(actual[where]):.9g}, expected {float(expected[where]):.9g};"
        f" error {error:.3g} of the scale, allowed {allowed:.3g}"
    )
    return error / allowed if error else 0.0
