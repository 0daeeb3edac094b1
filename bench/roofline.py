"""Roofline: the work of every operator by formula, and the least time that two ceilings allow it.

Operations are those of the convolutions (two per multiply-add), as torch's FlopCounterMode counts
them; bytes are the fewest that must cross the memory: every operand once, every result once, and a
tensor twice where a statistic over all positions must be known before the first result is written.
Intermediates of an operator (the convolution's result before batch statistics) are written and read
once. The ceilings are measured in the same run (bench/ceilings.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resunet_fast.registry import OPERATORS
from resunet_fast.testing.cases import argument_names


@dataclass(frozen=True)
class Work:
    """Operations of the matrix units, and bytes across the memory."""

    flops: float
    nbytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.nbytes + other.nbytes)


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: a large copy (bytes read and written), a large matrix product.

    Args:
        bytes_per_second, flops_per_second: the two rates.
        dtype: of the matrix product.
        source: "measured", or "assumed" for predictions.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: str
    source: str = "measured"


@dataclass(frozen=True)
class Floor:
    """The least time for some work, and the ceiling that sets it."""

    ms: float
    binds: str


def floor(work: Work, ceilings: Ceilings) -> Floor:
    memory = 1e3 * work.nbytes / ceilings.bytes_per_second
    arithmetic = 1e3 * work.flops / ceilings.flops_per_second
    return Floor(memory, "memory") if memory >= arithmetic else Floor(arithmetic, "arithmetic")


def share(work: Work, ceilings: Ceilings, ms: float) -> dict[str, Any]:
    """What a row says of itself: its percentage of the roofline and which ceiling binds."""
    least = floor(work, ceilings)
    return {
        "flops": work.flops,
        "bytes": work.nbytes,
        "roofline_percent": 100 * least.ms / ms,
        "binds": least.binds,
    }


def convolution_flops(result: Sequence[int], weight: Sequence[int]) -> int:
    """Operations of one convolution: result [N, K, H, W], weight [K, C / groups, R, S]."""
    return 2 * math.prod(result) * math.prod(weight[1:])


def size(*tensors: Tensor | None) -> int:
    """Bytes of some tensors, each counted as often as it is given."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class Call:
    """An operator's arguments by name, as meta tensors, and its results."""

    def __init__(self, operator: str, arguments: Sequence[Any]) -> None:
        moved = [v.detach().to("meta") if isinstance(v, Tensor) else v for v in arguments]
        self.arguments = dict(zip(argument_names(operator), moved, strict=True))
        self.wants = {
            name: isinstance(v, Tensor) and v.requires_grad
            for name, v in zip(self.arguments, arguments, strict=True)
        }
        results = OPERATORS[operator].fake(*moved)
        self.results = results if isinstance(results, tuple) else (results,)

    def __getattr__(self, name: str) -> Any:
        return self.arguments[name]

    @property
    def operands(self) -> int:
        """Bytes of every tensor argument, once."""
        return size(*(v for v in self.arguments.values() if isinstance(v, Tensor)))

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of every argument that requires one."""
        return size(*(self.arguments[name] for name, wanted in self.wants.items() if wanted))

    @property
    def batch_stats(self) -> bool:
        return self.arguments["mean"] is None

    @property
    def residual_batch_stats(self) -> bool:
        return bool(self.arguments["residual_norm"]) and self.arguments["residual_mean"] is None


def _bn_act(call: Call) -> Work:
    again = size(call.input) * call.batch_stats + size(call.residual) * call.residual_batch_stats
    return Work(0, call.operands + size(*call.results) + again)


def _bn_act_backward(call: Call) -> Work:
    z, pooled, *stats = call.results
    mask = z if call.pool or (call.relu and call.residual is not None) else None
    other = call.residual if call.residual_norm else None
    read = size(z, pooled, call.input, mask, other)
    vectors = size(*stats, call.weight, call.bias, call.residual_weight)
    passes = 2 if call.batch_stats or call.residual_batch_stats else 1
    return Work(0, passes * read + vectors + call.gradients)


def _sources(call: Call) -> list[Tensor | None]:
    return [call.input, call.arguments.get("skip"), call.conv_weight]


def _conv2d(call: Call) -> Work:
    flops = convolution_flops(call.results[0].shape, call.conv_weight.shape)
    return Work(flops, call.operands + size(call.results[0]))


def _conv2d_backward(call: Call) -> Work:
    y = call.results[0]
    flops = convolution_flops(y.shape, call.conv_weight.shape)
    return Work(flops * _products(call), size(y, *_sources(call)) + call.gradients)


def _products(call: Call) -> int:
    """Convolutions of a backward: one for the sources' gradient, one for the weight's."""
    image = call.wants["input"] or call.wants.get("skip", False)
    return int(image) + int(call.wants["conv_weight"])


def _conv_bn_act(call: Call) -> Work:
    z, pooled, y, *stats = call.results
    y = torch.empty_like(z) if y is None else y
    flops = convolution_flops(z.shape, call.conv_weight.shape)
    kept = size(y) * (call.batch_stats or call.keep)
    again = size(y) * call.batch_stats + size(call.residual) * call.residual_batch_stats
    return Work(flops, call.operands + size(z, pooled, *stats) + kept + again)


def _conv_bn_act_backward(call: Call) -> Work:
    z, pooled, _, *stats = call.results
    mask = z if call.pool or (call.relu and call.residual is not None) else None
    other = call.residual if call.residual_norm else None
    read = size(z, pooled, z, mask, other)  # the second z stands for y, of the same size
    passes = 2 if call.batch_stats or call.residual_batch_stats else 1
    vectors = size(*stats, call.weight, call.bias, call.residual_weight)
    between = 2 * size(z)  # y's gradient, written and read
    flops = convolution_flops(z.shape, call.conv_weight.shape) * _products(call)
    moved = passes * read + vectors + between + size(*_sources(call)) + call.gradients
    return Work(flops, moved)


def _bn_act_conv(call: Call) -> Work:
    y, _, *stats = call.results
    kept = size(call.input) * (call.keep and not call.recompute)
    again = size(call.input) * call.batch_stats
    flops = convolution_flops(y.shape, call.conv_weight.shape)
    return Work(flops, call.operands + size(y, *stats) + kept + again)


def _bn_act_conv_backward(call: Call) -> Work:
    y, _, *stats = call.results
    x = call.input
    flops = convolution_flops(y.shape, call.conv_weight.shape) * _products(call)
    # The gradient before the batch norm is summed where it is computed, written, and read once; x
    # is read in each pass; the weight's gradient reads z, kept or computed again from x.
    passes = 2 if call.batch_stats else 1
    moved = size(y, call.conv_weight, x, x, x) + passes * size(x)
    vectors = size(*stats, call.weight, call.bias)
    return Work(flops, moved + vectors + call.gradients)


def _conv_transpose2d(call: Call) -> Work:
    flops = convolution_flops(call.input.shape, call.conv_weight.shape)
    return Work(flops, call.operands + size(call.results[0]))


def _conv_transpose2d_backward(call: Call) -> Work:
    flops = convolution_flops(call.input.shape, call.conv_weight.shape)
    return Work(flops * _products(call), size(call.results[0], *_sources(call)) + call.gradients)


def _upsample(call: Call) -> Work:
    return Work(0, size(call.input, *call.results))


def _update_running_stats(call: Call) -> Work:
    # What is updated is read and written.
    return Work(
        0, call.operands + size(call.running_mean, call.running_var, call.num_batches_tracked)
    )


def _upsample_concat(call: Call) -> Work:
    return Work(0, call.operands)  # the result is an argument


FORWARD: dict[str, Callable[[Call], Work]] = {
    "bn_act": _bn_act,
    "bn_act_conv": _bn_act_conv,
    "conv2d": _conv2d,
    "conv_bias_act": _conv2d,
    "conv_bn_act": _conv_bn_act,
    "conv_transpose2d": _conv_transpose2d,
    "update_running_stats": _update_running_stats,
    "upsample": _upsample,
    "upsample_concat": _upsample_concat,
}
BACKWARD: dict[str, Callable[[Call], Work]] = {
    "bn_act": _bn_act_backward,
    "bn_act_conv": _bn_act_conv_backward,
    "conv2d": _conv2d_backward,
    "conv_bn_act": _conv_bn_act_backward,
    "conv_transpose2d": _conv_transpose2d_backward,
    "upsample": _upsample,
}


def operator_work(operator: str, arguments: Sequence[Any], direction: str) -> Work:
    """The work of one operator.

    Args:
        operator: its name.
        arguments: its arguments without `backend`; only shapes, dtypes and `requires_grad` matter.
        direction: "forward", or "backward" for the gradients of the arguments that require one.
    """
    table = FORWARD if direction == "forward" else BACKWARD
    return table[operator](Call(operator, arguments))
