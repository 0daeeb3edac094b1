"""Each fused function beside the same computation spelled in torch.nn, with the same signature."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast.functional import Conv, Norm
from resunet_fast.registry import backends

BACKENDS = [name for name, reasons in backends().items() if not reasons]
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
MODES = {
    "nearest": {"mode": "nearest"},
    "bilinear": {"mode": "bilinear", "align_corners": False},
    "bilinear_align_corners": {"mode": "bilinear", "align_corners": True},
}

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "innermost batch": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    "first channels": lambda x: F.pad(x, (0, 0, 0, 0, 0, 2))[:, :-2],
    "last channels": lambda x: F.pad(x, (0, 0, 0, 0, 1, 0)).contiguous(
        memory_format=torch.channels_last
    )[:, 1:],
    "window": lambda x: F.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded pixel": lambda x: x[:, :, :1, :1].expand_as(x),
}

Output = Any


def fused_bn_act(
    x: Tensor, bn: nn.BatchNorm2d, *, residual_bn: nn.BatchNorm2d | None = None, **options: Any
) -> Output:
    other = None if residual_bn is None else Norm.of(residual_bn)
    return rf.functional.bn_act(x, Norm.of(bn), residual_norm=other, **options)


def plain_bn_act(
    x: Tensor,
    bn: nn.BatchNorm2d,
    *,
    residual: Tensor | None = None,
    residual_bn: nn.BatchNorm2d | None = None,
    relu: bool = True,
    pool: bool = False,
) -> Output:
    z = bn(x)
    if residual is not None:
        z = z + (residual if residual_bn is None else residual_bn(residual))
    z = z.relu() if relu else z
    return (z, F.max_pool2d(z, 2)) if pool else z


def fused_conv(x: Tensor, conv: nn.Conv2d, **options: Any) -> Tensor:
    return rf.functional.conv2d(x, Conv.of(conv), **options)


def plain_conv(
    x: Tensor, conv: nn.Conv2d, *, skip: Tensor | None = None, upsample: str = "none"
) -> Tensor:
    if upsample != "none":
        x = F.interpolate(x, size=skip.shape[2:], **MODES[upsample])
    return conv(x if skip is None else torch.cat([x, skip], 1))


def fused_conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    residual_bn: nn.BatchNorm2d | None = None,
    **options: Any,
) -> Output:
    other = None if residual_bn is None else Norm.of(residual_bn)
    return rf.functional.conv_bn_act(x, Conv.of(conv), Norm.of(bn), residual_norm=other, **options)


def plain_conv_bn_act(
    x: Tensor,
    conv: nn.Conv2d,
    bn: nn.BatchNorm2d,
    *,
    skip: Tensor | None = None,
    upsample: str = "none",
    **options: Any,
) -> Output:
    return plain_bn_act(plain_conv(x, conv, skip=skip, upsample=upsample), bn, **options)


def fused_bn_act_conv(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, *, relu: bool = True, recompute: bool = False
) -> Tensor:
    norm = Norm.of(bn)
    return rf.functional.bn_act_conv(x, norm, Conv.of(conv), relu=relu, recompute=recompute)


def plain_bn_act_conv(
    x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, *, relu: bool = True, recompute: bool = False
) -> Tensor:
    return conv(plain_bn_act(x, bn, relu=relu))


def identity(channels: int, dtype: torch.dtype) -> nn.Conv2d:
    """A convolution that returns its input and keeps the channels apart."""
    conv = nn.Conv2d(channels, channels, 1, groups=channels, bias=False).to(dtype)
    nn.init.ones_(conv.weight)
    return conv


def _around(function: Callable[..., Output]) -> Callable[..., Output]:
    def unit(x: Tensor, bn: nn.BatchNorm2d, **options: Any) -> Output:
        dtype = x.dtype if x.is_floating_point() else torch.float32
        return function(x, identity(x.shape[-3], dtype), bn, **options)

    return unit


# A batch norm and ReLU three ways, as (fused, plain) of (x, bn); the convolutions change nothing.
UNITS = {
    "bn_act": (fused_bn_act, plain_bn_act),
    "conv_bn_act": (_around(fused_conv_bn_act), _around(plain_conv_bn_act)),
    "bn_act_conv": (_around(fused_bn_act_conv), _around(plain_bn_act_conv)),
}


def batch_norm(channels: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.BatchNorm2d:
    """Scales of both signs, and running statistics that matter."""
    generator = torch.Generator().manual_seed(11)
    bn = nn.BatchNorm2d(channels, **options)
    for tensor, low, high in (
        (bn.weight, -1.5, 1.5),
        (bn.bias, -0.5, 0.5),
        (bn.running_mean, -0.5, 0.5),
        (bn.running_var, 0.5, 1.5),
    ):
        if tensor is not None:
            tensor.data.uniform_(low, high, generator=generator)
    return bn.to(dtype)


def image(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def convolution(before: int, after: int) -> nn.Conv2d:
    conv = nn.Conv2d(before, after, 3, padding=1).double()
    with torch.no_grad():
        conv.weight.copy_(image(*conv.weight.shape, seed=21))
        conv.bias.copy_(image(after, seed=23))
    return conv


def transposed_convolution(before: int, after: int, **options: Any) -> nn.ConvTranspose2d:
    up = nn.ConvTranspose2d(before, after, 2, stride=2, **options).double()
    for parameter, seed in zip(up.parameters(), (25, 27), strict=False):
        parameter.data.copy_(image(*parameter.shape, seed=seed))
    return up


def transposed(x: Tensor, up: nn.ConvTranspose2d, padding: tuple[int, int] = (0, 0)) -> Tensor:
    return rf.functional.conv_transpose2d(x, Conv.of(up), output_padding=padding)


def outcome(function: Callable[..., Output], *operands: Any, **options: Any) -> tuple[str, Any]:
    """What came of a call: its result, or the exception's type and message."""
    try:
        return "returned", function(*operands, **options)
    except Exception as error:
        return "raised", (type(error), str(error))


def same_outcome(unit: str, x: Tensor, bn: nn.BatchNorm2d, **options: Any) -> tuple[str, Any]:
    """Run both, each on its own copy; assert equal results, errors and buffers afterwards."""
    fused, plain = UNITS[unit]
    ours, theirs = copy.deepcopy(bn), copy.deepcopy(bn)
    expected = outcome(plain, x, theirs, **options)
    actual = outcome(fused, x, ours, **options)
    assert actual[0] == expected[0], f"fused {actual[0]} {actual[1]}, eager {expected[1]}"
    if actual[0] == "raised":
        assert actual[1] == expected[1]
    else:
        for own, other in zip(tensors(actual[1]), tensors(expected[1]), strict=True):
            same(own, other)
    for (name, own), other in zip(
        buffers(ours), (buffer for _, buffer in buffers(theirs)), strict=True
    ):
        same(own, other, name)
    return actual


def tensors(output: Output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def buffers(bn: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return iter(bn.state_dict().items())


def same(actual: Tensor, expected: Tensor, name: str = "") -> None:
    """Equal but for a few roundings of the dtype, NaN for NaN, in dtype, shape and layout."""
    few = 16 * torch.finfo(actual.dtype).eps if actual.is_floating_point() else 0.0
    torch.testing.assert_close(
        actual, expected, rtol=few, atol=few, equal_nan=True, msg=lambda text: f"{name}: {text}"
    )
    assert actual.stride() == expected.stride(), name


def bn_act_and_residual(x: Tensor) -> Tensor:
    return fused_bn_act(x, batch_norm(3), residual=x * 2, pool=True)[1]


def two_sources(x: Tensor) -> Tensor:
    skip = torch.cat([x, x], 2)
    return fused_conv(x, convolution(6, 4), skip=skip, upsample="bilinear")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "bn_act": lambda x: fused_bn_act(x, batch_norm(3)),
    "bn_act of a projection": lambda x: fused_bn_act(
        x, batch_norm(3), residual=x.exp(), residual_bn=batch_norm(3)
    ),
    "bn_act pooled": bn_act_and_residual,
    "bn_act frozen": lambda x: fused_bn_act(x, batch_norm(3).eval(), residual=x),
    "conv2d": two_sources,
    "conv_bn_act": lambda x: fused_conv_bn_act(x, convolution(3, 3), batch_norm(3), residual=x),
    "bn_act_conv": lambda x: fused_bn_act_conv(x, convolution(3, 4), batch_norm(3)),
    "bn_act_conv recomputed": lambda x: fused_bn_act_conv(
        x, convolution(3, 4), batch_norm(3), recompute=True
    ),
    "conv_transpose2d": lambda x: transposed(x, transposed_convolution(3, 4), (1, 0)),
    "upsample": lambda x: rf.functional.upsample(x, (7, 9), "bilinear_align_corners"),
}
