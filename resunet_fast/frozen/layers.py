"""The layers of a frozen network: a convolution with what follows it folded in, and what is left.

Each keeps its tensors dense, in the frozen dtype, for saving, tracing and other backends; the
convolution keeps its weight as Winograd's method or else oneDNN wants it beside that, where one of
them takes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import Conv, Norm
from ..ops.bn_act.op import BN_ACT
from ..ops.conv2d import winograd
from ..ops.conv_bias_act import cpu as onednn
from ..ops.conv_bias_act.op import CONV_BIAS_ACT
from ..ops.layout import accumulator
from ..registry import forced_backend
from .sealed import HOLDS_NAN, Sealed, symbolic


class _Opaque:
    """Keeps a packed weight out of sight of whatever walks over a module's tensors."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor = tensor


class Layer(Sealed):
    """A layer with tensors: `names` are their keys in the state dict.

    Args:
        tensors: by name; None for those that the layer does without.
    """

    names: tuple[str, ...]
    _weight: Any
    _bias: Any

    def __init__(self, tensors: Mapping[str, Tensor | None]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            setattr(self, f"_{name}", tensor)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor of everything that makes this layer what it is."""
        for name in self.names:
            tensor = getattr(self, f"_{name}")
            if tensor is not None:
                yield name, tensor

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.tensors():
            destination[prefix + name] = tensor.clone()

    def fill(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Replace every tensor by one of the same shape: how a saved network is read."""
        for name, tensor in self.tensors():
            self.__dict__[f"_{name}"] = _like(state[prefix + name], tensor)


class FrozenConv(Layer):
    """z = relu(conv(x) + bias [+ residual]) with a batch norm folded into weight and bias.

    Args:
        conv: the folded convolution, dense.
        relu: apply the ReLU.
        sources: names of the convolution and of the batch norm in the model; "" for no batch norm.
    """

    _weight: Tensor
    _packed: _Opaque

    def __init__(self, conv: Conv, *, relu: bool, sources: tuple[str, str]) -> None:
        super().__init__({"weight": conv.weight, "bias": conv.bias})
        self.geometry = conv[2:]
        self.relu = relu
        self.sources = sources
        self._pack()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map [N, C, H, W] to [N, K, H', W']; the residual has the result's shape."""
        backend = forced_backend()
        weight = self._packed.tensor
        if weight is None or symbolic(x) or HOLDS_NAN.get():
            weight = self._weight
        elif not weight.is_mkldnn:
            if backend in ("", "cpu") and winograd.takes_image(x):
                return winograd.convolve(x, weight, self._bias, residual, relu=self.relu)
            weight = self._weight
        z: Tensor = CONV_BIAS_ACT(
            x, weight, self._bias, residual, self.relu, *self.geometry, backend
        )
        return z

    def fill(self, state: Mapping[str, Tensor], prefix: str) -> None:
        """Replace weight and bias."""
        super().fill(state, prefix)
        self._pack()

    def reservations(self) -> list[str]:
        """Say why the weight is not laid out for oneDNN (empty: it is, or lies on a GPU)."""
        if self._packed.tensor is not None or self._weight.device.type != "cpu":
            return []
        return onednn.refusals(self._weight, self._weight, None, None)

    def extra_repr(self) -> str:
        """Return shapes and what is folded in."""
        k, c, *kernel = self._weight.shape
        return f"{c}, {k}, kernel_size={tuple(kernel)}, relu={self.relu}, of={self.sources}"

    def _pack(self) -> None:
        packed = None
        if winograd.takes_weight(self._weight, self.geometry):
            packed = winograd.pack(self._weight)
        if packed is None:
            packed = onednn.pack(self._weight, *self.geometry)
        self.__dict__["_packed"] = _Opaque(packed)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()


class FrozenNorm(Layer):
    """relu(batch_norm(x)) with running statistics, in one pass: where no convolution comes before.

    Args:
        norm: its vectors; they stay in float32 (float64 for float64) whatever the images are in.
        dtype: of the images.
    """

    def __init__(self, norm: Norm, dtype: torch.dtype) -> None:
        vectors = {
            "weight": norm.weight,
            "bias": norm.bias,
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        }
        wide = accumulator(dtype)
        super().__init__({n: None if v is None else _copy(v, wide) for n, v in vectors.items()})
        self.eps = norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to the same shape."""
        own = (self._weight, self._bias, self._running_mean, self._running_var, self.eps)
        other = (None, False, None, None, None, None, 0.0)
        z: Tensor = BN_ACT(x, *own, *other, True, False, forced_backend())[0]
        return z


class FrozenTransposed(Layer):
    """The 2x2 transposed convolution with stride 2 on the way up.

    Args:
        up: its weight and bias are copied.
        dtype: of the copies.
    """

    def __init__(self, up: nn.ConvTranspose2d, dtype: torch.dtype) -> None:
        bias = None if up.bias is None else _copy(up.bias, dtype)
        super().__init__({"weight": _copy(up.weight, dtype), "bias": bias})

    def forward(self, low: Tensor, output_size: torch.Size | None = None) -> Tensor:
        """Double height and width; `output_size` may ask for one row or column more."""
        h, w = low.shape[2:]
        extra = [0, 0] if output_size is None else [output_size[0] - 2 * h, output_size[1] - 2 * w]
        return F.conv_transpose2d(low, self._weight, self._bias, 2, 0, extra)

    def reservations(self) -> list[str]:
        """Say why nothing is gained here."""
        return ["ATen's transposed convolution: it has no batch norm to fold and is not packed"]


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True)


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    layout = torch.channels_last if value.dim() == 4 else torch.contiguous_format
    return value.to(tensor.dtype, copy=True).contiguous(memory_format=layout)
