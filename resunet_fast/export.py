"""Networks for other programs: torch.export and ONNX, in standard operators only.

`python -m resunet_fast export --model DIR --format onnx --out FILE`; in Python `rf.export.program`,
`rf.export.to_onnx` and `rf.export.to_torch`. Whoever loads the file needs no part of this package.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .cli import OneLineParser
from .freeze import freeze
from .frozen import FrozenResUNet
from .frozen.errors import relative_error
from .registry import OPERATORS, Operator
from .sentences import first_line

__all__ = ["ExportError", "check_onnx", "program", "to_onnx", "to_torch"]

_EXTRA = 'pip install "resunet_fast[export]"'
# Frozen networks in float32 are within 1e-5 of the model; another runtime may be as far again.
_TOLERANCE = 2e-5


class ExportError(ValueError):
    """A network that cannot be exported; the message is one sentence that says why."""


def program(
    model: nn.Module, size: tuple[int, int] = (256, 256), *, dynamic: bool = False
) -> torch.export.ExportedProgram:
    """Trace a network by torch.export and replace this package's operators by standard ones.

    Args:
        model: a network of this package, plain, fast or frozen; it is traced in evaluation mode. A
            frozen one is the smaller program: its batch norms are folded.
        size: height and width of the images.
        dynamic: leave height and width open, above the smallest that the network takes.

    Returns:
        The program; `.module()` gives a callable for images [1, in_channels, H, W].

    Raises:
        ExportError: `size` is below what the network takes, or the network cannot be traced.
    """
    image = _example(model, size)
    shapes = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO} if dynamic else None
    try:
        with _evaluation(model), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            exported = torch.export.export(model, (image,), dynamic_shapes=(shapes,))
            decomposed: torch.export.ExportedProgram = exported.run_decompositions(_references())
            return decomposed
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"the network cannot be traced: {first_line(error)}") from error


def to_torch(
    model: nn.Module, path: str | Path, size: tuple[int, int] = (256, 256), *, dynamic: bool = False
) -> None:
    """Write :func:`program` to a file for `torch.export.load`; arguments as there.

    Raises:
        ExportError: the network cannot be exported.
        OSError: the file cannot be written; nothing is left behind.
    """
    _write(path, _torch(model, size, dynamic))


def to_onnx(
    model: nn.Module, path: str | Path, size: tuple[int, int] = (256, 256), *, dynamic: bool = False
) -> None:
    """Write :func:`program` to an ONNX file with input `image` and output `logits`.

    Raises:
        ExportError: the network cannot be exported, is not float32, or `onnx` or `onnxscript` is
            not installed.
        OSError: the file cannot be written; nothing is left behind.
    """
    _write(path, _onnx(model, size, dynamic))


def check_onnx(model: nn.Module, path: str | Path, sizes: Sequence[tuple[int, int]]) -> float:
    """Run an ONNX file in ONNX Runtime and compare it with the network it came from.

    Args:
        model: the network; it runs in evaluation mode.
        path: the file that :func:`to_onnx` wrote.
        sizes: heights and widths to try.

    Returns:
        The largest relative error (of the norm) over the sizes.

    Raises:
        ExportError: ONNX Runtime is not installed or refuses the file, or the error is above 2e-5.
    """
    return _difference(model, str(path), str(path), sizes)


def _difference(
    model: nn.Module, source: str | bytes, name: str, sizes: Sequence[tuple[int, int]]
) -> float:
    """As :func:`check_onnx`, of a file or of what one will hold."""
    if find_spec("onnxruntime") is None:
        raise ExportError(f"checking needs the package 'onnxruntime': {_EXTRA}")
    import onnxruntime

    images = [_example(model, size) for size in sizes]
    try:
        session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
        found = [session.run(None, {"image": image.cpu().numpy()})[0] for image in images]
    except Exception as error:  # its exceptions have no other class in common
        raise ExportError(f"ONNX Runtime refuses {name}: {first_line(error)}") from error
    with _evaluation(model):
        expected = [model(image).cpu() for image in images]
    pairs = zip(map(torch.from_numpy, found), expected, strict=True)
    errors = [relative_error(logits, judge) for logits, judge in pairs]
    for off in errors:  # one by one: max() overlooks NaN
        if not off <= _TOLERANCE:
            raise ExportError(
                f"{name} is off by {off:.3g} in ONNX Runtime; allowed are {_TOLERANCE}"
            )
    return max(errors, default=0.0)


def _torch(model: nn.Module, size: tuple[int, int], dynamic: bool) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's own archive, about CPU weights
        torch.export.save(program(model, size, dynamic=dynamic), buffer)
    return buffer.getvalue()


def _onnx(model: nn.Module, size: tuple[int, int], dynamic: bool) -> bytes:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ExportError(f"format onnx needs the package {missing[0]!r}: {_EXTRA}")
    dtype = _example(model, size).dtype
    if dtype != torch.float32:
        raise ExportError(f"format onnx needs a float32 network, got {dtype}")
    exported = program(model, size, dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about itself
        try:
            written = torch.onnx.export(
                exported, dynamo=True, verbose=False, input_names=["image"], output_names=["logits"]
            )
        except torch.onnx.OnnxExporterError as error:
            hint = " with an open height and width; try fixed ones" if dynamic else ""
            raise ExportError(
                f"torch's exporter does not write this network as ONNX{hint}"
            ) from error
    assert written is not None
    content: bytes = written.model_proto.SerializeToString()
    return content


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _example(model: nn.Module, size: tuple[int, int]) -> Tensor:
    """An image of random pixels, always the same ones."""
    if min(size) < 1:
        raise ExportError(f"size: expected two positive numbers, got {tuple(size)}")
    if isinstance(model, FrozenResUNet):
        dtype, device = model.dtype, model.device
    else:
        weight = next(model.parameters())
        dtype, device = weight.dtype, weight.device
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, int(model.in_channels), *size, generator=generator)  # type: ignore[arg-type]
    return pixels.to(device, dtype)


def _write(path: str | Path, data: bytes) -> None:
    # Deferred: it needs safetensors, which importing this package does not.
    from .checkpoint import write_atomically

    write_atomically(Path(path), data)


def _references() -> dict[Any, Callable[..., Any]]:
    """Every operator of this package in ordinary torch operations."""
    return {operator.overload: _reference(operator) for operator in OPERATORS.values()}


def _reference(operator: Operator) -> Callable[..., Any]:
    compute = operator.implementations["reference"].compute
    return lambda *args: compute(*operator.complete(args)[:-1])


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m resunet_fast export",
        description="Write a saved model, frozen, for programs that do not have this package. The "
        "program takes images that are normalised already; the command prints how.",
    )
    parser.add_argument("--model", required=True, type=Path, help="directory of a saved model")
    parser.add_argument("--format", required=True, choices=("onnx", "torch"))
    parser.add_argument("--out", required=True, type=Path, help="file to write")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        default=(256, 256),
        metavar=("H", "W"),
        help="height and width of the images (%(default)s)",
    )
    parser.add_argument("--dynamic", action="store_true", help="leave height and width open")
    return parser


def _run(options: argparse.Namespace) -> str:
    from .checkpoint import load

    saved = load(options.model)
    model = saved.network if isinstance(saved.network, FrozenResUNet) else freeze(saved.network)
    height, width = size = tuple(options.size)
    note = ""
    if options.format == "torch":
        to_torch(model, options.out, size, dynamic=options.dynamic)
    else:
        note = _checked_onnx(model, options.out, size, options.dynamic)
    shape = "H, W" if options.dynamic else f"{height}, {width}"
    normalisation = saved.config.normalisation
    return (
        f"{options.out}: takes [1, {saved.config.in_channels}, {shape}], "
        "(pixels in [0, 1] - mean) / std\n"
        f"  mean {normalisation.mean}, std {normalisation.std}{note}"
    )


def _checked_onnx(model: nn.Module, out: Path, size: tuple[int, int], dynamic: bool) -> str:
    """Write the file once ONNX Runtime agrees; return a line that says so, or why it was not asked.

    A file that fails is not written, and one that lies there already stays.
    """
    content = _onnx(model, size, dynamic)
    if find_spec("onnxruntime") is None:
        note = f"not checked: onnxruntime is not installed ({_EXTRA})"
    else:
        sizes = [size, *([(size[0] + 17, size[1] + 6)] if dynamic else [])]
        try:
            error = _difference(model, content, "the program", sizes)
        except ExportError as problem:
            raise ExportError(f"{out} is not written: {problem}") from problem
        note = f"relative difference in ONNX Runtime: {error:.2g}"
    _write(out, content)
    return f"\n  {note}"


def main(argv: list[str]) -> int:
    """Run the `export` command.

    Args:
        argv: the arguments after `export`.

    Returns:
        0, or 2 when the model could not be used or the file not written.
    """
    options = _parser().parse_args(argv)
    from .checkpoint import CheckpointError

    try:
        print(_run(options))
    except (CheckpointError, ExportError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        problem = error.strerror or error
        print(f"export: cannot write {options.out}: {problem}", file=sys.stderr)
        return 2
    return 0
