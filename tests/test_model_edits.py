"""Edits of a fast network against the same edits of the plain one: nothing stale.

Every edit is made on both networks after both have run, so that anything remembered would show.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from networks import assert_same, image
from networks import one_thread as one_thread
from pairs import FIRST, LAST, SHAPE, WIDTH, assert_same_step, filled, norm_of, pair, replace
from torch import nn

import resunet_fast as rf
from resunet_fast.modules import fused

Edit = Callable[[nn.Module], None]


def edit_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.25


def edit_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.75)


def edit_state(model: nn.Module) -> None:
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict({k: v * 1.125 if v.is_floating_point() else v for k, v in state.items()})


def edit_by_assignment(model: nn.Module) -> None:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    state["encoder_layers.0.double_conv.0.weight"] *= 2
    model.load_state_dict(state, assign=True)


def edit_running_stats(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.sub_(0.5)
        elif name.endswith("running_var"):
            buffer.mul_(3)


def edit_buffers_by_assignment(model: nn.Module) -> None:
    norm_of(model).running_var = norm_of(model).running_var * 5


def reset_running_stats(model: nn.Module) -> None:
    norm_of(model).reset_running_stats()


def through_bfloat16(model: nn.Module) -> None:
    model.bfloat16().double()


def freeze_encoder(model: nn.Module) -> None:
    model.encoder_layers.requires_grad_(False)


def freeze_decoder(model: nn.Module) -> None:
    model.decoder_layers.requires_grad_(False)
    model.res_blocks.requires_grad_(False)


def freeze_all_but_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def freeze_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


def cumulative_average(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


def other_eps(model: nn.Module) -> None:
    norm_of(model).eps = 0.3


def no_running_stats(model: nn.Module) -> None:
    replace(model, f"{FIRST}.double_conv.1", nn.BatchNorm2d(WIDTH, track_running_stats=False))


def stop_tracking(model: nn.Module) -> None:
    norm_of(model).track_running_stats = False


def no_affine(model: nn.Module) -> None:
    replace(model, f"{LAST}.bn2", nn.BatchNorm2d(WIDTH, affine=False))


def no_counter(model: nn.Module) -> None:
    norm_of(model).num_batches_tracked = None


def other_convolution(model: nn.Module) -> None:
    wide = nn.Conv2d(WIDTH, WIDTH, 5, padding=4, dilation=2, groups=2, bias=False)
    replace(model, f"{FIRST}.double_conv.3", filled(wide))


def no_bias(model: nn.Module) -> None:
    model.encoder_layers[0].double_conv[0].bias = None


def pure_relu(model: nn.Module) -> None:
    replace(model, f"{FIRST}.double_conv.2", nn.ReLU())


def shared_relu(model: nn.Module) -> None:
    replace(model, f"{FIRST}.double_conv.5", model.encoder_layers[0].double_conv[2])


def shared_convolution(model: nn.Module) -> None:
    model.res_blocks[1].conv1 = model.res_blocks[1].conv2


def tied_weights(model: nn.Module) -> None:
    model.res_blocks[1].conv1.weight = model.res_blocks[1].conv2.weight


def replaced_encoder_block(model: nn.Module) -> None:
    replace(model, FIRST, filled(nn.Conv2d(3, WIDTH, 3, padding=1)))


def replaced_decoder_block(model: nn.Module) -> None:
    replace(
        model, "decoder_layers.1", nn.Sequential(filled(nn.Conv2d(3 * WIDTH, WIDTH, 1)), nn.Tanh())
    )


def removed_residual_block(model: nn.Module) -> None:
    replace(model, LAST, nn.Identity())


def other_head(model: nn.Module) -> None:
    replace(model, "outc", filled(nn.Conv2d(WIDTH, 5, 3)))


def channels_last_weights(model: nn.Module) -> None:
    model.to(memory_format=torch.channels_last)


FUSED_EDITS: list[Edit] = [
    edit_data,
    edit_in_place,
    edit_state,
    edit_by_assignment,
    edit_running_stats,
    edit_buffers_by_assignment,
    reset_running_stats,
    through_bfloat16,
    freeze_encoder,
    freeze_decoder,
    freeze_all_but_norms,
    freeze_norms,
    cumulative_average,
    other_eps,
    no_running_stats,
    stop_tracking,
    no_affine,
    no_counter,
    other_convolution,
    no_bias,
    pure_relu,
    shared_relu,
    shared_convolution,
    tied_weights,
    replaced_encoder_block,
    replaced_decoder_block,
    removed_residual_block,
    other_head,
    channels_last_weights,
]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("edit", FUSED_EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_is_followed(edit: Edit, recompute: bool) -> None:
    fast, plain = pair(recompute=recompute)
    x = image(*SHAPE)
    for model in (fast, plain):
        for mode in (True, False):
            with torch.no_grad():
                model.train(mode)(x)
        edit(model)
    assert not any(rf.explain(fast).blocks.values())
    for _ in range(2):
        assert_same_step(fast.eval(), plain.eval(), x)
        with torch.no_grad():
            assert_same(fast(x), plain(x))
        assert_same_step(fast.train(), plain.train(), x)


def test_deepcopy_is_independent() -> None:
    fast, plain = pair(recompute=True)
    x = image(*SHAPE)
    twin = copy.deepcopy(fast)
    edit_in_place(fast)
    assert_same_step(twin, plain, x)
    assert all(b.recompute for b in twin.modules() if isinstance(b, fused.BLOCKS))


def through_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [through_file, lambda m: pickle.loads(pickle.dumps(m))], ids=["torch.save", "pickle"]
)
def test_a_saved_module_comes_back_whole(copied: Callable[[nn.Module], nn.Module]) -> None:
    fast, plain = pair(recompute=True, encoder="residual", order="pre")
    twin = copied(fast)
    assert type(twin) is rf.ResUNet
    assert all(b.recompute for b in twin.modules() if isinstance(b, fused.BLOCKS))
    assert_same_step(twin, plain, image(*SHAPE))


def test_a_saved_state_dict_comes_back_with_weights_only() -> None:
    fast, plain = pair()
    edit_in_place(fast)
    buffer = io.BytesIO()
    torch.save(fast.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_step(fast, plain, image(*SHAPE))
