"""The fused blocks alone: every way to call one against the plain blocks put together."""

import itertools
import re
from collections.abc import Callable

import pytest
import torch
from networks import assert_same, image, randomised
from networks import one_thread as one_thread
from pairs import LAYOUTS, step
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast.models.wiring import plain_down, plain_up
from resunet_fast.modules import fused, plain

MODES = ("none", "nearest", "bilinear")
LOW, SKIP, OUT = 5, 3, 4
WIDTH = LOW + SKIP

Build = Callable[[object], nn.Module]

BLOCKS: dict[str, Build] = {
    "double": lambda m: m.DoubleConv(WIDTH, OUT),
    "double-stride": lambda m: m.DoubleConv(WIDTH, OUT, stride=2),
    "double-pre": lambda m: m.DoubleConv(WIDTH, OUT, order="pre"),
    "double-pre-stride": lambda m: m.DoubleConv(WIDTH, OUT, order="pre", stride=2),
    "residual": lambda m: m.ResBlock(WIDTH, WIDTH),
    "residual-projection": lambda m: m.ResBlock(
        WIDTH, OUT, downsample=plain.projection(WIDTH, OUT, 1)
    ),
    "residual-stride": lambda m: m.ResBlock(
        WIDTH, WIDTH, 2, downsample=plain.projection(WIDTH, WIDTH, 2)
    ),
    "pre-residual": lambda m: m.PreActResBlock(WIDTH, WIDTH),
    "pre-residual-projection": lambda m: m.PreActResBlock(
        WIDTH, OUT, downsample=plain.projection(WIDTH, OUT, 1)
    ),
    "pre-residual-stride": lambda m: m.PreActResBlock(
        WIDTH, OUT, 2, downsample=plain.projection(WIDTH, OUT, 2)
    ),
    "pre-residual-first": lambda m: m.PreActResBlock(
        WIDTH, OUT, downsample=plain.projection(WIDTH, OUT, 1), preactivate=False
    ),
    "pre-residual-first-identity": lambda m: m.PreActResBlock(WIDTH, WIDTH, preactivate=False),
}


def twins(name: str, *, recompute: bool = False, shift: float = 0.5) -> tuple[nn.Module, nn.Module]:
    """A fused block and its plain twin in float64, ReLUs partly open whatever the statistics."""
    ours, theirs = (randomised(BLOCKS[name](module)) for module in (fused, plain))
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += shift
    ours.load_state_dict(theirs.state_dict())
    ours.recompute = recompute
    return ours, theirs


class Called(nn.Module):
    """A block with the way to call it; several inputs and outputs folded into one each."""

    def __init__(self, block: nn.Module, call: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.call(self.block, x)
        flat = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.cat([y.flatten() * (i + 1) for i, y in enumerate(flat)])


def sources(x: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Cut an image into features of half the size, or the same, and a skip."""
    low, skip = x[:, :LOW], x[:, LOW:]
    return (low if mode == "none" else low[:, :, : x.shape[2] // 2, ::2]), skip


def assert_same_call(ours: Called, theirs: Called, x: Tensor) -> None:
    expected = step(theirs, x)
    assert expected["grad of x"].abs().max() > 1e-6, "every ReLU is closed: nothing is compared"
    assert_same(step(ours, x), expected)


def settings() -> list[tuple[bool, bool, torch.memory_format]]:
    return list(itertools.product((True, False), (False, True), LAYOUTS.values()))


@pytest.mark.parametrize("name", BLOCKS)
def test_one_source(name: str) -> None:
    for training, recompute, layout in settings():
        ours, theirs = (block.train(training) for block in twins(name, recompute=recompute))
        x = image(2, WIDTH, 7, 10).contiguous(memory_format=layout)
        assert fused.refusals(ours) == []
        assert_same_call(*(Called(b, lambda block, x: block(x)) for b in (ours, theirs)), x)
        assert ours(x).is_contiguous(memory_format=layout)
        with torch.no_grad():
            assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_pooled_as_well(name: str) -> None:
    for training, recompute, layout in settings():
        ours, theirs = (block.train(training) for block in twins(name, recompute=recompute))
        x = image(2, WIDTH, 7, 10).contiguous(memory_format=layout)
        both = Called(ours, lambda block, x: block(x, pool=True)), Called(theirs, plain_down)
        assert_same_call(*both, x)
        assert_same_call(Called(ours, fused.down), both[1], x)
        skip, pooled = ours(x, pool=True)
        assert skip.is_contiguous(memory_format=layout)
        assert pooled.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BLOCKS)
def test_two_sources(name: str, mode: str) -> None:
    def ours_of(block: nn.Module, x: Tensor) -> Tensor:
        low, skip = sources(x, mode)
        return block(low, skip=skip, upsample=mode)

    def theirs_of(block: nn.Module, x: Tensor) -> Tensor:
        return plain_up(block, *sources(x, mode), mode)

    for training, recompute, layout in settings():
        ours, theirs = (block.train(training) for block in twins(name, recompute=recompute))
        x = image(2, WIDTH, 7, 10).contiguous(memory_format=layout)
        expected = Called(theirs, theirs_of)
        assert_same_call(Called(ours, ours_of), expected, x)
        wiring = Called(ours, lambda block, x: fused.up(block, *sources(x, mode), mode))
        assert_same_call(wiring, expected, x)


@pytest.mark.parametrize("name", BLOCKS)
def test_two_sources_pooled(name: str) -> None:
    def ours_of(block: nn.Module, x: Tensor) -> object:
        low, skip = sources(x, "bilinear")
        return block(low, skip=skip, upsample="bilinear", pool=True)

    def theirs_of(block: nn.Module, x: Tensor) -> object:
        z = plain_up(block, *sources(x, "bilinear"), "bilinear")
        return z, nn.functional.max_pool2d(z, 2)

    ours, theirs = twins(name)
    assert_same_call(Called(ours, ours_of), Called(theirs, theirs_of), image(2, WIDTH, 9, 8))


@pytest.mark.parametrize("name", BLOCKS)
def test_frozen_parts_keep_the_rest_exact(name: str) -> None:
    kinds = (nn.Conv2d, nn.BatchNorm2d)
    for kind, stay in itertools.product(kinds, (True, False)):
        ours, theirs = twins(name)
        for block in (ours, theirs):
            parts = [module for module in block.modules() if isinstance(module, kind)]
            for number, part in enumerate(parts):
                part.requires_grad_(stay and number > 0)
        assert_same_call(
            *(Called(block, lambda b, x: b(x)) for block in (ours, theirs)), image(2, WIDTH, 6, 6)
        )


@pytest.mark.parametrize("name", BLOCKS)
def test_the_input_is_left_alone(name: str) -> None:
    ours, _ = twins(name)
    x = image(2, WIDTH, 6, 7)
    before = x.clone()
    for mode in (True, False):
        ours.train(mode)(x, pool=True)
        with torch.no_grad():
            ours(x, pool=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_gives_the_plain_blocks_dtype(name: str, dtype: torch.dtype) -> None:
    ours, theirs = (block.float() for block in twins(name))
    x = image(2, WIDTH, 7, 10, dtype=torch.float32)
    exact = theirs(x)
    with torch.autocast("cpu", dtype):
        (actual, pooled), expected = ours(x, pool=True), theirs(x)
    assert actual.dtype == pooled.dtype == expected.dtype == dtype
    errors = [(y.float() - exact).square().mean().sqrt() for y in (actual, expected)]
    assert errors[0] <= 2 * errors[1]
    actual.float().sum().backward()
    assert {p.grad.dtype for p in ours.parameters()} == {torch.float32}


def watched(block: nn.Module) -> None:
    block.register_forward_hook(lambda *_: None)


def leaky(block: nn.Module) -> None:
    parent = block.double_conv if isinstance(block, plain.DoubleConv) else block
    for name, child in parent.named_children():
        if isinstance(child, nn.ReLU):
            setattr(parent, name, nn.LeakyReLU(0.3))


@pytest.mark.parametrize("edit", [watched, leaky], ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("name", BLOCKS)
def test_the_plain_way_takes_every_form_too(name: str, edit: Callable[[nn.Module], None]) -> None:
    ours, theirs = twins(name)
    for block in (ours, theirs):
        edit(block)
    assert fused.reasons_against(ours)
    x = image(2, WIDTH, 8, 10)
    assert_same_call(Called(ours, fused.down), Called(theirs, plain_down), x)
    for mode in MODES:
        calls = [
            lambda block, x, m=mode, f=form: f(block, *sources(x, m), m)
            for form in (fused.up, plain_up)
        ]
        assert_same_call(Called(ours, calls[0]), Called(theirs, calls[1]), x)
        low, skip = sources(x, mode)
        assert_same(ours(low, skip=skip, upsample=mode), plain_up(theirs, low, skip, mode))


@pytest.mark.parametrize("name", BLOCKS)
def test_refusals_name_the_layer(name: str) -> None:
    ours, _ = twins(name)
    leaky(ours)
    count = 2 if name.startswith("double") else 1
    reasons = fused.refusals(ours)
    assert len(reasons) == count
    pattern = r"(relu|double_conv\.\d) is a LeakyReLU, not exactly a ReLU"
    assert all(re.fullmatch(pattern, reason) for reason in reasons)


def test_refusals_name_every_reason() -> None:
    block = fused.ResBlock(3, 4, downsample=plain.projection(3, 4, 1))
    block.downsample[0].register_forward_pre_hook(lambda *_: None)
    block.downsample.append(nn.Dropout())
    block.conv1.padding_mode = "circular"
    block.bn2 = nn.InstanceNorm2d(4)
    assert fused.refusals(block) == [
        "bn2 is a InstanceNorm2d, not exactly a BatchNorm2d",
        "conv1 pads with circular, (1, 1)",
        "downsample.0 has hooks or a forward of its own",
        "downsample.2 is a Dropout, not exactly a NoneType",
    ]
    block.downsample = nn.Identity()
    assert "downsample is a Identity, not exactly a Sequential" in fused.refusals(block)
    block.relu = None
    assert "relu is a NoneType, not exactly a ReLU" in fused.refusals(block)


@pytest.mark.parametrize("name", ["residual-projection", "pre-residual-projection"])
def test_a_shortcut_may_share_a_batch_norm(name: str) -> None:
    ours, theirs = twins(name)
    for block in (ours, theirs):
        block.downsample[1] = block.bn2
    assert fused.refusals(ours) == ["downsample.1 is also bn2"]
    assert_same_call(Called(ours, fused.down), Called(theirs, plain_down), image(2, WIDTH, 6, 6))


@pytest.mark.parametrize("name", BLOCKS)
def test_sources_that_do_not_fit_are_named(name: str) -> None:
    block, _ = twins(name)
    x = image(2, WIDTH, 8, 8)
    with pytest.raises(ValueError, match=r"upsample: expected 'none' or one of .*, got 'cubic'"):
        block(x[:, :LOW], skip=x[:, LOW:], upsample="cubic")
    with pytest.raises(ValueError, match="upsample: expected 'none' without a skip, got 'nearest'"):
        block(x, upsample="nearest")
    with pytest.raises(
        ValueError, match=r"skip: expected the input's size .*\(8, 4\) and \(8, 8\)"
    ):
        block(x[:, :LOW, :, :4], skip=x[:, LOW:])


def test_explain_finds_blocks_outside_the_networks() -> None:
    model = nn.Sequential(fused.DoubleConv(3, 4), nn.ReLU(), fused.ResBlock(4, 4))
    model[2].bn1 = nn.Identity()
    reason = "bn1 is a Identity, not exactly a BatchNorm2d"
    assert rf.explain(model).blocks == {"0": [], "2": [reason]}
    assert str(rf.explain(model)) == f"0: fused\n2: {reason}"
    assert rf.explain(fused.DoubleConv(3, 4)).blocks == {"DoubleConv": []}
    with pytest.raises(ValueError, match="inputs: expected none for a model, got 1"):
        rf.explain(model, image(1, 3, 4, 4))
