"""Winograd's 3x3 convolution: values, what is not finite, bits, and where it is used."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_native_calls import in_subprocess
from torch import Tensor

import resunet_fast as rf
from resunet_fast import native
from resunet_fast.arguments import Conv
from resunet_fast.ops.conv2d import winograd
from resunet_fast.testing import assert_close, tolerance

NHWC = torch.channels_last
AVAILABLE = not native.unavailable() and native.ops().has_winograd()
needs_winograd = pytest.mark.skipif(not AVAILABLE, reason="no compiled library, or no FMA")
# "default" has no fused multiply-add.
OTHERS = {"avx2", "avx512"} - {native.ops().cpu_isa()} if AVAILABLE else set()
SIZES = [(1, 1), (1, 2), (2, 2), (3, 1), (5, 7), (13, 10)]


def image(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=NHWC)


def filters(k: int, c: int) -> Tensor:
    return image(k, c, 3, 3) / (3 * c**0.5)


def convolve(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    packed = winograd.pack(weight)
    assert packed is not None
    return winograd.convolve(x, packed, *rest, **options)


def judge(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool
) -> Tensor:
    shift = None if bias is None else bias.double()
    z = F.conv2d(x.double(), weight.double(), shift, padding=1)
    z = z if residual is None else z + residual.double()
    return z.relu() if relu else z


@needs_winograd
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [(16, 48), (96, 16), (112, 112), (48, 96)], ids=str)
def test_values(size: tuple[int, int], channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    c, k = channels
    weight, bias = filters(k, c), torch.randn(k)
    for n in (1, 3):
        x, residual = image(n, c, *size), image(n, k, *size)
        for operands in [(None, None, False), (bias, None, True), (bias, residual, True)]:
            *tensors, relu = operands
            z = convolve(x, weight, *tensors, relu=relu)
            assert z.is_contiguous(memory_format=NHWC)
            assert_close("z", z, judge(x, weight, *operands), 2 * tolerance(x.dtype, 9 * c))


@needs_winograd
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rotated_weights_give_the_gradient_of_the_input(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight, x, grad = filters(48, 96), image(2, 96, *size).double(), image(2, 48, *size)
    F.conv2d(x.requires_grad_(), weight.double(), padding=1).backward(grad.double())
    packed = winograd.pack(weight, rotated=True)
    assert packed is not None
    assert x.grad is not None
    dx = winograd.convolve(grad, packed, None)
    assert_close("dx", dx, x.grad, 2 * tolerance(torch.float32, 9 * 48))


def error(z: Tensor, expected: Tensor) -> float:
    return float((z.double() - expected).norm() / expected.norm())


@needs_winograd
@pytest.mark.parametrize("channels", [64, 256, 1024])
def test_as_accurate_as_onednn(channels: int) -> None:
    torch.manual_seed(0)
    x, weight = image(1, channels, 8, 8), filters(64, channels)
    expected = judge(x, weight, None, None, False)
    ours, theirs = convolve(x, weight, None), F.conv2d(x, weight, padding=1)
    assert error(ours, expected) <= 2 * error(theirs, expected)


@needs_winograd
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_where_the_definition_has_it(value: float) -> None:
    torch.manual_seed(0)
    weight, bias = filters(48, 64), torch.randn(48)
    weight[:, 3, 0, 1] = 0.0
    for y, x in [(0, 0), (4, 5), (3, 2), (8, 6), (5, 5)]:
        images = image(2, 64, 9, 7)
        images[1, 3, y, x] = value
        expected = judge(images, weight, bias, None, False)
        z = convolve(images, weight, bias)
        special = ~expected.isfinite()
        assert torch.equal(~z.isfinite(), special)
        assert torch.equal(z[special].isnan(), expected[special].isnan())
        infinite = expected.isinf()
        assert torch.equal(z[infinite].double(), expected[infinite])
        allowed = 2 * tolerance(z.dtype, 9 * 64)
        assert_close("the rest", z[~special], expected[~special], allowed)
        rectified = convolve(images, weight, bias, relu=True)
        assert torch.equal(rectified.isnan(), z.isnan())


@needs_winograd
def test_relu_keeps_negative_zero_and_zeros_are_exact() -> None:
    x, weight = torch.zeros(1, 32, 4, 4).contiguous(memory_format=NHWC), filters(32, 32)
    z = convolve(x, weight, None)
    assert torch.equal(z, torch.zeros_like(z))
    residual = torch.full((1, 32, 4, 4), -0.0)
    bias = torch.full((32,), -0.0)
    for relu in (False, True):
        expected = F.conv2d(x, weight, bias, padding=1) + residual
        z = convolve(x, weight, bias, residual, relu=relu)
        assert torch.equal(z.signbit(), expected.signbit())


@needs_winograd
def test_integers_are_exact() -> None:
    torch.manual_seed(0)
    x = torch.randint(-8, 9, (1, 32, 9, 6)).float().contiguous(memory_format=NHWC)
    weight = torch.randint(-8, 9, (48, 32, 3, 3)).float().contiguous(memory_format=NHWC)
    assert torch.equal(convolve(x, weight, None).double(), judge(x, weight, None, None, False))


@needs_winograd
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    for index in [(0, 0, 0, 0), (31, 47, 2, 2), (17, 5, 1, 1)]:
        weight = filters(32, 48)
        weight[index] = value
        assert winograd.pack(weight) is None
        assert winograd.pack(weight, rotated=True) is None
        x = image(1, 48, 8, 8)
        y = rf.functional.conv2d(x, Conv(weight, None, padding=(1, 1)))
        torch.testing.assert_close(y, F.conv2d(x, weight, padding=1), equal_nan=True)


def digest() -> str:
    """Of results for many tiles and for few, with a tile that is not finite."""
    torch.manual_seed(0)
    results = hashlib.sha256()
    for c, k, size in [(32, 48, (37, 50)), (112, 16, (6, 5)), (256, 224, (11, 8))]:
        x, weight, bias = image(2, c, *size), filters(k, c), torch.randn(k)
        x[1, 1, 2, 3] = torch.inf
        packed = winograd.pack(weight, rotated=True)
        assert packed is not None
        z = convolve(x, weight, bias, relu=True)
        for t in (z, winograd.convolve(z.nan_to_num(0.0, 0.0, 0.0), packed, None)):
            results.update(t.nan_to_num(7.0).contiguous().numpy().tobytes())
    return results.hexdigest()


@needs_winograd
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    digests = set()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            digests.add(digest())
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


@needs_winograd
@pytest.mark.parametrize("isa", OTHERS)
def test_bits_do_not_depend_on_the_instruction_set(isa: str) -> None:
    code = "import test_winograd as test; print(test.native.ops().cpu_isa(), test.digest())"
    done = in_subprocess(isa, code)
    if done.returncode == 0:
        assert done.stdout.split() == [isa, digest()]
    else:
        assert "that this CPU and build have" in done.stderr


@needs_winograd
def test_without_fused_multiply_add_aten_computes() -> None:
    code = (
        "import torch, test_winograd as t; w, x = t.filters(32, 32), t.image(1, 32, 8, 8);"
        "y = t.rf.functional.conv2d(x, t.Conv(w, padding=(1, 1)));"
        "print(t.AVAILABLE, torch.equal(y, t.F.conv2d(x, w, padding=1)))"
    )
    done = in_subprocess("default", code)
    assert done.stdout.split() == ["False", "True"], done.stderr


@needs_winograd
def test_misaligned_slices() -> None:
    torch.manual_seed(0)
    x, weight, bias = image(1, 32, 6, 5), filters(48, 32), torch.randn(48)
    expected = convolve(x, weight, bias)
    shifted = torch.empty(x.numel() + 1)[1:].view(1, 6, 5, 32).permute(0, 3, 1, 2).copy_(x)
    packed = winograd.pack(weight)
    assert packed is not None
    moved = torch.empty(packed.numel() + 3)[3:].view_as(packed).copy_(packed)
    output = torch.empty(expected.numel() + 1)[1:].view(1, 6, 5, 48).permute(0, 3, 1, 2)
    shift = torch.empty(49)[1:].copy_(bias)
    native.ops().winograd_conv2d(shifted, moved, shift, None, False, output)
    assert torch.equal(output, expected)


@needs_winograd
def test_refusals() -> None:
    ops, x, weight = native.ops(), image(1, 32, 4, 4), filters(32, 32)
    packed, y = winograd.pack(weight), image(1, 32, 4, 4)
    with pytest.raises(RuntimeError, match="input must be float32"):
        ops.winograd_conv2d(x.double(), packed, None, None, False, y)
    with pytest.raises(RuntimeError, match="dense in channels_last"):
        ops.winograd_conv2d(x.contiguous(), packed, None, None, False, y)
    with pytest.raises(RuntimeError, match=r"packed must be .* \[2, 16, 32, 16\]"):
        ops.winograd_conv2d(x, weight, None, None, False, y)
    with pytest.raises(RuntimeError, match=r"output must have shape \[1, 32, 4, 4\]"):
        ops.winograd_conv2d(x, packed, None, None, False, image(1, 32, 4, 5))
    with pytest.raises(RuntimeError, match=r"bias must have shape \[32\]"):
        ops.winograd_conv2d(x, packed, torch.zeros(31), None, False, y)
    with pytest.raises(RuntimeError, match="C must be a positive multiple of 16, got 8"):
        ops.winograd_pack(image(32, 8, 3, 3), False, packed)
    with pytest.raises(RuntimeError, match=r"weight must have shape \[K, C, 3, 3\]"):
        ops.winograd_pack(image(32, 32, 1, 3), False, packed)


@needs_winograd
def test_conv2d_and_its_gradients() -> None:
    torch.manual_seed(0)
    leaves = [image(2, 48, 9, 11), filters(32, 48), torch.randn(32)]
    grad = image(2, 32, 9, 11)
    single = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in leaves]
    y = rf.functional.conv2d(single[0], Conv(single[1], single[2], padding=(1, 1)))
    assert torch.equal(y, convolve(*leaves))
    y.backward(grad)
    double = [t.double().requires_grad_() for t in leaves]
    F.conv2d(*double, padding=1).backward(grad.double())
    for name, ours, theirs in zip(("x", "weight", "bias"), single, double, strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert_close(name, ours.grad, theirs.grad, 2 * tolerance(torch.float32, 9 * 48))


@needs_winograd
@pytest.mark.parametrize("relu", [False, True])
def test_conv_bias_act(relu: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = image(2, 48, 9, 11), filters(32, 48), torch.randn(32)
    x[0, 3, 2, 2] = torch.nan
    residual = image(2, 32, 9, 11)
    conv = Conv(weight, bias, padding=(1, 1))
    with torch.no_grad():
        z = rf.functional.conv_bias_act(x, conv, residual=residual, relu=relu)
        assert torch.equal(z.isnan(), judge(x, weight, bias, residual, relu).isnan())
    expected = convolve(x, weight, bias, residual, relu=relu)
    assert torch.equal(z.nan_to_num(), expected.nan_to_num())


@needs_winograd
def test_a_frozen_network_uses_it() -> None:
    torch.manual_seed(0)
    model = rf.ResUNet(3, 2, base_width=32, width_factors=(1, 2)).eval()
    frozen = rf.freeze(model)
    packed = [m for m in frozen.modules() if hasattr(m, "_packed")]
    kinds = [m._packed.tensor.is_mkldnn for m in packed if m._packed.tensor is not None]
    assert kinds.count(False) > len(kinds) // 2
    x = image(2, 3, 37, 26)
    with torch.no_grad():
        expected = model.double()(x.double())
        z = frozen(x)
        with rf.use_backend("reference"):
            plain = frozen(x)
    assert error(z, expected) < 1e-5
    assert error(plain, expected) < 1e-5
    assert not torch.equal(z, plain)
