"""The pre-activation unit's backward in Triton: sums for the batch norm in the data gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import guard_bands
import pytest
import torch
import torch.nn.functional as F
from launches import spy
from networks import assert_same
from networks import image as network_image
from pairs import named_pair, step
from torch import Tensor, nn

from resunet_fast.ops.backends import triton_unavailable
from resunet_fast.testing import Case, assert_close, tolerance

if triton_unavailable():
    pytest.skip("; ".join(triton_unavailable()), allow_module_level=True)

import resunet_fast as rf
from resunet_fast.arguments import Conv, Norm
from resunet_fast.ops.bn_act import triton_backward
from resunet_fast.ops.conv2d import triton_kernel, triton_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16)
DTYPES = HALVES if DEVICE == "cuda" else (torch.float64, torch.float32, *HALVES)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
Shape = tuple[int, int, int, int]
Outcome = tuple[Tensor, ...]

# name: shape of x, filters; 3x3 filters, 8 channels or multiples of them: boxes
BOXES: dict[str, tuple[Shape, int]] = {
    "odd size": ((2, 24, 7, 9), 16),
    "ragged tiles": ((1, 8, 19, 33), 8),
    "more channels than a tile": ((1, 136, 4, 5), 8),
    "one row": ((2, 8, 1, 20), 8),
    "several images": ((3, 16, 2, 2), 24),
}
# name: shape of x, filters, kernel, stride, padding
POINTERS: dict[str, tuple[Shape, int, int, int, int]] = {
    "odd channels": ((2, 5, 7, 9), 3, 3, 1, 1),
    "more channels than a tile": ((1, 133, 4, 5), 7, 3, 1, 1),
    "more pixels than a tile": ((2, 3, 13, 11), 5, 3, 1, 1),
    "1x1": ((2, 9, 6, 7), 33, 1, 1, 0),
    "stride": ((2, 8, 8, 9), 8, 3, 2, 1),
    "1x1 stride": ((2, 8, 7, 8), 8, 1, 2, 0),
    "padding beyond the kernel": ((1, 4, 3, 4), 4, 3, 1, 4),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which convolutions ran, and batch norm's own sums, in order."""
    seen: list[str] = []
    kernels = {f"conv2d_fwd_{name}_kernel": name for name in ("tma", "pointer")}
    spy(monkeypatch, triton_launch, kernels, seen)
    spy(monkeypatch, triton_backward, {"bn_act_sums_bwd_kernel": "sums"}, seen)
    return seen


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every convolution, whether its epilogue sums for a batch norm."""
    seen: list[bool] = []
    convolve = triton_launch.convolve

    def note(*arguments: Any) -> triton_launch.Result:
        seen.append(arguments[-1].sums is not None)
        return convolve(*arguments)

    monkeypatch.setattr(triton_kernel, "convolve", note)
    return seen


class Unit:
    """A pre-activation unit with its input and the gradient that its backward starts from."""

    def __init__(
        self,
        shape: Shape,
        filters: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int = 1,
        *,
        dtype: torch.dtype = DTYPES[0],
        layout: str = "nhwc",
        affine: bool = True,
        training: bool = True,
        relu: bool = True,
        recompute: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def draw(*sizes: int, to: torch.dtype = wide, scale: float = 1.0) -> Tensor:
            values = torch.randn(sizes, generator=generator) * scale
            return values.to(DEVICE, to)

        def picture(*sizes: int, scale: float = 1.0) -> Tensor:
            values = draw(*sizes, to=dtype, scale=scale)
            return values.contiguous(memory_format=LAYOUTS[layout])

        c = shape[1]
        self.x = picture(*shape).requires_grad_()
        self.weight = draw(c).requires_grad_() if affine else None
        self.bias = draw(c, scale=0.5).requires_grad_() if affine else None
        self.stats = () if training else (draw(c, scale=0.5), draw(c).abs() + 0.5)
        fan_in = c * kernel * kernel
        self.filters = picture(filters, c, kernel, kernel, scale=fan_in**-0.5).requires_grad_()
        self.training, self.relu, self.recompute = training, relu, recompute
        self.geometry = ((stride, stride), (padding, padding))
        self.dtype = dtype
        sizes = [(n + 2 * padding - kernel) // stride + 1 for n in shape[2:]]
        self.grad = picture(shape[0], filters, *sizes)

    @property
    def norm(self) -> Norm:
        stats = self.stats or (None, None)
        return Norm(self.weight, self.bias, *stats, training=self.training)

    @property
    def leaves(self) -> dict[str, Tensor]:
        found = {"x": self.x, "weight": self.weight, "bias": self.bias, "filters": self.filters}
        return {name: t for name, t in found.items() if t is not None and t.requires_grad}

    def forward(self) -> Tensor:
        conv = Conv(self.filters, None, *self.geometry)
        return rf.functional.bn_act_conv(
            self.x, self.norm, conv, relu=self.relu, recompute=self.recompute
        )

    def run(self) -> Outcome:
        """The result and all gradients, by Triton."""
        with rf.use_backend("triton"):
            y = self.forward()
            return y.detach(), *torch.autograd.grad(y, list(self.leaves.values()), self.grad)

    def judge(self) -> Outcome:
        """The same in float64 by ATen, with the mask of what Triton stores."""
        with torch.no_grad(), rf.use_backend("triton"):
            z = rf.functional.bn_act(self.x, self.norm, relu=self.relu)
        assert isinstance(z, Tensor)
        twin = {n: t.detach().double().cpu().requires_grad_() for n, t in self.leaves.items()}
        stats = [t.double().cpu() for t in self.stats] or [None, None]
        v = F.batch_norm(
            twin.get("x", self.x.detach().double().cpu()),
            *stats,
            twin.get("weight"),
            twin.get("bias"),
            self.training,
        )
        if self.relu:
            v = v * (z > 0).cpu()
        y = F.conv2d(v, twin["filters"], None, *self.geometry)
        seed = self.grad.double().cpu()
        return y.detach(), *torch.autograd.grad(y, list(twin.values()), seed)

    def compare(self, results: Sequence[Tensor]) -> None:
        n, c, h, w = self.x.shape
        allowed = 4 * tolerance(self.dtype, n * h * w * max(c, 9))
        names = ("y", *(f"gradient of {name}" for name in self.leaves))
        for name, result, expected in zip(names, results, self.judge(), strict=True):
            assert_close(name, result.cpu(), expected, allowed)


def unit(name: str, **options: Any) -> Unit:
    if name in BOXES:
        return Unit(*BOXES[name], **options)
    return Unit(*POINTERS[name.removeprefix("pointer: ")], **options)


NAMES = [*BOXES, *(f"pointer: {name}" for name in POINTERS)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name: str, dtype: torch.dtype, launches: list[str]) -> None:
    one = unit(name, dtype=dtype)
    one.compare(one.run())
    family = "tma" if name in BOXES else "pointer"
    assert launches == [family] * 2  # forward and data gradient: batch norm sums nothing itself


@pytest.mark.parametrize("name", ["odd size", "pointer: odd channels", "pointer: stride"])
@pytest.mark.parametrize(
    "options",
    [
        {"relu": False},
        {"affine": False},
        {"recompute": True},
        {"training": False},
        {"layout": "nchw"},
        {"relu": False, "affine": False, "training": False},
    ],
    ids=str,
)
def test_every_kind_of_unit(name: str, options: dict[str, Any], launches: list[str]) -> None:
    one = unit(name, **options)
    one.compare(one.run())
    assert "sums" not in launches


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias", "filters"), ("filters",)])
def test_sums_are_taken_where_a_gradient_needs_them(
    wanted: tuple[str, ...], training: bool, launches: list[str], fused: list[bool]
) -> None:
    one = unit("odd size", training=training)
    for name, leaf in one.leaves.items():
        leaf.requires_grad_(name in wanted)
    results = one.run()
    gradient = "x" in wanted or "weight" in wanted or "bias" in wanted
    summed = (training and "x" in wanted) or "weight" in wanted or "bias" in wanted
    assert fused == [False, *[summed] * gradient]
    assert "sums" not in launches
    whole = unit("odd size", training=training)
    expected = dict(zip(("y", *whole.leaves), whole.run(), strict=True))
    for name, result in zip(("y", *one.leaves), results, strict=True):
        assert torch.equal(result, expected[name])


@pytest.mark.parametrize("name", ["ragged tiles", "pointer: more pixels than a tile"])
def test_the_sums_are_those_of_the_stored_gradient(name: str) -> None:
    one = unit(name, dtype=torch.float16)
    *_, dbias, _ = one.run()
    with torch.no_grad(), rf.use_backend("triton"):
        z = rf.functional.bn_act(one.x, one.norm)
    geometry = (*one.geometry, (1, 1), 1, "none", (True, False, False, False))
    dz = triton_kernel.backward(one.grad, one.x.detach(), None, one.filters, None, *geometry)[0]
    assert dz is not None
    assert isinstance(z, Tensor)
    expected = (dz.double() * (z > 0)).sum((0, 2, 3)).cpu()
    # Held to float32: rounding to float16 behind the sum would be off a thousand times more.
    assert_close("bias", dbias.cpu(), expected, tolerance(torch.float32, one.x[:, 0].numel()))


@pytest.mark.parametrize("name", ["ragged tiles", "pointer: more pixels than a tile"])
def test_the_same_bits_at_every_call(name: str) -> None:
    one = unit(name, dtype=torch.float16)
    for first, second in zip(one.run(), one.run(), strict=True):
        assert torch.equal(first, second)


def test_sums_of_many_tiles_are_added_in_groups() -> None:
    tiles, k = triton_launch.MOST_SUMS + 3, 21
    partial = torch.randn(tiles, 3, k, device=DEVICE)
    partial[:, 2] = torch.nan  # which nobody writes
    merged = triton_launch.merge_sums(partial)
    assert merged.shape == (-(-tiles // triton_launch.MERGED_TILES), 3, k)
    expected = partial[:, :2].double().sum(0).cpu()
    assert_close("sums", merged[:, :2].sum(0).cpu(), expected, tolerance(torch.float64, tiles))
    few = partial[: triton_launch.MOST_SUMS]
    assert triton_launch.merge_sums(few) is few


@pytest.mark.parametrize("name", ["ragged tiles", "pointer: more pixels than a tile"])
def test_groups_of_tiles_do_not_change_the_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = unit(name)
    monkeypatch.setattr(triton_launch, "MOST_SUMS", 1)
    monkeypatch.setattr(triton_launch, "MERGED_TILES", 2)
    one.compare(one.run())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("place", ["x", "grad"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channels", [8, 5])
def test_what_is_not_finite_stays_where_it_belongs(
    channels: int, value: float, place: str, training: bool
) -> None:
    one = Unit((1, channels, 9, 20), channels, training=training)
    with torch.no_grad():
        getattr(one, place)[0, 1, 4, 17] = value
    results = one.run()
    with rf.use_backend("reference"):
        y = one.forward()
        expected = (y, *torch.autograd.grad(y, list(one.leaves.values()), one.grad))
    for name, result, judge in zip(("y", *one.leaves), results, expected, strict=True):
        assert torch.equal(result.isnan(), judge.isnan()), name


@pytest.mark.parametrize("name", ["odd size", "pointer: odd channels", "pointer: 1x1 stride"])
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels have no float64 on a GPU")
def test_gradients_of_gradients(name: str) -> None:
    one = unit(name)

    def function(*_: Tensor) -> Tensor:
        return one.forward()

    with rf.use_backend("triton"):
        leaves = list(one.leaves.values())
        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["odd size", "pointer: odd channels"])
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels have no float64 on a GPU")
def test_a_loss_of_the_result_and_of_its_gradients(name: str) -> None:
    """Then z, kept for backward, has a gradient of its own beside that of the result."""
    one = unit(name)
    found = []
    for backend in ("triton", "reference"):
        with rf.use_backend(backend):
            y = one.forward()
            leaves = list(one.leaves.values())
            grads = torch.autograd.grad(y, leaves, one.grad, create_graph=True)
            loss = y.sin().sum() + sum(grad.sin().sum() for grad in grads)
            found.append(torch.autograd.grad(loss, leaves))
    assert_same(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 8, 19, 33), (2, 5, 13, 11)], ids=str)
def test_between_guard_bands(shape: Shape, layout: str) -> None:
    case = Case("bn_act_conv", "bands", shape, {"out": 8})
    assert guard_bands.check_case(case, "triton", torch.float32, LAYOUTS[layout]) > 1


def test_a_slice_of_a_larger_buffer(launches: list[str]) -> None:
    one = unit("odd size")
    whole = torch.randn(2, 40, 8, 11, dtype=one.dtype).to(DEVICE)
    whole = whole.contiguous(memory_format=torch.channels_last)
    one.x = whole[:, 8:32, 1:, 2:].requires_grad_()
    one.compare(one.run())
    assert launches == ["tma"] * 2


@pytest.mark.parametrize("filters", [8, 5])  # boxes, pointers
def test_sums_with_a_slice_of_a_larger_buffer(filters: int) -> None:
    one = Unit((2, filters, 7, 9), filters)
    whole = torch.randn(2, filters + 3, 8, 11, dtype=one.dtype).to(DEVICE)
    window = whole.contiguous(memory_format=torch.channels_last)[:, :filters, 1:, 2:]
    geometry = triton_launch.Geometry((3, 3), padding=(1, 1))
    vectors = [torch.full((filters,), value, device=DEVICE) for value in (0.0, 1.0)]

    def sums(x: Tensor) -> Tensor:
        norm = triton_launch.Normalised(x, *vectors, None, None, 1e-5, True)
        epilogue = triton_launch.Epilogue(sums=norm)
        arguments = (one.grad, one.filters.detach(), geometry, (7, 9), torch.channels_last)
        found = triton_kernel.data_gradient(*arguments, epilogue).sums
        assert found is not None
        return found[:, :2]

    dense = window.contiguous(memory_format=torch.channels_last)
    assert torch.equal(sums(window), sums(dense))


def test_an_expanded_gradient(launches: list[str]) -> None:
    one = unit("odd size")
    one.grad = one.grad[:1, :, :1, :1].expand(one.grad.shape)
    one.compare(one.run())
    assert launches == ["tma", "pointer"]


def test_an_input_that_descriptors_cannot_address(launches: list[str]) -> None:
    one = unit("odd size")
    buffer = torch.randn(one.x.numel() + 1, dtype=one.dtype).to(DEVICE)
    one.x = buffer[1:].view(one.x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).requires_grad_()
    one.compare(one.run())
    # z is a tensor of its own; x is not aligned to 16 bytes.
    assert launches == ["tma", "pointer"]


def test_an_empty_batch() -> None:
    one = Unit((0, 8, 4, 5), 8, training=False)
    y, *grads = one.run()
    assert y.shape == (0, 8, 4, 5)
    assert grads[0].shape == one.x.shape
    assert all((grad == 0).all() for grad in grads[1:])


def test_weights_wider_than_the_image() -> None:
    one = unit("odd size", dtype=torch.bfloat16)
    rounded = one.run()
    one.filters = one.filters.detach().float().requires_grad_()
    wide = one.run()
    assert wide[-1].dtype == torch.float32
    for result, expected in zip(wide[:-1], rounded[:-1], strict=True):
        assert torch.equal(result, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels have no float64 on a GPU")
def test_the_whole_pre_activation_network(launches: list[str], fused: list[bool]) -> None:
    fast, plain = named_pair("deep_resunet", width_factors=(1, 2))
    x = network_image(1, 3, 8, 10)
    with rf.use_backend("triton"):
        own = step(fast, x)
    assert_same(own, step(plain, x))
    norms = [name for name, m in plain.named_modules() if isinstance(m, nn.BatchNorm2d)]
    shortcuts = [name for name in norms if "downsample" in name]
    assert sum(fused) == len(norms) - len(shortcuts)
    assert launches.count("sums") == len(shortcuts)
