"""Which images a command line names, and where the results of each go."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path

from .images import SUFFIXES, ImageError

# What can be written for an image, and how its file's name ends.
ENDINGS = {
    "mask": "_mask.png",
    "overlay": "_overlay.png",
    "probability": "_probability.npy",
    "probability-png": "_probability.png",
}


class NamingError(ValueError):
    """Results that have no safe place; the message is one sentence that says why."""


@dataclass(frozen=True)
class Job:
    """One image of the command line and where each of its results goes."""

    source: Path
    results: dict[str, Path]


def expand(argument: str) -> list[Path]:
    """Return the files that an argument stands for; one that is named need not exist.

    Args:
        argument: a file; a folder, searched for :data:`resunet_fast.images.SUFFIXES` but not in its
            subfolders; or a pattern, in which `**` stands for any number of folders.

    Raises:
        ImageError: the folder has none, or nothing matches.
    """
    path = Path(argument)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file()]
        if not files:
            raise ImageError(f"{path} is a folder without images ({', '.join(SUFFIXES)})")
    elif not path.exists() and has_magic(argument):
        # Path.glob takes no absolute patterns.
        files = [p for p in map(Path, glob(argument, recursive=True)) if p.is_file()]  # noqa: PTH207
        if not files:
            raise ImageError(f"{argument} matches no file")
    else:
        files = [path]
    return sorted(files)


def distinct(paths: Iterable[Path]) -> list[Path]:
    """Return the paths without those that lead to a file that came before."""
    return list({path.resolve(): path for path in reversed(list(paths))}.values())[::-1]


def plan(sources: Sequence[Path], out: Path, kinds: Collection[str]) -> list[Job]:
    """Name all results; refuse before any work what would overwrite an input or another result.

    In a directory the results lie as the sources lie below their common folder.

    Args:
        sources: files, existing or not.
        out: a directory, or for one image the mask's file, ending in .png.
        kinds: what is written, of :data:`ENDINGS`.

    Raises:
        NamingError: two results, or a result and a source, would be the same file.
    """
    if out.suffix.lower() == ".png" and not out.is_dir():
        if len(sources) > 1:
            raise NamingError(
                f"--out {out} names one file, but {len(sources)} images were given: "
                "name a directory"
            )
        names = {kind: out.with_name(out.stem + ENDINGS[kind]) for kind in kinds}
        jobs = [Job(sources[0], names | ({"mask": out} if "mask" in kinds else {}))]
    else:
        jobs = _jobs_in_directory(sources, out, kinds)
    _refuse_collisions(jobs)
    return jobs


def _jobs_in_directory(sources: Sequence[Path], out: Path, kinds: Collection[str]) -> list[Job]:
    folders = [source.resolve().parent for source in sources]
    root = os.path.commonpath(folders) if folders else ""
    return [
        Job(
            source,
            {
                kind: out / folder.relative_to(root) / (source.stem + ENDINGS[kind])
                for kind in kinds
            },
        )
        for source, folder in zip(sources, folders, strict=True)
    ]


def _refuse_collisions(jobs: Sequence[Job]) -> None:
    inputs = {job.source.resolve() for job in jobs}
    taken: set[Path] = set()
    for target in (path.resolve() for job in jobs for path in job.results.values()):
        if target in taken:
            raise NamingError(f"two of the images would both be written to {target.name}")
        if target in inputs:
            raise NamingError(f"the result {target.name} would overwrite an input image")
        taken.add(target)
