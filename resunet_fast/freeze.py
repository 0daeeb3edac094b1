"""freeze(model): an immutable inference copy with batch norms folded and weights prepacked."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .frozen.build import block_refusals, layer_refusals
from .frozen.errors import relative_error
from .frozen.network import FrozenResUNet
from .frozen.sealed import FrozenError
from .models.fast import FUSED_STAGES, _Fast
from .models.wiring import PLAIN_STAGES, Wiring
from .modules.fused import hooked

__all__ = ["freeze", "refusals"]

# Largest relative error (of the norm) that `verify` accepts from dtypes whose own error is below.
_EXACT = {torch.float64: 1e-12, torch.float32: 1e-5}


def freeze(
    model: nn.Module, dtype: torch.dtype | None = None, *, verify: Tensor | None = None
) -> FrozenResUNet:
    """Return an immutable inference copy of a network: its evaluation mode, faster.

    Batch norms are folded into the convolutions before them (in float64, rounded once), weights are
    laid out for the backend, bias, ReLU and residual sum happen inside the convolutions. The model
    itself is neither changed nor kept: edit it and freeze it again.

    Args:
        model: a network of this package, fast or plain, in either mode.
        dtype: torch.float64, float32, bfloat16 or float16 (not on a CPU); None keeps the model's.
        verify: an input; the frozen result is compared with the model's before it is returned.

    Returns:
        A module with `forward(x)` alone; see :class:`resunet_fast.frozen.FrozenResUNet`.

    Raises:
        ValueError: the model cannot be frozen, for the reasons named, or not in that dtype.
        FrozenError: `verify` found the result off by more than 1e-5 in float32, 1e-12 in float64,
            or twice the model's own error in that dtype.
    """
    reasons = refusals(model)
    if reasons:
        raise ValueError("model: it cannot be frozen: " + "; ".join(reasons))
    assert isinstance(model, Wiring)
    frozen = FrozenResUNet(model, model.outc.weight.dtype if dtype is None else dtype)
    if verify is not None:
        _verify(frozen, model, verify)
    return frozen


def refusals(model: nn.Module) -> list[str]:
    """Say why a model cannot be frozen (empty: it can)."""
    if isinstance(model, FrozenResUNet):
        return ["it is frozen already"]
    if not isinstance(model, Wiring):
        return [f"it is a {type(model).__name__}, not a network of this package"]
    reasons = ["it has hooks or a forward of its own"] if hooked(model) else []
    own = type(model)
    if own.forward not in (Wiring.forward, _Fast.forward) or own.stages not in (
        PLAIN_STAGES,
        FUSED_STAGES,
    ):
        reasons.append(f"its class {own.__name__} changes the network's forward")
    for name in ("encoder_layers", "decoder_layers", "res_blocks"):
        for i, block in enumerate(getattr(model, name)):
            reasons += block_refusals(f"{name}.{i}", block)
    reasons += block_refusals("bottleneck", model.bottleneck)
    for i, up in enumerate(model.ups):
        reasons += layer_refusals(f"ups.{i}", up, nn.ConvTranspose2d)
    return reasons + layer_refusals("outc", model.outc, nn.Conv2d)


def _verify(frozen: FrozenResUNet, model: Wiring, x: Tensor) -> None:
    """Raise FrozenError unless the frozen result is as close to float64 as it must be."""
    twin = copy.deepcopy(model).eval()
    own = twin.outc.weight.dtype
    half = frozen.dtype in (torch.bfloat16, torch.float16)
    autocast = torch.autocast(x.device.type, frozen.dtype if half else None, enabled=half)
    with torch.no_grad():
        with autocast:
            peer = twin(x.to(own))
        judge = twin.double()(x.double())
        error = relative_error(frozen(x), judge)
    peers = relative_error(peer, judge)
    allowed = max(2 * peers, _EXACT.get(frozen.dtype, 0.0))
    if not error <= allowed:
        raise FrozenError(
            f"verify: the frozen model in {frozen.dtype} is off by {error:.3g} of the result's"
            f" norm, the model itself by {peers:.3g}; allowed are {allowed:.3g}"
        )
