"""The networks' wiring against first principles, construction, input, names, and what users do."""

import copy
import pickle
import re

import oracle
import pytest
import torch
from networks import AXES, MODEL_PAGE, VARIANTS, assert_same, image, small, variant_id
from networks import one_thread as one_thread
from torch import Tensor, nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from resunet_fast import reference
from resunet_fast.models.catalogue import CATALOGUE
from resunet_fast.models.wiring import Stages, Wiring, plain_down, plain_up
from resunet_fast.modules.plain import DoubleConv, PreActResBlock, ResBlock

NAMES = reference.list_models()


@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_every_combination_equals_first_principles(options: dict[str, object]) -> None:
    model = small(**options)
    x = image(2, 3, 9, 14).requires_grad_()
    before, cotangent = x.detach().clone(), image(2, 2, 9, 14)
    state = {
        key: value.detach().clone().requires_grad_() for key, value in model.named_parameters()
    }

    actual = model(x)
    expected = oracle.network(state, x, levels=3, **options)
    assert_same(actual, expected)
    grads = torch.autograd.grad(actual, (x, *model.parameters()), cotangent)
    assert_same(grads, torch.autograd.grad(expected, (x, *state.values()), cotangent))
    assert torch.equal(x, before), "the image was modified"


def test_levels_may_be_any_number_from_two() -> None:
    for levels in (2, 3, 6):
        model = small(width_factors=range(1, levels + 1))
        size = 2**levels + 1
        x = image(1, 3, size, size)
        state = dict(model.named_parameters())
        assert_same(model(x), oracle.network(state, x, levels=levels, **VARIANTS[0]))


def test_same_seed_same_values() -> None:
    def built(build: type[Wiring]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        return build(3, 1).state_dict()

    article, general = map(built, (reference.UNetWithResidualConnections, reference.ResUNet))
    assert list(article) == list(general)
    assert all(torch.equal(article[key], general[key]) for key in article)


class OtherDoubleConv(DoubleConv):
    pass


class OtherResBlock(ResBlock):
    pass


class OtherPreActResBlock(PreActResBlock):
    pass


@pytest.mark.parametrize("options", VARIANTS, ids=variant_id)
def test_blocks_come_from_the_stages_alone(options: dict[str, object]) -> None:
    calls: list[str] = []

    def down(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("down")
        return plain_down(block, x)

    def up(block: nn.Module, low: Tensor, skip: Tensor, mode: str) -> Tensor:
        calls.append(mode)
        return plain_up(block, low, skip, mode)

    class Other(Wiring):
        stages = Stages(OtherDoubleConv, OtherResBlock, OtherPreActResBlock, down, up)

    torch.manual_seed(0)
    other = Other(3, 2, base_width=2, width_factors=(1, 2, 3), **options)
    torch.manual_seed(0)
    plain = reference.ResUNet(3, 2, base_width=2, width_factors=(1, 2, 3), **options)
    x = image(2, 3, 11, 8, dtype=torch.float32)
    assert torch.equal(other(x), plain(x))
    assert list(other.state_dict()) == list(plain.state_dict())
    modes = [{"transpose": "none"}.get(options["upsample"], options["upsample"])] * 2
    assert calls == ["down"] * 2 * (options["downsample"] == "maxpool") + modes
    assert not {DoubleConv, ResBlock, PreActResBlock} & {type(m) for m in other.modules()}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"in_channels": 0}, "in_channels: expected an integer of at least 1, got 0"),
        ({"num_classes": 1.0}, "num_classes: expected an integer of at least 1, got 1.0"),
        ({"base_width": -4}, "base_width: expected an integer of at least 1, got -4"),
        ({"base_width": True}, "base_width: expected an integer of at least 1, got True"),
        ({"width_factors": (1,)}, "width_factors: expected at least two numbers, got (1,)"),
        ({"width_factors": (1, 0)}, "width_factors: expected an integer of at least 1, got 0"),
        ({"encoder": "resnet"}, "encoder: expected one of ['double_conv', 'residual']"),
        ({"order": "mid"}, "order: expected one of ['post', 'pre'], got 'mid'"),
        ({"downsample": "avg"}, "downsample: expected one of ['maxpool', 'stride'], got 'avg'"),
        ({"upsample": None}, "upsample: expected one of ['bilinear', 'nearest', 'transpose']"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        reference.ResUNet(**{"in_channels": 3, "num_classes": 1, **arguments})


def test_double_conv_names_a_bad_order() -> None:
    with pytest.raises(ValueError, match=r"order: expected one of \['post', 'pre'\], got 'Post'"):
        DoubleConv(3, 4, order="Post")


def test_repr_shows_the_choices() -> None:
    text = repr(small(encoder="residual", upsample="nearest"))
    assert "widths=(2, 4, 6), encoder='residual'" in text
    assert "upsample='nearest'" in text


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 4, 16, 16), (1, 2, 3, 16, 16)], ids=str)
def test_shape_and_channels_are_checked(shape: tuple[int, ...]) -> None:
    sentence = f"x: expected shape [N, 3, H, W], got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        small()(image(*shape))


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 1)], ids=str)
def test_max_pooling_names_the_smallest_size(size: tuple[int, int]) -> None:
    sentence = f"expected at least 8 x 8 pixels for 4 levels, got {size[0]} x {size[1]}"
    with pytest.raises(ValueError, match=sentence):
        small(width_factors=(1, 1, 1, 1))(image(2, 3, *size))


@pytest.mark.parametrize("upsample", AXES["upsample"])
def test_smallest_sizes(upsample: str) -> None:
    pooled = small(upsample=upsample).eval()
    strided = small(upsample=upsample, downsample="stride").eval()
    for model, sizes in ((pooled, [(4, 4), (4, 7)]), (strided, [(1, 1), (1, 6), (3, 2)])):
        for size in sizes:
            y = model(image(1, 3, *size))
            assert y.shape == (1, 2, *size)
            assert y.isfinite().all()


def test_strided_convolutions_need_a_pixel() -> None:
    with pytest.raises(ValueError, match="expected at least 1 x 1 pixels for 3 levels, got 0 x 4"):
        small(downsample="stride")(image(2, 3, 0, 4))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds_and_computes(name: str) -> None:
    model = reference.create_model(name, in_channels=1, num_classes=4, base_width=2).eval()
    assert isinstance(model, reference.ResUNet)
    assert model(image(1, 1, 33, 18, dtype=torch.float32)).shape == (1, 4, 33, 18)


def test_overrides_win_over_the_catalogue() -> None:
    options = {"base_width": 3, "width_factors": [1, 2], "upsample": "nearest", "order": "post"}
    model = reference.create_model("deep_resunet", **options)
    assert (model.widths, model.upsample, model.order) == ((3, 6), "nearest", "post")
    assert (model.encoder, model.downsample) == ("residual", "stride")


def test_the_named_networks_are_what_they_say() -> None:
    prose = reference.create_model("resunet_prose", base_width=2)
    assert all(isinstance(layer, ResBlock) for layer in prose.encoder_layers)
    assert all(isinstance(up, nn.ConvTranspose2d) for up in prose.ups)
    assert all(isinstance(layer, DoubleConv) for layer in prose.decoder_layers)
    deep = reference.create_model("deep_resunet", base_width=2)
    units = [*deep.encoder_layers, deep.bottleneck, *deep.decoder_layers]
    assert [type(unit) for unit in units] == [PreActResBlock] * 7
    assert [unit.bn1 is None for unit in units] == [True] + [False] * 6
    assert [unit.conv1.stride[0] for unit in units] == [1, 2, 2, 2, 1, 1, 1]
    for name in ("unet", "unet_transpose"):
        plain = reference.create_model(name, base_width=2)
        assert not any(isinstance(m, ResBlock | PreActResBlock) for m in plain.modules())
        assert bool(plain.ups) == (name == "unet_transpose")


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    sentence = f"name: expected one of {NAMES}, got 'resunett' (did you mean 'resunet'?)"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        reference.create_model("resunett")


def test_an_unknown_keyword_is_answered_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match=r"'upsample'.*got 'upsampling' \(did you mean 'upsample'"):
        reference.create_model("unet", upsampling="nearest")


def test_the_list_of_names_is_the_callers_own() -> None:
    reference.list_models().clear()
    assert reference.list_models() == list(CATALOGUE)


def test_deepcopy_is_independent() -> None:
    model = small(encoder="residual").eval()
    x = image(1, 3, 8, 9)
    before = model(x)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.outc.weight)
    assert torch.equal(model(x), before)
    assert not torch.equal(twin(x), before)


@pytest.mark.parametrize("name", NAMES)
def test_pickle_round_trip(name: str) -> None:
    model = reference.create_model(name, base_width=2).eval()
    twin = pickle.loads(pickle.dumps(model))
    x = image(1, 3, 19, 16, dtype=torch.float32)
    assert type(twin) is type(model)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[-1]], ids=variant_id)
def test_channels_last_changes_nothing_but_the_layout(options: dict[str, object]) -> None:
    model = small(**options)
    x = image(2, 3, 9, 14)
    expected = model(x)
    assert_same(model(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("order", AXES["order"])
@pytest.mark.parametrize("encoder", AXES["encoder"])
def test_autocast(encoder: str, order: str) -> None:
    # As many image channels as the first level has, so that the first shortcut is the image.
    model = reference.ResUNet(
        4, 2, base_width=4, width_factors=(1, 2), encoder=encoder, order=order
    )
    x = image(2, 4, 8, 9, dtype=torch.float32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(x)
    assert actual.dtype == torch.bfloat16
    actual.sum().backward()
    # 0.06 is the worst of 20 seeds: each of the layers rounds to 8 bits.
    torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_as_one_graph(name: str) -> None:
    model = reference.create_model(name, base_width=2, width_factors=(1, 2)).double()
    twin = copy.deepcopy(model)
    x = image(2, 3, 7, 8)
    torch.compiler.reset()
    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    expected = twin(x)
    assert_same(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    grads = [[p.grad for p in network.parameters()] for network in (model, twin)]
    assert_same(*grads)
    assert_same(model.state_dict(), twin.state_dict())


def exported_agrees(
    model: nn.Module, example: Tensor, dims: dict[int, object], *others: Tensor
) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=(dims,)).module()
    for x in (example, *others):
        assert_same(program(x), model(x))


@pytest.mark.parametrize("downsample", AXES["downsample"])
def test_exports_with_any_size(downsample: str) -> None:
    model = small(downsample=downsample).eval()
    # Twice the smallest size: torch treats a dimension of one, here the bottleneck's, as fixed.
    dims = {0: Dim("n"), 2: Dim("h", min=8), 3: Dim("w", min=8)}
    exported_agrees(model, image(2, 3, 11, 14), dims, image(1, 3, 8, 9), image(3, 3, 16, 13))


@pytest.mark.parametrize("downsample", AXES["downsample"])
def test_exports_transposed_convolutions_with_multiples(downsample: str) -> None:
    model = small(upsample="transpose", downsample=downsample).eval()
    dims = {0: Dim("n"), 2: 4 * Dim("h", max=64), 3: 4 * Dim("w", max=64)}
    exported_agrees(model, image(2, 3, 12, 16), dims, image(1, 3, 8, 20))


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_true_sizes(name: str) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = reference.create_model(name)
        model(torch.empty(1, 3, 256, 256))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row = f"| `{name}` | {parameters:,} | {counter.get_total_flops() / 1e9:.1f} |"
    assert row in MODEL_PAGE.read_text(encoding="utf-8")
