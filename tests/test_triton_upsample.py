"""The Triton kernels of upsampling and of the running statistics."""

from __future__ import annotations

import itertools

import guard_bands
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resunet_fast.ops.backends import triton_unavailable
from resunet_fast.ops.running_stats import reference as running_reference
from resunet_fast.ops.upsample import reference
from resunet_fast.ops.upsample.reference import MODES
from resunet_fast.ops.upsample.triton_tiling import Blocks, readers
from resunet_fast.testing import assert_close, tolerance

pytestmark = pytest.mark.skipif(bool(triton_unavailable()), reason="; ".join(triton_unavailable()))
kernel = pytest.importorskip("resunet_fast.ops.upsample.triton_kernel")
running = pytest.importorskip("resunet_fast.ops.running_stats.triton_kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
layouts = pytest.mark.parametrize("layout", LAYOUTS)
modes = pytest.mark.parametrize("mode", MODES)
SMALL = Blocks(elements=64, pixels=32, channels=4)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "blocks_for", lambda *, backward: SMALL)


def image(layout: str, *shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=LAYOUTS[layout]).to(DEVICE)


# To and from one pixel, doubled, tripled (where float32 coordinates are rounded), odd, shrunk.
SIZES = [
    ((1, 1), (5, 3)),
    ((4, 3), (8, 6)),
    ((4, 3), (12, 9)),
    ((3, 4), (7, 9)),
    ((9, 11), (4, 1)),
]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("size", "target"), SIZES)
@modes
@layouts
def test_both_ways_in_small_blocks(
    layout: str, mode: str, size: tuple[int, int], target: tuple[int, int]
) -> None:
    x = image(layout, 1, 3, *size)
    y = kernel.forward(x, target, mode)
    assert_close("output", y, reference.forward(x, target, mode), tolerance(torch.float64, 4))
    dy = torch.empty_like(y).copy_(image(layout, *y.shape, seed=1))
    dx = kernel.backward(dy, size, mode)
    assert dx.stride() == x.stride()
    assert_close(
        "gradient", dx, reference.backward(dy, size, mode), 4 * tolerance(torch.float64, 64)
    )


@pytest.mark.usefixtures("small_blocks")
def test_the_same_bits_every_time() -> None:
    dy = image("nhwc", 1, 3, 12, 9, dtype=torch.float32)
    first, second = (kernel.backward(dy, (4, 3), "bilinear") for _ in range(2))
    assert torch.equal(first, second)


def test_nearest_takes_the_pixels_that_torch_takes() -> None:
    for size, target in itertools.product((1, 3, 7, 29, 64), (1, 5, 29, 83, 200)):
        x = torch.arange(size, dtype=torch.float32, device=DEVICE).view(1, 1, 1, size)
        expected = F.interpolate(x, size=[1, target], mode="nearest")
        assert torch.equal(kernel.forward(x, (1, target), "nearest"), expected), (size, target)


@modes
def test_no_output_that_reads_an_input_is_left_out(mode: str) -> None:
    for size, target in itertools.product(range(1, 40), range(1, 80)):
        matrix = reference._matrix(size, target, mode, torch.empty(0))  # [target, size], float32
        read = matrix != 0
        most = int(read.sum(0).max())
        span = max(
            int(column.nonzero()[-1] - column.nonzero()[0]) + 1
            for column in read.unbind(1)
            if column.any()
        )
        assert most <= span <= readers(size, target, mode), (size, target)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=["float64", "float16"])
@modes
@layouts
def test_a_skip_is_copied_and_the_gradient_of_a_slice_gathered(
    layout: str, mode: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.float64:
        monkeypatch.setattr(kernel, "blocks_for", lambda *, backward: SMALL)
    x, skip = image(layout, 2, 5, 3, 4, dtype=dtype), image(layout, 2, 3, 6, 7, dtype=dtype)
    y = image(layout, 2, 8, 6, 7, dtype=dtype)
    kernel.write(x, skip, mode, y)
    assert torch.equal(y[:, :5], kernel.forward(x, (6, 7), mode))
    assert torch.equal(y[:, 5:], skip)
    dy = torch.empty_like(y).copy_(image(layout, *y.shape, seed=2))
    dx = kernel.backward(dy[:, :5], (3, 4), mode)
    assert dx.stride() == x.stride()
    judge = reference.backward(dy[:, :5].double(), (3, 4), mode)
    assert_close("gradient", dx, judge, 4 * tolerance(dtype, 64))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("mode", ["nearest", "bilinear_align_corners"])
@layouts
def test_nothing_beside_an_image_is_read_or_written(layout: str, mode: str) -> None:
    x, skip, y = (image(layout, 2, c, *size) for c, size in ((5, (3, 4)), (3, (7, 5)), (8, (7, 5))))
    guard_bands.check("upsample_concat", (x, skip, y, mode), "triton")
    guard_bands.check("upsample_backward", (image(layout, 2, 5, 7, 5), (3, 4), mode), "triton")


@pytest.mark.parametrize("count", [0, 2, 24])
@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_running_statistics(
    dtype: torch.dtype, momentum: float | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "BLOCK_C", 4)  # more than one block of channels
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var, bias = (image("nchw", 1, 1, 1, 7, seed=i).view(7) for i in range(3))
    given = (mean.to(stats), var.abs().to(stats), bias.to(dtype), count, momentum)
    start = [mean.to(dtype), var.abs().to(dtype), torch.tensor(4, device=DEVICE)]
    moved, expected = ([t.clone() for t in start] for _ in range(2))
    running.update(*moved, *given)
    running_reference.update(*expected, *given)
    for result, judge in zip(moved[:2], expected[:2], strict=True):
        assert_close("running", result, judge.double(), torch.finfo(dtype).eps)
    assert int(moved[2]) == 5
    assert torch.equal(moved[0], start[0]) == (count == 0 or momentum == 0.0)


def test_running_statistics_with_strides_and_without_a_counter() -> None:
    whole = torch.ones(6, device=DEVICE)
    view = whole[::2]
    mean, var = torch.full((3,), 3.0, device=DEVICE), torch.ones(3, device=DEVICE)
    running.update(view, torch.ones(3, device=DEVICE), None, mean, var, None, 8, 0.5)
    assert torch.equal(whole.cpu(), torch.tensor([2.0, 1.0] * 3))
