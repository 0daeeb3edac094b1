"""Segment photographs with a saved model: `python -m resunet_fast predict`."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .checkpoint import CheckpointError, SavedModel, load, write_atomically
from .cli import OneLineParser
from .images import ImageError, to_png
from .segmentation import (
    DTYPES,
    Segmentation,
    SegmentationError,
    Settings,
    announcement,
    for_inference,
    pick_device,
    segment,
)
from .sources import ENDINGS, Job, NamingError, distinct, expand, plan


def _kinds(text: str) -> list[str]:
    kinds = text.split(",")
    for kind in kinds:
        if kind not in ENDINGS:
            raise argparse.ArgumentTypeError(f"expected some of {list(ENDINGS)}, got {kind!r}")
    return list(dict.fromkeys(kinds))


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m resunet_fast predict",
        description="Segment images with a saved model; writes NAME_mask.png (0 or 255) and "
        "NAME_overlay.png for each, and more with --save.",
        epilog="PNG, JPEG, TIFF and .npy of any size. An image that cannot be used is reported in "
        "one line and the others are still done. Exit code: 0, 1 when some images could not be "
        "used, 2 when none could, or for wrong use.",
    )
    parser.add_argument(
        "images", nargs="+", metavar="image", help="file, folder, or pattern such as 'a/**/*.png'"
    )
    parser.add_argument("--model", required=True, type=Path, help="directory that demo wrote")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/predict"),
        help="directory, or for one image the mask's file name ending in .png (%(default)s)",
    )
    parser.add_argument(
        "--save",
        type=_kinds,
        default=["mask", "overlay"],
        metavar="KINDS",
        help=f"what to write, separated by commas, of {', '.join(ENDINGS)} (mask,overlay)",
    )
    _add_settings(parser)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="(%(default)s)")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.5,
        help="probability from which a pixel is foreground (%(default)s)",
    )
    parser.add_argument(
        "--tile",
        type=int,
        help="height and width of the tiles in pixels (512; small images are done whole)",
    )
    parser.add_argument(
        "--overlap", type=int, help="pixels that neighbouring tiles share (a quarter of a tile)"
    )
    parser.add_argument("--batch", type=int, default=1, help="tiles at a time (%(default)s)")


def main(argv: list[str]) -> int:
    """Run the `predict` command.

    Args:
        argv: the arguments after `predict`.

    Returns:
        0; 1 when some of the images could not be used; 2 when none could, or the model or an
        argument could not.
    """
    options = _parser().parse_args(argv)
    names = ("threshold", "tile", "overlap", "batch", "dtype")
    settings = Settings(**{name: getattr(options, name) for name in names})
    sources, failures = _collect(options.images)
    if not sources:
        return 2
    try:
        jobs = plan(sources, options.out, options.save)
        model = load(options.model, pick_device(options.device))
    except (CheckpointError, SegmentationError, NamingError) as error:
        return _complain(error)
    try:
        settings.check(model.network)
    except SegmentationError as error:
        return _complain(f"--{error}")
    model, reasons = for_inference(model, settings.dtype)
    if reasons:
        _complain(announcement(reasons))
    try:
        done = _run(jobs, model, settings)
    except OSError as error:
        return _complain(f"cannot write to {options.out}: {error.strerror or error}")
    if not done:
        return 2
    return 1 if failures or done < len(jobs) else 0


def _collect(arguments: Sequence[str]) -> tuple[list[Path], int]:
    """Every file that the arguments stand for, and how many arguments stand for none."""
    files: list[Path] = []
    failures = 0
    for argument in arguments:
        try:
            files += expand(argument)
        except (ImageError, OSError) as error:
            failures += 1
            _complain(error)
    return distinct(files), failures


def _run(jobs: Sequence[Job], model: SavedModel, settings: Settings) -> int:
    """Segment and write one image after the other; return how many could be used."""
    done, pixels, start = 0, 0, time.perf_counter()
    with tqdm(total=len(jobs), desc="predict", unit="image", disable=None) as bar:
        for job in jobs:
            try:
                result = _segment(job.source, model, settings, bar.set_postfix_str)
            except (ImageError, SegmentationError) as error:
                with tqdm.external_write_mode(sys.stderr):
                    _complain(error)
            else:
                _write(job, result)
                done, pixels = done + 1, pixels + result.probability.size
                with tqdm.external_write_mode():
                    print(_line(job, result), flush=True)
            bar.update()
            bar.set_postfix_str(f"{pixels / 1e6 / (time.perf_counter() - start):.2f} Mpx/s")
    return done


def _segment(
    source: Path, model: SavedModel, settings: Settings, show: Callable[[str], object]
) -> Segmentation:
    def on_progress(share: float) -> None:
        show(f"{source.name} {share:.0%}")

    try:
        return segment(model, source, on_progress=on_progress, **vars(settings))
    except (ImageError, SegmentationError) as error:
        if str(error).startswith(str(source)):
            raise
        raise SegmentationError(f"{source}: {error}") from error
    except MemoryError as error:
        raise SegmentationError(f"{source}: there is not enough memory for it") from error


def _line(job: Job, result: Segmentation) -> str:
    height, width = result.probability.shape
    speed = height * width / 1e6 / max(result.seconds, 1e-9)
    return (
        f"{job.source}: {width} x {height} pixels, foreground {result.foreground_share:.1%}, "
        f"{result.seconds * 1e3:.0f} ms ({speed:.2f} Mpx/s) -> "
        f"{', '.join(map(str, job.results.values()))}"
    )


def _write(job: Job, result: Segmentation) -> None:
    encode: dict[str, Callable[[], bytes]] = {
        "mask": lambda: to_png(result.mask_image()),
        "overlay": lambda: to_png(result.overlay_image()),
        "probability": lambda: _npy(result.probability),
        "probability-png": lambda: to_png(result.probability_image()),
    }
    for kind, path in job.results.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, encode[kind]())


def _npy(array: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _complain(problem: object) -> int:
    print(f"predict: {problem}", file=sys.stderr)
    return 2
