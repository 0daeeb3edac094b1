"""Fused equals eager for drawn shapes, views, dtypes and flags; the judge is eager in float64.

An operator reads its operands exactly, computes in the accumulator's dtype and rounds its result
once. So a result may be off by the tolerance of its own dtype times its size, plus that of the
accumulator times what the case magnifies; and by twice eager's error, where eager rounds in
between. See docs/numerics.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import one_thread as one_thread
from torch import Tensor, nn
from twins import (
    BACKENDS,
    MODES,
    VIEWS,
    batch_norm,
    fused_bn_act,
    fused_bn_act_conv,
    fused_conv_bn_act,
    image,
    outcome,
    plain_bn_act,
    plain_bn_act_conv,
    plain_conv,
    plain_conv_bn_act,
    tensors,
)

import resunet_fast as rf
from resunet_fast.ops.layout import accumulator
from resunet_fast.testing import tolerance

Options = dict[str, Any]
Shape = tuple[int, int, int, int]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def few(number: int) -> Callable[[Any], Any]:
    return settings(deadline=None, derandomize=True, database=None, max_examples=number)


# Not interpreted kernels, which take seconds where these take milliseconds: test_guard_bands.py
# draws shapes for them.
backends = st.sampled_from([name for name in BACKENDS if name != "triton"])
views, seeds = st.sampled_from(list(VIEWS)), st.integers(0, 99)
channels = st.sampled_from([1, 2, 3, 5, 8, 15, 17, 33])
sizes = st.sampled_from([1, 2, 3, 4, 7, 9])
shapes = st.tuples(sizes, channels, sizes, sizes)
shapes_or_none = st.one_of(shapes, st.tuples(st.integers(0, 2), channels, st.integers(0, 2), sizes))
norms = st.fixed_dictionaries(
    {
        "momentum": st.sampled_from([None, 0.0, 0.1, 1.0]),
        "eps": st.sampled_from([1e-5, 1e-3, 1.0]),
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
    }
)
flags = st.fixed_dictionaries(
    {
        "residual": st.sampled_from([None, "tensor", "norm"]),
        "training": st.booleans(),
        "relu": st.booleans(),
        "pool": st.booleans(),
        "norm": norms,
        "other": norms,
        "views": st.tuples(views, views),
        "seed": seeds,
    }
)
convolutions = st.fixed_dictionaries(
    {
        "kernel_size": st.sampled_from([1, 2, 3]),
        "stride": st.sampled_from([1, 2]),
        "padding": st.sampled_from([0, 1]),
        "dilation": st.sampled_from([1, 2]),
        "bias": st.booleans(),
    }
)


class Example(nn.Module):
    """One example's modules; copies of it go the fused, the plain and the float64 way."""

    def __init__(self, channels: int, dtype: torch.dtype, drawn: Options) -> None:
        super().__init__()
        self.bn = batch_norm(channels, accumulator(dtype), **drawn["norm"])
        self.other = batch_norm(channels, accumulator(dtype), **drawn["other"])
        self.form, self.relu, self.pool = drawn["residual"], drawn["relu"], drawn["pool"]
        self.conv: nn.Conv2d | None = None
        self.train(drawn["training"])

    def convolve(self, before: int, after: int, dtype: torch.dtype, drawn: Options) -> None:
        self.conv = nn.Conv2d(before, after, **drawn).to(dtype)
        with torch.no_grad():
            for i, parameter in enumerate(self.conv.parameters()):
                parameter.copy_(image(*parameter.shape, seed=60 + i) / before)

    def options(self, residual: Tensor) -> Options:
        result: Options = {"relu": self.relu, "pool": self.pool}
        if self.form is not None:
            result["residual"] = residual
        if self.form == "norm":
            result["residual_bn"] = self.other
        return result


def magnification(bn: nn.BatchNorm2d, x: Tensor) -> float:
    """Of rounding errors, by subtracting the mean and dividing by the deviation."""
    x = x.detach().double()
    if bn.training or bn.running_mean is None:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    else:
        mean, var = bn.running_mean.double(), bn.running_var.double()
    slope = 1.0 if bn.weight is None else float(bn.weight.detach().abs().max())
    return 1 + (1 + slope) * float(
        ((1 + mean.abs() + x.abs().amax((0, 2, 3))) * (var + bn.eps).rsqrt()).max()
    )


def assert_near(
    name: str, own: Tensor, peer: Tensor | None, judge: Tensor, magnified: float, extra: float = 0.0
) -> None:
    """Compare by the largest element, as the module's docstring says."""
    assert own.shape == judge.shape, name
    if own.numel() == 0:
        return
    error = float((own.detach().double() - judge).detach().abs().max())
    size, terms = float(judge.detach().abs().max()), own.numel()
    allowed = tolerance(own.dtype) * (size + extra)
    allowed += 4 * tolerance(accumulator(own.dtype), terms) * (magnified + size)
    if peer is not None:
        assert own.dtype == peer.dtype, name
        allowed += 2 * float((peer.detach().double() - judge).detach().abs().max())
    assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"


def assert_same_buffers(
    own: nn.Module, peer: nn.Module, judge: nn.Module, magnified: float
) -> None:
    for (name, value), (_, other), (_, exact) in zip(
        own.named_buffers(), peer.named_buffers(), judge.named_buffers(), strict=True
    ):
        if value.is_floating_point():
            assert_near(name, value, other, exact, magnified)
        else:
            assert torch.equal(value, other), name


def double(module: nn.Module) -> Any:
    return copy.deepcopy(module).double()


def operands(shape: Shape, dtype: torch.dtype, drawn: Options) -> tuple[Tensor, Tensor]:
    x = VIEWS[drawn["views"][0]](image(*shape, dtype=dtype, seed=drawn["seed"]) * 2 + 1)
    return x, VIEWS[drawn["views"][1]](image(*shape, dtype=dtype, seed=drawn["seed"] + 1))


@few(400)
@given(shapes_or_none, st.sampled_from(DTYPES), flags, backends)
def test_bn_act(shape: Shape, dtype: torch.dtype, drawn: Options, backend: str) -> None:
    x, r = operands(shape, dtype, drawn)
    own = Example(shape[1], dtype, drawn)
    peer, judge = copy.deepcopy(own), double(own)
    with rf.use_backend(backend):
        result = outcome(fused_bn_act, x, own.bn, **own.options(r))
    expected = outcome(plain_bn_act, x, peer.bn, **peer.options(r))
    assert result[0] == expected[0], (result, expected)
    if result[0] == "raised":
        assert result == expected
        return
    exact = plain_bn_act(x.double(), judge.bn, **judge.options(r.double()))
    magnified = 0.0
    if x.numel():
        magnified = magnification(own.bn, x) + magnification(own.other, r)
        magnified += float(x.double().square().max())
    for z, other, truth in zip(*map(tensors, (result[1], expected[1], exact)), strict=True):
        assert_near("output", z, other, truth, magnified)
        if drawn["views"][0] in ("contiguous", "channels_last"):
            assert z.stride() == other.stride()
    assert_same_buffers(own, peer, judge, magnified)


def imposed(v: Tensor, outputs: tuple[Tensor, ...], example: Example) -> list[Tensor]:
    """ReLU and max-pooling of v with the mask and the maxima of the given outputs."""
    z = v * (outputs[0].detach() > 0) if example.relu else v
    if not example.pool:
        return [z]
    _, index = F.max_pool2d(outputs[0].detach().double().contiguous(), 2, return_indices=True)
    return [z, z.flatten(2).gather(2, index.flatten(2)).view(index.shape)]


def assert_same_gradients(
    own: Example,
    fused: Callable[..., Any],
    plain: Callable[..., Any],
    sources: dict[str, Tensor],
    magnified: float,
) -> None:
    """Both ways take (example, sources); the plain one stops before the ReLU."""
    judge = double(own)
    # Eager's own gradient is wrong for some strides, such as those of an innermost batch.
    doubles = {k: t.detach().double().contiguous().requires_grad_() for k, t in sources.items()}
    sources = {k: t.detach().requires_grad_() for k, t in sources.items()}
    outputs = tensors(fused(own, sources))
    expected = imposed(plain(judge, doubles), outputs, own)
    seeds = [image(*o.shape, dtype=o.dtype, seed=70) for o in outputs]
    names = [*sources, *(name for name, _ in own.named_parameters())]
    grads = torch.autograd.grad(
        outputs, [*sources.values(), *own.parameters()], seeds, allow_unused=True
    )
    exact = torch.autograd.grad(
        expected,
        [*doubles.values(), *judge.parameters()],
        [seed.double() for seed in seeds],
        allow_unused=True,
    )
    positions = max(o.numel() // o.shape[1] for o in outputs)
    for name, grad, truth in zip(names, grads, exact, strict=True):
        assert (grad is None) == (truth is None), name
        if grad is not None:
            assert grad.dtype == (sources | dict(own.named_parameters()))[name].dtype
            sums = 1 if name in sources else positions
            # Pooling rounds the sum of both gradients before the rest.
            extra = magnified if own.pool else 0.0
            assert_near(f"gradient of {name}", grad, None, truth, 4 * magnified * sums, extra)


@few(250)
@given(shapes, st.sampled_from(DTYPES), flags, backends)
def test_bn_act_backward(shape: Shape, dtype: torch.dtype, drawn: Options, backend: str) -> None:
    if shape[0] * shape[2] * shape[3] == 1:
        return
    drawn["pool"] = drawn["pool"] and min(shape[2:]) > 1
    x, r = operands(shape, dtype, drawn)
    example = Example(shape[1], dtype, drawn)

    def plain(example: Example, sources: dict[str, Tensor]) -> Tensor:
        options = {**example.options(sources["r"]), "relu": False, "pool": False}
        return plain_bn_act(sources["x"], example.bn, **options)

    magnified = magnification(example.bn, x) * magnification(example.other, r)
    with rf.use_backend(backend):
        assert_same_gradients(
            example,
            lambda example, s: fused_bn_act(s["x"], example.bn, **example.options(s["r"])),
            plain,
            {"x": x, "r": r},
            magnified,
        )


@st.composite
def convolved(draw: st.DrawFn) -> tuple[Example, dict[str, Tensor], Options]:
    """(example, sources, keywords beside them) of a convolution with batch norm."""
    shape, drawn = draw(shapes), draw(flags)
    dtype = draw(st.sampled_from(DTYPES[:2]))
    mode = draw(st.sampled_from([None, "none", *MODES]))
    x, _ = operands(shape, dtype, drawn)
    sources, keywords, before = {"x": x}, {}, shape[1]
    if mode is not None:
        grown = [n if mode == "none" else n + draw(sizes) - 1 for n in shape[2:]]
        skip = image(shape[0], 3, *grown, dtype=dtype, seed=drawn["seed"] + 2)
        sources["skip"], keywords["upsample"] = VIEWS[drawn["views"][1]](skip), mode
        before += 3
    example = Example(4, dtype, drawn)
    example.convolve(before, 4, dtype, draw(convolutions))
    skips = {k: t for k, t in sources.items() if k == "skip"}
    kind, y = outcome(plain_conv, x, example.conv, **skips, **keywords)
    if kind == "returned":
        sources["residual"] = image(*y.shape, dtype=dtype, seed=drawn["seed"] + 3)
    return example, sources, keywords


def through(
    function: Callable[..., Any], example: Example, sources: dict[str, Tensor], **options: Any
) -> Any:
    """Call one of the twins on an example's operands, absent ones left out."""
    given = {k: t for k, t in sources.items() if k != "x"}
    if example.form is None:
        given.pop("residual", None)
    elif example.form == "norm":
        options["residual_bn"] = example.other
    return function(sources["x"], example.conv, example.bn, **given, **options)


@few(250)
@given(convolved(), backends)
def test_conv_bn_act(drawn: tuple[Example, dict[str, Tensor], Options], backend: str) -> None:
    own, sources, keywords = drawn
    peer = copy.deepcopy(own)
    options = {**keywords, "relu": own.relu, "pool": own.pool}
    with rf.use_backend(backend):
        result = outcome(through, fused_conv_bn_act, own, sources, **options)
    expected = outcome(through, plain_conv_bn_act, peer, sources, **options)
    assert result[0] == expected[0], (result, expected)
    if result[0] == "raised":
        assert result == expected
        return
    magnified = conv_magnification(own, sources, keywords)
    for z, other in zip(tensors(result[1]), tensors(expected[1]), strict=True):
        assert_near("output", z, other, other.double(), magnified)
    assert_same_buffers(own, peer, double(peer), magnified)


def conv_magnification(example: Example, sources: dict[str, Tensor], keywords: Options) -> float:
    skip = {"skip": sources["skip"]} if "skip" in sources else {}
    y = plain_conv(sources["x"], example.conv, **skip, **keywords)
    residual = magnification(example.other, sources["residual"])
    return magnification(example.bn, y) * residual * example.conv.weight[0].numel()


@few(150)
@given(convolved(), backends)
def test_conv_bn_act_backward(
    drawn: tuple[Example, dict[str, Tensor], Options], backend: str
) -> None:
    example, sources, keywords = drawn
    r = sources.get("residual")
    if r is None or r.numel() // r.shape[1] == 1 or (example.pool and min(r.shape[2:]) == 1):
        return

    def fused(example: Example, sources: dict[str, Tensor]) -> Any:
        options = {**keywords, "relu": example.relu, "pool": example.pool}
        return through(fused_conv_bn_act, example, sources, **options)

    def plain(example: Example, sources: dict[str, Tensor]) -> Tensor:
        return through(plain_conv_bn_act, example, sources, **keywords, relu=False)

    magnified = conv_magnification(example, sources, keywords) * sources["x"][0].numel()
    with rf.use_backend(backend):
        assert_same_gradients(example, fused, plain, sources, magnified)


def bn_act_conv_step(
    function: Callable[..., Any], example: Example, x: Tensor, **flags: bool
) -> Any:
    example, x = copy.deepcopy(example), x.detach().requires_grad_()
    y = function(x, example.conv, example.bn, relu=example.relu, **flags)
    leaves = [x, *example.conv.parameters(), *example.bn.parameters()]
    grads = torch.autograd.grad(y, leaves, image(*y.shape, seed=70))
    return [y, *grads, *(buffer.double() for buffer in example.buffers())]


@few(150)
@given(shapes, flags, convolutions, st.booleans(), backends)
def test_bn_act_conv(
    shape: Shape, drawn: Options, conv: Options, recompute: bool, backend: str
) -> None:
    x, _ = operands(shape, torch.float64, drawn)
    example = Example(shape[1], torch.float64, drawn)
    example.convolve(shape[1], 5, torch.float64, conv)
    with rf.use_backend(backend):
        step = (bn_act_conv_step, fused_bn_act_conv, example, x)
        kind, results = outcome(*step, recompute=recompute)
    # Contiguous: eager's own gradient is wrong for some strides.
    expected = outcome(bn_act_conv_step, plain_bn_act_conv, example, x.contiguous())
    assert kind == expected[0], (results, expected)
    if kind == "raised":
        assert results == expected[1]
        return
    magnified = magnification(example.bn, x) * x.numel() * example.conv.weight.numel()
    for i, (result, truth) in enumerate(zip(results, expected[1], strict=True)):
        assert_near(f"result {i}", result, None, truth, magnified)


@few(150)
@given(shapes_or_none, st.tuples(sizes, sizes), st.sampled_from(list(MODES)), flags, backends)
def test_upsample(
    shape: Shape, size: tuple[int, int], mode: str, drawn: Options, backend: str
) -> None:
    for dtype in DTYPES:
        x, _ = operands(shape, dtype, drawn)
        leaf, double = x.detach().requires_grad_(), x.detach().double().requires_grad_()
        with rf.use_backend(backend):
            kind, y = outcome(rf.functional.upsample, leaf, size, mode)
        expected = outcome(F.interpolate, double, size=size, **MODES[mode])
        assert kind == expected[0]
        if kind == "raised":
            assert y == expected[1]
            continue
        assert_near("output", y, None, expected[1], 8.0)
        seed = image(*y.shape, dtype=dtype, seed=70)
        (grad,) = torch.autograd.grad(y, leaf, seed)
        (exact,) = torch.autograd.grad(expected[1], double, seed.double())
        assert_near("gradient", grad, None, exact, y.numel() / max(x.numel(), 1) + 1)
