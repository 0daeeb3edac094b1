"""Replaced layers, hooks, parametrizations: what a fused block may not skip, and what it says."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from networks import assert_same, image
from networks import one_thread as one_thread
from pairs import (
    FIRST,
    LAST,
    SHAPE,
    WIDTH,
    assert_same_step,
    conv_of,
    filled,
    norm_of,
    pair,
    replace,
    step,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import resunet_fast as rf
from resunet_fast.modules import fused

Edit = Callable[[nn.Module], None]


class MyBatchNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class MySequential(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def leaky(model: nn.Module) -> None:
    replace(model, f"{FIRST}.double_conv.2", nn.LeakyReLU())


def group_norm(model: nn.Module) -> None:
    replace(model, f"{FIRST}.double_conv.1", nn.GroupNorm(1, WIDTH))


def no_norm(model: nn.Module) -> None:
    replace(model, f"{LAST}.bn1", nn.Identity())


def norm_subclass(model: nn.Module) -> None:
    replace(model, f"{LAST}.bn2", MyBatchNorm(WIDTH))


def sequential_subclass(model: nn.Module) -> None:
    block = model.encoder_layers[0]
    block.double_conv = MySequential(*block.double_conv)


def one_layer_more(model: nn.Module) -> None:
    model.encoder_layers[0].double_conv.append(nn.Tanh())


def one_layer_less(model: nn.Module) -> None:
    del model.encoder_layers[0].double_conv[5]


def reflect_padding(model: nn.Module) -> None:
    replace(
        model,
        f"{LAST}.conv1",
        filled(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect")),
    )


def same_padding(model: nn.Module) -> None:
    replace(model, f"{LAST}.conv2", filled(nn.Conv2d(WIDTH, WIDTH, 3, padding="same")))


def weight_norm(model: nn.Module) -> None:
    parametrizations.weight_norm(conv_of(model))


def old_weight_norm(model: nn.Module) -> None:
    torch.nn.utils.weight_norm(conv_of(model))


def spectral_norm(model: nn.Module) -> None:
    torch.manual_seed(2)
    parametrizations.spectral_norm(conv_of(model))


def pruned(model: nn.Module) -> None:
    mask = torch.arange(conv_of(model).weight.numel()) % 2
    prune.custom_from_mask(conv_of(model), "weight", mask.view_as(conv_of(model).weight))


def pruned_norm(model: nn.Module) -> None:
    prune.l1_unstructured(norm_of(model), "weight", amount=1)


def shared_norm(model: nn.Module) -> None:
    replace(model, f"{FIRST}.double_conv.4", norm_of(model))


def shared_norm_of_a_residual_block(model: nn.Module) -> None:
    model.res_blocks[1].bn2 = model.res_blocks[1].bn1


def own_forward(model: nn.Module) -> None:
    norm = norm_of(model)
    norm.forward = lambda x: nn.BatchNorm2d.forward(norm, x).neg()


def doubling_hook(model: nn.Module) -> None:
    conv_of(model).register_forward_hook(lambda module, args, output: output * 2)


def shifting_pre_hook(model: nn.Module) -> None:
    norm_of(model).register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def scaling_backward_hook(model: nn.Module) -> None:
    conv_of(model).register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))


def relu_hook(model: nn.Module) -> None:
    model.res_blocks[1].relu.register_forward_hook(lambda module, args, output: output + 1)


def container_hook(model: nn.Module) -> None:
    block = model.encoder_layers[0].double_conv
    block.register_forward_hook(lambda module, args, output: output - 1)


NOT_A = "double_conv.1 is a {}, not exactly a BatchNorm2d"
HOOKED = "double_conv.3 has hooks or a forward of its own"

REFUSED_EDITS: list[tuple[Edit, str, list[str]]] = [
    (leaky, FIRST, ["double_conv.2 is a LeakyReLU, not exactly a ReLU"]),
    (group_norm, FIRST, [NOT_A.format("GroupNorm")]),
    (no_norm, LAST, ["bn1 is a Identity, not exactly a BatchNorm2d"]),
    (norm_subclass, LAST, ["bn2 is a MyBatchNorm, not exactly a BatchNorm2d"]),
    (sequential_subclass, FIRST, ["double_conv is a MySequential, not exactly a Sequential"]),
    (one_layer_more, FIRST, ["double_conv.6 is a Tanh, not exactly a NoneType"]),
    (one_layer_less, FIRST, ["double_conv.5 is a NoneType, not exactly a ReLU"]),
    (reflect_padding, LAST, ["conv1 pads with reflect, (1, 1)"]),
    (same_padding, LAST, ["conv2 pads with zeros, same"]),
    (weight_norm, FIRST, ["double_conv.3 is a ParametrizedConv2d, not exactly a Conv2d"]),
    (old_weight_norm, FIRST, [HOOKED]),
    (spectral_norm, FIRST, ["double_conv.3 is a ParametrizedConv2d, not exactly a Conv2d"]),
    (pruned, FIRST, [HOOKED]),
    (pruned_norm, FIRST, [HOOKED.replace("3", "1")]),
    (shared_norm, FIRST, ["double_conv.4 is also double_conv.1"]),
    (shared_norm_of_a_residual_block, LAST, ["bn2 is also bn1"]),
    (own_forward, FIRST, [HOOKED.replace("3", "1")]),
    (doubling_hook, FIRST, [HOOKED]),
    (shifting_pre_hook, FIRST, [HOOKED.replace("3", "1")]),
    (scaling_backward_hook, FIRST, [HOOKED]),
    (relu_hook, LAST, ["relu has hooks or a forward of its own"]),
    (container_hook, FIRST, ["double_conv has hooks or a forward of its own"]),
]


@pytest.mark.parametrize(
    ("edit", "block", "reasons"), REFUSED_EDITS, ids=[edit.__name__ for edit, *_ in REFUSED_EDITS]
)
def test_what_cannot_be_fused_is_called_and_explained(
    edit: Edit, block: str, reasons: list[str]
) -> None:
    fast, plain = pair()
    x = image(*SHAPE)
    for model in (fast, plain):
        model(x)
        edit(model)
    explained = {name: why for name, why in rf.explain(fast).blocks.items() if why}
    assert explained == {block: reasons}
    assert f"{block}: {reasons[0]}" in str(rf.explain(fast))
    for mode in (True, False):
        assert_same_step(fast.train(mode), plain.train(mode), x)


def test_synchronised_batch_norms_are_called() -> None:
    fast, plain = (nn.SyncBatchNorm.convert_sync_batchnorm(model) for model in pair())
    x = image(*SHAPE)
    reasons = [why for block in rf.explain(fast).blocks.values() for why in block]
    assert len(reasons) == 2 * len(rf.explain(fast).blocks)
    assert all("is a SyncBatchNorm, not exactly a BatchNorm2d" in reason for reason in reasons)
    for mode in (True, False):
        assert_same_step(fast.train(mode), plain.train(mode), x)


def test_an_edit_that_is_undone_is_fused_again() -> None:
    fast, plain = pair()
    x = image(*SHAPE)
    handle = conv_of(fast).register_forward_hook(lambda *_: None)
    assert rf.explain(fast).blocks[FIRST] == [HOOKED]
    handle.remove()
    parametrizations.weight_norm(conv_of(fast))
    nn.utils.parametrize.remove_parametrizations(conv_of(fast), "weight")
    assert not any(rf.explain(fast).blocks.values())
    assert_same_step(fast, plain, x)


class TwiceTheBlock(fused.DoubleConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def test_a_subclass_of_a_fused_block_keeps_its_own_forward() -> None:
    fast, plain = pair()
    x = image(*SHAPE)
    fast.encoder_layers[0].__class__ = TwiceTheBlock
    fast.decoder_layers[1].__class__ = TwiceTheBlock
    for block in (plain.encoder_layers[0], plain.decoder_layers[1]):
        block.register_forward_hook(lambda module, args, output: output * 2)
    assert_same_step(fast, plain, x)


@dataclass
class Witness:
    """Everything that hooks on the named modules were given, in order."""

    seen: list[tuple[str, str, list[Tensor]]] = field(default_factory=list)

    def note(self, event: str, name: str, *values: object) -> None:
        flat = torch.utils._pytree.tree_leaves(values)
        tensors = [value.detach().clone() for value in flat if isinstance(value, Tensor)]
        self.seen.append((event, name, tensors))

    def forward(self, name: str, module: nn.Module) -> None:
        module.register_forward_pre_hook(lambda _, args: self.note("pre", name, args))
        module.register_forward_hook(
            lambda _, args, kwargs, output: self.note("forward", name, args, kwargs, output),
            with_kwargs=True,
        )

    def backward(self, name: str, module: nn.Module) -> None:
        module.register_full_backward_pre_hook(lambda _, grads: self.note("pre", name, grads))
        module.register_full_backward_hook(
            lambda _, inputs, outputs: self.note("backward", name, inputs, outputs)
        )


def witnessed(model: nn.Module, watch: str, names: list[str]) -> Witness:
    witness = Witness()
    for name in names:
        getattr(witness, watch)(name, model.get_submodule(name))
    step(model, image(*SHAPE))
    return witness


BLOCK_NAMES = ["encoder_layers.0", "bottleneck", "decoder_layers.0", "decoder_layers.1", LAST]
PART_NAMES = [
    f"{FIRST}.double_conv",
    *(f"{FIRST}.double_conv.{i}" for i in range(6)),
    f"{LAST}.relu",
]
CONV_NAMES = ["encoder_layers.1", "outc", f"{LAST}.conv1"]


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize(
    ("watch", "names"),
    [
        ("forward", BLOCK_NAMES),
        ("forward", PART_NAMES),
        ("forward", [*BLOCK_NAMES, *PART_NAMES]),
        ("backward", BLOCK_NAMES),
        ("backward", CONV_NAMES),
    ],
    ids=["blocks", "parts", "both", "blocks backward", "convolutions backward"],
)
def test_hooks_see_what_they_see_in_the_reference(watch: str, names: list[str], order: str) -> None:
    fast, plain = pair(order=order)
    actual, expected = (witnessed(model, watch, names).seen for model in (fast, plain))
    assert len(expected) >= 2 * len(names)
    assert [entry[:2] for entry in actual] == [entry[:2] for entry in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours[2], theirs[2])


@pytest.mark.parametrize("name", [f"{FIRST}.double_conv.1", f"{LAST}.bn2"])
def test_a_backward_hook_before_an_in_place_layer_is_refused_alike(name: str) -> None:
    for model in pair():
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            witnessed(model, "backward", [name])


def test_blocks_with_hooks_of_their_own_are_explained() -> None:
    fast, _ = pair()
    fast.bottleneck.register_forward_hook(lambda *_: None)
    reasons = {"bottleneck": ["it has hooks or a forward of its own"]}
    assert {name: why for name, why in rf.explain(fast).blocks.items() if why} == reasons


def test_global_hooks_see_what_they_see_in_the_reference() -> None:
    seen = []
    for model in pair():
        witness = Witness()
        names = {module: name for name, module in model.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, w=witness, n=names: w.note("", n[module], args, output)
        )
        try:
            reasons = rf.explain(model).blocks.values()
            model(image(*SHAPE))
        finally:
            handle.remove()
        assert all(why == ["a global module hook is registered"] for why in reasons)
        seen.append(witness.seen)
    actual, expected = seen
    assert [entry[1] for entry in actual] == [entry[1] for entry in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours[2], theirs[2])
