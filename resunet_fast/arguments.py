"""What the public operators take: a convolution and a batch norm, and which can be fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .ops.layout import accumulator
from .ops.upsample.reference import MODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Conv(NamedTuple):
    """A convolution's tensors and geometry, as in torch.nn.functional.conv2d.

    Args:
        weight: [K, C / groups, R, S], of a transposed convolution [C, K / groups, R, S], in the
            input's dtype, or float32 with a 16-bit input.
        bias: [K] or None.
        stride, padding, dilation: (vertical, horizontal).
        groups: number of groups.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @staticmethod
    def of(module: nn.Conv2d | nn.ConvTranspose2d) -> Conv:
        """Take them from a module with zero padding given in numbers."""
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        return Conv(module.weight, module.bias, *geometry)  # type: ignore[arg-type]


class Norm(NamedTuple):
    """A batch norm's tensors and settings, as in torch.nn.BatchNorm2d.

    Args:
        weight, bias: [C] or None.
        running_mean, running_var: [C] or None (then batch statistics are always used).
        num_batches_tracked: int64 scalar or None.
        training: normalise with the batch's statistics and update the running ones in place.
        momentum: weight of the new statistics; None for a cumulative average.
        eps: added to the variance.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5

    @staticmethod
    def of(module: nn.BatchNorm2d) -> Norm:
        """Take them from a module, with its present mode."""
        tracked = not module.training or module.track_running_stats
        return Norm(
            module.weight,
            module.bias,
            module.running_mean if tracked else None,
            module.running_var if tracked else None,
            module.num_batches_tracked if module.track_running_stats else None,
            module.training,
            module.momentum,
            module.eps,
        )

    @property
    def batch_stats(self) -> bool:
        """Whether the batch's own statistics normalise it."""
        return self.training or (self.running_mean is None and self.running_var is None)


def fits(input: Tensor | None, norm: Norm | None, pool: bool = False) -> bool:
    """Whether the fused batch norm takes these; torch reports what does not fit."""
    if input is None or norm is None:
        return True
    if input.dim() != 4 or input.numel() == 0:
        return False
    return normalises(input.shape, input.dtype, norm, pool)


def normalises(shape: Sequence[int], dtype: torch.dtype, norm: Norm, pool: bool) -> bool:
    """Whether the fused batch norm takes an image of this shape and dtype with these vectors."""
    n, c, h, w = shape
    if min(h, w) < (2 if pool else 1) or (norm.batch_stats and n * h * w == 1):
        return False
    if dtype not in DTYPES or not _tracks(norm):
        return False
    common: torch.dtype | None = None
    for v in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        if v is None:
            continue
        if common is None:
            common = v.dtype
        if v.dtype != common or v.dim() != 1 or v.shape[0] != c:
            return False
    return common in (None, dtype, accumulator(dtype))


def _tracks(norm: Norm) -> bool:
    """Whether the running tensors that the mode needs are there, and no others."""
    if (norm.running_mean is None) != (norm.running_var is None):
        return False
    if not norm.training:
        return True
    if norm.momentum is not None and norm.momentum < 0:  # which torch takes as it is
        return False
    if norm.running_mean is None:
        return norm.num_batches_tracked is None
    return norm.momentum is not None or norm.num_batches_tracked is not None


def convolves(input: Tensor, conv: Conv, skip: Tensor | None = None) -> bool:
    """Whether the fused convolution takes these; torch reports what does not fit."""
    if input.dim() != 4 or input.dtype not in DTYPES or input.numel() == 0:
        return False
    if conv.weight.dim() != 4 or min(conv.stride) < 1:
        return False
    if skip is not None and skip.dtype != input.dtype:
        return False
    channels = input.shape[1] + (0 if skip is None else skip.shape[1])
    if conv.groups < 1 or conv.weight.shape[1] * conv.groups != channels:
        return False
    if min(conv_shape(input if skip is None else skip, conv)[2:]) < 1:
        return False
    return _mixes(input.dtype, conv, conv.weight.shape[0])


def transposes(input: Tensor, conv: Conv, output_padding: tuple[int, int]) -> bool:
    """Whether the transposed convolution takes these; torch reports what does not fit."""
    if input.dim() != 4 or input.dtype not in DTYPES or input.numel() == 0:
        return False
    if conv.weight.numel() == 0 or conv.weight.shape[0] != input.shape[1]:
        return False
    if any(padding not in (0, 1) for padding in output_padding):
        return False
    return _mixes(input.dtype, conv, conv.weight.shape[1])


def _mixes(dtype: torch.dtype, conv: Conv, channels: int) -> bool:
    """Whether weight and bias go with an input of this dtype and a result of these channels."""
    weight = conv.weight.dtype
    mixed = weight == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return (mixed or weight == dtype) and (
        conv.bias is None or (conv.bias.dtype in (weight, dtype) and conv.bias.shape == (channels,))
    )


def conv_shape(input: Tensor, conv: Conv) -> tuple[int, ...]:
    """Shape of the convolution's result."""
    kernel = conv.weight.shape[2:]
    axes = zip(input.shape[2:], kernel, conv.stride, conv.padding, conv.dilation, strict=True)
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    return (input.shape[0], conv.weight.shape[0], *spatial)


def check_doubling(conv: Conv) -> None:
    """Raise ValueError unless a transposed convolution has kernel 2, stride 2 and nothing else."""
    kernel, geometry = tuple(conv.weight.shape[2:]), tuple(conv[2:])
    if kernel != (2, 2) or geometry != ((2, 2), (0, 0), (1, 1), 1):
        raise ValueError(
            "conv: expected kernel (2, 2), stride (2, 2), padding (0, 0), dilation (1, 1) and "
            f"groups 1, got kernel {kernel} and {', '.join(map(str, geometry))}"
        )


def check_residual(
    shape: Sequence[int], dtype: torch.dtype, residual: Tensor | None, norm: Norm | None = None
) -> None:
    """Raise ValueError unless the residual has the shape and dtype of what it is added to."""
    if residual is None:
        if norm is not None:
            raise ValueError("residual_norm: expected None without a residual")
        return
    if tuple(residual.shape) != tuple(shape):
        raise ValueError(f"residual: expected shape {tuple(shape)}, got {tuple(residual.shape)}")
    if residual.dtype != dtype:
        raise ValueError(f"residual: expected dtype {dtype}, got {residual.dtype}")


def check_sources(input: Tensor, skip: Tensor | None, mode: str) -> None:
    """Raise ValueError unless two sources and the way to enlarge the first go together."""
    if mode != "none" and mode not in MODES:
        raise ValueError(f"upsample: expected 'none' or one of {list(MODES)}, got {mode!r}")
    if skip is None:
        if mode != "none":
            raise ValueError(f"upsample: expected 'none' without a skip, got {mode!r}")
        return
    if skip.dim() != 4 or input.dim() != 4 or skip.shape[0] != input.shape[0]:
        shapes = f"{tuple(input.shape)} and {tuple(skip.shape)}"
        raise ValueError(f"skip: expected 4-D sources with the same N, got {shapes}")
    if mode == "none" and skip.shape[2:] != input.shape[2:]:
        sizes = f"{tuple(input.shape[2:])} and {tuple(skip.shape[2:])}"
        raise ValueError(f"skip: expected the input's size with upsample='none', got {sizes}")
