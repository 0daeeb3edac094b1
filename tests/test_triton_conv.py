"""Convolutions in Triton: both kernels and every epilogue against float64 ATen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from launches import spy
from torch import Tensor

from resunet_fast.ops.backends import triton_unavailable
from resunet_fast.testing import assert_close, tolerance

if triton_unavailable():
    pytest.skip("; ".join(triton_unavailable()), allow_module_level=True)

from resunet_fast.ops.conv2d import triton_kernel, triton_launch
from resunet_fast.ops.conv2d.op import ConvArguments
from resunet_fast.ops.conv2d.triton_launch import Epilogue, Result

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = HALVES if DEVICE == "cuda" else (torch.float64, torch.float32, *HALVES)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
Shape = tuple[int, int, int, int]

# name: shape of x, filters; 3x3 filters, 8 channels or multiples of them: boxes
BOXES: dict[str, tuple[Shape, int]] = {
    "odd size": ((2, 16, 7, 9), 24),
    "ragged tiles": ((1, 8, 19, 33), 8),
    "more filters than a tile": ((1, 8, 4, 5), 136),
    "more channels than a step": ((1, 72, 4, 6), 8),
    "one row": ((2, 8, 1, 20), 8),
    "one pixel": ((3, 8, 1, 1), 8),
}
# name: shape of x, filters, kernel, stride, padding
POINTERS: dict[str, tuple[Shape, int, tuple[int, int], tuple[int, int], tuple[int, int]]] = {
    "first layer": ((2, 3, 7, 9), 20, (3, 3), (1, 1), (1, 1)),
    "odd channels": ((1, 37, 6, 7), 5, (3, 3), (1, 1), (1, 1)),
    "more pixels than a tile": ((2, 5, 13, 11), 3, (3, 3), (1, 1), (1, 1)),
    "1x1": ((2, 9, 6, 7), 33, (1, 1), (1, 1), (0, 0)),
    "stride": ((2, 8, 8, 9), 8, (3, 3), (2, 2), (1, 1)),
    "1x1 stride": ((1, 8, 7, 8), 8, (1, 1), (2, 2), (0, 0)),
    "oblong": ((1, 5, 9, 8), 4, (3, 2), (2, 1), (0, 1)),
    "padding beyond the kernel": ((1, 4, 3, 4), 4, (3, 3), (1, 1), (4, 3)),
    "one pixel": ((2, 5, 1, 1), 4, (3, 3), (1, 1), (1, 1)),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of the two kernels ran, in order."""
    seen: list[str] = []
    kernels = {f"conv2d_fwd_{name}_kernel": name for name in ("tma", "pointer")}
    spy(monkeypatch, triton_launch, kernels, seen)
    return seen


def image(
    *shape: int, dtype: torch.dtype = DTYPES[0], layout: str = "nhwc", scale: float = 1.0
) -> Tensor:
    values = (torch.randn(shape) * scale).to(DEVICE, dtype)
    return values.contiguous(memory_format=LAYOUTS[layout])


def filters(k: int, c: int, kernel: tuple[int, int] = (3, 3), **options: Any) -> Tensor:
    return image(k, c, *kernel, scale=(c * kernel[0] * kernel[1]) ** -0.5, **options)


def arguments(
    x: Tensor,
    weight: Tensor,
    *,
    skip: Tensor | None = None,
    bias: Tensor | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (1, 1),
) -> ConvArguments:
    return ConvArguments(x, skip, weight, bias, stride, padding, (1, 1), 1, "none")


def ours(a: ConvArguments, **epilogue: Any) -> Result:
    return triton_kernel.fused("conv2d", a, Epilogue(shift=a.bias, **epilogue))


def judge(a: ConvArguments) -> Tensor:
    """ATen in float64, on the CPU."""
    x, skip, weight, bias = (None if t is None else t.double().cpu() for t in a[:4])
    source = x if skip is None else torch.cat([x, skip], 1)
    return F.conv2d(source, weight, bias, a.stride, a.padding)


def close(name: str, result: Tensor, expected: Tensor, dtype: torch.dtype, terms: int) -> None:
    assert_close(name, result.cpu(), expected, tolerance(dtype, terms))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BOXES)
def test_boxes(name: str, dtype: torch.dtype, launches: list[str]) -> None:
    (n, c, h, w), k = BOXES[name]
    a = arguments(
        image(n, c, h, w, dtype=dtype), filters(k, c, dtype=dtype), bias=torch.randn(k).to(DEVICE)
    )
    y = ours(a).output
    assert launches == ["tma"]
    assert y.is_contiguous(memory_format=torch.channels_last)
    close("y", y, judge(a), dtype, 9 * c)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", POINTERS)
def test_pointers(name: str, layout: str, launches: list[str]) -> None:
    (n, c, h, w), k, kernel, stride, padding = POINTERS[name]
    for dtype in DTYPES:
        x = image(n, c, h, w, dtype=dtype, layout=layout)
        a = arguments(
            x, filters(k, c, kernel, dtype=dtype, layout=layout), stride=stride, padding=padding
        )
        y = ours(a).output
        assert y.is_contiguous(memory_format=LAYOUTS[layout])
        close(f"{dtype} y", y, judge(a), dtype, c * kernel[0] * kernel[1])
    assert launches == ["pointer"] * len(DTYPES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*BOXES, *POINTERS])
def test_data_gradient(name: str, layout: str) -> None:
    three = ((3, 3), (1, 1), (1, 1))
    shape, k, kernel, stride, padding = POINTERS.get(name) or (*BOXES[name], *three)
    dtype = DTYPES[0]
    x = image(*shape, dtype=dtype, layout=layout)
    weight = filters(k, shape[1], kernel, dtype=dtype, layout=layout)
    grad = torch.randn_like(judge(arguments(x, weight, stride=stride, padding=padding)))
    grad = grad.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout])
    geometry = (stride, padding, (1, 1), 1, "none")
    mask = (True, False, False, False)
    dx = triton_kernel.backward(grad, x, None, weight, None, *geometry, mask)[0]
    expected = torch.ops.aten.convolution_backward(
        *(t.double().cpu() for t in (grad, x, weight)),
        *(None, stride, padding, (1, 1), False, (0, 0), 1, (True, False, False)),
    )[0]
    assert dx is not None
    assert dx.is_contiguous(memory_format=LAYOUTS[layout])
    close("dx", dx, expected, dtype, k * kernel[0] * kernel[1])


def test_data_gradient_of_boxes_is_boxes(launches: list[str]) -> None:
    x, weight = image(1, 16, 5, 6), filters(8, 16)
    triton_kernel.data_gradient(
        image(1, 8, 5, 6),
        weight,
        triton_launch.Geometry((3, 3), padding=(1, 1)),
        (5, 6),
        torch.channels_last,
    )
    ours(arguments(x, weight, stride=(2, 2)))
    assert launches == ["tma", "pointer"]


@pytest.mark.parametrize("channels", [(8, 24), (16, 8), (3, 5)])
def test_two_sources(channels: tuple[int, int], launches: list[str]) -> None:
    first, second = channels
    dtype = DTYPES[0]
    x, skip = image(2, first, 6, 7), image(2, second, 6, 7)
    weight = filters(9 if first == 3 else 8, first + second)
    a = arguments(x, weight, skip=skip)
    close("y", ours(a).output, judge(a), dtype, 9 * (first + second))
    assert launches == ["pointer" if first == 3 else "tma"]
    grad = image(*judge(a).shape)
    geometry = ((1, 1), (1, 1), (1, 1), 1, "none")
    grads = triton_kernel.backward(grad, x, skip, weight, None, *geometry, (True,) * 3 + (False,))
    expected = torch.ops.aten.convolution_backward(
        grad.double().cpu(),
        torch.cat([x, skip], 1).double().cpu(),
        weight.double().cpu(),
        *(None, (1, 1), (1, 1), (1, 1), False, (0, 0), 1, (True, True, False)),
    )
    for name, result, part in zip(
        ("dx", "dskip"), grads, expected[0].split(channels, 1), strict=False
    ):
        assert result is not None
        close(name, result, part, dtype, 9 * weight.shape[0])
    assert grads[2] is not None
    close("dweight", grads[2], expected[1], dtype, 2 * 6 * 7)


@pytest.mark.parametrize("family", ["tma", "pointer"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_after_the_sum(dtype: torch.dtype, family: str, launches: list[str]) -> None:
    c, k = (8, 16) if family == "tma" else (5, 9)
    a = arguments(image(2, c, 9, 21, dtype=dtype), filters(k, c, dtype=dtype))
    scale, shift = torch.randn(k, device=DEVICE), torch.randn(k, device=DEVICE)
    residual = image(2, k, 9, 21, dtype=dtype)
    result = triton_kernel.fused("conv2d", a, Epilogue(scale, shift, residual, True, True))
    v = judge(a) * scale.cpu()[:, None, None] + shift.cpu()[:, None, None]
    expected = (v + residual.double().cpu()).relu()
    close("z", result.output, expected, dtype, 9 * c)
    assert torch.equal(result.pooled, F.max_pool2d(result.output, 2))
    assert launches == [family]


@pytest.mark.parametrize("family", ["tma", "pointer"])
def test_the_residual_is_added_before_the_only_rounding(family: str) -> None:
    k = 8 if family == "tma" else 7
    x = torch.full((1, 8, 4, 4), 16.0, dtype=torch.float16, device=DEVICE)
    weight = torch.full((k, 8, 3, 3), 2.0, dtype=torch.float16, device=DEVICE)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    bias = torch.full((k,), 1.0, device=DEVICE)
    residual = torch.full((1, k, 4, 4), 0.5, dtype=torch.float16, device=DEVICE)
    exact = judge(arguments(x, weight, bias=bias)) + 0.5
    z = ours(arguments(x, weight, bias=bias), residual=residual).output
    assert torch.equal(z.cpu(), exact.half())
    # Rounded before the addition as well, 8 * 9 * 32 + 1 + 0.5 comes out 2 lower.
    assert not torch.equal((exact - 0.5).half() + 0.5, exact.half())


@pytest.mark.parametrize(
    "name", ["ragged tiles", "odd size", "one row", "more filters than a tile"]
)
@pytest.mark.parametrize("family", ["tma", "pointer"])
def test_statistics_are_those_of_the_stored_values(name: str, family: str) -> None:
    (n, c, h, w), k = BOXES[name]
    for dtype in DTYPES:
        x = image(n, c, h, w, dtype=dtype) + 30
        weight = filters(k if family == "tma" else k + 1, c, dtype=dtype)
        result = ours(arguments(x, weight), statistics=True)
        y = result.output.double().cpu()
        assert result.mean is not None
        assert result.var is not None
        # The mean is many deviations from zero: the sums must not cancel.
        close(f"{dtype} mean", result.mean, y.mean((0, 2, 3)), result.mean.dtype, h * w)
        close(f"{dtype} var", result.var, y.var((0, 2, 3), correction=0), result.var.dtype, h * w)


def test_statistics_of_many_tiles_merge_in_steps() -> None:
    tiles, k = 2 * triton_launch.MERGED_TILES + 3, 21
    values = (torch.randn(tiles, 7, k, dtype=torch.float64) + 30).to(DEVICE)
    counts = torch.arange(tiles).remainder(8)  # some tiles lie outside the image
    partial = torch.zeros(tiles, 3, k, dtype=torch.float32, device=DEVICE)
    for i, count in enumerate(counts.tolist()):
        part = values[i, :count]
        if count:
            var, mean = torch.var_mean(part, 0, correction=0)
            partial[i] = torch.stack([torch.full_like(mean, count), mean, var * count])
    inside = values[torch.arange(7)[None, :] < counts[:, None]].cpu()
    mean, var = triton_launch.merge(partial)
    close("mean", mean, inside.mean(0), torch.float32, tiles)
    close("var", var, inside.var(0, correction=0), torch.float32, tiles)


@pytest.mark.parametrize("channels", [8, 5])
def test_nan_and_infinity_stay_where_they_belong(channels: int) -> None:
    x, weight = image(1, channels, 9, 20), filters(channels, channels)
    weight[1] = torch.nan
    x[0, 0, 4, 4] = torch.nan
    y = ours(arguments(x, weight), relu=True).output.cpu()
    expected = judge(arguments(x, weight)).relu()
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[0, 0, 2].isfinite().all()


@pytest.mark.parametrize("channels", [8, 5])
def test_statistics_of_infinity(channels: int) -> None:
    x, weight = image(1, channels, 4, 20), filters(channels, channels).abs()
    x[0, 0, 2, 2] = torch.inf
    result = ours(arguments(x, weight), statistics=True)
    assert result.mean is not None
    assert result.var is not None
    assert (result.mean == torch.inf).all()
    assert result.var.isnan().all()


@pytest.mark.parametrize("channels", [8, 5])
def test_relu_of_negative_zero_and_pooling_of_nan(channels: int) -> None:
    x, weight = image(1, channels, 4, 4), filters(channels, channels)
    x[0, :, :, 2:] = 0
    x[0, 0, 0, 0] = torch.nan
    a = arguments(x, weight)
    result = ours(a, scale=torch.full((channels,), -1.0, device=DEVICE), relu=True, pool=True)
    assert result.pooled is not None
    z = result.output.cpu()
    assert (z[0, :, :, 3] == 0).all()
    assert z[0, :, :, 3].signbit().all()
    assert result.pooled[0, :, 0, 0].isnan().all()
    assert result.pooled[0, :, 1, 1].isfinite().all()


def test_pooling_keeps_the_first_of_equal_elements() -> None:
    x = torch.ones(1, 8, 6, 6, device=DEVICE).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(8, 8, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    result = ours(arguments(x.to(DTYPES[0]), weight.to(DTYPES[0])), pool=True)
    assert torch.equal(result.pooled, F.max_pool2d(result.output, 2))


def test_slices_of_larger_buffers(launches: list[str]) -> None:
    whole = image(2, 24, 8, 9)
    inner, shifted = whole[:, 8:16, 1:, 2:], whole.flatten()[1 : 1 + 8 * 42].view(1, 6, 7, 8)
    for x in (inner, shifted.permute(0, 3, 1, 2)):
        a = arguments(x, filters(8, 8))
        close("y", ours(a).output, judge(a), DTYPES[0], 72)
    assert launches == ["pointer", "pointer"]  # not dense; not aligned to 16 bytes


@pytest.mark.parametrize("channels", [8, 5])
def test_a_strided_bias(channels: int) -> None:
    bias = torch.randn(16, device=DEVICE)[::2]
    a = arguments(image(1, channels, 4, 5), filters(8, channels), bias=bias)
    close("y", ours(a).output, judge(a), DTYPES[0], 72)


def test_an_expanded_gradient() -> None:
    x, weight = image(2, 8, 4, 5), filters(8, 8)
    grad = torch.ones(1, 1, 1, 1, dtype=x.dtype, device=DEVICE).expand(2, 8, 4, 5)
    rest = (None, (1, 1), (1, 1), (1, 1), 1, "none", (True, False, False, False))
    dx = triton_kernel.backward(grad, x, None, weight, *rest)[0]
    dense = triton_kernel.backward(grad.contiguous(), x, None, weight, *rest)[0]
    assert dx is not None
    assert torch.equal(dx, dense)


@pytest.mark.parametrize("channels", [8, 5])
def test_an_empty_batch(channels: int) -> None:
    y = ours(arguments(image(0, channels, 4, 5), filters(8, channels)), pool=True)
    assert y.output.shape == (0, 8, 4, 5)
    assert y.pooled is not None
    assert y.pooled.shape == (0, 8, 2, 2)


def test_weights_wider_than_the_image_are_rounded_inside() -> None:
    x, weight = image(1, 8, 5, 6, dtype=torch.bfloat16), filters(8, 8, dtype=torch.float32)
    rounded = ours(arguments(x, weight.bfloat16())).output
    assert torch.equal(ours(arguments(x, weight)).output, rounded)


def test_the_same_bits_at_every_call() -> None:
    x, weight = image(2, 8, 19, 18, dtype=torch.float16), filters(8, 8, dtype=torch.float16)
    first, second = (ours(arguments(x, weight), statistics=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_contiguous_operands_of_a_channels_last_result(launches: list[str]) -> None:
    x, weight = image(1, 8, 5, 6, layout="nchw"), filters(8, 8)
    y = ours(arguments(x, weight)).output
    assert y.is_contiguous(memory_format=torch.channels_last)
    close("y", y, judge(arguments(x, weight)), DTYPES[0], 72)
    assert launches == ["tma"]
