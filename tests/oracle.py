"""Two second opinions on the networks' wiring, neither of which uses it.

:class:`RepairedListing` is the article's listing with its defects repaired, written straight
through: one name per block, one line per step. :func:`network` computes any variant in training
mode from the state dict alone, by recursion over the levels and from first principles.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + x)


class RepairedListing(nn.Module):
    def __init__(self, n_channels: int, n_classes: int, width: int = 64) -> None:
        super().__init__()
        self.down1 = double_conv(n_channels, width)
        self.down2 = double_conv(width, 2 * width)
        self.down3 = double_conv(2 * width, 4 * width)
        self.down4 = double_conv(4 * width, 8 * width)
        self.bottom = double_conv(8 * width, 16 * width)
        self.up4 = double_conv(16 * width + 8 * width, 8 * width)
        self.up3 = double_conv(8 * width + 4 * width, 4 * width)
        self.up2 = double_conv(4 * width + 2 * width, 2 * width)
        self.up1 = double_conv(2 * width + width, width)
        self.res4 = Residual(8 * width)
        self.res3 = Residual(4 * width)
        self.res2 = Residual(2 * width)
        self.res1 = Residual(width)
        self.last = nn.Conv2d(width, n_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        skip3 = self.down3(F.max_pool2d(skip2, 2))
        skip4 = self.down4(F.max_pool2d(skip3, 2))
        x = self.bottom(F.max_pool2d(skip4, 2))
        x = self.res4(self.up4(torch.cat([enlarged(x, skip4), skip4], dim=1)))
        x = self.res3(self.up3(torch.cat([enlarged(x, skip3), skip3], dim=1)))
        x = self.res2(self.up2(torch.cat([enlarged(x, skip2), skip2], dim=1)))
        x = self.res1(self.up1(torch.cat([enlarged(x, skip1), skip1], dim=1)))
        return self.last(x)


def enlarged(x: Tensor, skip: Tensor) -> Tensor:
    return F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=True)


# The listing's names for the same blocks; its decoder starts at the lowest resolution.
LISTING_NAMES = {
    "encoder_layers.0.double_conv": "down1",
    "encoder_layers.1.double_conv": "down2",
    "encoder_layers.2.double_conv": "down3",
    "encoder_layers.3.double_conv": "down4",
    "bottleneck.double_conv": "bottom",
    "decoder_layers.0.double_conv": "up4",
    "decoder_layers.1.double_conv": "up3",
    "decoder_layers.2.double_conv": "up2",
    "decoder_layers.3.double_conv": "up1",
    "res_blocks.0": "res4",
    "res_blocks.1": "res3",
    "res_blocks.2": "res2",
    "res_blocks.3": "res1",
    "outc": "last",
}


def to_oracle(key: str) -> str:
    """The oracle's name of a parameter or buffer of the network."""
    prefix = next(prefix for prefix in LISTING_NAMES if key.startswith(prefix + "."))
    return LISTING_NAMES[prefix] + key[len(prefix) :]


def network(
    state: State,
    x: Tensor,
    *,
    levels: int,
    encoder: str,
    order: str,
    downsample: str,
    upsample: str,
    decoder_residual: bool,
) -> Tensor:
    """The logits of a network in training mode, whose parameters are in `state`."""

    def unit(
        name: str, x: Tensor, *, residual: bool, stride: int = 1, image: bool = False
    ) -> Tensor:
        if not residual:
            return double(state, name + ".double_conv", x, order, stride)
        if order == "post":
            return residual_post(state, name, x, stride)
        return residual_pre(state, name, x, stride, image)

    def level(index: int, x: Tensor) -> Tensor:
        bottom = index == levels - 1
        name = "bottleneck" if bottom else f"encoder_layers.{index}"
        stride = 2 if downsample == "stride" and index > 0 else 1
        residual = encoder == "residual"
        skip = unit(name, x, residual=residual, stride=stride, image=index == 0)
        if bottom:
            return skip
        low = level(index + 1, max_pool(skip) if downsample == "maxpool" else skip)
        step = levels - 2 - index
        if upsample == "transpose":
            low = transposed(state, f"ups.{step}", low, skip)
        else:
            low = {"bilinear": bilinear, "nearest": nearest}[upsample](low, skip)
        y = torch.cat([low, skip], dim=1)
        y = unit(f"decoder_layers.{step}", y, residual=residual and decoder_residual)
        if decoder_residual and not residual:
            y = unit(f"res_blocks.{step}", y, residual=True)
        return y

    return conv(state, "outc", level(0, x))


def double(state: State, name: str, x: Tensor, order: str, stride: int) -> Tensor:
    if order == "post":
        x = norm(state, f"{name}.1", conv(state, f"{name}.0", x, stride)).relu()
        return norm(state, f"{name}.4", conv(state, f"{name}.3", x)).relu()
    x = conv(state, f"{name}.2", norm(state, f"{name}.0", x).relu(), stride)
    return conv(state, f"{name}.5", norm(state, f"{name}.3", x).relu())


def residual_post(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    y = norm(state, f"{name}.bn1", conv(state, f"{name}.conv1", x, stride)).relu()
    y = norm(state, f"{name}.bn2", conv(state, f"{name}.conv2", y))
    return (y + shortcut(state, name, x, stride)).relu()


def residual_pre(state: State, name: str, x: Tensor, stride: int, image: bool) -> Tensor:
    y = x if image else norm(state, f"{name}.bn1", x).relu()
    y = norm(state, f"{name}.bn2", conv(state, f"{name}.conv1", y, stride)).relu()
    return conv(state, f"{name}.conv2", y) + shortcut(state, name, x, stride)


def shortcut(state: State, name: str, x: Tensor, stride: int) -> Tensor:
    if state[f"{name}.conv1.weight"].shape[0] == x.shape[1] and stride == 1:
        return x
    return norm(state, f"{name}.downsample.1", conv(state, f"{name}.downsample.0", x, stride))


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean((0, 2, 3), keepdim=True)
    scaled = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return scaled * weight[:, None, None] + bias[:, None, None]


def max_pool(x: Tensor) -> Tensor:
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
    return x[:, :, :height, :width].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))


def bilinear(low: Tensor, skip: Tensor) -> Tensor:
    """Resize with the corner pixels of both grids on top of each other."""

    def weights(size: int, new_size: int) -> Tensor:
        position = torch.linspace(0, size - 1, new_size, dtype=low.dtype)
        distance = position[:, None] - torch.arange(size, dtype=low.dtype)
        return (1 - distance.abs()).clamp(min=0)

    rows, columns = map(weights, low.shape[2:], skip.shape[2:])
    return rows @ low @ columns.T


def nearest(low: Tensor, skip: Tensor) -> Tensor:
    rows, columns = (
        torch.arange(new) * old // new
        for old, new in zip(low.shape[2:], skip.shape[2:], strict=True)
    )
    return low[:, :, rows][:, :, :, columns]


def transposed(state: State, name: str, low: Tensor, skip: Tensor) -> Tensor:
    """Each pixel becomes a 2x2 patch; what is missing is bias, what is too much is cut."""
    patches = torch.einsum("nchw,ckab->nkhawb", low, state[f"{name}.weight"])
    doubled = patches.flatten(4, 5).flatten(2, 3)
    height, width = skip.shape[2:]
    missing = (0, width - doubled.shape[3], 0, height - doubled.shape[2])
    return F.pad(doubled, missing) + state[f"{name}.bias"][:, None, None]
