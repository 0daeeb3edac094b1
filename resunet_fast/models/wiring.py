"""How the networks connect their blocks, written once; the blocks themselves are passed in.

A class that inherits from :class:`Wiring` names its :class:`Stages` and nothing else. Registration
order and initialisation happen here, so two such classes have the same state-dict keys and, from
the same seed, the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.plain import DoubleConv, Order, PreActResBlock, ResBlock, projection

__all__ = [
    "CHOICES",
    "PLAIN_STAGES",
    "ListingWiring",
    "Stages",
    "Wiring",
    "plain_down",
    "plain_enlarge",
    "plain_up",
]

Encoder = Literal["double_conv", "residual"]
Downsample = Literal["maxpool", "stride"]
Upsample = Literal["bilinear", "nearest", "transpose"]
Interpolation = Literal["none", "nearest", "bilinear"]
Choice = TypeVar("Choice", bound=str)

# What a network is beside its channels, by the names of its attributes.
CHOICES = ("widths", "encoder", "order", "downsample", "upsample", "decoder_residual")


def plain_enlarge(up: nn.Module, low: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Return up(low), of the given size where there is one."""
    enlarged: Tensor = up(low) if size is None else up(low, output_size=size)
    return enlarged


@dataclass(frozen=True)
class Stages:
    """What a network is made of.

    Args:
        double_conv, res_block, pre_res_block: the block classes.
        down: `(block, x) -> (skip, pooled)`, with skip = block(x), pooled = max_pool2d(skip, 2).
        up: `(block, low, skip, mode) -> block(cat([low enlarged to the skip's size, skip], 1))`;
            mode is "none" where `low` already has that size.
        enlarge: `(up, low, size) -> up(low, output_size=size)` for a transposed convolution;
            without a size it doubles that of `low`.
    """

    double_conv: type[DoubleConv]
    res_block: type[ResBlock]
    pre_res_block: type[PreActResBlock]
    down: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]
    up: Callable[[nn.Module, Tensor, Tensor, Interpolation], Tensor]
    enlarge: Callable[[nn.Module, Tensor, tuple[int, int] | None], Tensor] = plain_enlarge


def plain_down(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (block(x), max_pool2d(block(x), 2))."""
    skip = block(x)
    return skip, F.max_pool2d(skip, 2)


def plain_up(block: nn.Module, low: Tensor, skip: Tensor, mode: Interpolation) -> Tensor:
    """Return block(cat([low enlarged to the skip's size, skip], channels)).

    Args:
        block: takes C + C' channels.
        low: [N, C, H', W'], of the skip's size where the mode is "none".
        skip: [N, C', H, W].
        mode: "none", "nearest" or "bilinear" (align_corners=True).
    """
    if mode != "none":
        align_corners = True if mode == "bilinear" else None
        low = F.interpolate(low, size=skip.shape[2:], mode=mode, align_corners=align_corners)
    y: Tensor = block(torch.cat([low, skip], 1))
    return y


PLAIN_STAGES = Stages(DoubleConv, ResBlock, PreActResBlock, plain_down, plain_up)


class Wiring(nn.Module):
    """A residual U-Net: [N, in_channels, H, W] to logits [N, num_classes, H, W].

    Level l has width base_width * width_factors[l] and 1 / 2**l of the resolution. The last level
    is the bottleneck; each other one has a block on the way down, whose output is kept (the skip),
    and one on the way up, which reads [enlarged lower level, skip].

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits.
        base_width: unit of the widths.
        width_factors: one per level, at least two.
        encoder: "double_conv" (:class:`DoubleConv`) or "residual" (residual units, with a
            projection where width or size changes).
        order: "post" (convolution, batch norm, ReLU) or "pre" (batch norm, ReLU, convolution).
        downsample: "maxpool" (2x2, behind the block) or "stride" (the first convolution of the next
            level).
        upsample: "bilinear" (align_corners=True), "nearest" or "transpose" (2x2 transposed
            convolution, stride 2, to the skip's width).
        decoder_residual: with encoder="double_conv", a residual unit behind each decoder block;
            with encoder="residual", the decoder blocks are residual units. False: DoubleConv only.

    Raises:
        ValueError: an argument is out of its range; the sentence names it.

    Source: the article's prose and listing (docs/model.md); Zhang et al. 2018, arXiv:1711.10684.
    """

    stages: ClassVar[Stages] = PLAIN_STAGES

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        base_width: int = 64,
        width_factors: Sequence[int] = (1, 2, 4, 8, 16),
        encoder: Encoder = "double_conv",
        order: Order = "post",
        downsample: Downsample = "maxpool",
        upsample: Upsample = "bilinear",
        decoder_residual: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = _positive("in_channels", in_channels)
        self.num_classes = _positive("num_classes", num_classes)
        self.widths = _widths(base_width, width_factors)
        self.encoder: Encoder = _choice("encoder", encoder, Encoder)
        self.order: Order = _choice("order", order, Order)
        self.downsample: Downsample = _choice("downsample", downsample, Downsample)
        self.upsample: Upsample = _choice("upsample", upsample, Upsample)
        self.decoder_residual = bool(decoder_residual)

        levels = range(len(self.widths))
        upward = levels[-2::-1]
        self.encoder_layers = nn.ModuleList(self._encoder_block(level) for level in levels[:-1])
        self.bottleneck = self._encoder_block(levels[-1])
        self.ups = nn.ModuleList()
        if upsample == "transpose":
            self.ups.extend(self._transposed(level) for level in upward)
        self.decoder_layers = nn.ModuleList(self._decoder_block(level) for level in upward)
        self.res_blocks = nn.ModuleList()
        if decoder_residual and encoder == "double_conv":
            widths = [self.widths[level] for level in upward]
            self.res_blocks.extend(self._residual(width, width) for width in widths)
        self.outc = nn.Conv2d(self.widths[0], num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits.

        Args:
            x: [N, in_channels, H, W] in the parameters' dtype. Max pooling needs H and W of at
                least 2 ** (levels - 1); strided convolutions take any size.

        Returns:
            [N, num_classes, H, W].

        Raises:
            ValueError: `x` is not 4-D, has another number of channels, or is too small.
        """
        self._check_input(x)
        skips: list[Tensor] = []
        for block in self.encoder_layers:
            if self.downsample == "maxpool":
                skip, x = self.stages.down(block, x)
            else:
                skip = x = block(x)
            skips.append(skip)
        x = self.bottleneck(x)
        for step, (block, skip) in enumerate(zip(self.decoder_layers, skips[::-1], strict=True)):
            if self.upsample == "transpose":
                x = self.stages.up(block, self._enlarge(self.ups[step], x, skip), skip, "none")
            else:
                x = self.stages.up(block, x, skip, self.upsample)
            if self.res_blocks:
                x = self.res_blocks[step](x)
        logits: Tensor = self.outc(x)
        return logits

    def _encoder_block(self, level: int) -> nn.Module:
        before = self.widths[level - 1] if level else self.in_channels
        stride = 2 if level and self.downsample == "stride" else 1
        if self.encoder == "residual":
            return self._residual(before, self.widths[level], stride, preactivate=level > 0)
        return self._double_conv(before, self.widths[level], stride)

    def _decoder_block(self, level: int) -> nn.Module:
        width = self.widths[level]
        low = width if self.upsample == "transpose" else self.widths[level + 1]
        if self.encoder == "residual" and self.decoder_residual:
            return self._residual(low + width, width)
        return self._double_conv(low + width, width)

    def _double_conv(self, before: int, after: int, stride: int = 1) -> nn.Module:
        return self.stages.double_conv(before, after, order=self.order, stride=stride)

    def _residual(
        self, before: int, after: int, stride: int = 1, *, preactivate: bool = True
    ) -> nn.Module:
        shortcut = projection(before, after, stride)
        if self.order == "post":
            return self.stages.res_block(before, after, stride, shortcut)
        return self.stages.pre_res_block(before, after, stride, shortcut, preactivate=preactivate)

    def _transposed(self, level: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(
            self.widths[level + 1], self.widths[level], kernel_size=2, stride=2
        )

    def _enlarge(self, up: nn.Module, low: Tensor, skip: Tensor) -> Tensor:
        """Apply a transposed convolution, which doubles the size, and bring it to the skip's size.

        Max pooling drops the last row of an odd size: output padding restores it, with the bias
        as its value. A strided convolution rounds up instead: the surplus row is cut.
        """
        height, width = skip.shape[2:]
        if self.downsample == "maxpool":
            return self.stages.enlarge(up, low, (height, width))
        return self.stages.enlarge(up, low, None)[:, :, :height, :width]

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            expected = f"[N, {self.in_channels}, H, W]"
            raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
        smallest = 2 ** len(self.encoder_layers) if self.downsample == "maxpool" else 1
        if x.shape[2] < smallest or x.shape[3] < smallest:
            raise ValueError(
                f"x: expected at least {smallest} x {smallest} pixels for "
                f"{len(self.widths)} levels, got {x.shape[2]} x {x.shape[3]}"
            )

    def extra_repr(self) -> str:
        """Return the choices that the modules' own lines do not show."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in CHOICES)


class ListingWiring(Wiring):
    """The article's network, repaired: the defaults of :class:`Wiring`, the listing's arguments.

    Args:
        n_channels: channels of the image.
        n_classes: channels of the logits.

    Source: the article's listing; docs/model.md has each repair.
    """

    def __init__(self, n_channels: int, n_classes: int) -> None:
        super().__init__(n_channels, n_classes)


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return value


def _choice(name: str, value: Choice, literal: Any) -> Choice:
    if value not in get_args(literal):
        raise ValueError(f"{name}: expected one of {list(get_args(literal))}, got {value!r}")
    return value


def _widths(base_width: int, width_factors: Sequence[int]) -> tuple[int, ...]:
    base = _positive("base_width", base_width)
    if len(width_factors) < 2:
        raise ValueError(f"width_factors: expected at least two numbers, got {width_factors!r}")
    return tuple(base * _positive("width_factors", factor) for factor in width_factors)
