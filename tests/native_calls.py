"""Shorthands for the private operators: outputs allocated, absent operands filled in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resunet_fast import native

Shape = tuple[int, ...]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def image(shape: Shape, dtype: torch.dtype, layout: str, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, dtype=torch.float64) * scale
    return values.to(dtype).contiguous(memory_format=LAYOUTS[layout])


def like(t: Tensor, *size: int) -> Tensor:
    """NaN-filled, so that an element left unwritten shows."""
    layout = torch.channels_last if is_channels_last(t) else torch.contiguous_format
    shape = size or tuple(t.shape)
    return torch.full(shape, torch.nan, dtype=t.dtype).contiguous(memory_format=layout)


def is_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous()


@dataclass
class Norm:
    """Statistics and weights of one batch normalisation."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float = 1e-5

    @staticmethod
    def random(x: Tensor, dtype: torch.dtype | None = None) -> Norm:
        """The statistics of x, random weights."""
        mean, var = stats(x)
        kind = dtype or mean.dtype
        weight = (torch.rand(x.shape[1], dtype=torch.float64) + 0.5).to(kind)
        return Norm(mean, var, weight, torch.randn(x.shape[1], dtype=torch.float64).to(kind))

    def reference(self, x: Tensor, from_batch: bool = False) -> Tensor:
        """Float64; the statistics as given, or those of x, differentiably."""
        mean, var = self.mean.double(), self.var.double()
        if from_batch:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        weight = torch.ones_like(mean) if self.weight is None else self.weight.double()
        bias = torch.zeros_like(mean) if self.bias is None else self.bias.double()
        per_channel = [v[:, None, None] for v in (mean, (var + self.eps).rsqrt() * weight, bias)]
        return (x - per_channel[0]) * per_channel[1] + per_channel[2]

    def differentiable(self) -> Norm:
        """Float64 leaves."""
        leaves = [None if t is None else leaf(t) for t in (self.weight, self.bias)]
        return Norm(self.mean.double(), self.var.double(), leaves[0], leaves[1], self.eps)


def leaf(t: Tensor) -> Tensor:
    return t.detach().double().clone().requires_grad_()


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = torch.full((x.shape[1],), torch.nan, dtype=accumulation(x.dtype))
    var = mean.clone()
    native.ops().bn_stats(x, mean, var)
    return mean, var


def forward(
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    shortcut: Norm | None = None,
    *,
    relu: bool = True,
    output: Tensor | None = None,
    pool: bool = False,
) -> tuple[Tensor, Tensor | None]:
    n, c, h, w = x.shape
    output = like(x) if output is None else output
    pooled = like(x, n, c, h // 2, w // 2) if pool else None
    other = [None] * 4 if shortcut is None else _vectors(shortcut)
    eps = 0.0 if shortcut is None else shortcut.eps
    native.ops().bn_act_forward(
        x, *_vectors(norm), norm.eps, residual, *other, eps, relu, output, pooled
    )
    return output, pooled


def _vectors(norm: Norm) -> list[Tensor | None]:
    return [norm.mean, norm.var, norm.weight, norm.bias]


def backward(
    grad_output: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None = None,
    shortcut: Norm | None = None,
    *,
    output: Tensor | None = None,
    relu: bool = True,
    batch_stats: bool = True,
    wanted: tuple[str, ...] = ("input", "weight", "bias"),
    **given: Tensor,
) -> dict[str, Tensor]:
    """The gradients named in `wanted`, allocated unless given."""
    names = ("input", "weight", "bias", "residual", "residual_weight", "residual_bias")
    channel = torch.full_like(norm.mean, torch.nan)
    made = {
        name: given.get(name, like(x) if name in ("input", "residual") else channel.clone())
        for name in names
        if name in wanted
    }
    other: list[Any] = [None] * 3 if shortcut is None else _vectors(shortcut)[:3]
    eps = 0.0 if shortcut is None else shortcut.eps
    arguments = [grad_output, x, output, *_vectors(norm), norm.eps, batch_stats]
    arguments += [residual, *other, eps, batch_stats, relu, *(made.get(name) for name in names)]
    native.ops().bn_act_backward(*arguments)
    return made


def upsample(x: Tensor, mode: int, size: tuple[int, int], skip: Tensor | None = None) -> Tensor:
    channels = x.shape[1] + (0 if skip is None else skip.shape[1])
    output = like(x, x.shape[0], channels, *size)
    native.ops().upsample_forward(x, skip, mode, output)
    return output


def upsample_backward(
    grad_output: Tensor, mode: int, x: Tensor, skip: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    grad_input = like(x)
    grad_skip = None if skip is None else like(skip)
    native.ops().upsample_backward(grad_output, mode, grad_input, grad_skip)
    return grad_input, grad_skip
