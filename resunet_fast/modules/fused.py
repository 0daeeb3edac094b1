"""The plain blocks with fused insides: same classes' children, same state-dict keys, same numbers.

A fused block may also be called with a second source and asked for its pooled result:
`block(low, skip=skip, upsample=mode)` convolves the concatenation without keeping it, and
`block(x, pool=True)` returns (z, max_pool2d(z, 2)) from one sweep.

The fused way is taken only where it cannot be told apart from the plain one: exactly nn.Conv2d,
nn.BatchNorm2d and nn.ReLU children, without hooks, parametrizations or replaced forwards.
:func:`refusals` says what stands against it.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import functional as rf
from ..arguments import check_doubling, check_sources
from ..functional import Conv, Norm
from . import plain

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# The models' name for a mode (the article's listing aligns corners) and the operators' name.
UPSAMPLE = {"none": "none", "nearest": "nearest", "bilinear": "bilinear_align_corners"}

Output = Tensor | tuple[Tensor, Tensor]
Parts = list[tuple[str, "nn.Module | None", type[Any]]]


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches or replaces this module's own forward or backward."""
    state = module.__dict__
    return "forward" in state or any(state[name] for name in _HOOKS)


def refusals(block: DoubleConv | ResBlock | PreActResBlock) -> list[str]:
    """Say why a block's children must be called one by one (empty: they can be fused)."""
    reasons = ["a global module hook is registered"] if _has_any_global_hook() else []
    parts = block.parts()
    return reasons + part_refusals(parts) + _repeated(parts)


def part_refusals(parts: Parts) -> list[str]:
    """Say which children are not what they are expected to be, one by one."""
    reasons: list[str] = []
    for name, part, expected in parts:
        if type(part) is not expected:
            reasons.append(f"{name} is a {type(part).__name__}, not exactly a {expected.__name__}")
        elif part is not None and hooked(part):
            reasons.append(f"{name} has hooks or a forward of its own")
        elif isinstance(part, nn.Conv2d) and not _zero_padded(part):
            reasons.append(f"{name} pads with {part.padding_mode}, {part.padding}")
    return reasons


def _repeated(parts: Parts) -> list[str]:
    # The running statistics of a shared batch norm depend on the order of the calls.
    norms = [(name, part) for name, part, expected in parts if expected is nn.BatchNorm2d]
    return [
        f"{name} is also {earlier}"
        for i, (name, part) in enumerate(norms)
        for earlier, other in norms[:i]
        if part is other
    ]


def _zero_padded(conv: nn.Conv2d) -> bool:
    return conv.padding_mode == "zeros" and not isinstance(conv.padding, str)


def _sequence(name: str, sequence: nn.Module | None, kinds: tuple[type[nn.Module], ...]) -> Parts:
    parts: Parts = [(name, sequence, nn.Sequential)]
    if isinstance(sequence, nn.Sequential):
        # A layer too many is expected to be None, a layer too few is None.
        numbered = enumerate(zip_longest(sequence, kinds, fillvalue=None))
        parts += [(f"{name}.{i}", part, kind or type(None)) for i, (part, kind) in numbered]
    return parts


def _children(sequence: nn.Module) -> list[Any]:
    """The layers of a Sequential whose classes :func:`refusals` has checked."""
    # Not children(), which names a layer that occurs twice once.
    return list(sequence._modules.values())


def _residual_parts(block: ResBlock | PreActResBlock) -> Parts:
    parts: Parts = [
        ("bn1", block.bn1, nn.BatchNorm2d),
        ("bn2", block.bn2, nn.BatchNorm2d),
        ("conv1", block.conv1, nn.Conv2d),
        ("conv2", block.conv2, nn.Conv2d),
        ("relu", block.relu, nn.ReLU),
    ]
    if block.downsample is None:
        return parts
    return [*parts, *_sequence("downsample", block.downsample, (nn.Conv2d, nn.BatchNorm2d))]


def _operators_mode(mode: str) -> str:
    # The operators name those they know to whoever passes another one.
    return UPSAMPLE.get(mode, mode)


def _source(x: Tensor, skip: Tensor | None, mode: str) -> Tensor:
    """The concatenation that the plain blocks are given."""
    mode = _operators_mode(mode)
    check_sources(x, skip, mode)
    if skip is None:
        return x
    low = x if mode == "none" else rf.upsample(x, (skip.shape[2], skip.shape[3]), mode)
    return torch.cat([low, skip], 1)


def _pooled(z: Tensor, pool: bool) -> Output:
    return (z, F.max_pool2d(z, 2)) if pool else z


def _pair(
    x: Tensor,
    convs: tuple[nn.Conv2d, nn.Conv2d],
    norms: tuple[nn.BatchNorm2d, nn.BatchNorm2d],
    *,
    skip: Tensor | None,
    mode: str,
    residual: Tensor | None,
    residual_norm: Norm | None,
    pool: bool,
    recompute: bool,
) -> Output:
    """Convolution, batch norm, ReLU; convolution, batch norm [+ residual], ReLU [and pool].

    Kept for backward: the sources, both convolutions' results, and the first ReLU's unless
    `recompute`; the last ReLU's only with a residual or pooling, where the next block keeps it
    anyway.
    """
    first, second = Conv.of(convs[0]), Conv.of(convs[1])
    sources = {"skip": skip, "upsample": _operators_mode(mode)}
    tail = {"residual": residual, "residual_norm": residual_norm, "pool": pool}
    if recompute and torch.is_grad_enabled():
        y = rf.conv2d(x, first, **sources)  # type: ignore[arg-type]
        y = rf.bn_act_conv(y, Norm.of(norms[0]), second, recompute=True)
        return rf.bn_act(y, Norm.of(norms[1]), **tail)  # type: ignore[arg-type]
    z = rf.conv_bn_act(x, first, Norm.of(norms[0]), **sources)  # type: ignore[arg-type]
    assert isinstance(z, Tensor)
    return rf.conv_bn_act(z, second, Norm.of(norms[1]), **tail)  # type: ignore[arg-type]


class DoubleConv(plain.DoubleConv):
    """Two convolutions with batch norm and ReLU, fused; see :class:`plain.DoubleConv`."""

    recompute = False

    def parts(self) -> Parts:
        """The children that are fused, with the class that each must have."""
        conv, rest = (nn.Conv2d,), (nn.BatchNorm2d, nn.ReLU)
        kinds = (*conv, *rest) if self.order == "post" else (*rest, *conv)
        return _sequence("double_conv", self.double_conv, kinds * 2)

    def forward(  # type: ignore[override]
        self, x: Tensor, skip: Tensor | None = None, upsample: str = "none", pool: bool = False
    ) -> Output:
        """Compute z, or (z, pooled)."""
        if refusals(self):
            return _pooled(super().forward(_source(x, skip, upsample)), pool)
        layers = _children(self.double_conv)
        if self.order == "post":
            conv1, bn1, _, conv2, bn2, _ = layers
            return _pair(
                x,
                (conv1, conv2),
                (bn1, bn2),
                skip=skip,
                mode=upsample,
                residual=None,
                residual_norm=None,
                pool=pool,
                recompute=self.recompute,
            )
        bn1, _, conv1, bn2, _, conv2 = layers
        y = _source(x, skip, upsample)
        for bn, conv in ((bn1, conv1), (bn2, conv2)):
            y = rf.bn_act_conv(y, Norm.of(bn), Conv.of(conv), recompute=self.recompute)
        return _pooled(y, pool)


class ResBlock(plain.ResBlock):
    """A post-activation residual unit, fused; see :class:`plain.ResBlock`."""

    recompute = False

    def parts(self) -> Parts:
        """The children that are fused, with the class that each must have."""
        return _residual_parts(self)

    def forward(  # type: ignore[override]
        self, x: Tensor, skip: Tensor | None = None, upsample: str = "none", pool: bool = False
    ) -> Output:
        """Compute z, or (z, pooled)."""
        if refusals(self) or (self.downsample is None and skip is not None):
            return _pooled(super().forward(_source(x, skip, upsample)), pool)
        residual, residual_norm = x, None
        if self.downsample is not None:
            conv, bn = _children(self.downsample)
            residual = rf.conv2d(x, Conv.of(conv), skip=skip, upsample=_operators_mode(upsample))
            residual_norm = Norm.of(bn)
        return _pair(
            x,
            (self.conv1, self.conv2),
            (self.bn1, self.bn2),
            skip=skip,
            mode=upsample,
            residual=residual,
            residual_norm=residual_norm,
            pool=pool,
            recompute=self.recompute,
        )


class PreActResBlock(plain.PreActResBlock):
    """A pre-activation residual unit, fused; see :class:`plain.PreActResBlock`."""

    recompute = False

    def parts(self) -> Parts:
        """The children that are fused, with the class that each must have."""
        parts = _residual_parts(self)
        return parts if self.bn1 is not None else parts[1:]

    def forward(  # type: ignore[override]
        self, x: Tensor, skip: Tensor | None = None, upsample: str = "none", pool: bool = False
    ) -> Output:
        """Compute the sum, or (sum, pooled)."""
        x = _source(x, skip, upsample)
        if refusals(self):
            return _pooled(super().forward(x), pool)
        if self.bn1 is not None:
            y = rf.bn_act_conv(x, Norm.of(self.bn1), Conv.of(self.conv1), recompute=self.recompute)
        else:
            y = rf.conv2d(x, Conv.of(self.conv1))
        y = rf.bn_act_conv(y, Norm.of(self.bn2), Conv.of(self.conv2), recompute=self.recompute)
        if self.downsample is None:
            # In place, as in the plain block: the sum has the convolution's dtype under autocast.
            y += x
            return _pooled(y, pool)
        conv, bn = _children(self.downsample)
        shortcut = rf.conv2d(x, Conv.of(conv))
        return rf.bn_act(shortcut, Norm.of(bn), residual=y, relu=False, pool=pool)


BLOCKS = (DoubleConv, ResBlock, PreActResBlock)


def reasons_against(block: DoubleConv | ResBlock | PreActResBlock) -> list[str]:
    """Everything that keeps a block from being fused as a whole, its own hooks included."""
    own = ["it has hooks or a forward of its own"] if hooked(block) else []
    return own + refusals(block)


def reasons_against_enlarging(up: nn.Module) -> list[str]:
    """Say why a transposed convolution must be called as a module (empty: the operator does it)."""
    if type(up) is not nn.ConvTranspose2d:
        return [f"it is a {type(up).__name__}, not exactly a ConvTranspose2d"]
    reasons = ["a global module hook is registered"] if _has_any_global_hook() else []
    if hooked(up):
        reasons.append("it has hooks or a forward of its own")
    try:
        check_doubling(Conv.of(up))
    except ValueError as error:
        reasons.append(str(error))
    if tuple(up.output_padding) != (0, 0):
        reasons.append(f"it pads its output by {up.output_padding}")
    return reasons


def _takes_sources(block: nn.Module) -> bool:
    """Whether nobody can tell that a block is given two sources or asked for a pooled result.

    Subclasses, and whatever replaces a block, know only `forward(x)`; hooks would see the
    difference.
    """
    return type(block) in BLOCKS and not hooked(block) and not _has_any_global_hook()


def down(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run an encoder block and pool its result; (skip, pooled)."""
    if _takes_sources(block):
        skip, pooled = block(x, pool=True)
        return skip, pooled
    z = block(x)
    return z, F.max_pool2d(z, 2)


def up(block: nn.Module, low: Tensor, skip: Tensor, mode: str) -> Tensor:
    """Run a decoder block on the upsampled features and the skip."""
    result: Tensor
    if _takes_sources(block):
        result = block(low, skip=skip, upsample=mode)
    else:
        result = block(_source(low, skip, mode))
    return result


def enlarge(up: nn.Module, low: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Apply a transposed convolution that doubles the size, or reaches `size`, one more."""
    height, width = low.shape[-2:]
    padding = (0, 0) if size is None else (size[0] - 2 * height, size[1] - 2 * width)
    if reasons_against_enlarging(up) or not all(0 <= surplus <= 1 for surplus in padding):
        # A size out of reach is for the module to refuse.
        result: Tensor = up(low) if size is None else up(low, output_size=size)
        return result
    return rf.conv_transpose2d(low, Conv.of(up), output_padding=padding)  # type: ignore[arg-type]
