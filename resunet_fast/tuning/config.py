"""Tiles of the Triton convolutions: frozen configurations and a pure function that picks one.

Nothing here has been measured: the sizes follow from registers (256 pixels by 128 filters are 128
accumulators a thread with eight warps), from shared memory, and from the number of programs that
fill a GPU. Measurements go into the tables (see `table.py`) and take precedence.
"""

from __future__ import annotations

from dataclasses import dataclass

# Enough programs for every multiprocessor of the GPUs that the tables name (132 on sm_90).
_PROGRAMS = 132
# Bytes of one row of a box: the widest that shared memory swizzles.
_ROW_BYTES = 128


@dataclass(frozen=True)
class ConvProblem:
    """What a choice may depend on: one convolution's shape class, dtype and purpose.

    Args:
        operator: "conv2d", "conv2d_backward" (then channels and filters are those of its data
            gradient), "conv_bias_act", "conv_bn_act" or "bn_act_conv".
        images, height, width: of the result.
        channels: of all sources together.
        filters: of the result.
        kernel, stride: (vertical, horizontal).
        dtype: of the operands, such as "bfloat16".
        itemsize: bytes of one of them.
    """

    operator: str
    images: int
    height: int
    width: int
    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dtype: str
    itemsize: int


@dataclass(frozen=True)
class ConvConfig:
    """Tiles of one launch.

    Args:
        family: "tma" (boxes of rows x columns) or "pointer" (rows is 1: consecutive pixels).
        filters, rows, columns: of the result that one program owns.
        channels: added in one step.
        warps, stages: of the launch and of its loads.

    Raises:
        ValueError: tiles that the kernels cannot have.
    """

    family: str
    filters: int
    rows: int
    columns: int
    channels: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        sides = (self.filters, self.rows * self.columns, self.channels)
        if any(side < 16 or side & (side - 1) for side in sides):
            raise ValueError(f"tiles: expected powers of two of at least 16, got {sides}")
        # Statistics are taken by quarters of the rows, maxima of 2x2.
        least = {"tma": (4, 2), "pointer": (1, 16)}.get(self.family)
        if least is None:
            raise ValueError(f"family: expected 'tma' or 'pointer', got {self.family!r}")
        if self.rows < least[0] or self.columns < least[1]:
            raise ValueError(
                f"rows, columns: expected at least {least} for {self.family!r},"
                f" got {(self.rows, self.columns)}"
            )


def pick(problem: ConvProblem, *, boxes: bool) -> ConvConfig:
    """Return tiles for a convolution that nobody has measured.

    Args:
        problem: the convolution.
        boxes: whether tensor descriptors can address its operands.
    """
    return _boxes(problem) if boxes else _pointers(problem)


def _boxes(problem: ConvProblem) -> ConvConfig:
    filters = _power_of_two(problem.filters, 16, 128)
    channels = _power_of_two(problem.channels, 16, max(_ROW_BYTES // problem.itemsize, 16))
    columns = _power_of_two(problem.width, 2, 16)
    rows = max(_power_of_two(problem.height, 4, 16), 16 // columns)
    if _programs(problem, filters, rows * columns) < _PROGRAMS and rows * columns > 128:
        rows //= 2
    if filters == 128:
        return ConvConfig("tma", filters, rows, columns, channels, warps=8, stages=3)
    return ConvConfig("tma", filters, rows, columns, channels, warps=4, stages=2)


def _pointers(problem: ConvProblem) -> ConvConfig:
    filters = _power_of_two(problem.filters, 16, 128)
    pixels = _power_of_two(problem.height * problem.width, 16, 128)
    channels = _power_of_two(problem.channels, 16 if problem.channels >= 16 else 32, 32)
    # Taps gathered together need an address for every element.
    warps = 8 if (filters == 128 and pixels == 128) or problem.channels < channels else 4
    return ConvConfig("pointer", filters, 1, pixels, channels, warps, stages=3)


def _power_of_two(size: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `size`, within bounds."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)


def _programs(problem: ConvProblem, filters: int, pixels: int) -> int:
    tiles = -(-problem.height * problem.width // pixels)
    return problem.images * tiles * -(-problem.filters // filters)
