"""The transposed convolution: its public function, and the networks that enlarge with it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import assert_same
from networks import one_thread as one_thread
from pairs import SHAPE, assert_same_step, pair, step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import BACKENDS, LAYOUTS, VIEWS, image, outcome, same, transposed, transposed_convolution

import resunet_fast as rf
from resunet_fast import environment
from resunet_fast.functional import Conv
from resunet_fast.ops.conv_transpose2d.op import CONV_TRANSPOSE2D, CONV_TRANSPOSE2D_BACKWARD
from resunet_fast.testing import assert_close, tolerance

PADDINGS = [(0, 0), (1, 0), (0, 1), (1, 1)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with rf.use_backend(request.param):
        yield request.param


def plain(x: Tensor, up: nn.ConvTranspose2d, padding: tuple[int, int] = (0, 0)) -> Tensor:
    return F.conv_transpose2d(x, up.weight, up.bias, 2, 0, padding)


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the calls of the operator, and of torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.ours = self.torchs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ours += func is CONV_TRANSPOSE2D.overload
        transposed = func is torch.ops.aten.convolution.default and args[6]
        self.torchs += bool(transposed)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients_are_torchs(bias: bool, layout: str, padding: tuple[int, int]) -> None:
    up = transposed_convolution(5, 6, bias=bias).to(memory_format=LAYOUTS[layout])
    x = image(2, 5, 3, 7).requires_grad_()
    result, expected = transposed(x, up, padding), plain(x, up, padding)
    same(result, expected)
    wanted = [x, *up.parameters()]
    seed = image(*expected.shape, seed=5)
    grads = [torch.autograd.grad(y, wanted, seed) for y in (result, expected)]
    for own, other in zip(*grads, strict=True):
        assert_close("gradient", own, other, tolerance(torch.float64, seed[:, 0].numel()))
        assert own.stride() == other.stride()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view: str) -> None:
    up = transposed_convolution(5, 3)
    x = VIEWS[view](image(2, 5, 4, 6)).detach().requires_grad_()
    grad = VIEWS[view](image(2, 3, 8, 12, seed=5))
    same(transposed(x, up).contiguous(), plain(x, up).contiguous())
    wanted = [x, *up.parameters()]
    ours = torch.autograd.grad(transposed(x, up), wanted, grad)
    theirs = torch.autograd.grad(plain(x, up), wanted, grad)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.usefixtures("backend")
def test_a_bias_with_gaps() -> None:
    up = transposed_convolution(5, 3)
    up.bias = nn.Parameter(torch.arange(6, dtype=torch.float64)[::2])
    x = image(2, 5, 4, 6)
    same(transposed(x, up), plain(x, up))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("channels", "out"), [(1, 1), (16, 8), (70, 33), (33, 130)])
def test_ragged_tiles(channels: int, out: int) -> None:
    """Channels and pixels that fill no tile, and some that take several."""
    up = transposed_convolution(channels, out)
    x = image(3, channels, 7, 11).requires_grad_()
    result = transposed(x, up, (1, 1))
    judge = plain(x, up, (1, 1))
    assert_close("y", result.detach(), judge.detach(), tolerance(torch.float64, channels))
    seed = image(*judge.shape, seed=5)
    wanted = [x, *up.parameters()]
    ours, theirs = (torch.autograd.grad(y, wanted, seed) for y in (result, judge))
    for own, other in zip(ours, theirs, strict=True):
        assert_close("gradient", own, other, tolerance(torch.float64, seed[:, 0].numel()))


@pytest.mark.usefixtures("backend")
def test_nothing_but_the_bias_beyond_the_input() -> None:
    up = transposed_convolution(3, 4)
    up.weight.data[1, 2] = torch.nan
    y = transposed(image(1, 3, 2, 2), up, (1, 1))
    for border in (y[0, :, -1], y[0, :, :, -1]):
        assert torch.equal(border, up.bias[:, None].expand(4, 5))
    assert y[0, 2, :-1, :-1].isnan().all()
    assert y[0, [0, 1, 3]].isfinite().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """The input and a rounded weight are multiplied; the weight's gradient is its own dtype's."""
    up = transposed_convolution(6, 4).float()
    x = image(2, 6, 3, 5, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype):
        result, expected = transposed(x, up), up(x)
        assert CONV_TRANSPOSE2D.overload(x.to(dtype), up.weight, up.bias).dtype == dtype
    assert result.dtype == expected.dtype == dtype
    judge = plain(x.to(dtype).double(), copy.deepcopy(up).to(dtype).double())
    assert_close("y", result.detach(), judge.detach(), tolerance(dtype, 6))
    wanted = [x, *up.parameters()]
    ours = torch.autograd.grad(result.float().sum(), wanted)
    theirs = torch.autograd.grad(expected.float().sum(), wanted)
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        assert_close("gradient", own, other.double(), 2 * tolerance(dtype, 60))


CONV = Conv(torch.ones(3, 4, 2, 2), None, (2, 2))


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"weight": torch.ones(3, 4, 3, 3)}, "kernel (3, 3) and (2, 2), (0, 0), (1, 1), 1"),
        ({"weight": torch.ones(3, 4, 2)}, "kernel (2,) and (2, 2), (0, 0), (1, 1), 1"),
        ({"stride": (1, 1)}, "kernel (2, 2) and (1, 1), (0, 0), (1, 1), 1"),
        ({"padding": (0, 1)}, "kernel (2, 2) and (2, 2), (0, 1), (1, 1), 1"),
        ({"dilation": (2, 2)}, "kernel (2, 2) and (2, 2), (0, 0), (2, 2), 1"),
        ({"groups": 3}, "kernel (2, 2) and (2, 2), (0, 0), (1, 1), 3"),
    ],
)
def test_other_geometries_are_refused(changes: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=r"^conv: expected kernel") as caught:
        rf.functional.conv_transpose2d(torch.ones(1, 3, 2, 2), CONV._replace(**changes))
    assert str(caught.value) == (
        "conv: expected kernel (2, 2), stride (2, 2), padding (0, 0), dilation (1, 1) and groups 1,"
        f" got {got}"
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("x", "bias", "padding"),
    [
        (torch.ones(1, 2, 3, 3), None, (0, 0)),  # channels
        (torch.ones(1, 3, 3, 3), torch.ones(3), (0, 0)),  # of the bias
        (torch.ones(1, 3, 3, 3), None, (2, 0)),
        (torch.ones(1, 3, 3, 3), None, (0, -1)),
        (torch.ones(1, 3, 3, 3).double(), None, (0, 0)),
        (torch.ones(1, 3, 3, 3).long(), None, (0, 0)),
        (torch.ones(1, 3, 3, 3).half(), torch.ones(4).double(), (0, 0)),
        (torch.ones(3, 3), None, (0, 0)),
        (torch.ones(3, 3, 3), None, (0, 0)),  # no batch: torch takes it
        (torch.ones(0, 3, 3, 3), None, (1, 0)),  # an empty one too
        (torch.ones(1, 3, 0, 3), None, (0, 0)),
    ],
)
def test_what_torch_says_of_other_input(
    x: Tensor, bias: Tensor | None, padding: tuple[int, int]
) -> None:
    conv = CONV._replace(bias=bias)
    ours = outcome(rf.functional.conv_transpose2d, x, conv, output_padding=padding)
    theirs = outcome(F.conv_transpose2d, x, conv.weight, bias, 2, 0, padding)
    assert ours[0] == theirs[0]
    if ours[0] == "raised":
        assert ours[1] == theirs[1]
    else:
        same(ours[1], theirs[1])


def test_a_gpu_keeps_cudnn_until_triton_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    x = image(1, 3, 2, 2)
    for operator in (CONV_TRANSPOSE2D, CONV_TRANSPOSE2D_BACKWARD):
        triton = operator.implementations["triton"]
        assert triton.declines(x) == ["Triton's interpreter is slow"]
        with monkeypatch.context() as patch:
            patch.setattr(environment, "triton_interpreted", lambda: False)
            assert triton.declines(x) == ["cuDNN is the default until a measurement prefers this"]


def test_a_gpu_has_no_products_of_wide_floats() -> None:
    with FakeTensorMode():
        x, weight = (torch.empty(1, 3, 2, 2, device="cuda") for _ in range(2))
        arguments = (weight, None, [0, 0])
        refusals = CONV_TRANSPOSE2D.implementations["triton"].refusals
        assert "it has no torch.float32 products on a GPU" in refusals(x, *arguments)
        assert "it has no torch.float64 products on a GPU" in refusals(x.double(), *arguments)
        assert not any("products" in reason for reason in refusals(x.half(), *arguments))


DOWNSAMPLES = ["maxpool", "stride"]


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("size", [(8, 12), (9, 14), (11, 7)])
def test_networks_use_it_and_learn_the_same(downsample: str, size: tuple[int, int]) -> None:
    """Sizes that double exactly, that need a row of padding, and that need one cut."""
    fast, twin = pair(upsample="transpose", downsample=downsample)
    assert list(fast.state_dict()) == list(twin.state_dict())
    x = image(2, 3, *size)
    assert_same_step(fast, twin, x)
    with Calls() as calls:
        step(fast, x)
    assert (calls.ours, calls.torchs) == (2, 0)


@pytest.mark.usefixtures("backend")
def test_networks_learn_the_same_on_every_backend() -> None:
    fast, twin = pair(upsample="transpose", width_factors=(1, 2))
    assert_same_step(fast, twin, image(2, 3, 5, 6))


def test_networks_compile_into_one_graph() -> None:
    fast, twin = pair(upsample="transpose", width_factors=(1, 2))
    torch._dynamo.reset()
    fast.compile(fullgraph=True, backend="aot_eager")
    for size in ((9, 14), (12, 15)):
        assert_same_step(fast, twin, image(2, 3, *size))


def test_networks_under_autocast() -> None:
    fast, twin = (network.float() for network in pair(upsample="transpose"))
    x = image(*SHAPE, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        seen, expected = step(fast, x), step(twin, x)
    judge = step(twin, x)
    for name in ("output", "grad of ups.0.weight", "grad of ups.1.weight", "grad of ups.1.bias"):
        assert seen[name].dtype == expected[name].dtype
        scale = judge[name].square().mean().sqrt()
        own, others = ((t[name] - judge[name]).abs().mean() / scale for t in (seen, expected))
        assert own <= 2 * others + tolerance(torch.bfloat16), name


class Up(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size) * 2


def subclass(up: nn.ConvTranspose2d) -> nn.Module:
    mine = Up(up.in_channels, up.out_channels, 2, stride=2).double()
    mine.load_state_dict(up.state_dict())
    return mine


def hook(up: nn.ConvTranspose2d) -> nn.Module:
    up.register_forward_hook(lambda module, inputs, output: output + 1)
    return up


def wide(up: nn.ConvTranspose2d) -> nn.Module:
    mine = nn.ConvTranspose2d(up.in_channels, up.out_channels, 4, stride=2, padding=1).double()
    mine.weight.data.copy_(image(*mine.weight.shape, seed=31))
    mine.bias.data.zero_()
    return mine


def padded(up: nn.ConvTranspose2d) -> nn.Module:
    up.output_padding = (1, 1)  # overruled by an output size
    return up


GEOMETRY = "conv: expected kernel (2, 2), stride (2, 2), padding (0, 0), dilation (1, 1) and groups"
EDITS: dict[Callable[[nn.ConvTranspose2d], nn.Module], str] = {
    subclass: "it is a Up, not exactly a ConvTranspose2d",
    hook: "it has hooks or a forward of its own",
    wide: f"{GEOMETRY} 1, got kernel (4, 4) and (2, 2), (1, 1), (1, 1), 1",
    padded: "it pads its output by (1, 1)",
}


@pytest.mark.parametrize("edit", EDITS)
def test_edited_modules_are_called_and_explained(
    edit: Callable[[nn.ConvTranspose2d], nn.Module],
) -> None:
    fast, twin = pair(upsample="transpose")
    for network in (fast, twin):
        network.ups[0] = edit(network.ups[0])
    x = image(*SHAPE)
    assert_same_step(fast, twin, x)
    with Calls() as calls:
        fast(x)
    assert (calls.ours, calls.torchs) == (1, 1)
    blocks = rf.explain(fast).blocks
    assert blocks["ups.0"] == [EDITS[edit]]
    assert blocks["ups.1"] == []


def test_explain_knows_whose_transposed_convolutions_run_fused() -> None:
    fast, twin = pair(upsample="transpose")
    model = nn.ModuleDict({"fast": fast, "plain": twin, "other": transposed_convolution(3, 4)})
    names = [name for name in rf.explain(model).blocks if "ups" in name or "other" in name]
    assert names == ["fast.ups.0", "fast.ups.1"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert rf.explain(fast).blocks["ups.0"] == ["a global module hook is registered"]
    finally:
        handle.remove()


def test_a_size_out_of_reach_is_the_modules_to_refuse() -> None:
    fast, twin = pair(upsample="transpose")
    for network in (fast, twin):
        network.bottleneck = nn.Upsample(scale_factor=2)
        network.ups[0] = nn.ConvTranspose2d(8, 8, 2, stride=2).double()
    ours, theirs = (outcome(network, image(*SHAPE)) for network in (fast, twin))
    assert ours[0] == theirs[0] == "raised"
    assert ours[1] == theirs[1]


def test_edits_of_the_weight_are_seen() -> None:
    fast, twin = pair(upsample="transpose")
    x = image(*SHAPE)
    fast(x)
    for network in (fast, twin):
        network.ups[1].weight.data *= 1.5
        network.ups[1].bias.data += 1
    assert_same(fast(x), twin(x))
