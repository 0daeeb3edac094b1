"""The article's listing: equality with the oracle, and each repair of docs/model.md."""

import itertools
import pickle
import re
from collections.abc import Iterator

import oracle
import pytest
import torch
from networks import MODEL_PAGE, assert_same, image, randomised
from networks import one_thread as one_thread
from torch import Tensor, nn

from resunet_fast import reference
from resunet_fast.modules.plain import PreActResBlock, ResBlock, projection


def oracle_of(model: reference.ResUNet, width: int) -> oracle.RepairedListing:
    twin = oracle.RepairedListing(model.in_channels, model.num_classes, width).double()
    twin.load_state_dict({oracle.to_oracle(k): v for k, v in model.state_dict().items()})
    return twin.train(model.training)


@pytest.mark.parametrize("size", [(32, 48), (37, 51), (16, 31)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_defaults_equal_the_repaired_listing(size: tuple[int, int], training: bool) -> None:
    model = randomised(reference.ResUNet(3, 2, base_width=4)).train(training)
    twin = oracle_of(model, 4)
    x, cotangent = image(2, 3, *size).requires_grad_(), image(2, 2, *size)
    actual, expected = model(x), twin(x)
    assert_same(actual, expected)

    names, parameters = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(actual, (x, *parameters), cotangent)
    other = dict(twin.named_parameters())
    parameters = [other[oracle.to_oracle(name)] for name in names]
    for name, grad, wanted in zip(
        ("x", *names),
        grads,
        torch.autograd.grad(expected, (x, *parameters), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-10, msg=f"gradient of {name}")
    for key, value in model.state_dict().items():
        assert_same(value, twin.state_dict()[oracle.to_oracle(key)])


def test_full_width_equals_the_repaired_listing() -> None:
    model = randomised(reference.UNetWithResidualConnections(1, 3)).eval()
    twin = oracle_of(model, 64)
    x = image(1, 1, 17, 20)
    with torch.no_grad():
        assert_same(model(x), twin(x))


def listing(width: int = 4) -> reference.ResUNet:
    return randomised(reference.ResUNet(3, 2, base_width=width))


def test_repair_the_listing_runs() -> None:
    model = reference.UNetWithResidualConnections(3, 2)
    with torch.no_grad():
        assert model.eval()(image(1, 3, 32, 32, dtype=torch.float32)).shape == (1, 2, 32, 32)


def test_repair_encoder_layers_follow_one_another() -> None:
    model = reference.UNetWithResidualConnections(3, 2)
    inputs = [layer.double_conv[0].in_channels for layer in model.encoder_layers]
    outputs = [layer.double_conv[3].out_channels for layer in model.encoder_layers]
    assert inputs == [3, 64, 128, 256]
    assert outputs == [64, 128, 256, 512]


def test_repair_bottleneck() -> None:
    model = reference.UNetWithResidualConnections(3, 2)
    first, second = model.bottleneck.double_conv[0], model.bottleneck.double_conv[3]
    assert (first.in_channels, first.out_channels, second.out_channels) == (512, 1024, 1024)
    assert model.decoder_layers[0].double_conv[0].in_channels == 1024 + 512


def test_repair_res_blocks_keep_their_width() -> None:
    model = reference.UNetWithResidualConnections(3, 2)
    widths = [(block.conv1.in_channels, block.conv2.out_channels) for block in model.res_blocks]
    assert widths == [(512, 512), (256, 256), (128, 128), (64, 64)]
    assert [block.downsample for block in model.res_blocks] == [None] * 4


def test_repair_the_residual_is_the_decoder_layers_result() -> None:
    model = listing()
    given, returned, results = [], [], []
    for layer, block in zip(model.decoder_layers, model.res_blocks, strict=True):
        # With a second batch norm of zero the branch vanishes: relu(x) = x is left.
        nn.init.zeros_(block.bn2.weight)
        nn.init.zeros_(block.bn2.bias)
        layer.register_forward_hook(lambda module, args, out: returned.append(out))
        block.register_forward_pre_hook(lambda module, args: given.append(args[0]))
        block.register_forward_hook(lambda module, args, out: results.append(out))
    model(image(2, 3, 32, 32))
    assert len(given) == 4
    assert all(a is b for a, b in zip(given, returned, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(given, results, strict=True))


@pytest.mark.parametrize("block", [ResBlock, PreActResBlock])
@pytest.mark.parametrize(("planes", "stride"), [(4, 1), (3, 2), (4, 2)])
def test_repair_a_projection_where_width_or_stride_changes(
    block: type[nn.Module], planes: int, stride: int
) -> None:
    with pytest.raises(ValueError, match=rf"downsample: .*3 to {planes} channels, stride {stride}"):
        block(3, planes, stride)
    shortcut = projection(3, planes, stride)
    conv, norm = shortcut
    assert (conv.kernel_size, conv.stride, conv.bias) == ((1, 1), (stride, stride), None)
    assert isinstance(norm, nn.BatchNorm2d)
    x = image(2, 3, 5, 6, dtype=torch.float32)
    assert block(3, planes, stride, shortcut)(x).shape == (2, planes, -(-5 // stride), 6 // stride)


def test_no_projection_where_nothing_changes() -> None:
    assert projection(3, 3, 1) is None


def test_repair_any_size() -> None:
    model = listing()
    for height, width in ((16, 16), (17, 31), (33, 47), (40, 24)):
        assert model(image(2, 3, height, width)).shape == (2, 2, height, width)


def test_concatenation_is_upsampled_then_skip() -> None:
    model = listing().eval()
    seen: dict[str, Tensor] = {}
    model.bottleneck.register_forward_hook(lambda m, args, out: seen.update(low=out))
    model.encoder_layers[3].register_forward_hook(lambda m, args, out: seen.update(skip=out))
    model.decoder_layers[0].register_forward_pre_hook(lambda m, args: seen.update(cat=args[0]))
    model(image(1, 3, 32, 48))
    # On multiples of 16 the skip is twice as large, so the listing's scale factor says the same.
    low = nn.functional.interpolate(
        seen["low"], scale_factor=(2, 2), mode="bilinear", align_corners=True
    )
    assert_same(seen["cat"], torch.cat([low, seen["skip"]], 1))


def conv_keys(name: str, *, bias: bool) -> Iterator[str]:
    yield from (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)


def norm_keys(name: str) -> Iterator[str]:
    for leaf in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield f"{name}.{leaf}"


def listing_keys() -> Iterator[str]:
    doubles = [f"{kind}_layers.{i}" for kind in ("encoder", "decoder") for i in range(4)]
    for name in (*doubles, "bottleneck"):
        for i in (0, 3):
            yield from conv_keys(f"{name}.double_conv.{i}", bias=True)
            yield from norm_keys(f"{name}.double_conv.{i + 1}")
    for name, i in itertools.product([f"res_blocks.{i}" for i in range(4)], (1, 2)):
        yield from conv_keys(f"{name}.conv{i}", bias=False)
        yield from norm_keys(f"{name}.bn{i}")
    yield from conv_keys("outc", bias=True)


def test_state_dict_keys_are_the_listings() -> None:
    with torch.device("meta"):
        model = reference.UNetWithResidualConnections(3, 1)
    assert sorted(model.state_dict()) == sorted(listing_keys())


def test_parameter_count_of_the_listing() -> None:
    with torch.device("meta"):
        model = reference.UNetWithResidualConnections(3, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 37_661_441


def test_the_articles_class_pickles() -> None:
    with torch.device("meta"):
        model = reference.UNetWithResidualConnections(3, 1)
    assert type(pickle.loads(pickle.dumps(model))) is reference.UNetWithResidualConnections


def test_the_page_names_tests_that_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", MODEL_PAGE.read_text(encoding="utf-8")))
    assert len(named) >= 6
    assert named <= set(globals())
