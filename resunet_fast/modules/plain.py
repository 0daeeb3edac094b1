"""The networks' blocks in ordinary torch.nn, under the attribute names of the article's listing."""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

from torch import Tensor, nn

__all__ = ["DoubleConv", "Order", "PreActResBlock", "ResBlock", "projection"]

Order = Literal["post", "pre"]


class DoubleConv(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU.

    post: relu(bn(conv(relu(bn(conv(x)))))), pre: conv(relu(bn(conv(relu(bn(x)))))).

    Args:
        in_channels, out_channels: widths before and after; both convolutions carry a bias.
        order: "post" (convolution first) or "pre" (batch norm first).
        stride: of the first convolution.

    Raises:
        ValueError: an unknown order.

    Source: the article's listing, class `DoubleConv`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, order: Order = "post", stride: int = 1
    ) -> None:
        super().__init__()
        if order not in get_args(Order):
            raise ValueError(f"order: expected one of {list(get_args(Order))}, got {order!r}")
        self.order = order
        first = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        second = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1)
        if order == "post":
            layers = [first, *_bn_relu(out_channels), second, *_bn_relu(out_channels)]
        else:
            layers = [*_bn_relu(in_channels), first, *_bn_relu(out_channels), second]
        self.double_conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        y: Tensor = self.double_conv(x)
        return y


class ResBlock(nn.Module):
    """The basic residual unit: relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)).

    Args:
        inplanes, planes: widths before and after; the 3x3 convolutions carry no bias.
        stride: of `conv1`.
        downsample: the shortcut, see :func:`projection`; None for the identity.

    Raises:
        ValueError: the width or the size changes and `downsample` is None.

    Source: the article's listing, class `ResBlock`; He et al. 2016, arXiv:1512.03385.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None
    ) -> None:
        super().__init__()
        _check_shortcut(inplanes, planes, stride, downsample)
        self.conv1 = nn.Conv2d(
            inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        residual = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += residual
        out = self.relu(out)
        return out


class PreActResBlock(nn.Module):
    """The pre-activation residual unit: conv2(relu(bn2(conv1(relu(bn1(x)))))) + shortcut(x).

    Nothing follows the addition. The shortcut sees x itself, not relu(bn1(x)).

    Args:
        inplanes, planes: widths before and after; the 3x3 convolutions carry no bias.
        stride: of `conv1`.
        downsample: the shortcut, see :func:`projection`; None for the identity.
        preactivate: False leaves out `bn1` and its ReLU, for the unit that reads the image.

    Raises:
        ValueError: the width or the size changes and `downsample` is None.

    Source: Zhang, Liu, Wang 2018, arXiv:1711.10684, figure 1b.
    """

    expansion: ClassVar[int] = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        *,
        preactivate: bool = True,
    ) -> None:
        super().__init__()
        _check_shortcut(inplanes, planes, stride, downsample)
        self.bn1 = nn.BatchNorm2d(inplanes) if preactivate else None
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(
            inplanes, planes, kernel_size=3, stride=stride, padding=1, bias=False
        )
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, padding=1, bias=False)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, inplanes, H, W] to [N, planes, ceil(H / stride), ceil(W / stride)]."""
        residual = x if self.downsample is None else self.downsample(x)
        activated = x if self.bn1 is None else self.relu(self.bn1(x))
        out: Tensor = self.conv1(activated)
        out = self.conv2(self.relu(self.bn2(out)))
        out += residual
        return out


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """Return the shortcut bn(conv1x1(x)) that changes width or size, or None if neither changes.

    Args:
        in_channels, out_channels: widths before and after; the convolution carries no bias.
        stride: of the convolution.

    Source: He et al. 2016, arXiv:1512.03385, option B.
    """
    if in_channels == out_channels and stride == 1:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def _bn_relu(channels: int) -> tuple[nn.Module, nn.Module]:
    # The ReLU may overwrite its input: no batch norm needs its own output in backward.
    return nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


def _check_shortcut(inplanes: int, planes: int, stride: int, downsample: nn.Module | None) -> None:
    if downsample is None and (inplanes != planes or stride != 1):
        raise ValueError(
            f"downsample: expected a projection where the unit changes its input "
            f"({inplanes} to {planes} channels, stride {stride}), got None"
        )
