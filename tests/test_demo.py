"""The demo: what it measures, what it writes, and when it calls its result bad."""

from __future__ import annotations

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import run_python
from networks import one_thread as one_thread
from PIL import Image
from torch import nn

from resunet_fast import checkpoint, cli
from resunet_fast.checkpoint import Normalisation, SavedModel
from resunet_fast.demo import command, measure, training, verdict
from resunet_fast.demo.command import Settings
from resunet_fast.demo.dataset import Batch
from resunet_fast.demo.measure import Agreement, Quality

# Training and measuring


def test_loss_is_zero_for_a_perfect_and_two_for_a_useless_answer() -> None:
    masks = torch.zeros(2, 1, 4, 4)
    masks[:, :, :2] = 1
    perfect = training.segmentation_loss((masks - 0.5) * 200, masks)
    assert perfect.item() == pytest.approx(0, abs=1e-6)
    # At probability 1/2: BCE = log 2, Dice = (2 * 4 + 1) / (8 + 8 + 1).
    undecided = training.segmentation_loss(torch.zeros(2, 1, 4, 4), masks)
    assert undecided.item() == pytest.approx(math.log(2) + 1 - 9 / 17, abs=1e-6)


def test_schedule_warms_up_and_decays() -> None:
    rates = [training.schedule(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates.index(1.0) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert training.schedule(0, 1) == 1.0


def contestant(label: str) -> training.Contestant:
    torch.manual_seed(0)
    return training.enter(label, nn.Sequential(nn.Conv2d(3, 1, 3, padding=1), nn.BatchNorm2d(1)))


def random_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 8, generator=generator)
    return Batch(images, (images[:, :1] > 0.5).float())


def test_training_takes_turns_on_the_same_batches() -> None:
    seen: list[tuple[str, int]] = []
    pair = contestant("a"), contestant("b")
    for one in pair:
        one.network.register_forward_hook(
            lambda module, inputs, output, label=one.label: seen.append((label, id(inputs[0])))
        )
    batches = [random_batch() for _ in range(4)]
    source = iter(batches)
    training.train(pair, lambda: next(source), 4)
    assert [label for label, _ in seen] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert [address for _, address in seen[::2]] == [id(batch.images) for batch in batches]
    assert [address for _, address in seen[1::2]] == [id(batch.images) for batch in batches]
    assert pair[0].losses == pair[1].losses
    assert pair[0].losses[-1] < pair[0].losses[0]
    assert all(len(one.seconds) == 4 and min(one.seconds) > 0 for one in pair)


def test_quality_against_counts_by_hand() -> None:
    truth = torch.zeros(2, 1, 2, 4)
    truth[0, 0, 0] = 1
    truth[1, 0, 0, 0] = 1
    predicted = torch.zeros(2, 1, 2, 4, dtype=torch.bool)
    predicted[0, 0, :, :2] = True
    predicted[1, 0, 0, 0] = True
    # First picture: 2 of 4 + 4 pixels shared; second: perfect.
    result = measure.quality(predicted, truth)
    assert result.dice == pytest.approx((0.5 + 1) / 2)
    assert result.iou == pytest.approx((2 / 6 + 1) / 2)


def test_times_are_compared_round_by_round() -> None:
    timing = measure.compare_times([1.0, 2.0, 3.0], [2.0, 2.0, 9.0])
    assert timing.first.median == 2.0
    assert timing.second.median == 2.0
    assert timing.ratio.median == 2.0
    assert timing.ratio.p20 < 2.0 < timing.ratio.p80


def test_agreement_compares_at_the_fast_weights_and_changes_nothing() -> None:
    class Detuned(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1.1 * super().forward(x)

    plain, equal, detuned = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1), Detuned(3, 1, 1)
    before = plain.weight.detach().clone()
    batch = random_batch()
    assert measure.agreement(equal, plain, batch.images, batch) == Agreement(0.0, 0.0)
    found = measure.agreement(detuned, plain, batch.images, batch)
    assert found.probability > 1e-3
    assert found.gradient > 0.05
    assert torch.equal(plain.weight, before)
    assert plain.weight.grad is None


def test_kept_bytes_count_storages_once_without_parameters() -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 1, 32, 32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # Saves x (twice, one of them as a view) and the weight.
            return (x * self.weight + x.flatten().view_as(x) * self.weight).abs()

    images = torch.rand(4, 1, 32, 32)
    masks = torch.ones_like(images)
    network = Doubled()
    one_map = images.numel() * images.element_size()
    whole = measure.training_bytes(network, Batch(images, masks))
    bare = measure.training_bytes(nn.Identity(), Batch(images.clone().requires_grad_(), masks))
    # On top of the loss, whose saved logits are the network's output: x and the input of abs.
    assert whole - bare == 2 * one_map
    assert network.weight.grad is None


# The verdict


def curves(noise: float, start: float = 0.0) -> tuple[list[float], list[float]]:
    reference = [1.0 / (1 + step / 20) for step in range(50)]
    fast = [loss + noise * (-1) ** step for step, loss in enumerate(reference)]
    fast[0] = reference[0] + start
    return fast, reference


def test_curves_within_rounding_pass() -> None:
    assert verdict.curve_complaints(*curves(1e-3)) == []


@pytest.mark.parametrize(
    ("fast_and_reference", "phrase"),
    [
        (curves(1e-3, start=5e-3), "first losses"),
        (curves(0.2), "on average"),
        (([float("nan")], [1.0]), "not finite"),
    ],
)
def test_curves_that_drift_are_called_out(
    fast_and_reference: tuple[list[float], list[float]], phrase: str
) -> None:
    complaints = verdict.curve_complaints(*fast_and_reference)
    assert len(complaints) == 1
    assert phrase in complaints[0]


def test_disagreement_at_equal_weights_is_called_out() -> None:
    small, large = Agreement(1e-6, 1e-5), Agreement(0.5, float("nan"))
    for device in ("cpu", "cuda"):
        assert verdict.agreement_complaints(small, device) == []
        complaints = verdict.agreement_complaints(large, device)
        assert "probabilities differ by 5.0e-01" in complaints[0]
        assert "gradients differ by nan" in complaints[1]


def test_poor_or_unequal_quality_is_called_out() -> None:
    good, poor = Quality(0.9, 0.8), Quality(0.5, 0.4)
    assert verdict.quality_complaints(good, good) == []
    assert len(verdict.quality_complaints(poor, poor)) == 2
    assert "reference" in verdict.quality_complaints(good, poor)[0]
    assert "differs by 0.400" in verdict.quality_complaints(good, poor)[1]
    nan = Quality(float("nan"), float("nan"))
    assert len(verdict.quality_complaints(nan, good)) == 2


# The command


def test_quick_run_from_start_to_predict(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    arguments = ("-m", "resunet_fast", "demo", "--quick", "--device=cpu", f"--out={out}")
    result = run_python(*arguments, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    assert "composited" in result.stdout
    for word in ("Dice", "IoU", "training step", "inference", "backward", "torch", "threads"):
        assert word in result.stdout
    check_files(out)
    check_metrics(json.loads((out / "metrics.json").read_text()))
    printed = re.search(r"python -m resunet_fast (predict .*)$", result.stdout, re.MULTILINE)
    assert printed is not None
    predict = [*shlex.split(printed[1]), "--out", str(tmp_path / "predicted")]
    assert cli.main(predict) == 0
    assert len(list((tmp_path / "predicted").glob("*_mask.png"))) == command.EXAMPLES


def check_files(out: Path) -> None:
    assert not list(out.rglob("*.tmp"))
    with Image.open(out / "report.png") as report:
        assert min(report.size) > 800
    examples = sorted((out / "examples").glob("*.png"))
    assert len(examples) == command.EXAMPLES
    loaded = checkpoint.load(out / "model")
    assert loaded.config.name == command.MODEL
    assert loaded.config.training["steps"] == command.QUICK.steps
    assert "composited" in loaded.config.training["data"]


def check_metrics(metrics: dict[str, Any]) -> None:
    for label in ("fast", "reference"):
        assert 0 <= metrics["quality"][label]["iou"] <= metrics["quality"][label]["dice"] <= 1
        assert len(metrics["losses"][label]) == command.QUICK.steps
        assert metrics["training_seconds"][label]["median"] > 0
        assert metrics["inference_seconds"][label]["median"] > 0
        assert metrics["training_bytes"][label] > 0
    assert 0 <= metrics["agreement_at_equal_weights"]["probability"] < 1e-4
    first = metrics["losses"]["fast"][0] - metrics["losses"]["reference"][0]
    assert abs(first) <= verdict.MAXIMUM_FIRST_DIFFERENCE


def test_a_poor_result_exits_with_1_and_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Four steps teach nothing: with the quality judged, that must not pass."""
    strict = replace(command.QUICK, judge_quality=True)
    assert command.run_demo(strict, tmp_path) == 1
    captured = capfd.readouterr()
    assert "demo: the held-out Dice of the fast model" in captured.err
    assert "predict --model" in captured.out
    assert (tmp_path / "report.png").exists()


def test_drifting_models_exit_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    build = command.build_models

    def sabotage(settings: Settings, normalisation: Normalisation) -> tuple[SavedModel, SavedModel]:
        fast, plain = build(settings, normalisation)
        with torch.no_grad():
            next(reversed(list(fast.network.parameters()))).add_(0.1)
        return fast, plain

    monkeypatch.setattr(command, "build_models", sabotage)
    assert cli.main(["demo", "--quick", "--device=cpu", "--out", str(tmp_path)]) == 1
    assert "the first losses, from equal weights, differ" in capfd.readouterr().err


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    settings = replace(command.QUICK, steps=2)
    losses = []
    for seed in (5, 5, 6):
        run = command.Run.prepare(replace(settings, seed=seed))
        training.train([run.plain], run.training_batches(), settings.steps)
        losses.append(run.plain.losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_both_models_start_from_equal_weights() -> None:
    run = command.Run.prepare(command.QUICK)
    fast, plain = run.fast.network.state_dict(), run.plain.network.state_dict()
    assert fast.keys() == plain.keys()
    assert all(torch.equal(fast[key], plain[key]) for key in fast)
    assert all(fast[key].data_ptr() != plain[key].data_ptr() for key in fast)


@pytest.mark.parametrize(
    "arguments", [["--steps", "0"], ["--steps", "many"], ["--device", "tpu"], ["--bogus"]]
)
def test_wrong_use_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["demo", *arguments])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: ")


def test_an_out_that_cannot_be_written_is_noticed_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file" / "demo")]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "cannot write to" in captured.err
