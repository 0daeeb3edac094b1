"""Derivatives of derivatives, forward mode, torch.func, and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from networks import one_thread as one_thread
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from twins import (
    BACKENDS,
    LAYOUTS,
    MODES,
    batch_norm,
    convolution,
    fused_bn_act,
    image,
    plain_bn_act,
)

import resunet_fast as rf
from resunet_fast.functional import Conv, Norm

Leaves = dict[str, Tensor]
F = rf.functional


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with rf.use_backend(request.param):
        yield request.param


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


SHAPE = (2, 3, 4, 6)
FROZEN = {"running_mean": image(3, seed=41), "running_var": image(3, seed=42).exp()}


def leaves() -> Leaves:
    made = {"x": image(*SHAPE), "weight": image(3, seed=43), "bias": image(3, seed=44)}
    made |= {"residual": image(*SHAPE, seed=45), "other": image(3, seed=46)}
    made |= {"conv": image(4, 3, 3, 3, seed=47), "conv_bias": image(4, seed=48)}
    return made | {"wide": image(4, seed=49), "skip": image(2, 3, 8, 9, seed=50)}


def norm(t: Leaves, training: bool, weight: str = "weight", bias: str = "bias") -> Norm:
    return Norm(t[weight], t[bias], **({} if training else FROZEN), training=training)


def plain_norm(x: Tensor, n: Norm) -> Tensor:
    """Batch norm from elementary operations: eager's third derivatives of batch norm are wrong."""
    if n.training:
        mean = x.mean((0, 2, 3))
        var = (x - mean[:, None, None]).square().mean((0, 2, 3))
    else:
        mean, var = n.running_mean, n.running_var
    xhat = (x - mean[:, None, None]) / (var[:, None, None] + n.eps).sqrt()
    return xhat * n.weight[:, None, None] + n.bias[:, None, None]


def plain_source(t: Leaves) -> Tensor:
    low = nn.functional.interpolate(t["x"], size=t["skip"].shape[2:], **MODES["bilinear"])
    return torch.cat([low, t["skip"]], 1)


def conv(t: Leaves, bias: bool = True) -> Conv:
    return Conv(t["conv"], t["conv_bias"] if bias else None, padding=(1, 1))


def two_sources(t: Leaves) -> Conv:
    return Conv(torch.cat([t["conv"], t["conv"]], 1), None, padding=(1, 1))


# (fused, plain, the leaves they depend on); "training" or "eval" is the statistics used.
Function = Callable[[Leaves], Tensor]
TWINS: dict[str, tuple[Function, Function, list[str]]] = {
    "bn_act training": (
        lambda t: F.bn_act(t["x"], norm(t, True)),
        lambda t: plain_norm(t["x"], norm(t, True)).relu(),
        ["x", "weight", "bias"],
    ),
    "bn_act of a projection": (
        lambda t: F.bn_act(
            t["x"],
            norm(t, True),
            residual=t["residual"],
            residual_norm=norm(t, False, "other"),
            pool=True,
        )[1],
        lambda t: nn.functional.max_pool2d(
            (
                plain_norm(t["x"], norm(t, True))
                + plain_norm(t["residual"], norm(t, False, "other"))
            ).relu(),
            2,
        ),
        ["x", "weight", "bias", "residual", "other"],
    ),
    "bn_act eval": (
        lambda t: F.bn_act(t["x"], norm(t, False), residual=t["residual"]),
        lambda t: (plain_norm(t["x"], norm(t, False)) + t["residual"]).relu(),
        ["x", "weight", "bias", "residual"],
    ),
    "conv2d": (
        lambda t: F.conv2d(t["x"], two_sources(t), skip=t["skip"], upsample="bilinear"),
        lambda t: nn.functional.conv2d(plain_source(t), *two_sources(t)),
        ["x", "skip", "conv"],
    ),
    "conv_bn_act training": (
        lambda t: F.conv_bn_act(t["x"], conv(t, False), norm(t, True, "wide", "conv_bias")),
        lambda t: plain_norm(
            nn.functional.conv2d(t["x"], *conv(t, False)), norm(t, True, "wide", "conv_bias")
        ).relu(),
        ["x", "conv", "wide", "conv_bias"],
    ),
    "bn_act_conv training": (
        lambda t: F.bn_act_conv(t["x"], norm(t, True), conv(t)),
        lambda t: nn.functional.conv2d(plain_norm(t["x"], norm(t, True)).relu(), *conv(t)),
        ["x", "weight", "bias", "conv", "conv_bias"],
    ),
    "bn_act_conv recomputed": (
        lambda t: F.bn_act_conv(t["x"], norm(t, True), conv(t), recompute=True),
        lambda t: nn.functional.conv2d(plain_norm(t["x"], norm(t, True)).relu(), *conv(t)),
        ["x", "weight", "bias", "conv", "conv_bias"],
    ),
    "bn_act_conv eval": (
        lambda t: F.bn_act_conv(t["x"], norm(t, False), conv(t), recompute=True),
        lambda t: nn.functional.conv2d(plain_norm(t["x"], norm(t, False)).relu(), *conv(t)),
        ["x", "weight", "bias", "conv", "conv_bias"],
    ),
    "upsample": (
        lambda t: F.upsample(t["x"], (7, 9)),
        lambda t: nn.functional.interpolate(t["x"], size=(7, 9), **MODES["bilinear"]),
        ["x"],
    ),
}
twins = pytest.mark.parametrize("twin", TWINS)


@twins
@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivatives(twin: str, layout: str) -> None:
    fused, _, names = TWINS[twin]
    t = leaves()
    t["x"] = t["x"].contiguous(memory_format=LAYOUTS[layout])
    wanted = [t[name].requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        return fused(t | dict(zip(names, values, strict=True)))

    assert torch.autograd.gradcheck(function, wanted, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, wanted, fast_mode=True)


def derivatives(function: Function, names: list[str], order: int) -> list[Tensor]:
    """A mixed directional derivative of every order up to `order`, and all gradients of it."""
    t = leaves()
    wanted = [t[name].requires_grad_() for name in names]
    value = (function(t).sin() * image(*function(t).shape, seed=51)).sum()
    found = []
    for _ in range(order):
        grads = torch.autograd.grad(value, wanted, create_graph=True, materialize_grads=True)
        value = sum((g * image(*g.shape, seed=52)).sum() for g in grads)
        found += [*grads, value]
    return [f.detach() for f in found]


@twins
def test_third_derivatives(twin: str) -> None:
    fused, plain, names = TWINS[twin]
    close(derivatives(fused, names, 3), derivatives(plain, names, 3))


@twins
def test_forward_mode_for_any_input(twin: str) -> None:
    fused, plain, names = TWINS[twin]
    for name in names:
        for grad_mode in (True, False):
            found = []
            for function in (fused, plain):
                t = leaves()
                for other in names:
                    t[other].requires_grad_(grad_mode and other != name)
                with forward_ad.dual_level(), torch.set_grad_enabled(grad_mode):
                    t[name] = forward_ad.make_dual(t[name], image(*t[name].shape, seed=53))
                    primal, tangent = forward_ad.unpack_dual(function(t))
                assert tangent is not None, f"no tangent from {name}"
                found.append((primal.detach(), tangent.detach()))
            close(*found)


@twins
def test_forward_over_reverse(twin: str) -> None:
    """The tangents of the upstream gradient pass through a backward recorded without any."""
    found = []
    for function in TWINS[twin][:2]:
        t = leaves()
        t["x"].requires_grad_()
        y = function(t)
        with forward_ad.dual_level():
            seed = forward_ad.make_dual(image(*y.shape, seed=54), image(*y.shape, seed=55))
            (grad,) = torch.autograd.grad(y, t["x"], seed)
            found.append(forward_ad.unpack_dual(grad).tangent)
    close(*found)


@twins
def test_functional_transforms_are_eagers(twin: str) -> None:
    fused, plain, names = TWINS[twin]
    t = leaves()

    def of(function: Function) -> Callable[..., Tensor]:
        return lambda *values: function(t | dict(zip(names, values, strict=True)))

    values = tuple(t[name] for name in names)
    tangents = tuple(image(*v.shape, seed=56) for v in values)
    numbers = tuple(range(len(names)))

    def loss(function: Function) -> Callable[..., Tensor]:
        return lambda *values: of(function)(*values).square().sum()

    for transformed in (
        lambda f: torch.func.jvp(of(f), values, tangents),
        lambda f: torch.func.grad(loss(f), argnums=numbers)(*values),
        lambda f: torch.func.jvp(torch.func.grad(loss(f)), values, tangents),
    ):
        close(transformed(fused), transformed(plain))
    small = (t["weight"],) if "weight" in names else ()
    if small:
        index = names.index("weight")
        for jacobian in (torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
            close(jacobian(of(fused), index)(*values), jacobian(of(plain), index)(*values))


@pytest.mark.parametrize("twin", ["bn_act eval", "bn_act_conv eval", "conv2d", "upsample"])
def test_vmap_over_images(twin: str) -> None:
    fused, plain, _ = TWINS[twin]
    batch = image(3, *SHAPE, seed=57)
    t = leaves()

    def grad(function: Function) -> Callable[[Tensor], Tensor]:
        return torch.func.grad(lambda x: function(t | {"x": x}).square().sum())

    for make in (lambda f: lambda x: f(t | {"x": x}), grad):
        close(torch.vmap(make(fused))(batch), torch.vmap(make(plain))(batch))


@twins
def test_vectorised_jacobian(twin: str) -> None:
    """Backward operators under vmap, recorded outside of it."""
    found = []
    for function in TWINS[twin][:2]:
        t = leaves()
        t["x"].requires_grad_()
        y = function(t)
        seeds = image(4, *y.shape, seed=58)
        found.append(torch.autograd.grad(y, t["x"], seeds, is_grads_batched=True))
    close(*found)


class Layer(nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.bn, self.function = batch_norm(3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.bn)


@pytest.mark.parametrize("training", [True, False])
def test_functional_call(training: bool) -> None:
    found = []
    for function in (fused_bn_act, plain_bn_act):
        layer = Layer(function).train(training)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}

        def loss(given: Leaves, layer: nn.Module = layer, before: Leaves = before) -> Any:
            buffers = {name: buffer * 1 for name, buffer in before.items()}
            y = torch.func.functional_call(layer, (given, buffers), image(*SHAPE))
            return y.square().sum(), buffers

        parameters = {name: p.detach() + 1 for name, p in layer.named_parameters()}
        found.append(torch.func.grad(loss, has_aux=True)(parameters))
        close(dict(layer.named_buffers()), before)
    close(*found)


@twins
def test_compiled_without_graph_breaks(twin: str) -> None:
    torch._dynamo.reset()
    fused, plain, names = TWINS[twin]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    for seed in (3, 4):
        found = []
        for function in (compiled, plain):
            t = leaves() | {"x": image(*SHAPE, seed=seed)}
            wanted = [t[name].requires_grad_() for name in names]
            y = function(t)
            found.append((y.detach(), torch.autograd.grad(y.sin().sum(), wanted)))
        close(*found)
    assert counter.frame_count == 1


def test_compiled_statistics() -> None:
    torch._dynamo.reset()
    ours, theirs = Layer(fused_bn_act), Layer(plain_bn_act)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        close(compiled(image(*SHAPE, seed=seed)), theirs(image(*SHAPE, seed=seed)))
    close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_another_backend_compiles_again_and_only_then() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    bn, weights = batch_norm(3).eval(), convolution(3, 4)
    compiled = torch.compile(
        lambda x: F.bn_act_conv(x, Norm.of(bn), Conv.of(weights)), fullgraph=True, backend=counter
    )
    frames = []
    for name in (*BACKENDS, *BACKENDS, *reversed(BACKENDS)):
        with rf.use_backend(name):
            compiled(image(*SHAPE))
        frames.append(counter.frame_count)
    assert frames == [*range(1, len(BACKENDS) + 1), *[len(BACKENDS)] * 2 * len(BACKENDS)]


@twins
def test_compiled_forward_mode(twin: str) -> None:
    torch._dynamo.reset()
    fused, plain, _ = TWINS[twin]
    compiled = torch.compile(fused, backend="aot_eager")
    compiled(leaves())
    found = []
    for function in (compiled, plain):
        t = leaves()
        with forward_ad.dual_level():
            t["x"] = forward_ad.make_dual(t["x"], image(*SHAPE, seed=53))
            found.append(forward_ad.unpack_dual(function(t)))
    assert found[0].tangent is not None
    close(*map(tuple, found))
