"""What a frozen network is made of cannot be changed, but copied, saved, compiled and exported."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import image
from networks import one_thread as one_thread
from test_freeze import SIZES, lively, network
from torch import Tensor, nn
from torch._dynamo.utils import counters

import resunet_fast as rf
from resunet_fast import checkpoint
from resunet_fast.checkpoint import CheckpointError, ModelConfig, Normalisation
from resunet_fast.frozen import FrozenResUNet
from resunet_fast.frozen.graphs import GraphCache

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
X = image(1, 3, 17, 22).float()


@pytest.fixture
def frozen() -> FrozenResUNet:
    return rf.freeze(network(upsample="transpose"))


EDITS: dict[str, Callable[[FrozenResUNet], object]] = {
    r"train\(\)": lambda f: f.train(),
    r"train\(\) ": lambda f: f.bottleneck.train(),
    r"load_state_dict\(\)": lambda f: f.load_state_dict(f.state_dict()),
    r"load_state_dict\(\) ": lambda f: f.outc.load_state_dict(f.outc.state_dict()),
    r"requires_grad_\(\)": lambda f: f.requires_grad_(),
    "cannot move from torch.float32": lambda f: f.half(),
    "cannot move from torch.float32 on cpu": lambda f: f.to("meta"),
    "cannot move from": lambda f: f.outc.double(),
    "cannot set 'outc'": lambda f: setattr(f, "outc", nn.Identity()),
    "cannot set 'dtype'": lambda f: setattr(f, "dtype", torch.bfloat16),
    "cannot set '_weight'": lambda f: setattr(f.outc, "_weight", torch.ones(2, 4, 1, 1)),
    "cannot set 'relu'": lambda f: setattr(f.outc, "relu", True),
    "cannot set '0'": lambda f: setattr(f.ups, "0", nn.Identity()),
    "cannot set '1'": lambda f: f.ups.__setitem__(1, nn.Identity()),
    "cannot delete 'norm'": lambda f: delattr(f.bottleneck, "norm"),
    "cannot delete '0'": lambda f: f.encoder_layers.__delitem__(0),
    "cannot insert at 0": lambda f: f.encoder_layers.insert(0, nn.Identity()),
    "cannot add the module '2'": lambda f: f.encoder_layers.append(nn.Identity()),
    "cannot add the module 'more'": lambda f: f.register_module("more", nn.Identity()),
    "cannot register the buffer 'b'": lambda f: f.register_buffer("b", torch.ones(1)),
    "cannot register the parameter 'p'": lambda f: f.register_parameter("p", None),
}


@pytest.mark.parametrize("sentence", EDITS)
def test_edits_are_refused(frozen: FrozenResUNet, sentence: str) -> None:
    before = frozen(X)
    with pytest.raises(rf.FrozenError, match=f"^{sentence.strip()}.*: a frozen model cannot be"):
        EDITS[sentence](frozen)
    assert torch.equal(frozen(X), before)


def test_what_changes_nothing_is_allowed(frozen: FrozenResUNet) -> None:
    assert frozen.eval() is frozen
    assert frozen.train(False) is frozen
    assert frozen.requires_grad_(False) is frozen
    assert frozen.to("cpu").float().to(memory_format=torch.channels_last) is frozen
    assert not frozen.training


def test_the_state_dict_is_a_copy(frozen: FrozenResUNet) -> None:
    assert not list(frozen.parameters())
    assert not list(frozen.buffers())
    before, state = frozen(X), frozen.state_dict()
    assert {"outc.weight", "outc.bias", "bottleneck.conv2.weight", "ups.0.bias"} <= set(state)
    for tensor in state.values():
        tensor.data.zero_()
    assert torch.equal(frozen(X), before)
    assert frozen.state_dict()["outc.weight"].abs().sum() > 0


def test_gradients_and_transforms_are_refused(frozen: FrozenResUNet) -> None:
    with pytest.raises(rf.FrozenError, match=r"^a frozen model has no derivative: pass x.detach"):
        frozen(X.clone().requires_grad_())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        with pytest.raises(rf.FrozenError, match=r"^a frozen model has no derivative"):
            frozen(dual)
    for transform, x in (
        (torch.func.vmap(frozen), X[None]),
        (torch.func.grad(lambda x: frozen(x).sum()), X),
    ):
        with pytest.raises(rf.FrozenError, match=r"^torch.func does not see through a frozen"):
            transform(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies(duplicate: Callable[[FrozenResUNet], FrozenResUNet], dtype: torch.dtype) -> None:
    frozen = rf.freeze(network(order="pre", encoder="residual"), dtype)
    other = duplicate(frozen)
    assert torch.equal(other(X), frozen(X))
    with pytest.raises(rf.FrozenError):
        other.train()
    own = {tensor.data_ptr() for layer in layers(frozen) for _, tensor in layer.tensors()}
    assert not own & {tensor.data_ptr() for layer in layers(other) for _, tensor in layer.tensors()}


def test_copies_of_a_wide_network_keep_its_kernels_and_nan(tmp_path: Path) -> None:
    """Wide enough for Winograd's convolution, whose weights are packed again in every copy."""
    described = config(base_width=32, width_factors=(1, 2), encoder="double_conv")
    frozen = rf.freeze(lively(described.build()).float())
    checkpoint.save(tmp_path, frozen, described)
    z = frozen(X)
    for other in (copy.deepcopy(frozen), checkpoint.load(tmp_path).network):
        assert torch.equal(other(X), z)
        assert other(torch.full_like(X, torch.nan)).isnan().any()


def layers(frozen: FrozenResUNet) -> list[nn.Module]:
    return [module for module in frozen.modules() if hasattr(module, "tensors")]


def config(**arguments: object) -> ModelConfig:
    return ModelConfig(
        name="deep_resunet",
        in_channels=3,
        num_classes=1,
        arguments={"base_width": 4, "width_factors": (1, 2, 3), **arguments},
        normalisation=Normalisation((0.4,) * 3, (0.25,) * 3),
    )


@pytest.mark.parametrize("upsample", ["bilinear", "transpose"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saved_and_loaded(dtype: torch.dtype, upsample: str, tmp_path: Path) -> None:
    described = config(upsample=upsample)
    frozen = rf.freeze(lively(described.build()).float(), dtype)
    checkpoint.save(tmp_path, frozen, described)
    saved = checkpoint.load(tmp_path)
    assert isinstance(saved.network, FrozenResUNet)
    assert saved.config.frozen_dtype == str(dtype).removeprefix("torch.")
    for shape in SIZES:
        x = image(*shape).float()
        assert torch.equal(saved.network(x), frozen(x))
    with pytest.raises(rf.FrozenError):
        saved.network.train()


def test_a_saved_network_that_can_be_trained_is_still_loaded_as_one(tmp_path: Path) -> None:
    model = config().build()
    checkpoint.save(tmp_path, model, config())
    text = (tmp_path / checkpoint.CONFIG_FILE).read_text()
    # As written before there was anything to freeze.
    (tmp_path / checkpoint.CONFIG_FILE).write_text(text.replace('"frozen_dtype": ""', '"x": 0'))
    assert isinstance(checkpoint.load(tmp_path).network, rf.ResUNet)


@pytest.mark.parametrize(
    ("dtype", "sentence"),
    [
        ('"int8"', r"field 'frozen_dtype' must be one of .*, got 'int8'"),
        ("3", r"field 'frozen_dtype' must be one of"),
        ('"float16"', r"frozen for another device: dtype: torch.float16 has no fused conv"),
        ('""', r"belongs to another model: .* are missing"),
    ],
)
def test_damaged_directories_are_refused(dtype: str, sentence: str, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, rf.freeze(config().build()), config())
    file = tmp_path / checkpoint.CONFIG_FILE
    file.write_text(
        file.read_text().replace('"frozen_dtype": "float32"', f'"frozen_dtype": {dtype}')
    )
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compiled_in_one_graph(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    frozen = rf.freeze(network(order="pre", width_factors=(1, 2)), dtype)
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    for shape in SIZES[:2]:
        x = image(*shape).float()
        torch.testing.assert_close(compiled(x), frozen(x))


@pytest.mark.slow
@pytest.mark.parametrize("upsample", ["bilinear", "transpose"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_compiled_by_inductor(dtype: torch.dtype, upsample: str) -> None:
    torch._dynamo.reset()
    frozen = rf.freeze(network(upsample=upsample, width_factors=(1, 2)), dtype)
    compiled = torch.compile(frozen, fullgraph=True)
    before = counters["stats"]["unique_graphs"]
    for shape in SIZES[:2]:
        x = image(*shape).float()
        torch.testing.assert_close(compiled(x), frozen(x))
    assert counters["stats"]["unique_graphs"] > before


def test_exported_and_run_at_another_size(frozen: FrozenResUNet) -> None:
    auto = torch.export.Dim.AUTO
    program = torch.export.export(frozen, (X,), dynamic_shapes=({2: auto, 3: auto},))
    for shape in ((1, 3, 9, 31), (1, 3, 40, 17)):
        x = image(*shape).float()
        torch.testing.assert_close(program.module()(x), frozen(x))


class Recorder:
    """Captures as a CUDA graph does, without one: fixed buffers, and the shapes it saw."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, ...]] = []

    def __call__(self, run: Callable[[Tensor], Tensor], example: Tensor) -> Callable[..., Tensor]:
        self.captured.append(tuple(example.shape))
        static = torch.empty_like(example)

        def replay(x: Tensor) -> Tensor:
            static.copy_(x)
            return run(static).clone()

        return replay


def test_graphs_one_per_shape_and_the_oldest_dropped(frozen: FrozenResUNet) -> None:
    capture = Recorder()
    cache = GraphCache(capture, limit=2)
    a, b, c = ((1, 3, 8, 8), (1, 3, 9, 8), (2, 3, 8, 8))
    for shape in (a, a, b, a, c, a, b):
        x = image(*shape).float()
        assert torch.equal(cache(frozen.run, x), frozen(x))
        assert len(cache) <= 2
    assert capture.captured == [a, b, c, b]


def test_graphs_tell_layouts_apart_and_results_are_the_callers_own(frozen: FrozenResUNet) -> None:
    capture = Recorder()
    cache = GraphCache(capture)
    first = cache(frozen.run, X)
    kept = first.clone()
    cache(frozen.run, X * 2)
    assert torch.equal(first, kept)
    cache(frozen.run, X.contiguous(memory_format=torch.channels_last))
    assert len(capture.captured) == 2


def test_graphs_are_used_but_not_by_a_twin_with_stages_of_its_own(
    frozen: FrozenResUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture, expected = Recorder(), frozen(X)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(frozen.__dict__, "_graphs", GraphCache(capture))
    assert torch.equal(frozen(X), expected)
    assert len(capture.captured) == 1
    twin = object.__new__(FrozenResUNet)
    half = replace(frozen.stages, down=lambda block, x: frozen.stages.down(block, x / 2))
    twin.__dict__.update(frozen.__dict__, stages=half)
    assert not torch.equal(twin(X), expected)
    assert len(capture.captured) == 1


def test_no_graphs_on_a_cpu(frozen: FrozenResUNet) -> None:
    assert frozen._graphs is None
