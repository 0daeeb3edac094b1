"""The frozen network: the wiring of all others around frozen blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..models.wiring import CHOICES, PLAIN_STAGES, Stages, Wiring
from .blocks import up
from .build import check_dtype, freeze_block, freeze_conv
from .errors import LayerErrors, layer_errors
from .graphs import GraphCache, cuda_capture
from .layers import FrozenTransposed, Layer
from .sealed import HOLDS_NAN, FrozenError, Sealed, SealedList, seal, symbolic


class FrozenResUNet(Sealed, Wiring):
    """An immutable inference copy of a network, as :func:`resunet_fast.freeze` makes it.

    It has the network's wiring and none of its state-dict keys. `state_dict()` gives copies of the
    folded tensors; deepcopy and pickle work, `resunet_fast.checkpoint` saves and loads it.

    Args:
        model: a network of this package that nothing stands against.
        dtype: of the folded tensors and of everything that flows between them.
    """

    device: torch.device
    _finite: bool
    _graphs: GraphCache | None
    stages: ClassVar[Stages] = replace(PLAIN_STAGES, up=up)

    def __init__(self, model: Wiring, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        check_dtype(dtype, model.outc.weight.device)
        for name in ("in_channels", "num_classes", *CHOICES):
            setattr(self, name, getattr(model, name))
        self.dtype = dtype
        self.encoder_layers = self._frozen("encoder_layers", model.encoder_layers)
        self.bottleneck = freeze_block("bottleneck", model.bottleneck, dtype)
        self.ups = SealedList(FrozenTransposed(_transposed(layer), dtype) for layer in model.ups)
        self.decoder_layers = self._frozen("decoder_layers", model.decoder_layers)
        self.res_blocks = self._frozen("res_blocks", model.res_blocks)
        self.outc = freeze_conv("", model, "outc", "", dtype, relu=False)  # type: ignore[assignment]
        seal(self)
        self._settle()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits.

        Args:
            x: [N, in_channels, H, W] on the model's device, floating point; it is rounded to the
                model's dtype. Sizes may differ from call to call.

        Returns:
            [N, num_classes, H, W] in the model's dtype and the layout of `x`, without a gradient.

        Raises:
            ValueError: `x` has a wrong shape, dtype or device.
            FrozenError: a derivative is asked for.
        """
        self._check_input(x)
        with torch.no_grad():
            if self._graphs is None or not self._captures(x):
                return self.run(x)
            return self._graphs(self.run, x)

    def run(self, x: Tensor) -> Tensor:
        """Compute the logits of a checked input, layer by layer."""
        if symbolic(x) or not self._may_hold_nan(x):
            return self._compute(x)
        token = HOLDS_NAN.set(True)
        try:
            return self._compute(x)
        finally:
            HOLDS_NAN.reset(token)

    def report(self, model: Wiring, x: Tensor) -> LayerErrors:
        """Compare every folded layer with the layers it stands for, in float64, on its own input.

        Args:
            model: the one that this was frozen from, unchanged since.
            x: an input of the network.

        Returns:
            The relative error (of the norm) of every layer by the name of its convolution.
        """
        self._check_input(x)
        return layer_errors(self, model, x)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take the tensors of a saved network of the same structure: how it is loaded.

        Raises:
            ValueError: their device does not take the model's dtype.
        """
        device = next(iter(state.values())).device
        check_dtype(self.dtype, device)
        for name, module in self.named_modules():
            if isinstance(module, Layer):
                module.fill(state, f"{name}." if name else "")
        self._settle()

    def extra_repr(self) -> str:
        """Return the network's choices and the frozen dtype."""
        return f"{super().extra_repr()}, dtype={self.dtype}, device={self.device}"

    def _captures(self, x: Tensor) -> bool:
        if symbolic(x) or torch.cuda.is_current_stream_capturing():
            return False
        # A twin with stages of its own computes something else than the graphs it shares.
        return "stages" not in self.__dict__

    def _compute(self, x: Tensor) -> Tensor:
        contiguous = x.is_contiguous()
        x = x.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(x.device.type, enabled=False):
            logits = Wiring.forward(self, x)
        return logits.contiguous() if contiguous else logits

    def _may_hold_nan(self, x: Tensor) -> bool:
        # Not asked on a GPU, which would have to be waited for.
        return x.device.type == "cpu" and not (self._finite and bool(x.isfinite().all()))

    def _settle(self) -> None:
        """Derive what depends on the tensors and is not saved with them."""
        layers = (module for module in self.modules() if isinstance(module, Layer))
        tensors = [tensor for layer in layers for _, tensor in layer.tensors()]
        self.__dict__["device"] = tensors[0].device
        on_cpu = self.device.type == "cpu"
        self.__dict__["_finite"] = on_cpu and all(bool(t.isfinite().all()) for t in tensors)
        cache = GraphCache(cuda_capture) if self.device.type == "cuda" else None
        self.__dict__["_graphs"] = cache

    def _frozen(self, name: str, blocks: nn.ModuleList) -> SealedList:
        parts: Iterable[nn.Module] = (
            freeze_block(f"{name}.{i}", block, self.dtype) for i, block in enumerate(blocks)
        )
        return SealedList(parts)

    def _check_input(self, x: Tensor) -> None:
        super()._check_input(x)
        if not x.is_floating_point():
            raise ValueError(f"x: expected a floating-point tensor, got {x.dtype}")
        if x.device != self.device:
            raise ValueError(f"x: expected a tensor on {self.device}, got one on {x.device}")
        if torch._C._are_functorch_transforms_active():
            raise FrozenError(
                "torch.func does not see through a frozen model: transform the model that it was"
                " frozen from"
            )
        if (torch.is_grad_enabled() and x.requires_grad) or _has_tangent(x):
            raise FrozenError(
                "a frozen model has no derivative: pass x.detach(), call it under torch.no_grad(),"
                " or use the model that it was frozen from"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_graphs"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._settle()


def _transposed(layer: nn.Module) -> nn.ConvTranspose2d:
    assert isinstance(layer, nn.ConvTranspose2d)
    return layer


def _has_tangent(x: Tensor) -> bool:
    if torch.autograd.forward_ad._current_level < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(x).tangent is not None
