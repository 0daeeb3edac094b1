"""Saved models: a directory with `model.safetensors` (weights) and `config.json` (everything else).

Neither file can run code: the weights are plain numbers and the configuration is checked field by
field, so a directory from anywhere is either loaded or refused with a sentence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from resunet_fast import __version__, create_model, freeze
from resunet_fast.arguments import DTYPES
from resunet_fast.frozen import FrozenResUNet
from resunet_fast.sentences import first_line

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
BINARY_SEGMENTATION = "binary_segmentation"
FROZEN_DTYPES = ("", *(str(dtype).removeprefix("torch.") for dtype in DTYPES))

Argument = bool | int | str | tuple[int, ...]


class CheckpointError(ValueError):
    """A saved model that cannot be used; the message is one sentence that says why."""


@dataclass(frozen=True)
class Normalisation:
    """Per-channel affine map of pixel values in [0, 1]: `y = (x - mean) / std`."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: [N, C, H, W], floating point, values in [0, 1], C = len(mean).

        Returns:
            [N, C, H, W], same dtype and device.
        """
        shape = (1, len(self.mean), 1, 1)
        mean = images.new_tensor(self.mean).view(shape)
        return (images - mean) / images.new_tensor(self.std).view(shape)


@dataclass(frozen=True)
class ModelConfig:
    """What must be known beside the weights to rebuild a network and feed it.

    `frozen_dtype` is empty for a network that can be trained, else the dtype that it is frozen in;
    `save` fills it in.
    """

    name: str
    in_channels: int
    num_classes: int
    arguments: Mapping[str, Argument]
    normalisation: Normalisation
    task: str = BINARY_SEGMENTATION
    training: Mapping[str, Any] = field(default_factory=dict)
    frozen_dtype: str = ""

    def build(self) -> nn.Module:
        """Build the network that the configuration describes, with fresh weights."""
        network = create_model(
            self.name,
            in_channels=self.in_channels,
            num_classes=self.num_classes,
            **self.arguments,
        )
        return freeze(network, getattr(torch, self.frozen_dtype)) if self.frozen_dtype else network


@dataclass(frozen=True)
class SavedModel:
    """A network in evaluation mode with its configuration."""

    network: nn.Module
    config: ModelConfig


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part of either.

    Args:
        path: the file; its directory must exist.
        data: the whole content.

    Raises:
        OSError: the directory cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(directory: str | Path, network: nn.Module, config: ModelConfig) -> None:
    """Write a model directory that `load` accepts.

    Args:
        directory: created if it does not exist; files of an earlier model are replaced.
        network: the model whose parameters and buffers are kept, on any device.
        config: the description from which `config.build()` gives this network's class.

    Raises:
        OSError: the directory cannot be written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    frozen = str(network.dtype).removeprefix("torch.") if isinstance(network, FrozenResUNet) else ""
    config = replace(config, frozen_dtype=frozen)
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    text = json.dumps({"library_version": __version__, **asdict(config)}, indent=2)
    write_atomically(directory / WEIGHTS_FILE, to_safetensors(state))
    write_atomically(directory / CONFIG_FILE, (text + "\n").encode())


def load(directory: str | Path, device: torch.device | str = "cpu") -> SavedModel:
    """Read a model directory written by `save`.

    Args:
        directory: holds `model.safetensors` and `config.json`.
        device: where the network is put.

    Returns:
        The network in evaluation mode, with its configuration.

    Raises:
        CheckpointError: a file is missing, damaged, or does not describe a model of this library.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"the model directory {directory} does not exist")
    config = _parse_config(directory / CONFIG_FILE)
    state = _read_weights(directory / WEIGHTS_FILE)
    try:
        # On the meta device a configuration with absurd sizes costs no memory before it is refused.
        with torch.device("meta"):
            skeleton = config.build()
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{directory / CONFIG_FILE} does not describe a model: {first_line(error)}"
        ) from error
    _require_same_state(directory / WEIGHTS_FILE, state, skeleton.state_dict())
    if isinstance(skeleton, FrozenResUNet):
        return SavedModel(_filled(skeleton, state, device), config)
    network = config.build()
    network.load_state_dict(state)
    return SavedModel(network.to(device).eval(), config)


def _filled(
    network: FrozenResUNet, state: Mapping[str, Tensor], device: torch.device | str
) -> FrozenResUNet:
    try:
        network.fill({key: value.to(device) for key, value in state.items()})
    except ValueError as error:
        raise CheckpointError(f"the model is frozen for another device: {error}") from error
    return network


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    data = _read(path)
    try:
        state: dict[str, Tensor] = parse_safetensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file: {first_line(error)}"
        ) from error
    return state


def _require_same_state(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    missing = sorted(expected.keys() - state.keys())
    foreign = sorted(state.keys() - expected.keys())
    if missing or foreign:
        raise CheckpointError(
            f"{path} belongs to another model: {len(missing)} of {len(expected)} tensors are "
            f"missing{_such_as(missing)}, {len(foreign)} are unknown{_such_as(foreign)}"
        )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(
                f"{path} belongs to another model: {key} has shape {list(value.shape)}, "
                f"expected {list(expected[key].shape)}"
            )
        if value.is_floating_point() != expected[key].is_floating_point():
            raise CheckpointError(
                f"{path} belongs to another model: {key} is {value.dtype}, "
                f"expected {expected[key].dtype}"
            )


def _such_as(keys: list[str]) -> str:
    return f" (such as {keys[0]})" if keys else ""


def _parse_config(path: Path) -> ModelConfig:
    data = _read(path)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {first_line(error)}") from error
    reader = _Reader(path, document)
    config = ModelConfig(
        name=reader.text("name"),
        in_channels=reader.positive("in_channels"),
        num_classes=reader.positive("num_classes"),
        arguments=reader.arguments("arguments"),
        normalisation=reader.normalisation("normalisation", "in_channels"),
        task=reader.text("task"),
        training=reader.table("training"),
        frozen_dtype=reader.frozen_dtype("frozen_dtype"),
    )
    if config.task != BINARY_SEGMENTATION or config.num_classes != 1:
        raise CheckpointError(
            f"{path}: expected task {BINARY_SEGMENTATION!r} with num_classes 1, "
            f"got task {config.task!r} with num_classes {config.num_classes}"
        )
    return config


class _Reader:
    """Typed access to the fields of a JSON object; every refusal names the file and the field."""

    def __init__(self, path: Path, document: object) -> None:
        if not isinstance(document, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {type(document).__name__}")
        self.path = path
        self.document = document

    def refuse(self, key: str, expected: str) -> CheckpointError:
        got = f"got {self.document[key]!r:.80}" if key in self.document else "it is missing"
        return CheckpointError(f"{self.path}: field {key!r} must be {expected}, {got}")

    def text(self, key: str) -> str:
        value = self.document.get(key)
        if not isinstance(value, str):
            raise self.refuse(key, "a string")
        return value

    def frozen_dtype(self, key: str) -> str:
        value = self.document.get(key, "")  # directories written before it existed have none
        if value not in FROZEN_DTYPES:
            raise self.refuse(key, f"one of {list(FROZEN_DTYPES)}")
        return str(value)

    def positive(self, key: str) -> int:
        value = self.document.get(key)
        if not _is_integer(value) or value < 1:
            raise self.refuse(key, "a positive integer")
        return value

    def table(self, key: str) -> dict[str, Any]:
        value = self.document.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return value

    def arguments(self, key: str) -> dict[str, Argument]:
        values: dict[str, Argument] = {}
        for name, value in self.table(key).items():
            if isinstance(value, list) and all(_is_integer(item) for item in value):
                values[name] = tuple(value)
            elif isinstance(value, bool | int | str):
                values[name] = value
            else:
                raise self.refuse(key, "an object of booleans, integers, strings and integer lists")
        return values

    def normalisation(self, key: str, channels_key: str) -> Normalisation:
        channels = self.positive(channels_key)
        table = self.table(key)
        mean, std = table.get("mean"), table.get("std")
        if _is_vector(mean, channels) and _is_vector(std, channels) and min(std) > 0:
            return Normalisation(tuple(map(float, mean)), tuple(map(float, std)))
        raise self.refuse(
            key, f"an object with 'mean' and positive 'std', each {channels} finite numbers"
        )


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_vector(value: object, length: int) -> TypeGuard[list[float]]:
    return (
        isinstance(value, list)
        and len(value) == length
        and all(isinstance(item, float) or _is_integer(item) for item in value)
        and all(abs(item) < 1e6 for item in value)
    )
