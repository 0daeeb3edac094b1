"""Frozen networks against the ones they came from: numbers, sizes, dtypes, what is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from networks import VARIANTS, image, randomised, small, variant_id
from networks import one_thread as one_thread
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast import reference
from resunet_fast.frozen import FrozenResUNet
from resunet_fast.frozen.errors import relative_error
from resunet_fast.models.wiring import Wiring

# Odd sizes, several images, one pixel at the bottom (nothing but it shows no layout), square ones.
SIZES = ((1, 3, 9, 14), (2, 3, 16, 16), (1, 3, 4, 4), (1, 3, 33, 21), (1, 3, 5, 30))
EXACT = {torch.float64: 1e-13, torch.float32: 1e-5}


def lively(model: nn.Module) -> nn.Module:
    """In evaluation, with batch norms that scale and shift and leave the ReLUs half open."""
    randomised(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += 0.5
    return model.eval()


def network(kind: type[Wiring] = rf.ResUNet, **options: object) -> Wiring:
    return lively(kind(3, 2, **{"base_width": 4, "width_factors": (1, 2, 3), **options})).float()


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize("kind", [rf.ResUNet, reference.ResUNet], ids=["fast", "plain"])
@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_every_variant_at_changing_sizes(
    options: dict[str, object], kind: type[Wiring], dtype: torch.dtype
) -> None:
    model = network(kind, **options)
    judge = double(model)
    frozen = rf.freeze(model.to(dtype))
    for shape in (*SIZES, SIZES[0]):
        x = image(*shape)
        z = frozen(x.to(dtype))
        assert z.dtype == dtype
        assert z.is_contiguous()
        assert relative_error(z, run(judge, x)) < EXACT[dtype]


@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_bfloat16_is_within_twice_eager_autocasts_own_error(options: dict[str, object]) -> None:
    # Wide enough, and over images enough, that the errors are averages and not luck.
    model = network(reference.ResUNet, base_width=16, **options)
    judge, frozen = double(model), rf.freeze(model, torch.bfloat16)
    expected, ours, eagers = [], [], []
    for shape in (*SIZES, (2, 3, 40, 33)):
        x = image(*shape)
        expected.append(run(judge, x).flatten())
        ours.append(frozen(x.float()).double().flatten())
        with torch.autocast("cpu", torch.bfloat16):
            eagers.append(run(model, x.float()).double().flatten())
    judged = torch.cat(expected)
    own = relative_error(torch.cat(eagers), judged)
    assert own > 1e-3
    assert relative_error(torch.cat(ours), judged) < 2 * own


@pytest.mark.parametrize("name", rf.list_models())
def test_every_named_network(name: str) -> None:
    model = lively(rf.create_model(name, base_width=4, num_classes=3)).float()
    x = image(1, 3, 35, 50)
    assert relative_error(rf.freeze(model)(x.float()), run(double(model), x)) < 1e-5


def test_the_articles_network_and_other_numbers_of_channels() -> None:
    model = lively(rf.reference.UNetWithResidualConnections(1, 1)).float()
    x = image(1, 1, 16, 17)
    assert relative_error(rf.freeze(model)(x.float()), run(double(model), x)) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_slices(layout: torch.memory_format) -> None:
    model = network()
    whole = image(2, 5, 20, 30).contiguous(memory_format=layout)
    for x in (whole[:, :3], whole[:, 1:4, 3:, 5:24], whole[:1, :3].expand(2, -1, -1, -1)):
        z = rf.freeze(model)(x.float())
        assert relative_error(z, run(double(model), x)) < 1e-5
    dense = whole[:, :3].contiguous(memory_format=layout).float()
    assert rf.freeze(model)(dense).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_forced_backends(backend: str) -> None:
    model, x = network(encoder="residual", order="pre"), image(1, 3, 12, 19)
    frozen = rf.freeze(model)
    with rf.use_backend(backend):
        assert relative_error(frozen(x.float()), run(double(model), x)) < 1e-5


def test_empty_batch_and_float64_images_in_a_float32_network() -> None:
    model = network()
    frozen = rf.freeze(model)
    assert frozen(torch.zeros(0, 3, 8, 8)).shape == (0, 2, 8, 8)
    x = image(1, 3, 8, 9)
    assert torch.equal(frozen(x), frozen(x.float()))


def test_training_mode_is_not_frozen_but_left_alone() -> None:
    model, x = network().train(), image(2, 3, 9, 9).float()
    before = copy.deepcopy(model.state_dict())
    z = rf.freeze(model, verify=x)(x)
    assert model.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert relative_error(z, run(double(model.eval()), x.double())) < 1e-5


def test_nothing_of_the_model_is_shared() -> None:
    for dtype in (torch.float32, torch.float64):
        model, x = network().to(dtype), image(1, 3, 8, 8).to(dtype)
        frozen = rf.freeze(model)
        before = frozen(x)
        for tensor in model.state_dict().values():
            tensor.fill_(3)
        assert torch.equal(frozen(x), before)


def test_shared_layers_are_not_folded_twice() -> None:
    model = network(reference.ResUNet, width_factors=(1, 1, 1), encoder="residual")
    first, second = model.encoder_layers[1], model.bottleneck
    second.bn1 = first.bn1
    second.conv1 = first.conv1
    model.encoder_layers[0].bn2 = model.encoder_layers[0].bn1
    x = image(1, 3, 12, 13)
    frozen = rf.freeze(model)
    assert relative_error(frozen(x.float()), run(double(model), x)) < 1e-5
    again = rf.freeze(model)
    assert torch.equal(again(x.float()), frozen(x.float()))


def test_batch_norms_of_every_kind() -> None:
    model = network(reference.ResUNet)
    layers = model.encoder_layers[0].double_conv
    layers[1] = lively(nn.BatchNorm2d(4, eps=0.3, momentum=None))
    layers[4].weight = layers[4].bias = None
    model.bottleneck.double_conv[1].weight.data.neg_()
    x = image(1, 3, 12, 13)
    assert relative_error(rf.freeze(model.float())(x.float()), run(double(model), x)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays(dtype: torch.dtype) -> None:
    model, x = network(), image(2, 3, 12, 12).float()
    x[0, 1, 3, 4] = torch.nan
    z = rf.freeze(model, dtype)(x)
    assert z[0].isnan().any()
    assert z[1].isfinite().all()
    model.encoder_layers[0].double_conv[1].running_mean[0] = torch.nan
    assert rf.freeze(model, dtype)(x)[1].isnan().any()


def test_autocast_changes_nothing() -> None:
    frozen, x = rf.freeze(network(upsample="transpose")), image(1, 3, 9, 12).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), frozen(x.clone()))
        inside = frozen(x)
    assert torch.equal(inside, frozen(x))
    assert inside.dtype == torch.float32


def test_inference_mode_and_results_without_a_gradient() -> None:
    frozen, x = rf.freeze(network()), image(1, 3, 9, 12).float()
    z = frozen(x)
    assert not z.requires_grad
    with torch.inference_mode():
        assert torch.equal(frozen(x), z)
    with torch.no_grad():
        assert torch.equal(frozen(x.clone().requires_grad_()), z)


def test_verification() -> None:
    model, x = network(), image(1, 3, 16, 24).float()
    for dtype in (None, torch.float64, torch.bfloat16):
        rf.freeze(model, dtype, verify=x)
    x[0, 0, 0, 0] = torch.nan
    with pytest.raises(
        rf.FrozenError, match=r"^verify: .*float32 is off by .*, the model itself by nan"
    ):
        rf.freeze(model, verify=x)


def test_verification_notices_a_wrong_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    from resunet_fast.frozen import build

    model, x = network(), image(1, 3, 16, 24).float()
    right = build.fold
    monkeypatch.setattr(build, "fold", lambda conv, norm, dtype: right(conv, None, dtype))
    with pytest.raises(rf.FrozenError, match=r"^verify: the frozen model in torch.float32 is off"):
        rf.freeze(model, verify=x)


def test_error_report() -> None:
    model, x = network(encoder="residual", order="pre"), image(1, 3, 16, 24).float()
    frozen = rf.freeze(model)
    report = frozen.report(model, x)
    convolutions = {name for name, part in model.named_modules() if type(part) is nn.Conv2d}
    assert set(report.by_layer) == convolutions
    assert all(0 < error < 1e-6 for error in report.by_layer.values())
    assert len(str(report).splitlines()) == len(convolutions)
    rounded = rf.freeze(model, torch.bfloat16).report(model, x)
    assert all(1e-4 < error < 1e-2 for error in rounded.by_layer.values())
    # The report sees which layer is wrong, and no other: each is judged on its own input.
    model.bottleneck.bn2.running_mean += 1
    wrong = frozen.report(model, x)
    name = "bottleneck.conv1"
    assert wrong.by_layer[name] > 1e-3
    del wrong.by_layer[name], report.by_layer[name]
    assert wrong == report


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "outc has hooks": lambda m: m.outc.register_forward_hook(lambda *_: None),
    "it has hooks or": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "bottleneck has hooks": lambda m: m.bottleneck.register_forward_hook(lambda *_: None),
    "encoder_layers.0.double_conv.1 has hooks": lambda m: (
        m.encoder_layers[0].double_conv[1].register_forward_hook(lambda *_: None)
    ),
    "encoder_layers.0.double_conv.0 is a ParametrizedConv2d": lambda m: (
        nn.utils.parametrizations.weight_norm(m.encoder_layers[0].double_conv[0])
    ),
    "double_conv.1 is a InstanceNorm2d, not exactly a BatchNorm2d": lambda m: setattr(
        m.bottleneck.double_conv, "1", nn.InstanceNorm2d(12)
    ),
    "double_conv.2 is a ELU": lambda m: setattr(m.bottleneck.double_conv, "2", nn.ELU()),
    "res_blocks.1 is a Identity": lambda m: setattr(m.res_blocks, "1", nn.Identity()),
    "bottleneck.double_conv.4 has no running statistics": lambda m: setattr(
        m.bottleneck.double_conv, "4", nn.BatchNorm2d(12, track_running_stats=False)
    ),
    "outc pads with reflect": lambda m: setattr(
        m, "outc", nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect")
    ),
    "outc is a Linear": lambda m: setattr(m, "outc", nn.Linear(4, 2)),
}


@pytest.mark.parametrize("kind", [rf.ResUNet, reference.ResUNet], ids=["fast", "plain"])
@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_frozen_is_named(sentence: str, kind: type[Wiring]) -> None:
    model = network(kind)
    REFUSED[sentence](model)
    with pytest.raises(ValueError, match=r"^model: it cannot be frozen: ") as error:
        rf.freeze(model)
    assert sentence in str(error.value)


def test_other_networks_are_refused() -> None:
    class Own(rf.ResUNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    frozen = rf.freeze(network())
    for model, sentence in (
        (nn.Conv2d(3, 3, 3), "it is a Conv2d, not a network of this package"),
        (network(Own), "its class Own changes the network's forward"),
        (frozen, "it is frozen already"),
    ):
        with pytest.raises(ValueError, match=sentence):
            rf.freeze(model)
    model = network(upsample="transpose")
    model.ups[0] = nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
    with pytest.raises(ValueError, match=r"ups\.0 is not a 2x2 transposed convolution"):
        rf.freeze(model)


def test_dtypes_are_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    with pytest.raises(ValueError, match=r"^dtype: torch.float16 has no fused convolution on a"):
        rf.freeze(model, torch.float16)
    with pytest.raises(ValueError, match=r"^dtype: expected None or one of .*, got torch.int8"):
        rf.freeze(model, torch.int8)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 on this processor"):
        frozen = rf.freeze(model, torch.bfloat16)
    x = image(1, 3, 16, 24).float()
    assert relative_error(frozen(x), run(model, x)) < 0.05


def test_inputs_are_refused_with_a_sentence() -> None:
    frozen = rf.freeze(network())
    for x, sentence in (
        (torch.zeros(1, 4, 8, 8), r"x: expected shape \[N, 3, H, W\], got \[1, 4, 8, 8\]"),
        (torch.zeros(3, 8, 8), r"x: expected shape"),
        (torch.zeros(1, 3, 8, 3), r"x: expected at least 4 x 4 pixels"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"x: expected a floating-point tensor, got"),
        (torch.zeros(1, 3, 8, 8, device="meta"), r"x: expected a tensor on cpu, got one on meta"),
    ):
        with pytest.raises(ValueError, match=sentence):
            frozen(x)


def test_the_plain_network_has_the_same_frozen_copy() -> None:
    plain = lively(small()).float()
    fast = rf.ResUNet(3, 2, base_width=2, width_factors=(1, 2, 3))
    fast.load_state_dict(plain.state_dict())
    x = image(1, 3, 9, 9).float()
    one, other = rf.freeze(fast), rf.freeze(plain)
    assert isinstance(one, FrozenResUNet)
    assert torch.equal(one(x), other(x))
