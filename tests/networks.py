"""Small networks and inputs that the tests of the models share."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resunet_fast import reference

MODEL_PAGE = Path(__file__).parents[1] / "docs" / "model.md"

AXES = {
    "encoder": ("double_conv", "residual"),
    "order": ("post", "pre"),
    "downsample": ("maxpool", "stride"),
    "upsample": ("bilinear", "nearest", "transpose"),
    "decoder_residual": (True, False),
}
VARIANTS = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def variant_id(options: dict[str, object]) -> str:
    return "-".join(map(str, options.values()))


def small(**options: object) -> reference.ResUNet:
    """Three narrow levels, all widths different."""
    shape = {"base_width": 2, "width_factors": (1, 2, 3)}
    return randomised(reference.ResUNet(3, 2, **{**shape, **options}))


def randomised(model: nn.Module) -> nn.Module:
    """In float64, with batch norms that scale and shift and running statistics that matter."""
    generator = torch.Generator().manual_seed(7)
    for module in model.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                tensor.uniform_(0.5, 1.5, generator=generator)
            for tensor in (module.bias.data, module.running_mean):
                tensor.uniform_(-0.5, 0.5, generator=generator)
    return model


def image(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


def assert_same(actual: object, expected: object) -> None:
    """Equal but for float64 rounding; batch norm makes the gradient of a bias before it noise."""
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)
