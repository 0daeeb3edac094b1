"""The `demo` command: train the fast and the reference model side by side and compare them."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resunet_fast import environment, reference
from resunet_fast.checkpoint import (
    ModelConfig,
    Normalisation,
    SavedModel,
    save,
    write_atomically,
)
from resunet_fast.cli import OneLineParser
from resunet_fast.demo.dataset import (
    CROP,
    Batch,
    Mask,
    Scene,
    Split,
    load_splits,
    pixel_statistics,
    scenes,
    to_batch,
)
from resunet_fast.demo.measure import (
    Quality,
    agreement,
    compare_times,
    inference_times,
    logits_of,
    process_peak_bytes,
    quality,
    training_bytes,
)
from resunet_fast.demo.report import Results, figure, table
from resunet_fast.demo.training import LEARNING_RATE, Contestant, enter, train
from resunet_fast.demo.verdict import agreement_complaints, curve_complaints, quality_complaints
from resunet_fast.images import to_png
from resunet_fast.segmentation import SegmentationError, pick_device

MODEL = "resunet"
EXAMPLES = 4
EXAMPLE_SIZE = (256, 256)


@dataclass(frozen=True)
class Settings:
    """What one run is made of.

    Attributes:
        steps: optimisation steps of each model.
        seed: of weights, training pictures and held-out pictures.
        device: "cpu" or "cuda".
        base_width: of both networks.
        width_factors: of both networks.
        batch_size: pictures per training step and per timed inference.
        held_out: number of held-out pictures.
        inference_rounds: timed forward passes of each model.
        judge_quality: whether a poor held-out result counts as a failure.
    """

    steps: int = 280
    seed: int = 0
    device: str = "cpu"
    base_width: int = 16
    width_factors: tuple[int, ...] = (1, 2, 4, 8)
    batch_size: int = 8
    held_out: int = 70
    inference_rounds: int = 20
    judge_quality: bool = True


# Enough to walk through every line in seconds; far too little to learn the task.
QUICK = Settings(
    steps=4, base_width=4, batch_size=2, held_out=6, inference_rounds=3, judge_quality=False
)


def build_models(settings: Settings, normalisation: Normalisation) -> tuple[SavedModel, SavedModel]:
    """Build the fast and the reference network with equal weights on the run's device."""
    config = ModelConfig(
        name=MODEL,
        in_channels=3,
        num_classes=1,
        arguments={"base_width": settings.base_width, "width_factors": settings.width_factors},
        normalisation=normalisation,
        training={
            "data": "handwritten digits composited onto photographs",
            "optimizer": "AdamW",
            "learning_rate": LEARNING_RATE,
            **asdict(settings),
        },
    )
    torch.manual_seed(settings.seed)
    plain = reference.create_model(
        config.name,
        in_channels=config.in_channels,
        num_classes=config.num_classes,
        **config.arguments,
    )
    fast = config.build()
    fast.load_state_dict(copy.deepcopy(plain.state_dict()))
    device = torch.device(settings.device)
    return SavedModel(fast.to(device), config), SavedModel(plain.to(device), config)


@dataclass
class Run:
    """The demo's data and both contestants."""

    settings: Settings
    training: Split
    held_out: Split
    fast: Contestant
    plain: Contestant
    config: ModelConfig

    @classmethod
    def prepare(cls, settings: Settings) -> Run:
        """Load the data and build both models."""
        training, held_out = load_splits()
        normalisation = Normalisation(*pixel_statistics(training))
        fast, plain = build_models(settings, normalisation)
        contestants = enter("fast", fast.network), enter("reference", plain.network)
        return cls(settings, training, held_out, *contestants, fast.config)

    def rng(self, stream: int) -> np.random.Generator:
        """An independent source of random numbers for each purpose."""
        return np.random.default_rng([self.settings.seed, stream])

    def feed(self, batch: Batch) -> Batch:
        """Normalise images and move a batch to the run's device."""
        images = self.config.normalisation(batch.images)
        return Batch(images.to(self.settings.device), batch.masks.to(self.settings.device))

    def training_batches(self) -> Callable[[], Batch]:
        """A function that composes the next training batch."""
        rng, size = self.rng(1), self.settings.batch_size
        return lambda: self.feed(to_batch(scenes(self.training, rng, size)))

    def held_out_scenes(self) -> list[Scene]:
        """The pictures that both models are judged on."""
        return scenes(self.held_out, self.rng(2), self.settings.held_out)

    def examples(self) -> list[Scene]:
        """Larger held-out pictures of various sizes, for `predict`."""
        return scenes(self.held_out, self.rng(3), EXAMPLES, EXAMPLE_SIZE)


def measure(run: Run, batch: Batch, predicted: Sequence[Tensor]) -> Results:
    """Collect the results of a finished training.

    Args:
        run: after `train`.
        batch: the held-out pictures, normalised, on the run's device.
        predicted: the masks [N, 1, H, W] that (fast, reference) predict for them.
    """
    settings, fast, plain = run.settings, run.fast, run.plain
    part = Batch(*(tensor[: settings.batch_size] for tensor in batch))
    # The first steps also allocate memory and choose algorithms.
    skip = min(5, settings.steps // 2)
    qualities = [quality(masks, batch.masks) for masks in predicted]
    kept = [training_bytes(contestant.network, part) for contestant in (fast, plain)]
    on_cuda = settings.device == "cuda"
    return Results(
        description=_description(run),
        machine=_machine(),
        losses=(fast.losses, plain.losses),
        quality=(qualities[0], qualities[1]),
        agreement=agreement(fast.network, plain.network, batch.images, part),
        training=compare_times(fast.seconds[skip:], plain.seconds[skip:]),
        inference=inference_times(fast, plain, part.images, settings.inference_rounds),
        training_bytes=(kept[0], kept[1]),
        training_bytes_meaning="peak memory of a step" if on_cuda else "kept for backward",
        process_bytes=process_peak_bytes(),
    )


def _description(run: Run) -> tuple[str, ...]:
    settings = run.settings
    parameters = sum(parameter.numel() for parameter in run.fast.network.parameters())
    return (
        "task: find handwritten digits composited onto photographs (binary masks); "
        f"{settings.held_out} held-out pictures of {CROP} x {CROP}",
        f"model: {MODEL}, base_width {settings.base_width}, width_factors "
        f"{settings.width_factors}, {parameters:,} parameters",
        f"run: {settings.steps} steps of {settings.batch_size} pictures, seed {settings.seed}, "
        "float32; both models from equal weights, same batches, in turn",
    )


def _machine() -> str:
    facts = environment.machine()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"machine: {gpu}{facts['cpu']}, torch {facts['torch']}, {facts['threads']} threads"


def write(run: Run, results: Results, out: Path, shown: Sequence[tuple[Mask, Mask]]) -> list[Path]:
    """Write model, metrics, report and examples.

    Args:
        run: after training.
        results: what `measure` returned.
        out: directory, created if need be.
        shown: masks that (fast, reference) predict for the first held-out pictures.

    Returns:
        The example pictures' paths.
    """
    examples = out / "examples"
    examples.mkdir(parents=True, exist_ok=True)
    save(out / "model", run.fast.network, run.config)
    write_atomically(out / "metrics.json", _metrics(run, results))
    pictures = run.held_out_scenes()[: len(shown)]
    write_atomically(out / "report.png", figure(results, pictures, shown))
    paths = []
    for number, scene in enumerate(run.examples(), start=1):
        path = examples / f"{number}_{scene.photograph}.png"
        write_atomically(path, to_png(Image.fromarray(scene.image)))
        paths.append(path)
    return paths


def _metrics(run: Run, results: Results) -> bytes:
    document = {
        "settings": asdict(run.settings),
        "machine": environment.machine(),
        "agreement_at_equal_weights": asdict(results.agreement),
        "largest_loss_difference": float(results.differences.max()),
        **{
            key: dict(zip(("fast", "reference"), map(_plain, pair), strict=True))
            for key, pair in (
                ("quality", results.quality),
                ("losses", results.losses),
                ("training_bytes", results.training_bytes),
            )
        },
        **{
            f"{key}_seconds": {
                "fast": asdict(timing.first),
                "reference": asdict(timing.second),
                "speed_ratio": asdict(timing.ratio),
            }
            for key, timing in (("training", results.training), ("inference", results.inference))
        },
        "training_bytes_meaning": results.training_bytes_meaning,
        "process_peak_bytes": results.process_bytes,
    }
    return (json.dumps(document, indent=2) + "\n").encode()


def _plain(value: object) -> object:
    return asdict(value) if isinstance(value, Quality) else value


def run_demo(settings: Settings, out: Path) -> int:
    """Train, measure, write and judge.

    Args:
        settings: what to run.
        out: directory of the results, created if need be.

    Returns:
        0, or 1 when the result is poor or the two models drift apart.
    """
    run = Run.prepare(settings)
    train([run.fast, run.plain], run.training_batches(), settings.steps)
    batch = run.feed(to_batch(run.held_out_scenes()))
    networks = run.fast.network, run.plain.network
    predicted = [logits_of(network, batch.images) > 0 for network in networks]
    results = measure(run, batch, predicted)
    fast, plain = (masks[:EXAMPLES, 0].cpu().numpy() for masks in predicted)
    paths = write(run, results, out, list(zip(fast, plain, strict=True)))
    print(table(results))
    print(f"\nwritten: {out}/report.png, metrics.json, model/, examples/")
    complaints = curve_complaints(*results.losses)
    complaints += agreement_complaints(results.agreement, settings.device)
    if settings.judge_quality:
        complaints += quality_complaints(*results.quality)
    for complaint in complaints:
        print(f"demo: {complaint}", file=sys.stderr)
    images = " ".join(str(path) for path in paths)
    print(f"try: python -m resunet_fast predict --model {out / 'model'} {images}")
    return 1 if complaints else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m resunet_fast demo",
        description="Train the fast and the plain model side by side on handwritten digits "
        "composited onto photographs (nothing is downloaded), compare them and write a report.",
        epilog="Exit code: 0; 1 when the held-out result is poor or the models drift apart.",
    )
    parser.add_argument("--steps", type=_positive, help="optimisation steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="(%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny model, quality not judged"
    )
    return parser


def main(argv: list[str]) -> int:
    """Run the `demo` command.

    Args:
        argv: the arguments after `demo`.

    Returns:
        0; 1 when the result is poor; 2 when it could not run.
    """
    options = _parser().parse_args(argv)
    settings = QUICK if options.quick else Settings()
    try:
        device = pick_device(options.device).type
        # Before minutes of training, not after.
        options.out.mkdir(parents=True, exist_ok=True)
    except SegmentationError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"demo: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    settings = replace(
        settings, seed=options.seed, device=device, steps=options.steps or settings.steps
    )
    return run_demo(settings, options.out)
