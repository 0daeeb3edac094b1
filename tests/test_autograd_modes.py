"""What is kept for backward, and autograd's modes: autocast, checkpointing, inference, anomaly."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from networks import one_thread as one_thread
from torch import Tensor, nn
from twins import (
    BACKENDS,
    FUNCTIONS,
    batch_norm,
    convolution,
    fused_bn_act,
    fused_bn_act_conv,
    fused_conv,
    fused_conv_bn_act,
    image,
    plain_bn_act,
    plain_bn_act_conv,
    plain_conv,
    plain_conv_bn_act,
    same,
    tensors,
)

import resunet_fast as rf
from resunet_fast.testing import assert_close, tolerance

functions = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with rf.use_backend(request.param):
        yield request.param


def kept(function: Callable[[], Any], names: dict[str, Tensor]) -> list[str]:
    """What autograd saves during a call, by name; tensors that have none by their rank."""
    known = {tensor.data_ptr(): name for name, tensor in names.items()}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = tensors(function())
    known |= {o.data_ptr(): f"result {i}" for i, o in enumerate(outputs)}
    ranks = {1: "vector", 4: "image"}
    return sorted(known.get(tensor.data_ptr()) or ranks[tensor.dim()] for tensor in saved)


X, SKIP = image(2, 3, 4, 6).requires_grad_(), image(2, 4, 4, 6)
RESIDUAL = image(2, 3, 4, 6, seed=4).requires_grad_()
NORM = ["bn.bias", "bn.weight"]
BATCH = [*NORM, "vector", "vector"]
SHORTCUT = ["other.weight", "vector", "vector"]
CONV = ["conv.bias", "conv.weight"]
Parts = tuple[nn.Conv2d, nn.BatchNorm2d, nn.BatchNorm2d]
KEPT: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "bn_act: no result": (lambda conv, bn, other: fused_bn_act(X, bn), ["x", *BATCH]),
    "bn_act: the result with a residual, not the residual": (
        lambda conv, bn, other: fused_bn_act(X, bn, residual=RESIDUAL),
        ["x", "result 0", *BATCH],
    ),
    "bn_act: no result without a ReLU": (
        lambda conv, bn, other: fused_bn_act(X, bn, residual=RESIDUAL, relu=False),
        ["x", *BATCH],
    ),
    "bn_act: the residual with its own batch norm": (
        lambda conv, bn, other: fused_bn_act(X, bn, residual=RESIDUAL, residual_bn=other),
        ["x", "result 0", "residual", *BATCH, *SHORTCUT],
    ),
    "bn_act: the result when pooled, no indices": (
        lambda conv, bn, other: fused_bn_act(X, bn, pool=True),
        ["x", "result 0", *BATCH],
    ),
    "bn_act: given statistics": (
        lambda conv, bn, other: fused_bn_act(X, bn.eval()),
        ["x", *NORM, "bn.running_mean", "bn.running_var"],
    ),
    "conv2d: its operands": (lambda conv, bn, other: fused_conv(X, conv), ["x", *CONV]),
    "conv2d: both sources, no concatenation": (
        lambda conv, bn, other: fused_conv(X, convolution(7, 3), skip=SKIP, upsample="bilinear"),
        ["x", "skip", "image", "vector"],
    ),
    "conv_bn_act: the convolution's result between": (
        lambda conv, bn, other: fused_conv_bn_act(X, conv, bn),
        ["x", *CONV, "image", *BATCH],
    ),
    "conv_bn_act: with a residual": (
        lambda conv, bn, other: fused_conv_bn_act(X, conv, bn, residual=RESIDUAL),
        ["x", *CONV, "image", "result 0", *BATCH],
    ),
    "bn_act_conv: the activation": (
        lambda conv, bn, other: fused_bn_act_conv(X, conv, bn),
        ["x", "image", *CONV, *BATCH],
    ),
    "bn_act_conv: no activation when recomputed": (
        lambda conv, bn, other: fused_bn_act_conv(X, conv, bn, recompute=True),
        ["x", *CONV, *BATCH],
    ),
    "upsample: nothing": (lambda conv, bn, other: rf.functional.upsample(X, (8, 12)), []),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_is_kept_for_backward(case: str) -> None:
    function, expected = KEPT[case]
    conv, bn, other = convolution(3, 3), batch_norm(3), batch_norm(3)
    names = {"x": X, "skip": SKIP, "residual": RESIDUAL}
    for prefix, module in (("conv", conv), ("bn", bn), ("other", other)):
        names |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    assert kept(lambda: function(conv, bn, other), names) == sorted(expected)


@functions
def test_nothing_is_kept_without_grad(function: str) -> None:
    with torch.no_grad():
        assert kept(lambda: FUNCTIONS[function](X), {}) == []
        y = FUNCTIONS[function](X)
    assert y.grad_fn is None
    same(y, FUNCTIONS[function](X).detach())


@functions
def test_inference_mode(function: str) -> None:
    expected = FUNCTIONS[function](X).detach()
    with torch.inference_mode():
        y = FUNCTIONS[function](X)
    assert y.is_inference()
    same(y, expected)


def test_statistics_in_inference_mode() -> None:
    ours, theirs = batch_norm(3), batch_norm(3)
    with torch.inference_mode():
        same(fused_bn_act(X, ours), plain_bn_act(X, theirs))
    for name, value in theirs.state_dict().items():
        same(ours.state_dict()[name], value, name)


PAIRS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "bn_act": (
        lambda x, conv, bn, **o: fused_bn_act(x, bn, **o),
        lambda x, conv, bn, **o: plain_bn_act(x, bn, **o),
    ),
    "conv2d": (
        lambda x, conv, bn, **o: fused_conv(x, conv),
        lambda x, conv, bn, **o: plain_conv(x, conv),
    ),
    "conv_bn_act": (fused_conv_bn_act, plain_conv_bn_act),
    "bn_act_conv": (fused_bn_act_conv, plain_bn_act_conv),
}


def autocast_step(
    function: Callable[..., Any], x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, enabled: bool
) -> list[Tensor]:
    """Output and gradients; no ReLU, whose mask rounding would change."""
    leaf = x.clone().requires_grad_()
    leaves = [leaf, *conv.parameters(), *bn.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        y = function(leaf, conv, bn, relu=False)
    seed = image(*y.shape, dtype=torch.bfloat16, seed=7).to(y.dtype)
    grads = torch.autograd.grad(y, leaves, seed, allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


@pytest.mark.parametrize("unit", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_autocast(unit: str, dtype: torch.dtype, training: bool) -> None:
    x, conv = image(4, 8, 9, 10, dtype=dtype), convolution(8, 8).float()
    bn = batch_norm(8, torch.float32).train(training)
    fused, plain = PAIRS[unit]
    own = autocast_step(fused, x, conv, copy.deepcopy(bn), True)
    eager = autocast_step(plain, x, conv, copy.deepcopy(bn), True)
    exact = copy.deepcopy(conv).double(), copy.deepcopy(bn).double()
    judge = autocast_step(plain, x.double(), *exact, False)
    for i, (result, peer, truth) in enumerate(zip(own, eager, judge, strict=True)):
        assert result.dtype == peer.dtype, i
        scale = float(truth.square().mean().sqrt())
        peers_error = float((peer.double() - truth).abs().max())
        if scale < 1e-9:  # a convolution's bias before batch statistics
            assert not result.any()
            continue
        allowed = 2 * peers_error / scale + 4 * tolerance(peer.dtype, 9 * 8)
        assert_close(f"result {i}", result, truth, allowed)


@pytest.mark.parametrize("unit", ["conv_bn_act", "bn_act_conv", "conv2d"])
def test_no_rounded_weight_is_kept_under_autocast(unit: str) -> None:
    x, conv, bn = image(2, 8, 6, 7).bfloat16(), convolution(8, 5).float(), batch_norm(5).float()
    if unit == "bn_act_conv":
        bn = batch_norm(8).float()
    saved: list[Tensor] = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = PAIRS[unit][0](x, conv, bn)
    kept_weights = [t for t in saved if t.shape == conv.weight.shape]
    assert [t.data_ptr() for t in kept_weights] == [conv.weight.data_ptr()]
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def test_a_wider_residual_under_autocast() -> None:
    """It is rounded to the other operand's dtype, as by the blocks' in-place addition."""
    x, conv, bn = image(2, 3, 5, 6).float(), convolution(3, 3).float(), batch_norm(3).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = plain_conv(x, conv)
        expected = bn(y)
        expected += x
        for z in (
            fused_bn_act(y, bn, residual=x, relu=False),
            fused_conv_bn_act(x, conv, bn, residual=x, relu=False),
        ):
            assert z.dtype == torch.bfloat16
            assert_close("z", z.detach(), expected.detach(), 4 * tolerance(torch.bfloat16))


FLOAT: dict[str, Callable[[Tensor], Tensor]] = {
    "bn_act": lambda x: fused_bn_act(x, batch_norm(3, torch.float32), pool=True)[1],
    "conv_bn_act": lambda x: fused_conv_bn_act(
        x, convolution(3, 4).float(), batch_norm(4, torch.float32)
    ),
    "bn_act_conv": lambda x: fused_bn_act_conv(
        x, convolution(3, 4).float(), batch_norm(3, torch.float32), recompute=True
    ),
    "conv2d": lambda x: fused_conv(
        x, convolution(6, 4).float(), skip=torch.cat([x, x], 3), upsample="bilinear"
    ),
    "upsample": lambda x: rf.functional.upsample(x, (7, 9)),
}


@pytest.mark.parametrize("function", FLOAT)
def test_backward_inside_autocast_computes_the_same(function: str) -> None:
    x = image(2, 3, 4, 6, dtype=torch.float32).requires_grad_()
    y = FLOAT[function](x)
    seed = image(*y.shape, dtype=torch.float32, seed=5)
    (expected,) = torch.autograd.grad(y, x, seed, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (result,) = torch.autograd.grad(y, x, seed)
    assert torch.equal(result, expected)


@functions
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode(function: str) -> None:
    x = image(2, 3, 4, 6).requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        FUNCTIONS[function](x).sum().backward()
    assert x.grad is not None


@functions
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(function: str, reentrant: bool) -> None:
    x, again = image(2, 3, 4, 6).requires_grad_(), image(2, 3, 4, 6).requires_grad_()
    y = FUNCTIONS[function](x)
    z = torch.utils.checkpoint.checkpoint(FUNCTIONS[function], again, use_reentrant=reentrant)
    same(y.detach(), z.detach())
    for leaf, result in ((x, y), (again, z)):
        result.square().sum().backward()
        assert leaf.grad is not None
    assert torch.equal(x.grad, again.grad)


class Layers(nn.Module):
    """Two layers, fused or plain."""

    def __init__(self, layer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.convs = nn.ModuleList(convolution(3, 3) for _ in range(2))
        self.norms = nn.ModuleList(batch_norm(3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.layer(x, conv, norm)
        return x

    def checkpointed(self, **options: Any) -> dict[str, Tensor]:
        """Buffers after a step."""
        x = image(2, 3, 4, 6).requires_grad_()
        torch.utils.checkpoint.checkpoint(self, x, **options).sum().backward()
        return dict(self.named_buffers())


@pytest.mark.parametrize(
    "options", [{"use_reentrant": True}, {"use_reentrant": False, "early_stop": False}], ids=str
)
def test_checkpointing_updates_statistics_twice(options: dict[str, Any]) -> None:
    own = Layers(fused_conv_bn_act).checkpointed(**options)
    other = Layers(plain_conv_bn_act).checkpointed(**options)
    for name, value in own.items():
        same(value, other[name], name)
    assert own["norms.0.num_batches_tracked"] == own["norms.1.num_batches_tracked"] == 2


def test_recomputation_that_stops_early_leaves_out_the_last_update() -> None:
    """Known difference: eager updates inside the operator whose saved tensors end it."""
    own = Layers(fused_conv_bn_act).checkpointed(use_reentrant=False)
    assert own["norms.0.num_batches_tracked"] == 2
    assert own["norms.1.num_batches_tracked"] == 1
