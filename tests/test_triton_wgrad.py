"""Weight and bias gradients in Triton: both forms of the kernel against float64 ATen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from resunet_fast import environment
from resunet_fast.ops.backends import triton_unavailable
from resunet_fast.testing import assert_close, tolerance

if triton_unavailable():
    pytest.skip("; ".join(triton_unavailable()), allow_module_level=True)

from resunet_fast.ops.conv2d import triton_wgrad

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16)
if DEVICE == "cpu":
    DTYPES = (torch.float64, torch.float32, *DTYPES)

# name: shape of x, channels of the result, kernel, stride, padding, and the boxes (None: pointers)
Geometry = tuple[
    tuple[int, int, int, int], int, tuple[int, int], int, tuple[int, int], tuple[int, int] | None
]
GEOMETRIES: dict[str, Geometry] = {
    "first layer": ((2, 3, 7, 9), 20, (3, 3), 1, (1, 1), None),
    "odd size": ((1, 8, 5, 19), 8, (3, 3), 1, (1, 1), None),
    "odd channels": ((2, 17, 8, 8), 5, (3, 3), 1, (1, 1), None),
    "1x1": ((2, 9, 6, 7), 33, (1, 1), 1, (0, 0), None),
    "stride": ((2, 8, 8, 8), 16, (3, 3), 2, (1, 1), None),
    "stride, odd size": ((2, 5, 9, 7), 6, (3, 3), 2, (1, 1), None),
    "2x2 stride 2": ((2, 6, 9, 8), 5, (2, 2), 2, (0, 0), None),
    "oblong": ((1, 5, 9, 8), 4, (3, 2), 1, (0, 1), None),
    "one pixel": ((1, 4, 1, 1), 4, (3, 3), 1, (1, 1), None),
    "one channel": ((2, 1, 5, 6), 1, (3, 3), 1, (1, 1), None),
    "squares": ((1, 8, 24, 8), 24, (3, 3), 1, (1, 1), (8, 8)),
    "bars": ((2, 16, 6, 32), 8, (3, 3), 1, (1, 1), (2, 32)),
    "rows": ((1, 8, 3, 128), 16, (3, 3), 1, (1, 1), (1, 64)),
    "no full box": ((2, 8, 4, 12), 8, (3, 3), 1, (1, 1), None),
    "thirds of rows": ((1, 8, 2, 96), 8, (3, 3), 1, (1, 1), (1, 32)),
    "boxes, 1x1": ((2, 40, 8, 16), 24, (1, 1), 1, (0, 0), (4, 16)),
    "boxes, oblong": ((1, 8, 6, 17), 8, (3, 2), 1, (0, 0), (4, 16)),
}
POINTERS = [name for name, geometry in GEOMETRIES.items() if geometry[-1] is None]
BOXES = [name for name in GEOMETRIES if name not in POINTERS]


def image(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return values.contiguous(memory_format=torch.channels_last)


def operands(name: str, dtype: torch.dtype = DTYPES[0]) -> tuple[Tensor, Tensor]:
    """Gradient and input of a convolution of that geometry."""
    (n, c, h, w), k, kernel, stride, padding, _ = GEOMETRIES[name]
    axes = zip((h, w), kernel, padding, strict=True)
    oh, ow = ((size + 2 * p - taps) // stride + 1 for size, taps, p in axes)
    return image(n, k, oh, ow, dtype=dtype, seed=1), image(n, c, h, w, dtype=dtype, seed=2)


def ours(name: str, grad: Tensor, x: Tensor, skip: Tensor | None = None) -> Tensor:
    _, _, kernel, stride, padding, _ = GEOMETRIES[name]
    return triton_wgrad.weight_gradient(grad, x, kernel, (stride, stride), padding, skip=skip)


def judge(name: str, grad: Tensor, x: Tensor) -> Tensor:
    """ATen in float64, on the CPU: a GPU's own may add in any order."""
    _, _, kernel, stride, padding, _ = GEOMETRIES[name]
    grad, x = grad.double().cpu(), x.double().cpu()
    weight = x.new_zeros(grad.shape[1], x.shape[1], *kernel)
    flags = ([stride] * 2, padding, [1, 1], False, [0, 0], 1, [False, True, False])
    return torch.ops.aten.convolution_backward(grad, x, weight, None, *flags)[1]


def check(name: str, result: Tensor, expected: Tensor, dtype: torch.dtype, pixels: int) -> None:
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert result.is_contiguous(memory_format=torch.channels_last)
    # Operands are exact and the result is not rounded to their dtype.
    assert_close(name, result.cpu(), expected, tolerance(result.dtype, pixels))


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and few pixels per partial, so that ragged tiles and many splits occur."""
    configure = triton_wgrad.configure

    def shrunken(*sizes: int) -> triton_wgrad.Config:
        config = configure(*sizes)
        return replace(config, block_k=16, block_c=16, split=config.block_p)

    monkeypatch.setattr(triton_wgrad, "configure", shrunken)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_weight_gradient(name: str, dtype: torch.dtype) -> None:
    grad, x = operands(name, dtype)
    stride = GEOMETRIES[name][3]
    assert triton_wgrad.box_of(grad, x, (stride, stride)) == GEOMETRIES[name][-1]
    pixels = grad.numel() // grad.shape[1]
    check(name, ours(name, grad, x), judge(name, grad, x), dtype, pixels)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_many_splits_and_ragged_tiles(name: str) -> None:
    for dtype in DTYPES:
        grad, x = operands(name, dtype)
        pixels = grad.numel() // grad.shape[1]
        check(name, ours(name, grad, x), judge(name, grad, x), dtype, pixels)


@pytest.mark.parametrize("name", BOXES)
def test_pointers_compute_what_boxes_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grad, x = operands(name)
    monkeypatch.setattr(triton_wgrad, "box_of", lambda *_: None)
    check(name, ours(name, grad, x), judge(name, grad, x), x.dtype, grad[:, 0].numel())


@pytest.mark.parametrize("name", ["odd size", "bars"])
def test_two_sources_without_their_concatenation(name: str) -> None:
    grad, x = operands(name)
    skip = image(x.shape[0], 3, *x.shape[2:], dtype=x.dtype, seed=3)
    result = ours(name, grad, x, skip)
    expected = judge(name, grad, torch.cat([x, skip], 1))
    check(name, result, expected, x.dtype, grad[:, 0].numel())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels of a buffer": lambda t: torch.cat([t, t, t], 1)[:, t.shape[1] : 2 * t.shape[1]],
    "rows of a buffer": lambda t: torch.cat([t, t], 2)[:, :, t.shape[2] :],
    "odd offset": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
    "expanded": lambda t: t[:, :, :1, :1].expand_as(t),
    "expanded batch": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["stride, odd size", "bars"])
def test_any_strides(name: str, view: str) -> None:
    grad, x = operands(name)
    for g, source in ((VIEWS[view](grad), x), (grad, VIEWS[view](x))):
        check(view, ours(name, g, source), judge(name, g, source), x.dtype, g[:, 0].numel())


def test_boxes_need_whole_16_bytes() -> None:
    grad, x = operands("bars")
    assert triton_wgrad.box_of(grad, VIEWS["channels of a buffer"](x), (1, 1)) is not None
    assert triton_wgrad.box_of(grad, VIEWS["odd offset"](x), (1, 1)) is None
    assert triton_wgrad.box_of(grad, VIEWS["expanded batch"](x), (1, 1)) is None
    assert triton_wgrad.box_of(VIEWS["channels of a buffer"](grad), x, (1, 1)) is None


@pytest.mark.parametrize(
    ("capability", "boxes"), [((8, 9), False), ((9, 0), True), ((12, 0), False)]
)
def test_boxes_need_a_gpu_that_holds_them(
    capability: tuple[int, int], boxes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "compute_capability", lambda _: capability)
    grad, x = operands("bars")
    assert (triton_wgrad.box_of(grad, x, (1, 1)) is not None) == boxes


@pytest.mark.parametrize("name", ["1x1", "bars"])
@pytest.mark.usefixtures("short_splits")
def test_the_same_bits_at_every_call(name: str) -> None:
    grad, x = operands(name, torch.float16)
    first = ours(name, grad, x)
    assert all(torch.equal(ours(name, grad, x), first) for _ in range(3))


@pytest.mark.parametrize("name", ["odd size", "bars"])
def test_nan_and_infinity_stay_in_their_channels(name: str) -> None:
    """Also those at the border of the image, which not all taps reach."""
    grad, x = operands(name)
    x[0, 3, 0, -1] = torch.inf
    x[0, 5, 2, -1] = torch.nan
    result, expected = ours(name, grad, x).cpu(), judge(name, grad, x)
    assert torch.equal(result.isfinite(), expected.isfinite())
    assert not result[:, 5, 1, 1].isfinite().any()
    assert result[:, [0, 1, 2, 4, 6, 7]].isfinite().all()
    grad[0, 2, 1, 4] = torch.nan
    result = ours(name, grad, x).cpu()
    assert result[2].isnan().all()
    assert torch.equal(result[:2].isfinite(), expected[:2].isfinite())


def test_nothing_is_left_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(
        Tensor, "new_empty", lambda t, *a, **k: t.new_full(a, torch.nan, **k), raising=True
    )
    monkeypatch.setattr(triton_wgrad, "MAX_PIXELS_PER_PARTIAL", 64)
    monkeypatch.setattr(triton_wgrad, "_MIN_PIXELS_PER_PARTIAL", 64)
    for name in ("first layer", "bars"):
        grad, x = operands(name)
        assert ours(name, grad, x).isfinite().all()
        assert triton_wgrad.bias_gradient(grad).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_no_pixels_give_zeros(shape: tuple[int, int, int, int]) -> None:
    grad, x = torch.empty(shape, device=DEVICE), torch.empty(shape, device=DEVICE)
    result = triton_wgrad.weight_gradient(grad, x, (1, 1), (1, 1), (0, 0))
    assert torch.equal(result, torch.zeros(4, 4, 1, 1, device=DEVICE))
    assert torch.equal(triton_wgrad.bias_gradient(grad), torch.zeros(4, device=DEVICE))


def test_long_sums_keep_their_digits() -> None:
    """Terms that are added exactly up to a sum of 2 ** 14 and vanish in one of 2 ** 15."""
    x = image(1, 8, 256, 256, dtype=torch.float16, seed=0).fill_(1)
    x[..., ::64] = 2.0**-10
    grad = torch.ones_like(x)
    result = triton_wgrad.weight_gradient(grad, x, (1, 1), (1, 1), (0, 0))
    expected = x.double().sum((0, 2, 3))
    allowed = tolerance(torch.float32)
    assert_close("weight", result[..., 0, 0].cpu(), expected.expand(8, 8).cpu(), allowed)
    assert_close("bias", triton_wgrad.bias_gradient(x).cpu(), expected.cpu(), allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(2, 5, 7, 9), (1, 70, 24, 33), (3, 1, 1, 1)])
def test_bias_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for view in VIEWS.values():
        grad = view(image(*shape, dtype=dtype, seed=1))
        result = triton_wgrad.bias_gradient(grad)
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = grad.double().sum((0, 2, 3)).cpu()
        assert_close("bias", result.cpu(), expected, tolerance(result.dtype, grad[:, 0].numel()))


@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("pixels", [1, 100, 2**14, 2**22, 2**31])
@pytest.mark.parametrize(("k", "columns", "taps"), [(64, 27, 1), (64, 64, 9), (1024, 1024, 9)])
def test_sums_are_never_longer_than_the_bound(
    k: int, columns: int, taps: int, pixels: int, multiprocessors: int
) -> None:
    config = triton_wgrad.configure(pixels, k, columns, taps, multiprocessors)
    assert config.split <= triton_wgrad.MAX_PIXELS_PER_PARTIAL
    assert config.split % config.block_p == 0
    splits = -(-pixels // config.split)
    tiles = taps * -(-k // config.block_k) * -(-columns // config.block_c)
    assert splits * tiles < 2**31  # programs are numbered in 32 bits
    if pixels >= 2**22:
        assert splits * tiles >= multiprocessors, "some multiprocessors have no work"
