"""conv_bn_act in Triton without gradients: batch norm in the convolution's epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from resunet_fast.ops.backends import triton_unavailable
from resunet_fast.testing import assert_close, tolerance

if triton_unavailable():
    pytest.skip("; ".join(triton_unavailable()), allow_module_level=True)

import resunet_fast as rf
from resunet_fast.arguments import Conv, Norm
from resunet_fast.ops.conv2d import triton_kernel, triton_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16,) if DEVICE == "cuda" else (torch.float64, torch.float32, torch.float16)


def image(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)


def layers(c: int, k: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[Conv, Norm]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, *vectors = (torch.randn(k).to(DEVICE, wide) for _ in range(4))
    norm = Norm(weight, vectors[0], vectors[1], torch.rand(k).to(DEVICE, wide) + 0.5)
    conv = Conv(image(k, c, 3, 3, dtype=dtype) / 5, vectors[2].to(dtype) if bias else None)
    return conv._replace(padding=(1, 1)), norm._replace(training=False)


def judge(
    x: Tensor, conv: Conv, norm: Norm, residual: Tensor | None = None, skip: Tensor | None = None
) -> Tensor:
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double().cpu()

    source = x if skip is None else torch.cat([x, skip], 1)
    y = F.conv2d(wide(source), wide(conv.weight), wide(conv.bias), padding=conv.padding)
    vectors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    v = F.batch_norm(y, *map(wide, vectors), eps=norm.eps)
    return (v if residual is None else v + residual.double().cpu()).relu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"residual": True}, {"pool": True}, {"skip": True}], ids=str
)
@pytest.mark.parametrize("channels", [8, 5])
def test_evaluation_without_gradients(
    channels: int, options: dict[str, bool], dtype: torch.dtype
) -> None:
    x = image(2, channels, 5, 18, dtype=dtype)
    tensors: dict[str, Tensor] = {}
    if options.get("residual"):
        tensors["residual"] = image(2, 8, 5, 18, dtype=dtype)
    if options.get("skip"):
        tensors["skip"] = image(2, 16, 5, 18, dtype=dtype)
    conv, norm = layers(channels + (16 if "skip" in tensors else 0), 8, dtype)
    with torch.no_grad(), rf.use_backend("triton"):
        result = rf.functional.conv_bn_act(
            x, conv, norm, pool=options.get("pool", False), **tensors
        )
    z, pooled = result if isinstance(result, tuple) else (result, None)
    assert_close("z", z.cpu(), judge(x, conv, norm, **tensors), tolerance(dtype, 300))
    if pooled is not None:
        assert torch.equal(pooled, F.max_pool2d(z, 2))


def test_nothing_between_the_convolution_and_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = DTYPES[0]
    x = image(1, 8, 4, 6, dtype=dtype)
    conv, norm = layers(8, 8, dtype)
    epilogues: list[triton_launch.Epilogue] = []
    convolve = triton_launch.convolve

    def note(*arguments: Any) -> triton_launch.Result:
        epilogues.append(arguments[-1])
        return convolve(*arguments)

    monkeypatch.setattr(triton_kernel, "convolve", note)
    with rf.use_backend("triton"):
        with torch.no_grad():
            rf.functional.conv_bn_act(x, conv, norm)
        kept = rf.functional.conv_bn_act(x.requires_grad_(), conv, norm)
        rf.functional.conv_bn_act(x, conv, norm._replace(training=True))
    assert isinstance(kept, Tensor)
    assert kept.requires_grad
    affine, plain, training = epilogues
    assert affine.scale is not None
    assert affine.relu
    assert plain.scale is None
    assert not plain.relu  # y is needed in backward
    assert training.statistics
    assert training.shift is None  # the bias cancels


def test_edits_between_calls_are_seen() -> None:
    dtype = DTYPES[0]
    x = image(1, 8, 4, 6, dtype=dtype)
    conv, norm = layers(8, 8, dtype)
    assert norm.running_mean is not None
    with torch.no_grad(), rf.use_backend("triton"):
        rf.functional.conv_bn_act(x, conv, norm)
        norm.running_mean.data.mul_(3)
        conv.weight.data.neg_()
        z = rf.functional.conv_bn_act(x, conv, norm)
    assert isinstance(z, Tensor)
    assert_close("z", z.cpu(), judge(x, conv, norm), tolerance(dtype, 300))


def test_no_affine_and_no_bias() -> None:
    dtype = DTYPES[0]
    x = image(1, 5, 4, 6, dtype=dtype)
    conv, norm = layers(5, 3, dtype, bias=False)
    norm = norm._replace(weight=None, bias=None, eps=1e-3)
    with torch.no_grad(), rf.use_backend("triton"):
        z = rf.functional.conv_bn_act(x, conv, norm)
    assert isinstance(z, Tensor)
    assert_close("z", z.cpu(), judge(x, conv, norm), tolerance(dtype, 300))
