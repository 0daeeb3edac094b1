"""The networks that have a name: what each one is, where it comes from, how it is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import signature
from typing import Any, TypeVar

from .wiring import Wiring

__all__ = ["CATALOGUE", "Entry", "build", "list_models"]

Network = TypeVar("Network", bound=Wiring)


@dataclass(frozen=True)
class Entry:
    """One named network.

    Args:
        summary: one sentence.
        source: where it was described.
        arguments: those of :class:`Wiring` that differ from its defaults.
    """

    summary: str
    source: str
    arguments: Mapping[str, Any]


_ARTICLE = "the article that the project starts from, see docs/model.md"

CATALOGUE: Mapping[str, Entry] = {
    "resunet": Entry(
        summary="The article's listing, repaired: double convolutions, a residual unit behind each "
        "one on the way up, bilinear upsampling.",
        source=_ARTICLE,
        arguments={},
    ),
    "resunet_prose": Entry(
        summary="The article's prose: residual units on the way down, transposed convolutions and "
        "double convolutions on the way up.",
        source=_ARTICLE,
        arguments={"encoder": "residual", "upsample": "transpose", "decoder_residual": False},
    ),
    "deep_resunet": Entry(
        summary="Deep Residual U-Net: pre-activation residual units on both ways, strided "
        "convolutions, four levels.",
        source="Zhang, Liu, Wang 2018, Road Extraction by Deep Residual U-Net, arXiv:1711.10684",
        arguments={
            "width_factors": (1, 2, 4, 8),
            "encoder": "residual",
            "order": "pre",
            "downsample": "stride",
        },
    ),
    "unet": Entry(
        summary="U-Net with batch norm and padded convolutions, bilinear upsampling, no residuals.",
        source="Ronneberger, Fischer, Brox 2015, U-Net, arXiv:1505.04597",
        arguments={"decoder_residual": False},
    ),
    "unet_transpose": Entry(
        summary="U-Net with batch norm and padded convolutions, transposed convolutions, no "
        "residuals.",
        source="Ronneberger, Fischer, Brox 2015, U-Net, arXiv:1505.04597",
        arguments={"upsample": "transpose", "decoder_residual": False},
    ),
}


def list_models() -> list[str]:
    """Return the names that `create_model` knows."""
    return list(CATALOGUE)


def build(
    network: type[Network], name: str, in_channels: int, num_classes: int, **overrides: Any
) -> Network:
    """Return a new network of the given class, as its name and the overrides say.

    Args:
        network: the class, which settles the blocks.
        name: one of :func:`list_models`.
        in_channels, num_classes: channels of the image and of the logits.
        overrides: keywords of :class:`Wiring` or of `network`; they win over the catalogue's.

    Raises:
        ValueError: an unknown name, or a value that `network` refuses.
        TypeError: an unknown keyword.
    """
    if name not in CATALOGUE:
        raise ValueError(f"name: {_unknown(name, CATALOGUE)}")
    keywords = list(dict.fromkeys([*_keywords(Wiring), *_keywords(network)]))
    for keyword in overrides:
        if keyword not in keywords:
            raise TypeError(f"create_model: {_unknown(keyword, keywords)}")
    return network(in_channels, num_classes, **{**CATALOGUE[name].arguments, **overrides})


def _keywords(network: type[Wiring]) -> list[str]:
    parameters = signature(network).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _unknown(given: str, known: Mapping[str, Any] | list[str]) -> str:
    close = get_close_matches(str(given), known, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"expected one of {list(known)}, got {given!r}{hint}"
