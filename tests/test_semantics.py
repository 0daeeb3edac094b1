"""Eager PyTorch's behaviour at the edges, kept: errors, empty batches, NaN, layouts, counters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import one_thread as one_thread
from networks import small
from torch import Tensor, nn
from twins import (
    BACKENDS,
    LAYOUTS,
    UNITS,
    batch_norm,
    fused_bn_act,
    fused_conv_bn_act,
    image,
    outcome,
    plain_bn_act,
    plain_conv_bn_act,
    same,
    same_outcome,
    tensors,
)

import resunet_fast as rf
from resunet_fast.functional import Conv, Norm

LOW = [torch.bfloat16, torch.float16]
units = pytest.mark.parametrize("unit", UNITS)


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and request.node.callspec.params.get("unit", "bn_act") != "bn_act":
        pytest.skip("groups keep the channels of the unit's convolution apart: Triton refuses them")
    with rf.use_backend(request.param):
        yield request.param


def with_buffer(bn: nn.BatchNorm2d, **values: Any) -> nn.BatchNorm2d:
    for name, value in values.items():
        setattr(bn, name, value)
    return bn


BAD: dict[str, Callable[[], tuple[Tensor, nn.BatchNorm2d]]] = {
    "one value per channel": lambda: (image(1, 3, 1, 1), batch_norm(3)),
    "one value, statistics not tracked": lambda: (
        image(1, 3, 1, 1),
        batch_norm(3, track_running_stats=False).eval(),
    ),
    "3-D": lambda: (image(3, 4, 5), batch_norm(3)),
    "wrong number of channels": lambda: (image(2, 4, 5, 5), batch_norm(3)),
    "wrong number of channels, eval": lambda: (image(2, 4, 5, 5), batch_norm(3).eval()),
    "integers": lambda: (torch.ones(2, 3, 4, 4, dtype=torch.int64), batch_norm(3, torch.float32)),
    "double with float parameters": lambda: (image(2, 3, 4, 4), batch_norm(3, torch.float32)),
    "float with double parameters": lambda: (image(2, 3, 4, 4).float(), batch_norm(3)),
    "half with half weights and float statistics": lambda: (
        image(2, 3, 4, 4, dtype=torch.bfloat16),
        with_buffer(
            batch_norm(3, torch.bfloat16), running_mean=torch.zeros(3), running_var=torch.ones(3)
        ),
    ),
    "short running statistics": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), running_mean=image(2), running_var=image(2).exp()),
    ),
    "short running statistics, eval": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), running_mean=image(2), running_var=image(2).exp()).eval(),
    ),
    "long running variance, eval": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), running_var=image(4).exp()).eval(),
    ),
    "short weight": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), weight=nn.Parameter(image(2))),
    ),
    "short bias": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), bias=nn.Parameter(image(1))),
    ),
    "mean without variance": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), running_var=None),
    ),
    "variance without mean, eval": lambda: (
        image(2, 3, 4, 4),
        with_buffer(batch_norm(3), running_mean=None).eval(),
    ),
}


@pytest.mark.parametrize("bad", BAD)
@units
def test_errors_are_eagers(unit: str, bad: str) -> None:
    x, bn = BAD[bad]()
    assert same_outcome(unit, x, bn)[0] == "raised"


def test_the_counter_has_moved_when_one_value_is_refused() -> None:
    bn = batch_norm(3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fused_bn_act(image(1, 3, 1, 1), bn)
    assert bn.num_batches_tracked == 1


@units
def test_one_value_in_evaluation(unit: str) -> None:
    assert same_outcome(unit, image(1, 3, 1, 1), batch_norm(3).eval())[0] == "returned"


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)], ids=["N=0", "H=0"])
def test_empty_batch(shape: tuple[int, ...], momentum: float | None) -> None:
    bn = batch_norm(3, momentum=momentum)
    before = bn.running_var.clone()
    assert same_outcome("bn_act", image(*shape), bn)[0] == "returned"
    z = fused_bn_act(image(*shape), bn)
    assert z.shape == shape
    assert torch.equal(bn.running_var, before)
    assert bn.num_batches_tracked == 1


@units
def test_empty_batch_through_a_convolution(unit: str) -> None:
    same_outcome(unit, image(0, 3, 4, 4), batch_norm(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@units
def test_16_bit_input_with_float32_batch_norm(
    unit: str, dtype: torch.dtype, training: bool
) -> None:
    x, bn = image(2, 3, 5, 6, dtype=dtype), batch_norm(3, torch.float32).train(training)
    kind, z = same_outcome(unit, x, bn)
    assert kind == "returned"
    assert z.dtype == dtype


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@units
def test_a_bad_value_stays_in_its_channel(unit: str, value: float, layout: str) -> None:
    x, bn = image(2, 5, 6, 7).contiguous(memory_format=LAYOUTS[layout]), batch_norm(5)
    x[1, 2, 3, 4] = value
    _, z = same_outcome(unit, x, bn)
    others = [0, 1, 3, 4]
    assert z[:, others].isfinite().all()
    assert not z[:, 2].isfinite().all()
    UNITS[unit][0](x, bn)
    for running in (bn.running_mean, bn.running_var):
        assert running[others].isfinite().all()
        assert not running[2].isfinite()


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_at_its_corners(layout: str, dtype: torch.dtype, residual: bool, pool: bool) -> None:
    tiny = torch.finfo(dtype).tiny
    corners = [torch.nan, 0.0, -0.0, tiny, -tiny, torch.inf, -torch.inf, 3.0, 1e-9, -1e-9, 1.0, 2.0]
    x = torch.tensor(corners * 4, dtype=dtype).view(2, 2, 4, 3)
    x = x.contiguous(memory_format=LAYOUTS[layout])
    # The identity, so that -0. and the smallest numbers reach the ReLU.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bn = nn.BatchNorm2d(2, eps=1e-30, dtype=wide).eval().requires_grad_(False)
    bn.bias.fill_(-0.0)
    options = {"residual": torch.full_like(x, -0.0) if residual else None, "pool": pool}
    results = []
    for function in (fused_bn_act, plain_bn_act):
        leaf = x.clone().requires_grad_()
        outputs = tensors(function(leaf, bn, **options))
        (grad,) = torch.autograd.grad(outputs, leaf, [torch.ones_like(z) for z in outputs])
        results.append((*outputs, outputs[0].signbit() & (outputs[0] == 0), grad))
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0, equal_nan=True)
    nan, zeros = grad.flatten()[x.flatten().isnan()], grad.flatten()[x.flatten() == 0]
    assert (nan >= 1).all()
    assert pool or (zeros == 0).all()


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("unit", ["bn_act", "conv_bn_act"])
def test_the_result_has_the_first_operands_layout(
    unit: str, normalised: bool, first: str, second: str
) -> None:
    x = image(2, 3, 4, 5).contiguous(memory_format=LAYOUTS[first])
    r = image(2, 3, 4, 5, seed=4).contiguous(memory_format=LAYOUTS[second])
    other = batch_norm(3) if normalised else None
    _, z = same_outcome(unit, x, batch_norm(3), residual=r, residual_bn=other)
    assert z.is_contiguous(memory_format=LAYOUTS[first])


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@units
def test_ambiguous_layouts(unit: str, layout: str, shape: tuple[int, ...]) -> None:
    x = image(*shape).contiguous(memory_format=LAYOUTS[layout])
    assert same_outcome(unit, x, batch_norm(shape[1]))[0] == "returned"


SETTINGS = {
    "momentum": (0.1, 0.0, 1.0, None),
    "eps": (1e-5, 0.3),
    "affine": (True, False),
    "track_running_stats": (True, False),
}


@pytest.mark.parametrize("track", SETTINGS["track_running_stats"])
@pytest.mark.parametrize("affine", SETTINGS["affine"])
@pytest.mark.parametrize("eps", SETTINGS["eps"])
@pytest.mark.parametrize("momentum", SETTINGS["momentum"])
@units
def test_every_combination_of_settings(
    unit: str, momentum: float | None, eps: float, affine: bool, track: bool
) -> None:
    options = {"momentum": momentum, "eps": eps, "affine": affine, "track_running_stats": track}
    ours = batch_norm(3, **options)
    theirs = copy.deepcopy(ours)
    fused, plain = UNITS[unit]
    for step, training in enumerate([True, True, False, True, False]):
        x = image(2, 3, 4, 5, seed=step) + step
        same(fused(x, ours.train(training)), plain(x, theirs.train(training)), "output")
        for name, value in theirs.state_dict().items():
            same(ours.state_dict()[name], value, name)


@pytest.mark.parametrize("tracked", [True, False])
def test_removed_running_statistics(tracked: bool) -> None:
    bn = with_buffer(batch_norm(3), running_mean=None, running_var=None)
    bn.track_running_stats = tracked
    for training in (True, False):
        same_outcome("bn_act", image(2, 3, 4, 5), bn.train(training))


def test_running_variance_is_unbiased_and_normalisation_is_not() -> None:
    x, bn = image(2, 3, 4, 5), nn.BatchNorm2d(3, momentum=1.0, eps=0.0).double()
    z = fused_bn_act(x, bn, relu=False)
    same(bn.running_var, x.var((0, 2, 3), correction=1))
    same(z.var((0, 2, 3), correction=0), torch.ones(3, dtype=torch.float64))


def test_a_convolutions_bias_reaches_the_running_mean() -> None:
    conv, ours, theirs = nn.Conv2d(3, 4, 3).double(), batch_norm(4), batch_norm(4)
    z = fused_conv_bn_act(image(2, 3, 5, 6), conv, ours)
    same(z, plain_conv_bn_act(image(2, 3, 5, 6), conv, theirs))
    same(ours.running_mean, theirs.running_mean)


def test_running_statistics_are_updated_in_place_and_versioned() -> None:
    bn = batch_norm(3)
    before = {name: (value.data_ptr(), value._version) for name, value in bn.named_buffers()}
    fused_bn_act(image(2, 3, 4, 5), bn)
    for name, value in bn.named_buffers():
        pointer, version = before[name]
        assert value.data_ptr() == pointer
        assert value._version > version, name
    before = {name: value._version for name, value in bn.named_buffers()}
    fused_bn_act(image(2, 3, 4, 5), bn.eval())
    assert before == {name: value._version for name, value in bn.named_buffers()}


def test_strided_running_statistics() -> None:
    bn = batch_norm(3)
    bn.running_mean, bn.running_var = image(6)[::2], image(6).exp()[1::2]
    same_outcome("bn_act", image(2, 3, 4, 5), bn)
    same_outcome("bn_act", image(2, 3, 4, 5), bn.eval())


def test_statistics_of_one_position_are_refused() -> None:
    norm = Norm(running_mean=torch.zeros(3), running_var=torch.ones(3))
    with pytest.raises(ValueError, match="count: expected 0 or at least 2 positions"):
        rf.functional.update_running_stats(norm, torch.ones(3), torch.zeros(3), 1)
    rf.functional.update_running_stats(norm, torch.ones(3), torch.zeros(3), 0)
    assert torch.equal(norm.running_mean, torch.zeros(3))


F32, F64 = torch.float32, torch.float64
CONVOLUTIONS: dict[str, Callable[[], tuple[Tensor, Conv, dict[str, Any]]]] = {
    "wrong number of channels": lambda: (image(2, 3, 4, 4), Conv(image(5, 4, 3, 3)), {}),
    "kernel larger than the image": lambda: (image(2, 3, 2, 2), Conv(image(5, 3, 3, 3)), {}),
    "3-D weight": lambda: (image(2, 3, 4, 4), Conv(image(5, 3, 3)), {}),
    "5-D": lambda: (image(2, 3, 4, 4, 4), Conv(image(5, 3, 3, 3)), {}),
    "integers": lambda: (torch.ones(2, 3, 4, 4, dtype=torch.int64), Conv(image(5, 3, 3, 3)), {}),
    "stride of zero": lambda: (image(2, 3, 4, 4), Conv(image(5, 3, 3, 3), stride=(0, 0)), {}),
    "short bias": lambda: (image(2, 3, 4, 4), Conv(image(5, 3, 3, 3), image(4)), {}),
    "float with double weight": lambda: (image(2, 3, 4, 4, dtype=F32), Conv(image(5, 3, 3, 3)), {}),
    "double with float weight": lambda: (image(2, 3, 4, 4), Conv(image(5, 3, 3, 3, dtype=F32)), {}),
    "double bias": lambda: (
        image(2, 3, 4, 4, dtype=F32),
        Conv(image(5, 3, 3, 3, dtype=F32), image(5)),
        {},
    ),
    "double skip": lambda: (
        image(2, 3, 4, 4, dtype=F32),
        Conv(image(5, 6, 3, 3, dtype=F32)),
        {"skip": image(2, 3, 4, 4)},
    ),
}


@pytest.mark.parametrize("bad", CONVOLUTIONS)
def test_errors_of_convolutions_are_eagers(bad: str) -> None:
    x, conv, options = CONVOLUTIONS[bad]()
    source = x if "skip" not in options else torch.cat([x, options["skip"]], 1)
    expected = outcome(torch.nn.functional.conv2d, source, *conv)
    assert expected[0] == "raised"
    assert outcome(rf.functional.conv2d, x, conv, **options) == expected
    assert outcome(rf.functional.conv_bn_act, x, conv, Norm(), **options) == expected
    bn = nn.BatchNorm2d(source.shape[1], affine=False, track_running_stats=False)
    expected = outcome(lambda: torch.nn.functional.conv2d(bn(source).relu(), *conv))
    assert outcome(rf.functional.bn_act_conv, source, Norm(), conv) == expected


def test_pooling_a_single_row() -> None:
    x, conv = image(2, 3, 1, 6), nn.Conv2d(3, 4, 3, padding=1).double()
    expected = outcome(plain_conv_bn_act, x, conv, batch_norm(4), pool=True)
    assert expected[0] == "raised"
    assert outcome(fused_conv_bn_act, x, conv, batch_norm(4), pool=True) == expected
    same_outcome("bn_act", x, batch_norm(3), pool=True)


def network_pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    plain = small(**options)
    fast = rf.ResUNet(3, 2, base_width=2, width_factors=(1, 2, 3), **options).double()
    fast.load_state_dict(plain.state_dict())
    return fast, plain


def edit_norms(model: nn.Module, **values: Any) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for name, value in values.items():
                setattr(module, name, value)


def share_a_layer(model: nn.Module) -> None:
    layers = model.bottleneck.double_conv
    layers[4] = layers[1]


IMAGES = {
    "one value at the bottom": image(1, 3, 4, 4),
    "too small": image(1, 3, 3, 8),
    "3-D": image(3, 8, 8),
    "wrong number of channels": image(2, 4, 8, 8),
    "integers": torch.ones(2, 3, 8, 8, dtype=torch.int64),
    "float": image(2, 3, 8, 8).float(),
    "empty batch": image(0, 3, 8, 8),
    "NaN": image(2, 3, 9, 8).masked_fill(image(2, 3, 9, 8) > 2, torch.nan),
    "odd": image(2, 3, 11, 13),
}
EDITS: dict[str, Callable[[nn.Module], None]] = {
    "as it is": lambda model: None,
    "cumulative average": lambda model: edit_norms(model, momentum=None),
    "no running statistics": lambda model: edit_norms(
        model, track_running_stats=False, running_mean=None, running_var=None
    ),
    "a layer twice": share_a_layer,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("x", IMAGES)
def test_networks_behave_like_the_reference(x: str, edit: str, training: bool) -> None:
    results, states = [], []
    for model in network_pair():
        EDITS[edit](model)
        results.append(outcome(model.train(training), IMAGES[x]))
        states.append(model.state_dict())
    (kind, own), (expected_kind, expected) = results
    assert kind == expected_kind, results
    if kind == "raised":
        assert own == expected
    else:
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(*states, rtol=1e-9, atol=1e-9, equal_nan=True)
