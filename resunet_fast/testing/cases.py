"""Named cases of every operator: one table for tests, verification and benchmarks.

A case holds the shapes and flags that make it different; :func:`make_inputs` turns it into the
operator's arguments in any dtype and layout. Adding an operator means adding its lines here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One named set of arguments of an operator.

    Args:
        operator: its name.
        name: what is special about it.
        shape: of the first input.
        options: flags, see the makers below.
    """

    operator: str
    name: str
    shape: Shape
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The name under which tests and benchmarks report it."""
        return f"{self.operator}-{self.name}"


class _Maker:
    """Draws tensors of one dtype, layout and device from a seed, the same on every device."""

    def __init__(
        self,
        dtype: torch.dtype,
        layout: torch.memory_format,
        seed: int,
        device: torch.device | str,
    ) -> None:
        self.dtype = dtype
        self.layout = layout
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)
        self.stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device="cpu").to(self.device)

    def image(self, shape: Shape, sliced: bool = False) -> Tensor:
        n, c, h, w = shape
        if sliced:
            # A window into a larger buffer: not dense, and at an odd storage offset.
            whole = self._normal(n, c + 3, h + 1, w + 2)
            whole = whole.to(self.dtype).contiguous(memory_format=self.layout)
            return whole[:, 1 : c + 1, 1:, 1 : w + 1]
        values = self._normal(*shape).to(self.dtype)
        return values.contiguous(memory_format=self.layout)

    def weight(self, *shape: int) -> Tensor:
        fan_in = math.prod(shape[1:])
        values = self._normal(*shape) / math.sqrt(fan_in)
        return values.to(self.dtype).contiguous(memory_format=self.layout)

    def vector(self, channels: int, positive: bool = False) -> Tensor:
        if positive:
            drawn = torch.rand(channels, generator=self.generator, device="cpu")
            values = drawn.to(self.device) + 0.5
        else:
            values = self._normal(channels) * 0.5
        return values.to(self.stats_dtype)


def _norm(make: _Maker, channels: int, shape: Shape, options: dict[str, Any]) -> list[Any]:
    affine = options.get("affine", True)
    frozen = options.get("frozen", False)
    kind = options.get("residual")

    def norm() -> list[Any]:
        weight = make.vector(channels) if affine else None  # negative weights as well
        bias = make.vector(channels) if affine else None
        mean = make.vector(channels) if frozen else None
        var = make.vector(channels, positive=True) if frozen else None
        return [weight, bias, mean, var]

    residual = make.image(shape) if kind else None
    other = norm() if kind == "norm" else [None] * 4
    eps = options.get("eps", 1e-5)
    flags = [options.get("relu", True), options.get("pool", False)]
    return [*norm(), eps, residual, kind == "norm", *other, 1e-3, *flags]


def _bn_act(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    image = make.image(shape, options.get("sliced", False))
    if options.get("mean"):
        image = image + options["mean"]
    return [image, *_norm(make, shape[1], shape, options)]


def _sources(make: _Maker, shape: Shape, options: dict[str, Any]) -> tuple[list[Any], Shape]:
    """(input, skip, weight, bias, stride, padding, dilation, groups, upsample) and y's shape."""
    out, kernel = options.get("out", 5), options.get("kernel", 3)
    stride, groups = options.get("stride", 1), options.get("groups", 1)
    dilation, mode = options.get("dilation", 1), options.get("upsample", "none")
    padding = dilation * (kernel // 2)
    skip = make.image(options["skip"]) if "skip" in options else None
    channels = shape[1] + (0 if skip is None else skip.shape[1])
    weight = make.weight(out, channels // groups, kernel, kernel)
    bias = make.vector(out).to(make.dtype) if options.get("bias", True) else None
    n, _, h, w = shape if skip is None else tuple(skip.shape)
    size = [(s + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for s in (h, w)]
    geometry = [[stride] * 2, [padding] * 2, [dilation] * 2, groups, mode]
    source = [make.image(shape, options.get("sliced", False)), skip, weight, bias]
    return [*source, *geometry], (n, out, size[0], size[1])


def _conv2d(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    return _sources(make, shape, options)[0]


def _conv_bn_act(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    sources, result = _sources(make, shape, options)
    return [*sources, *_norm(make, result[1], result, options), True]


def _bn_act_conv(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    norm = _norm(make, shape[1], shape, options)
    source, _, weight, bias, *geometry, _ = _sources(make, shape, options)[0]
    conv = [weight, bias, *geometry]
    return [
        source,
        *norm[:5],
        options.get("relu", True),
        *conv,
        options.get("recompute", False),
        True,
    ]


def _conv_bias_act(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    (source, _, weight, bias, *geometry, _), result = _sources(make, shape, options)
    residual = make.image(result) if options.get("residual") else None
    return [source, weight, bias, residual, options.get("relu", True), *geometry]


def _conv_transpose2d(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    out = options.get("out", 5)
    weight = make.weight(shape[1], out, 2, 2)
    bias = make.vector(out).to(make.dtype) if options.get("bias", True) else None
    source = make.image(shape, options.get("sliced", False))
    return [source, weight, bias, options.get("output_padding", [0, 0])]


def _upsample(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    return [make.image(shape, options.get("sliced", False)), options["size"], options["mode"]]


def _update_running_stats(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    n, c, h, w = shape
    mean, new_mean = make.vector(c), make.vector(c)
    var, new_var = make.vector(c, positive=True), make.vector(c, positive=True)
    running = [value.to(make.dtype) for value in (mean, var)]
    counter = torch.tensor(3, device=make.device) if options.get("counter", True) else None
    bias = make.vector(c).to(make.dtype) if options.get("bias", True) else None
    return [*running, counter, new_mean, new_var, bias, n * h * w, options.get("momentum", 0.1)]


def _upsample_concat(make: _Maker, shape: Shape, options: dict[str, Any]) -> list[Any]:
    skip = make.image(options["skip"])
    n, c, h, w = options["skip"]
    output = make.image((n, c + shape[1], h, w))  # its values are not read
    return [make.image(shape, options.get("sliced", False)), skip, output, options["mode"]]


MAKERS: dict[str, Callable[[_Maker, Shape, dict[str, Any]], list[Any]]] = {
    "bn_act": _bn_act,
    "bn_act_conv": _bn_act_conv,
    "conv2d": _conv2d,
    "conv_bias_act": _conv_bias_act,
    "conv_bn_act": _conv_bn_act,
    "conv_transpose2d": _conv_transpose2d,
    "update_running_stats": _update_running_stats,
    "upsample": _upsample,
    "upsample_concat": _upsample_concat,
}


def _cases() -> list[Case]:
    odd, vectors = (2, 5, 7, 9), (2, 16, 6, 8)
    table: list[tuple[str, str, Shape, dict[str, Any]]] = [
        ("bn_act", "training", odd, {}),
        ("bn_act", "training-wide", (1, 70, 9, 5), {}),
        ("bn_act", "one-channel", (3, 1, 5, 6), {}),
        ("bn_act", "one-pixel", (4, 6, 1, 1), {"residual": "tensor"}),
        ("bn_act", "no-affine", odd, {"affine": False}),
        ("bn_act", "no-relu", odd, {"relu": False, "residual": "tensor"}),
        ("bn_act", "large-mean", vectors, {"mean": 30.0}),
        ("bn_act", "sliced", odd, {"sliced": True, "residual": "tensor"}),
        ("bn_act", "residual", odd, {"residual": "tensor"}),
        ("bn_act", "residual-norm", odd, {"residual": "norm"}),
        ("bn_act", "residual-norm-no-affine", odd, {"residual": "norm", "affine": False}),
        ("bn_act", "pool", odd, {"pool": True}),
        ("bn_act", "pool-even-residual", vectors, {"pool": True, "residual": "tensor"}),
        ("bn_act", "pool-thin", (2, 3, 2, 7), {"pool": True}),
        ("bn_act", "frozen", odd, {"frozen": True}),
        ("bn_act", "frozen-residual", odd, {"frozen": True, "residual": "tensor"}),
        (
            "bn_act",
            "frozen-residual-norm-pool",
            odd,
            {"frozen": True, "residual": "norm", "pool": True},
        ),
        ("conv2d", "one-source", odd, {}),
        ("conv2d", "no-bias", odd, {"bias": False}),
        ("conv2d", "wide", (2, 32, 7, 6), {"out": 48}),  # Winograd in float32 on a CPU
        ("conv2d", "1x1", odd, {"kernel": 1}),
        ("conv2d", "stride", odd, {"stride": 2}),
        ("conv2d", "dilation", odd, {"dilation": 2}),
        ("conv2d", "groups", (2, 6, 5, 4), {"groups": 3, "out": 9}),
        ("conv2d", "sliced", odd, {"sliced": True}),
        ("conv2d", "two-sources", odd, {"skip": (2, 3, 7, 9)}),
        ("conv2d", "two-sources-nearest", odd, {"skip": (2, 3, 15, 18), "upsample": "nearest"}),
        ("conv2d", "two-sources-bilinear", odd, {"skip": (2, 3, 14, 19), "upsample": "bilinear"}),
        (
            "conv2d",
            "two-sources-aligned-stride",
            odd,
            {"skip": (2, 3, 15, 18), "upsample": "bilinear_align_corners", "stride": 2},
        ),
        ("conv_bn_act", "training", odd, {}),
        (
            "conv_bn_act",
            "stride-residual-norm",
            odd,
            {"stride": 2, "residual": "norm", "bias": False},
        ),
        ("conv_bn_act", "residual-pool", odd, {"residual": "tensor", "pool": True}),
        ("conv_bn_act", "frozen-bias", odd, {"frozen": True}),
        ("conv_bn_act", "frozen-residual", odd, {"frozen": True, "residual": "tensor"}),
        ("conv_bn_act", "1x1-no-relu", odd, {"kernel": 1, "relu": False}),
        (
            "conv_bn_act",
            "two-sources",
            odd,
            {"skip": (2, 3, 14, 18), "upsample": "bilinear_align_corners", "pool": True},
        ),
        ("bn_act_conv", "training", odd, {}),
        ("bn_act_conv", "aligned", vectors, {"out": 8}),  # what tensor descriptors can address
        ("bn_act_conv", "recompute", odd, {"recompute": True}),
        ("bn_act_conv", "frozen-recompute", odd, {"recompute": True, "frozen": True}),
        ("bn_act_conv", "stride-no-relu", odd, {"stride": 2, "relu": False, "affine": False}),
        ("conv_bias_act", "bias", odd, {}),
        ("conv_bias_act", "residual", odd, {"residual": "tensor"}),
        ("conv_bias_act", "wide-residual", (2, 32, 7, 6), {"out": 48, "residual": "tensor"}),
        ("conv_bias_act", "no-bias-stride", odd, {"bias": False, "stride": 2, "relu": False}),
        ("conv_bias_act", "residual-no-relu", odd, {"residual": "tensor", "relu": False}),
        ("conv_transpose2d", "bias", odd, {}),
        ("conv_transpose2d", "no-bias", vectors, {"bias": False, "out": 8}),
        ("conv_transpose2d", "output-padding", odd, {"output_padding": [1, 1]}),
        ("conv_transpose2d", "sliced", odd, {"sliced": True, "output_padding": [0, 1]}),
        ("upsample", "nearest-double", odd, {"size": [14, 18], "mode": "nearest"}),
        ("upsample", "nearest-odd", odd, {"size": [15, 5], "mode": "nearest"}),
        ("upsample", "bilinear-double", odd, {"size": [14, 18], "mode": "bilinear"}),
        ("upsample", "bilinear-down", odd, {"size": [3, 4], "mode": "bilinear"}),
        ("upsample", "aligned-odd", odd, {"size": [15, 17], "mode": "bilinear_align_corners"}),
        ("upsample", "aligned-to-one", odd, {"size": [1, 1], "mode": "bilinear_align_corners"}),
        ("upsample", "from-one", (2, 3, 1, 1), {"size": [4, 3], "mode": "bilinear_align_corners"}),
        ("upsample", "sliced", odd, {"size": [9, 9], "mode": "bilinear", "sliced": True}),
    ]
    return [Case(*line) for line in table]


def _mutating_cases() -> list[Case]:
    odd, even = (2, 5, 7, 9), {"skip": (2, 3, 14, 18)}
    table: list[tuple[str, str, Shape, dict[str, Any]]] = [
        ("update_running_stats", "moving-average", odd, {}),
        ("update_running_stats", "cumulative-average", odd, {"momentum": None}),
        ("update_running_stats", "no-counter-wide", (2, 70, 3, 3), {"counter": False}),
        ("update_running_stats", "one-value-no-bias", (1, 6, 1, 1), {"bias": False}),
        ("upsample_concat", "nearest-odd", odd, {"skip": (2, 3, 15, 19), "mode": "nearest"}),
        ("upsample_concat", "bilinear", odd, {**even, "mode": "bilinear", "sliced": True}),
        ("upsample_concat", "aligned", odd, {**even, "mode": "bilinear_align_corners"}),
    ]
    return [Case(*line) for line in table]


CASES = _cases()
# Of the operators that write into an argument and have no derivative.
MUTATING_CASES = _mutating_cases()


def make_inputs(
    case: Case,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.channels_last,
    *,
    seed: int = 0,
    requires_grad: bool = False,
    device: torch.device | str | None = None,
) -> list[Any]:
    """Return the operator's arguments without `backend`.

    Args:
        case: a line of :data:`CASES` or :data:`MUTATING_CASES`.
        dtype: of the images and weights; statistics and affine vectors are float32, or float64.
        layout: of the images and weights.
        seed: of the random values.
        requires_grad: set it on every floating tensor but given statistics.
        device: of all tensors; None for torch's default device.
    """
    make = _Maker(dtype, layout, seed, device or torch.get_default_device())
    inputs = MAKERS[case.operator](make, case.shape, case.options)
    if requires_grad:
        for name, value in zip(argument_names(case.operator), inputs, strict=True):
            if isinstance(value, Tensor) and name.split("_")[-1] not in ("mean", "var"):
                value.requires_grad_()
    return inputs


def argument_names(operator: str) -> list[str]:
    """Names of an operator's arguments without `backend`, as its schema has them."""
    overload = getattr(torch.ops.resunet_fast, operator).default
    return [argument.name for argument in overload._schema.arguments][:-1]
