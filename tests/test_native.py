"""The compiled CPU operators against plain torch in float64: values, semantics, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import native_calls as call
import pytest
import torch
import torch.nn.functional as F
from native_calls import Norm, Shape, image, leaf, like
from torch import Tensor

from resunet_fast import native
from resunet_fast.testing import assert_close, tolerance

pytestmark = [
    pytest.mark.skipif(bool(native.unavailable()), reason="; ".join(native.unavailable())),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Few and many channels, odd sides, one channel, more lanes than a block, planes of several tiles.
SHAPES: list[Shape] = [(2, 3, 5, 7), (3, 8, 9, 6), (1, 1, 17, 33), (2, 300, 6, 5), (1, 2, 190, 201)]
SMALL = SHAPES[:4]
MODES: list[dict[str, Any]] = [
    {"mode": "nearest"},
    {"mode": "bilinear", "align_corners": False},
    {"mode": "bilinear", "align_corners": True},
]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", call.LAYOUTS)
small_shapes = pytest.mark.parametrize("shape", SMALL, ids=str)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The images are too small to share; what threads change is tested in test_native_calls.py."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_bits(a: Tensor, b: Tensor) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integers), b.view(integers))


@dtypes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stats(dtype: torch.dtype, layout: str, shape: Shape) -> None:
    x = image(shape, dtype, layout) + 0.5
    mean, var = call.stats(x)
    allowed = max(tolerance(mean.dtype), 1e-13)  # torch's own float64 is off by as much
    assert_close("mean", mean, x.double().mean((0, 2, 3)), allowed)
    assert_close("var", var, x.double().var((0, 2, 3), unbiased=False), allowed)


@layouts
@pytest.mark.parametrize("shape", [(4, 5, 96, 96), (2, 64, 70, 70)], ids=str)
def test_variance_far_below_the_mean(layout: str, shape: Shape) -> None:
    x = (image(shape, torch.float32, layout) + 1000.0).contiguous(
        memory_format=call.LAYOUTS[layout]
    )
    _, var = call.stats(x)
    assert_close("var", var, x.double().var((0, 2, 3), unbiased=False), 1e-6)


@layouts
def test_variance_when_the_beginning_is_unlike_the_rest(layout: str) -> None:
    x = image((2, 5, 128, 128), torch.float32, layout)
    x[0, :, :1] = 1e4
    _, var = call.stats(x)
    assert_close("var", var, x.double().var((0, 2, 3), unbiased=False), 1e-5)


@layouts
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_stats_of_a_channel_that_is_not_finite(layout: str, value: float) -> None:
    x = image((2, 3, 40, 40), torch.float32, layout)
    x[1, 1, 7, 7] = value
    mean, var = call.stats(x)
    assert torch.equal(mean[1], torch.tensor(value)) or (mean[1].isnan() and value != value)
    assert var.isnan().tolist() == [False, True, False]
    assert mean[[0, 2]].isfinite().all()


def test_variance_of_a_constant_is_zero() -> None:
    _, var = call.stats(torch.full((2, 3, 50, 50), 1000.1))
    assert var.tolist() == [0.0, 0.0, 0.0]


@dtypes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "tensor", "normalized"])
def test_forward(dtype: torch.dtype, layout: str, shape: Shape, kind: str) -> None:
    x = image(shape, dtype, layout)
    residual = None if kind == "none" else image(shape, dtype, layout)
    norm = Norm.random(x)
    shortcut = Norm.random(residual) if residual is not None and kind == "normalized" else None
    expected = norm.reference(x.double())
    if residual is not None:
        added = residual.double()
        expected = expected + (added if shortcut is None else shortcut.reference(added))
    for relu in (True, False):
        output, pooled = call.forward(x, norm, residual, shortcut, relu=relu, pool=True)
        reference = expected.relu() if relu else expected
        assert_close("output", output, reference, tolerance(dtype))
        assert pooled is not None
        assert torch.equal(pooled, F.max_pool2d(output, 2))
        plain, _ = call.forward(x, norm, residual, shortcut, relu=relu)
        in_place, _ = call.forward(y := x.clone(), norm, residual, shortcut, relu=relu, output=y)
        assert torch.equal(plain, output)
        assert torch.equal(in_place, output)


@layouts
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_the_storage_type(dtype: torch.dtype, layout: str) -> None:
    x = image((2, 5, 6, 7), dtype, layout)
    norm = Norm.random(x, dtype)
    wide = Norm(norm.mean, norm.var, norm.weight.float(), norm.bias.float())  # type: ignore[union-attr]
    assert same_bits(call.forward(x, norm)[0], call.forward(x, wide)[0])
    weight, bias = torch.empty(5, dtype=dtype), torch.empty(5, dtype=dtype)
    narrow = call.backward(x, x, norm, weight=weight, bias=bias)
    full = call.backward(x, x, wide)
    assert torch.equal(narrow["weight"], full["weight"].to(dtype))
    assert torch.equal(narrow["bias"], full["bias"].to(dtype))


def test_absent_weights_and_misaligned_slices() -> None:
    buffer = torch.randn(2 * 3 * 5 * 7 + 1)
    x = buffer[1:].view(2, 3, 5, 7)
    norm = Norm(*call.stats(x), None, None)
    output = like(buffer[None, None, None])[0, 0, 0][1:].view_as(x)
    call.forward(x, norm, relu=False, output=output)
    assert_close("output", output, norm.reference(x.double()), tolerance(torch.float32))


SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30])


@dtypes
@layouts
def test_relu_and_max_pool_keep_torch_semantics(dtype: torch.dtype, layout: str) -> None:
    """relu(NaN) = NaN, relu(-0.) = -0.; a window's NaN wins, ties go to the first."""
    x = SPECIAL[torch.randint(len(SPECIAL), (4, 3, 21, 35))].to(dtype)
    x = x.contiguous(memory_format=call.LAYOUTS[layout])
    zero = torch.zeros(3, dtype=call.accumulation(dtype))
    identity = Norm(zero, zero + 1, None, -zero, eps=0.0)
    output, pooled = call.forward(x, identity, pool=True)
    kept = (x > 0) | x.isnan() | (x == 0)
    expected = torch.where(kept, x, torch.zeros((), dtype=dtype))
    assert torch.equal(output.isnan(), x.isnan())
    assert torch.equal(output.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(output.signbit() | x.isnan(), (x.signbit() & (x == 0)) | x.isnan())
    reference = F.max_pool2d(output, 2)
    assert pooled is not None
    assert torch.equal(pooled.isnan(), reference.isnan())
    finite = ~reference.isnan()
    assert same_bits(pooled[finite], reference[finite])


@dtypes
@layouts
@pytest.mark.parametrize("size", [(6, 8), (7, 9), (2, 3), (1, 5), (5, 1)], ids=str)
def test_max_pool_backward(dtype: torch.dtype, layout: str, size: tuple[int, int]) -> None:
    values = SPECIAL[torch.randint(len(SPECIAL), (2, 5, *size))].to(dtype)
    z = values.contiguous(memory_format=call.LAYOUTS[layout]).requires_grad_()
    grad_pooled = image((2, 5, size[0] // 2, size[1] // 2), dtype, layout)
    expected = torch.zeros_like(z)
    if grad_pooled.numel() > 0:
        F.max_pool2d(z, 2).backward(grad_pooled)
        assert z.grad is not None
        expected = z.grad
    grad, grad_output = like(values), image(tuple(values.shape), dtype, layout)
    grad = grad.contiguous(memory_format=call.LAYOUTS[layout])
    native.ops().max_pool_backward(None, grad_pooled, z.detach(), grad)
    assert torch.equal(grad, expected)
    total = grad_output + expected
    native.ops().max_pool_backward(grad_output, grad_pooled, z.detach(), grad_output)
    assert torch.equal(grad_output, total)


def expected_gradients(
    grad_output: Tensor,
    x: Tensor,
    norm: Norm,
    residual: Tensor | None,
    shortcut: Norm | None,
    mask: Tensor,
    batch_stats: bool,
) -> dict[str, Tensor | None]:
    """Float64 autograd with the operator's own ReLU mask imposed."""
    inner, x64 = norm.differentiable(), leaf(x)
    leaves: dict[str, Tensor | None] = {"input": x64, "weight": inner.weight, "bias": inner.bias}
    v = inner.reference(x64, batch_stats)
    if residual is not None:
        leaves["residual"] = added = leaf(residual)
        if shortcut is not None:
            outer = shortcut.differentiable()
            leaves |= {"residual_weight": outer.weight, "residual_bias": outer.bias}
            added = outer.reference(added, batch_stats)
        v = v + added
    (v * mask).backward(grad_output.double())
    return {name: None if t is None else t.grad for name, t in leaves.items()}


@dtypes
@layouts
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "tensor", "normalized"])
@pytest.mark.parametrize("batch_stats", [True, False], ids=["batch", "fixed"])
def test_backward(
    dtype: torch.dtype, layout: str, shape: Shape, kind: str, batch_stats: bool
) -> None:
    x, grad = image(shape, dtype, layout), image(shape, dtype, layout)
    residual = None if kind == "none" else image(shape, dtype, layout)
    norm = Norm.random(x)
    shortcut = Norm.random(residual) if residual is not None and kind == "normalized" else None
    operands = (norm, residual, shortcut)
    for relu in (True, False):
        output, _ = call.forward(x, *operands, relu=relu)
        mask = output > 0 if relu else torch.ones_like(output)
        expected = expected_gradients(grad, x, *operands, mask, batch_stats)
        options: dict[str, Any] = {"relu": relu, "batch_stats": batch_stats}
        all_of_them = call.backward(
            grad, x, *operands, output=output, wanted=tuple(expected), **options
        )
        for name, reference in expected.items():
            assert reference is not None
            terms = x.numel() // x.shape[1]
            image_like = name in ("input", "residual")
            kind_of = dtype if image_like else call.accumulation(dtype)
            assert_close(name, all_of_them[name], reference, 2 * tolerance(kind_of, terms))
            alone = call.backward(grad, x, *operands, output=output, wanted=(name,), **options)
            assert same_bits(alone[name], all_of_them[name])
        in_place = call.backward(
            g := grad.clone(),
            x,
            *operands,
            output=output,
            input=g,
            wanted=tuple(expected),
            **options,
        )
        assert all(same_bits(in_place[name], all_of_them[name]) for name in expected)


@dtypes
@layouts
@small_shapes
def test_recomputed_mask(dtype: torch.dtype, layout: str, shape: Shape) -> None:
    """Without the output the mask comes from the input, with what rounds to zero left out."""
    tiny = float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    x = image(shape, dtype, layout)
    norm = Norm.random(x)
    scale = torch.full_like(norm.mean, tiny / 2)
    for case in (norm, Norm(norm.mean, norm.var, scale, None)):
        output, _ = call.forward(x, case)
        grad = image(shape, dtype, layout)
        options: dict[str, Any] = {"wanted": ("input", "weight", "bias"), "batch_stats": False}
        stored = call.backward(grad, x, case, output=output, **options)
        recomputed = call.backward(grad, x, case, **options)
        assert all(same_bits(recomputed[name], stored[name]) for name in stored)


@layouts
def test_gradient_passes_where_the_output_is_nan(layout: str) -> None:
    x = image((2, 3, 8, 8), torch.float32, layout)
    x[0, 1, 2, 3] = torch.nan
    norm = Norm(torch.zeros(3), torch.ones(3), None, None, eps=0.0)
    output, _ = call.forward(x, norm)
    for given in (output, None):
        options: dict[str, Any] = {"batch_stats": False, "wanted": ("input",)}
        grad = call.backward(torch.ones_like(x), x, norm, output=given, **options)["input"]
        assert torch.equal(grad, ((x > 0) | x.isnan()).float())


@dtypes
@layouts
@pytest.mark.parametrize("mode", range(3))
@pytest.mark.parametrize("channels", [(3, 0), (2, 5), (40, 3), (1, 1)], ids=str)
def test_upsample(dtype: torch.dtype, layout: str, mode: int, channels: tuple[int, int]) -> None:
    x = image((2, channels[0], 9, 6), dtype, layout)
    for size in [(18, 12), (19, 13), (9, 6), (4, 5), (1, 1), (31, 2)]:
        skip = image((2, channels[1], *size), dtype, layout) if channels[1] else None
        output = call.upsample(x, mode, size, skip)
        upsampled = output[:, : channels[0]]
        double = leaf(x)
        expected = F.interpolate(double, size=size, **MODES[mode])
        allowed = 2 * tolerance(dtype, max(size))
        if mode == 0:
            assert torch.equal(upsampled, F.interpolate(x, size=size, mode="nearest"))
        assert_close("output", upsampled, expected.detach(), allowed)
        grad = image(tuple(output.shape), dtype, layout)
        expected.backward(grad[:, : channels[0]].double())
        grad_input, grad_skip = call.upsample_backward(grad, mode, x, skip)
        assert double.grad is not None
        assert_close("grad_input", grad_input, double.grad, allowed)
        if skip is not None and grad_skip is not None:
            assert torch.equal(output[:, channels[0] :], skip)
            assert torch.equal(grad_skip, grad[:, channels[0] :])


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_reads_the_same_pixels_as_torch(dtype: torch.dtype, layout: str) -> None:
    for size in range(1, 60):
        x = torch.arange(float(size), dtype=dtype).expand(1, 2, 3, size)
        x = x.contiguous(memory_format=call.LAYOUTS[layout])
        for out in range(1, 60):
            expected = F.interpolate(x, size=(3, out), mode="nearest")
            assert torch.equal(call.upsample(x, 0, (3, out)), expected), (size, out)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_running_stats(momentum: float | None, dtype: torch.dtype) -> None:
    norm = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    mean, var = torch.zeros(5, dtype=dtype), torch.ones(5, dtype=dtype)
    counter = torch.zeros((), dtype=torch.int64)
    bias = torch.randn(5, dtype=call.accumulation(dtype))
    for _ in range(3):
        x = torch.randn(2, 5, 4, 3, dtype=call.accumulation(dtype))
        norm(x.double() + bias.double()[:, None, None])
        factor = -1.0 if momentum is None else momentum
        native.ops().update_running_stats(*call.stats(x), bias, 24, factor, mean, var, counter)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert counter.item() == 3
    for name, actual, expected in (
        ("running_mean", mean, norm.running_mean),
        ("running_var", var, norm.running_var),
    ):
        assert_close(name, actual, expected, 3 * tolerance(dtype))
    before = mean.clone()
    native.ops().update_running_stats(mean, var, None, 0, 0.1, mean, var, counter)
    assert counter.item() == 4
    assert torch.equal(mean, before)


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_cast(source: torch.dtype, target: torch.dtype) -> None:
    half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exponents = torch.linspace(-60.0, 40.0, 2**15, dtype=torch.float64).exp2()
    values = [half.view(torch.float16), half.view(torch.bfloat16), exponents, -exponents, SPECIAL]
    ties = 1.0 + torch.arange(2**12, dtype=torch.float64) / 2**12
    x = torch.cat([v.to(source) for v in [*values, ties, ties * 2.0**-16]])
    output = torch.empty_like(x, dtype=target)
    native.ops().cast(x, output)
    expected = x.to(target)
    assert torch.equal(output.isnan(), expected.isnan())
    assert same_bits(output[~expected.isnan()], expected[~expected.isnan()])
