"""First derivatives for any subset of inputs, and autograd's machinery around the operators."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pairwise
import pytest
import torch
import torch.utils.checkpoint
from networks import one_thread as one_thread
from torch import Tensor, nn
from twins import (
    BACKENDS,
    FUNCTIONS,
    LAYOUTS,
    batch_norm,
    convolution,
    fused_bn_act,
    fused_bn_act_conv,
    fused_conv,
    fused_conv_bn_act,
    image,
    plain_bn_act,
    plain_bn_act_conv,
    plain_conv_bn_act,
    tensors,
)

import resunet_fast as rf
from resunet_fast.ops.bn_act import direct
from resunet_fast.registry import OPERATORS

Step = tuple[list[Tensor], dict[str, Tensor | None]]


def gradients(
    function: Callable[..., Any], leaves: dict[str, Tensor], use: tuple[bool, bool] = (True, True)
) -> Step:
    """Call with the leaves; return the outputs and the leaves' gradients (None where unused)."""
    outputs = tensors(function())
    used = [o for o, wanted in zip(outputs, use, strict=False) if wanted and o.requires_grad]
    seeds = [image(*o.shape, seed=31) for o in used]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads: tuple[Tensor | None, ...] = ()
    if used:
        grads = torch.autograd.grad(used, list(wanted.values()), seeds, allow_unused=True)
    return list(outputs), dict(zip(wanted, grads, strict=bool(used)))


def assert_same_step(own: Step, other: Step, absent: str = "") -> None:
    """Equal outputs and gradients; `absent` is zero where eager has rounding noise."""
    for result, expected in zip(own[0], other[0], strict=True):
        assert result.requires_grad == expected.requires_grad
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
    assert own[1].keys() == other[1].keys()
    for name, grad in own[1].items():
        expected = other[1][name]
        if expected is None:
            assert grad is None or not grad.any(), name
            continue
        assert grad is not None, f"{name} has no gradient"
        if name == absent:
            assert not grad.any()
            assert expected.abs().max() < 1e-9
            continue
        worst = f"{name}: off by {(grad - expected).abs().max()}"
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-8, msg=worst)


FLAGS = dict.fromkeys(("x", "weight", "bias", "residual", "relu", "pool"), (True, False))
NORM_AXES = {
    **FLAGS,
    "form": (None, "tensor", "norm"),
    "own": ("training", "eval"),
    "other": ("training", "eval"),
    "other_weight": (True, False),
    "other_bias": (True, False),
    "use": ((True, True), (True, False), (False, True)),
    "layout": tuple(LAYOUTS),
    "backend": tuple(BACKENDS),
}
CONV_AXES = {
    "conv_weight": (True, False),
    "conv_bias": (True, False),
    "skip": (True, False),
    "mode": (None, "none", "nearest", "bilinear_align_corners"),
}
BN_ACT_CONV_AXES = {
    **dict.fromkeys(("x", "weight", "bias", "conv_weight", "conv_bias"), (True, False)),
    "relu": (True, False),
    "recompute": (True, False),
    "own": ("training", "eval"),
    "layout": tuple(LAYOUTS),
    "backend": tuple(BACKENDS),
}
DEFAULTS: pairwise.Row = {
    **dict.fromkeys(FLAGS, True),
    **{"other_weight": True, "other_bias": True, "conv_weight": True, "conv_bias": True},
    **{"skip": True, "mode": None, "form": None, "own": "training", "other": "training"},
    **{"use": (True, True), "layout": "nhwc", "backend": BACKENDS[0]},
}
NOTHING = dict.fromkeys(
    ["x", "weight", "bias", "residual", "other_weight", "other_bias", "conv_weight", "conv_bias"],
    False,
)
NAMED: dict[str, pairwise.Row] = {
    "only the shortcut's scale, pooled": {
        **NOTHING,
        **{"other_weight": True, "form": "norm", "use": (False, True)},
    },
    "only the residual, nothing trained": {**NOTHING, "residual": True, "form": "tensor"},
    "only the input, frozen, pooled": {**NOTHING, "x": True, "own": "eval", "relu": False},
    "one norm frozen, one not": {"form": "norm", "own": "eval", "other": "training"},
    "the other norm frozen": {"form": "norm", "own": "training", "other": "eval", "pool": False},
    "only scales": {**NOTHING, "weight": True, "other_weight": True, "form": "norm"},
    "nothing": NOTHING,
}


def norm_arguments(
    row: pairwise.Row, channels: int, shape: tuple[int, ...]
) -> tuple[nn.BatchNorm2d, dict[str, Any], dict[str, Tensor]]:
    """The batch norm of a row, the options beside it, and what derivatives are taken of."""
    bn = batch_norm(channels).train(row["own"] == "training")
    other = batch_norm(channels, eps=1e-2).train(row["other"] == "training")
    residual = image(*shape, seed=22).contiguous(memory_format=LAYOUTS[row["layout"]])
    leaves = {"weight": bn.weight, "bias": bn.bias}
    options: dict[str, Any] = {"relu": row["relu"], "pool": row["pool"]}
    if row["form"] is not None:
        options["residual"] = leaves["residual"] = residual
    if row["form"] == "norm":
        options["residual_bn"] = other
        leaves |= {"other_weight": other.weight, "other_bias": other.bias}
    return bn, options, leaves


def ask(leaves: dict[str, Tensor], row: pairwise.Row) -> None:
    for name, leaf in leaves.items():
        leaf.requires_grad_(row[name])


def bn_act_step(function: Callable[..., Any], row: pairwise.Row) -> Step:
    x = image(2, 3, 5, 6).contiguous(memory_format=LAYOUTS[row["layout"]])
    bn, options, leaves = norm_arguments(row, 3, tuple(x.shape))
    leaves["x"] = x
    ask(leaves, row)
    use = row["use"] if row["pool"] else (True, True)
    return gradients(lambda: function(x, bn, **options), leaves, use)


def conv_bn_act_step(function: Callable[..., Any], row: pairwise.Row) -> Step:
    x = image(2, 3, 5, 6).contiguous(memory_format=LAYOUTS[row["layout"]])
    size = (2, 4, *((9, 11) if row["mode"] not in (None, "none") else (5, 6)))
    skip = image(*size, seed=24)
    conv = convolution(3 if row["mode"] is None else 7, 4)
    bn, options, leaves = norm_arguments(row, 4, size)
    leaves |= {"x": x, "conv_weight": conv.weight, "conv_bias": conv.bias}
    if row["mode"] is not None:
        options |= {"skip": skip, "upsample": row["mode"]}
        leaves["skip"] = skip
    ask(leaves, row)
    use = row["use"] if row["pool"] else (True, True)
    return gradients(lambda: function(x, conv, bn, **options), leaves, use)


def bn_act_conv_step(function: Callable[..., Any], row: pairwise.Row) -> Step:
    x = image(2, 3, 5, 6).contiguous(memory_format=LAYOUTS[row["layout"]])
    bn, conv = batch_norm(3).train(row["own"] == "training"), convolution(3, 4)
    leaves = {"x": x, "weight": bn.weight, "bias": bn.bias}
    leaves |= {"conv_weight": conv.weight, "conv_bias": conv.bias}
    ask(leaves, row)
    options = {"relu": row["relu"], "recompute": row["recompute"]}
    return gradients(lambda: function(x, conv, bn, **options), leaves)


def named(axes: dict[str, tuple[Any, ...]]) -> list[Any]:
    """The pairwise rows and the named ones that mean something for these axes."""
    result = [pytest.param(row, id=pairwise.spell(row)) for row in pairwise.rows(axes)]
    for name, row in NAMED.items():
        for backend in BACKENDS:
            complete = {**DEFAULTS, **row, "backend": backend}
            result.append(pytest.param(complete, id=f"{name}, {backend}"))
    return result


@pytest.mark.parametrize("axes", [NORM_AXES, NORM_AXES | CONV_AXES, BN_ACT_CONV_AXES])
def test_the_rows_hold_every_pair(axes: dict[str, tuple[Any, ...]]) -> None:
    rows = pairwise.rows(axes)
    assert set().union(*(pairwise.pairs(row) for row in rows)) == pairwise.every_pair(axes)
    assert len(rows) < 40


@pytest.mark.parametrize("row", named(NORM_AXES))
def test_bn_act_for_any_subset_of_inputs(row: pairwise.Row) -> None:
    with rf.use_backend(row["backend"]):
        own = bn_act_step(fused_bn_act, row)
    assert_same_step(own, bn_act_step(plain_bn_act, row))


@pytest.mark.parametrize("row", named(NORM_AXES | CONV_AXES))
def test_conv_bn_act_for_any_subset_of_inputs(row: pairwise.Row) -> None:
    with rf.use_backend(row["backend"]):
        own = conv_bn_act_step(fused_conv_bn_act, row)
    absent = "conv_bias" if row["own"] == "training" else ""
    assert_same_step(own, conv_bn_act_step(plain_conv_bn_act, row), absent)


@pytest.mark.parametrize("row", pairwise.rows(BN_ACT_CONV_AXES), ids=pairwise.spell)
def test_bn_act_conv_for_any_subset_of_inputs(row: pairwise.Row) -> None:
    with rf.use_backend(row["backend"]):
        own = bn_act_conv_step(fused_bn_act_conv, row)
    assert_same_step(own, bn_act_conv_step(plain_bn_act_conv, row))


functions = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(operator, backend) of every computation; nothing passes the operators by."""
    monkeypatch.setattr(direct, "bn_act", lambda *_: None)
    calls: list[tuple[str, str]] = []

    def watched(operator: str, backend: str, compute: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*arguments: Any) -> Any:
            calls.append((operator, backend))
            return compute(*arguments)

        return watch

    for operator in OPERATORS.values():
        for name, implementation in operator.implementations.items():
            compute = watched(operator.name, name, implementation.compute)
            spy = dataclasses.replace(implementation, compute=compute)
            monkeypatch.setitem(operator.implementations, name, spy)
    return calls


def in_a_thread(function: Callable[[], None]) -> None:
    raised: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not raised, raised[0]


@functions
@pytest.mark.parametrize("forward", BACKENDS)
@pytest.mark.parametrize("later", BACKENDS)
def test_backward_uses_the_forwards_backend(
    function: str, forward: str, later: str, spied: list[tuple[str, str]]
) -> None:
    x = image(2, 3, 4, 6).requires_grad_()
    with rf.use_backend(forward):
        y = FUNCTIONS[function](x)
    seen = len(spied)
    assert seen
    with rf.use_backend(later):
        in_a_thread(lambda: y.square().sum().backward())
    assert any("backward" in name for name, _ in spied[seen:])
    assert {backend for _, backend in spied} == {forward}
    assert x.grad is not None


@functions
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(function: str, backend: str) -> None:
    x = image(2, 3, 4, 6).requires_grad_()
    with rf.use_backend(backend):
        y = FUNCTIONS[function](x)
    seed = image(*y.shape, seed=5)
    first = torch.autograd.grad(y, x, seed, retain_graph=True)
    assert torch.equal(*first, *torch.autograd.grad(y, x, seed))
    assert torch.equal(seed, image(*y.shape, seed=5))
    if function != "upsample":  # which saves nothing that could have been freed
        with pytest.raises(RuntimeError, match="a second time"):
            torch.autograd.grad(y, x, seed)


def spoil(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.add_(1)


CHANGES: dict[str, Callable[[Tensor, nn.BatchNorm2d, nn.Conv2d], tuple[Tensor, Tensor]]] = {
    "bn_act input": lambda x, bn, conv: (fused_bn_act(x, bn), x),
    "bn_act weight": lambda x, bn, conv: (fused_bn_act(x, bn), bn.weight),
    "bn_act frozen variance": lambda x, bn, conv: (fused_bn_act(x, bn.eval()), bn.running_var),
    "bn_act result": lambda x, bn, conv: (z := fused_bn_act(x, bn, residual=x), z),
    "bn_act residual": lambda x, bn, conv: (
        fused_bn_act(x, bn, residual=(r := x.detach() * 2), residual_bn=batch_norm(3)),
        r,
    ),
    "conv_bn_act weight": lambda x, bn, conv: (fused_conv_bn_act(x, conv, bn), conv.weight),
    "conv_bn_act input": lambda x, bn, conv: (fused_conv_bn_act(x, conv, bn), x),
    "bn_act_conv weight": lambda x, bn, conv: (fused_bn_act_conv(x, conv, bn), conv.weight),
    "bn_act_conv input": lambda x, bn, conv: (fused_bn_act_conv(x, conv, bn, recompute=True), x),
    "conv2d input": lambda x, bn, conv: (fused_conv(x, conv), x),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_saved_tensor_is_noticed(change: str, backend: str) -> None:
    leaf, bn, conv = image(2, 3, 4, 6).requires_grad_(), batch_norm(3), convolution(3, 3)
    with rf.use_backend(backend):
        y, changed = CHANGES[change](leaf * 1, bn, conv)
    loss = y.sum()
    spoil(changed)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_between_an_evaluation_and_its_backward_is_noticed(backend: str) -> None:
    x, bn = image(2, 3, 4, 6).requires_grad_(), batch_norm(3)
    with rf.use_backend(backend):
        loss = fused_bn_act(x, bn.eval()).sum()
        fused_bn_act(x, bn.train())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
