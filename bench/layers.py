"""The convolutions of the default network, by formula: shapes, operations and bytes, per level.

Bytes are counted for four ways to run the same layers, beyond which nothing needs to be known of
the machine:

* eager: every module reads its operands and writes its result.
* compiled: batch norm, ReLU, residual and pooling in one pass behind the convolution (a second one
  for statistics), the enlarged lower level written straight into the concatenation.
* fused: statistics, bias, ReLU and residual in the convolution's epilogue, one more pass where
  batch statistics must be applied, no concatenation.
* ideal: also the application in the next convolution's prologue, enlarging in its loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from .roofline import Ceilings, Work

MODES = ("eager", "compiled", "fused", "ideal")
PHASES = ("inference", "forward", "backward")


@dataclass(frozen=True)
class Layer:
    """One convolution, the batch norm and ReLU behind it, and what else belongs to it.

    Args:
        name: where it stands.
        level: 0 has the image's resolution.
        batch, height, width: of source and result.
        channels, out: of the source and the result.
        skip: how many of `channels` come from the skip, the others from the enlarged lower level;
            0: one source.
        kernel: 3, or 1 for the head, which has neither batch norm nor ReLU.
        pool: its result is pooled as well.
        residual: a tensor of the result's shape is added before the ReLU.
        first: its source needs no gradient.
    """

    name: str
    level: int
    batch: int
    height: int
    width: int
    channels: int
    out: int
    skip: int = 0
    kernel: int = 3
    pool: bool = False
    residual: bool = False
    first: bool = False

    @property
    def positions(self) -> int:
        return self.batch * self.height * self.width

    @property
    def flops(self) -> int:
        return 2 * self.kernel**2 * self.channels * self.out * self.positions

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """What a convolution's speed depends on: N, H, W, C, K and the kernel's size."""
        return (self.batch, self.height, self.width, self.channels, self.out, self.kernel)


def layers(
    batch: int,
    height: int,
    width: int,
    *,
    base_width: int = 64,
    in_channels: int = 3,
    num_classes: int = 2,
    factors: Sequence[int] = (1, 2, 4, 8, 16),
) -> list[Layer]:
    """Every convolution of the default network, in the order in which they run."""
    widths = [base_width * factor for factor in factors]
    last = len(widths) - 1

    def layer(name: str, level: int, channels: int, **options: Any) -> Layer:
        sizes = (batch, height >> level, width >> level)
        return Layer(f"{name} {level}", level, *sizes, channels, widths[level], **options)

    def downward() -> Iterator[Layer]:
        for level, own in enumerate(widths):
            before = widths[level - 1] if level else in_channels
            yield layer("encoder first", level, before, first=level == 0)
            yield layer("encoder second", level, own, pool=level < last)

    def upward() -> Iterator[Layer]:
        for level in range(last - 1, -1, -1):
            own = widths[level]
            yield layer("decoder first", level, own + widths[level + 1], skip=own)
            yield layer("decoder second", level, own)
            yield layer("residual first", level, own)
            yield layer("residual second", level, own, residual=True)

    head = Layer("head 0", 0, batch, height, width, widths[0], num_classes, kernel=1)
    return [*downward(), *upward(), head]


@dataclass(frozen=True)
class Traffic:
    """Bytes of one layer: of its convolutions, one by one, and of the passes around them."""

    convolutions: tuple[int, ...]
    passes: float

    @property
    def total(self) -> float:
        return sum(self.convolutions) + self.passes


class Bytes:
    """One layer's tensors in bytes: t is the result, r the residual, read the source as it is."""

    def __init__(self, layer: Layer, element: int) -> None:
        unit = layer.positions * element
        self.t = unit * layer.out
        self.weight = layer.kernel**2 * layer.channels * layer.out * element
        self.source = unit * layer.channels
        self.skip = unit * layer.skip
        self.enlarged = self.source - self.skip if layer.skip else 0
        self.lower = self.enlarged // 4
        self.read = self.lower + self.skip if layer.skip else self.source  # without enlarging
        self.r = self.t * layer.residual
        self.pooled = self.t // 4 * layer.pool
        self.pool = (self.t + self.pooled) * layer.pool
        self.indices = 8 * layer.positions // 4 * layer.out * layer.pool  # eager's, int64
        self.normalised = layer.kernel == 3


def _inference(b: Bytes, mode: str) -> Traffic:
    plain = (b.source + b.t,)
    if mode == "eager":
        concatenate = b.lower + b.enlarged + 2 * b.source if b.skip else 0
        passes = 4 * b.t * b.normalised + 3 * b.r + b.pool + b.indices
        return Traffic(plain, passes + concatenate)
    if mode == "compiled":
        concatenate = b.lower + b.skip + b.source if b.skip else 0
        return Traffic(plain, 2 * b.t * b.normalised + b.r + b.pool + concatenate)
    if mode == "fused":
        return Traffic((b.source + b.t + b.r,), b.pool + b.lower + b.enlarged)
    return Traffic((b.read + b.t + b.r + b.pooled,), 0)


def _forward(b: Bytes, mode: str) -> Traffic:
    """Training: as inference, with one more read for statistics, and a pass to apply them."""
    if not b.normalised:
        return _inference(b, mode)
    same = _inference(b, mode)
    if mode in ("eager", "compiled"):
        return Traffic(same.convolutions, same.passes + b.t)
    if mode == "fused":
        apply = 2 * b.t + b.r + b.pooled
        return Traffic((b.source + b.t,), apply + b.lower + b.enlarged)
    return Traffic((b.read + b.t,), 3 * b.r + b.pool)


def _backward(b: Bytes, mode: str, first: bool) -> Traffic:
    """The result's gradient through ReLU and batch norm, then one convolution per gradient."""
    products = 1 if first else 2
    plain = (b.source + b.t,) * products
    scatter = b.enlarged + b.lower  # the gradient of enlarging
    if not b.normalised:
        return Traffic(plain, 0)
    if mode == "eager":
        # A source of two branches (residual, skip) adds their gradients: two reads, one write.
        pool = 5 * b.pool - 4 * b.pooled + b.indices
        return Traffic(plain, 8 * b.t + 3 * b.r + pool + scatter)
    if mode == "compiled":
        pool = 2 * b.pool - b.pooled
        return Traffic(plain, 5 * b.t + b.r + pool + scatter)
    if mode == "fused":
        data = () if first else (2 * b.source + b.t,)  # its epilogue sums for the batch norm before
        return Traffic((b.source + b.t, *data), 3 * b.t + b.pool + scatter)
    data = () if first else (2 * b.t + 2 * b.read,)
    return Traffic((2 * b.t + b.read, *data), b.pooled)


def traffic(layer: Layer, mode: str, phase: str, element: int = 2) -> Traffic:
    """Bytes that one layer moves.

    Args:
        layer: the layer.
        mode: one of :data:`MODES`.
        phase: one of :data:`PHASES`: "forward" and "backward" are a training step's.
        element: bytes of one element, weights included.
    """
    b = Bytes(layer, element)
    if phase == "inference":
        moved = _inference(b, mode)
    elif phase == "forward":
        moved = _forward(b, mode)
    else:
        moved = _backward(b, mode, layer.first)
    return Traffic(tuple(n + b.weight for n in moved.convolutions), moved.passes)


def network_work(some: Sequence[Layer], phase: str, element: int, mode: str = "ideal") -> Work:
    """Operations and bytes of a whole network; phase "training" is forward and backward."""
    phases = ("forward", "backward") if phase == "training" else (phase,)
    return reduce(
        Work.__add__,
        (
            Work(layer.flops * len(moved.convolutions), moved.total)
            for layer in some
            for moved in (traffic(layer, mode, one, element) for one in phases)
        ),
    )


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one level: the convolutions' and the passes'."""

    convolutions: float
    passes: float

    @property
    def total(self) -> float:
        return self.convolutions + self.passes


def predict(
    some: Sequence[Layer],
    phase: str,
    mode: str,
    ceilings: Ceilings,
    *,
    efficiency: float = 1.0,
    pass_efficiency: float = 1.0,
    element: int = 2,
) -> dict[int, Prediction]:
    """Predict the time per level.

    Args:
        some: the layers.
        phase: one of :data:`PHASES`, or "training" for forward and backward.
        mode: one of :data:`MODES`.
        ceilings: measured or assumed.
        efficiency: the share of the matrix ceiling that a convolution reaches.
        pass_efficiency: the share of the copy rate that the passes reach.
        element: bytes of one element.
    """
    phases = ("forward", "backward") if phase == "training" else (phase,)
    rate, width = ceilings.flops_per_second * efficiency, ceilings.bytes_per_second
    levels: dict[int, Prediction] = {}
    for layer in some:
        for one in phases:
            moved = traffic(layer, mode, one, element)
            before = levels.get(layer.level, Prediction(0.0, 0.0))
            convolutions = sum(max(layer.flops / rate, n / width) for n in moved.convolutions)
            passes = moved.passes / (width * pass_efficiency)
            levels[layer.level] = Prediction(
                before.convolutions + 1e3 * convolutions, before.passes + 1e3 * passes
            )
    return dict(sorted(levels.items()))


def total(levels: dict[int, Prediction]) -> float:
    return sum(level.total for level in levels.values())


def network_share(
    some: Sequence[Layer], phase: str, element: int, ceilings: Ceilings, ms: float
) -> dict[str, Any]:
    """What a network's row says of itself: its percentage of the roofline, and what binds.

    The least time is taken layer by layer, since no layer's traffic can hide behind another's
    arithmetic.
    """
    work = network_work(some, phase, element)
    least = total(predict(some, phase, "ideal", ceilings, element=element))
    arithmetic = 1e3 * work.flops / ceilings.flops_per_second
    return {
        "flops": work.flops,
        "bytes": work.nbytes,
        "roofline_percent": 100 * least / ms,
        "binds": "arithmetic" if arithmetic >= least / 2 else "memory",
    }
