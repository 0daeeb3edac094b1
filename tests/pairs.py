"""A fast network beside its plain twin, and one step of both compared name by name."""

import torch
from networks import assert_same, randomised, small
from torch import Tensor, nn

import resunet_fast as rf
from resunet_fast import reference

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
SHAPE = (2, 3, 9, 14)
WIDTH = 4
FIRST, LAST = "encoder_layers.0", "res_blocks.1"


def pair(*, recompute: bool = False, **options: object) -> tuple[rf.ResUNet, reference.ResUNet]:
    """Three narrow levels in float64 with batch norms that matter, once fast and once plain."""
    options = {"base_width": WIDTH, "width_factors": (1, 2, 3), **options}
    fast = rf.ResUNet(3, 2, recompute=recompute, **options).double()
    plain = lively(small(**options))
    fast.load_state_dict(plain.state_dict())
    return fast, plain


def lively(model: reference.ResUNet) -> reference.ResUNet:
    """Shift the batch norms, so that in evaluation no layer's ReLUs are all closed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += 0.5
    return model


def named_pair(name: str, **options: object) -> tuple[rf.ResUNet, reference.ResUNet]:
    """A network of the catalogue, narrow and in float64."""
    options = {"num_classes": 2, "base_width": WIDTH, "width_factors": (1, 2, 3), **options}
    fast = rf.create_model(name, **options).double()
    plain = lively(randomised(reference.create_model(name, **options)))
    fast.load_state_dict(plain.state_dict())
    return fast, plain


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    """Run forward and backward; return the output, every gradient and every buffer by name."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    # Not a plain sum, whose gradient a batch norm with batch statistics cancels.
    (y * y.detach().sin()).sum().backward()
    seen = {"output": y.detach(), "grad of x": x.grad}
    seen |= {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    return seen | {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_step(fast: nn.Module, plain: nn.Module, x: Tensor) -> None:
    """One step of both: output, gradients, running statistics and counters."""
    expected = step(plain, x)
    assert expected["grad of x"].abs().max() > 1e-6, "every ReLU is closed: nothing is compared"
    assert_same(step(fast, x), expected)


def norm_of(model: nn.Module) -> nn.BatchNorm2d:
    return model.encoder_layers[0].double_conv[1]


def conv_of(model: nn.Module) -> nn.Conv2d:
    return model.encoder_layers[0].double_conv[3]


def replace(model: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new.double())


def filled(module: nn.Module) -> nn.Module:
    """The same values in every call: both networks get an equal replacement."""
    generator = torch.Generator().manual_seed(11)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.2, 0.8, generator=generator)
    return module
