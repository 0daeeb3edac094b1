"""conv_bias_act: weights packed for oneDNN, and what is handed to cuDNN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import one_thread as one_thread
from torch import Tensor

import resunet_fast as rf
from resunet_fast.ops.conv_bias_act import cpu, cudnn, reference
from resunet_fast.ops.conv_bias_act.op import CONV_BIAS_ACT
from resunet_fast.testing import assert_close, tolerance

NHWC = torch.channels_last
# Among them the tiny ones, for which oneDNN wants another layout than the packed one.
SIZES = ((1, 1), (1, 7), (2, 2), (3, 3), (9, 5), (64, 64), (130, 33))


def operands(dtype: torch.dtype, channels: int = 96) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(64, channels, 3, 3) / (3 * channels**0.5)
    return weight.to(dtype).contiguous(memory_format=NHWC), torch.randn(64).to(dtype)


def geometry(stride: int = 1) -> tuple[list[int], list[int], list[int], int]:
    return [stride, stride], [1, 1], [1, 1], 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_packed_weight_is_right_at_every_size(dtype: torch.dtype, stride: int) -> None:
    weight, bias = operands(dtype)
    packed = cpu.pack(weight, *geometry(stride))
    assert packed is not None
    assert torch.equal(packed.to_dense().to(dtype), weight)
    for n, size in enumerate(SIZES):
        x = torch.randn(1 + n % 2, 96, *size).to(dtype).contiguous(memory_format=NHWC)
        arguments = (bias, None, True, *geometry(stride))
        z = CONV_BIAS_ACT(x, packed, *arguments)
        doubles = [t.double() for t in (x, weight, bias)]
        judge = reference.forward(*doubles, None, True, *geometry(stride))
        assert_close(str(size), z, judge, 2 * tolerance(dtype, 9 * 96))
        assert torch.equal(CONV_BIAS_ACT(x, packed, *arguments), z)


def test_the_reference_unpacks() -> None:
    weight, bias = operands(torch.float32)
    x = torch.randn(1, 96, 5, 5)
    packed = cpu.pack(weight, *geometry())
    z = CONV_BIAS_ACT(x, packed, bias, None, False, *geometry(), "reference")
    assert_close("z", z, F.conv2d(x, weight, bias, padding=1).double(), 1e-5)


@pytest.mark.parametrize("summed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_passes_the_relu(dtype: torch.dtype, summed: bool) -> None:
    weight, bias = operands(dtype, channels=8)
    x = torch.randn(1, 8, 6, 6).to(dtype).contiguous(memory_format=NHWC)
    x[0, 3, 2, 2] = torch.nan
    residual = torch.randn(1, 64, 6, 6).to(dtype) if summed else None
    arguments = (x, weight, bias, residual, True, *geometry())
    expected = reference.forward(*arguments)
    assert expected.isnan().sum() == 9 * 64
    assert torch.equal(CONV_BIAS_ACT(*arguments).isnan(), expected.isnan())


def test_what_onednn_does_not_take_is_not_packed() -> None:
    for weight in (
        operands(torch.float64)[0],
        operands(torch.float16)[0],
        operands(torch.float32)[0][:, :0],
        operands(torch.float32)[0].to("meta"),
    ):
        assert cpu.pack(weight, *geometry()) is None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand in for ATen's two operators, with their signatures and on the CPU."""
    seen: list[str] = []

    def relu(
        self: Tensor, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int],
        dilation: list[int], groups: int,
    ) -> Tensor:  # fmt: skip
        seen.append("relu")
        assert {self.dtype, weight.dtype, bias.dtype} == {self.dtype}
        assert self.is_contiguous(memory_format=NHWC) == weight.is_contiguous(memory_format=NHWC)
        return F.conv2d(self, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(
        self: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, stride: list[int],
        padding: list[int], dilation: list[int], groups: int,
    ) -> Tensor:  # fmt: skip
        seen.append("add_relu")
        assert z.is_contiguous(memory_format=NHWC) == self.is_contiguous(memory_format=NHWC)
        y = F.conv2d(self, weight, bias, stride, padding, dilation, groups)
        return (y + alpha * z).relu()

    for name, stand_in in (("relu", relu), ("add_relu", add_relu)):
        schema = getattr(torch.ops.aten, f"cudnn_convolution_{name}").default._schema
        code = stand_in.__code__
        assert [a.name for a in schema.arguments] == list(code.co_varnames[: code.co_argcount])
        monkeypatch.setattr(torch.ops.aten, f"cudnn_convolution_{name}", stand_in)
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, NHWC])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("summed", [True, False])
def test_what_cudnn_is_given(
    calls: list[str], summed: bool, biased: bool, layout: torch.memory_format
) -> None:
    weight, bias = operands(torch.float32, channels=8)
    x = torch.randn(2, 8, 9, 7).contiguous(memory_format=layout)
    residual = torch.randn(2, 64, 5, 4) if summed else None
    arguments = (x, weight, bias if biased else None, residual, True, *geometry(2))
    assert_close("z", cudnn.forward(*arguments), reference.forward(*arguments).double(), 1e-6)
    assert calls == ["add_relu" if summed else "relu"]


def test_what_cudnn_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias = operands(torch.float32, channels=8)
    x = torch.randn(2, 8, 9, 7)
    assert cudnn.refusals(x, weight, bias, None, True)[-1].startswith("it needs tensors on an NVI")
    monkeypatch.setattr(cudnn, "cudnn_unavailable", lambda: [])
    monkeypatch.setattr(Tensor, "is_cuda", True)
    assert cudnn.refusals(x, weight, bias, None, True) == []
    assert cudnn.refusals(x, weight, bias, None, False) == [
        "cuDNN's fused convolution always ends in a ReLU"
    ]
    assert cudnn.refusals(x.double(), weight, bias, None, True) == [
        "cuDNN's fused convolution has no torch.float64 kernel"
    ]
    assert cudnn.refusals(x[:0], weight, bias, None, True) == ["cuDNN refuses empty tensors"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_backend_says_why_it_cannot_run_here() -> None:
    with (
        pytest.raises(rf.BackendError, match="'cudnn' cannot run here: cuDNN needs an NVIDIA GPU"),
        rf.use_backend("cudnn"),
    ):
        pass
