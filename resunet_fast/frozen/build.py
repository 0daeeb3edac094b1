"""From a model's blocks to frozen ones, and what stands against that."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ..arguments import DTYPES, Norm
from ..modules import fused, plain
from .blocks import FrozenBlock
from .folding import fold
from .layers import FrozenConv, FrozenNorm

# The fused classes know the children that they fuse; the plain ones have the same.
_KINDS: dict[type[nn.Module], Any] = {
    plain.DoubleConv: fused.DoubleConv,
    plain.ResBlock: fused.ResBlock,
    plain.PreActResBlock: fused.PreActResBlock,
    **{kind: kind for kind in fused.BLOCKS},
}


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ValueError unless a network can be frozen in this dtype on this device.

    Bfloat16 on a processor without it is slow, not wrong: a warning.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected None or one of {list(DTYPES)}, got {dtype!r}")
    if device.type != "cpu":
        return
    if dtype == torch.float16:
        raise ValueError(
            "dtype: torch.float16 has no fused convolution on a CPU; expected torch.bfloat16 or"
            " torch.float32"
        )
    for reason in reservations(dtype, device):
        warnings.warn(f"{reason}: the frozen model runs on the reference", stacklevel=4)


def reservations(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Say why a network frozen in this dtype would be no faster there (empty: it is)."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return []
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return []
    return ["oneDNN has no bfloat16 on this processor"]


def block_refusals(name: str, block: nn.Module) -> list[str]:
    """Say why a block cannot be frozen (empty: it can)."""
    kind = _KINDS.get(type(block))
    if kind is None:
        return [f"{name} is a {type(block).__name__}, not a block of this package"]
    reasons = [f"{name} has hooks or a forward of its own"] if fused.hooked(block) else []
    parts = kind.parts(block)
    reasons += [f"{name}.{reason}" for reason in fused.part_refusals(parts)]
    return reasons + [
        f"{name}.{part_name} has no running statistics to fold"
        for part_name, part, _ in parts
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is None
    ]


def layer_refusals(name: str, layer: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Say why a single layer cannot be frozen (empty: it can)."""
    reasons = [f"{name}{reason}" for reason in fused.part_refusals([("", layer, kind)])]
    if isinstance(layer, nn.ConvTranspose2d):
        geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups)
        if geometry != ((2, 2), (2, 2), (0, 0), (1, 1), 1):
            reasons.append(f"{name} is not a 2x2 transposed convolution with stride 2")
    return reasons


def freeze_block(name: str, block: nn.Module, dtype: torch.dtype) -> FrozenBlock:
    """Return the frozen copy of a block that :func:`block_refusals` has nothing against."""
    if isinstance(block, plain.DoubleConv):
        return _freeze_double_conv(f"{name}.double_conv", block, dtype)
    assert isinstance(block, plain.ResBlock | plain.PreActResBlock)
    post = isinstance(block, plain.ResBlock)
    norm = None if post or block.bn1 is None else FrozenNorm(Norm.of(block.bn1), dtype)
    first = "bn1" if post else "bn2"
    return FrozenBlock(
        norm,
        freeze_conv(name, block, "conv1", first, dtype, relu=True),
        freeze_conv(name, block, "conv2", "bn2" if post else "", dtype, relu=post),
        None
        if block.downsample is None
        else freeze_conv(f"{name}.downsample", block.downsample, "0", "1", dtype, relu=False),
        identity=block.downsample is None,
    )


def _freeze_double_conv(name: str, block: plain.DoubleConv, dtype: torch.dtype) -> FrozenBlock:
    layers = block.double_conv
    if block.order == "post":
        return FrozenBlock(
            None,
            freeze_conv(name, layers, "0", "1", dtype, relu=True),
            freeze_conv(name, layers, "3", "4", dtype, relu=True),
        )
    first = layers[0]
    assert isinstance(first, nn.BatchNorm2d)
    return FrozenBlock(
        FrozenNorm(Norm.of(first), dtype),
        freeze_conv(name, layers, "2", "3", dtype, relu=True),
        freeze_conv(name, layers, "5", "", dtype, relu=False),
    )


def freeze_conv(
    name: str, parent: nn.Module, conv: str, norm: str, dtype: torch.dtype, *, relu: bool
) -> FrozenConv:
    """Fold two children of `parent` into one layer; no `norm` is the empty string."""
    convolution, batch_norm = getattr(parent, conv), getattr(parent, norm) if norm else None
    paths = [".".join(filter(None, (name, child))) if child else "" for child in (conv, norm)]
    folded = fold(convolution, batch_norm, dtype)
    return FrozenConv(folded, relu=relu, sources=(paths[0], paths[1]))
